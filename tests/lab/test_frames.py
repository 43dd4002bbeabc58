from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestfault.lab.frames import MAX_PAYLOAD, Frame, Kind, Reader, encode

frames = st.lists(st.builds(Frame, st.sampled_from(Kind), st.binary(max_size=60)), max_size=6)
cuts = st.lists(st.integers(1, 40), max_size=30)


def read(data: bytes, sizes: list[int]) -> list[Frame]:
    """All frames of ``data`` when it comes in parts of these sizes, and the rest at once."""
    reader, found, at = Reader(), [], 0
    for size in [*sizes, len(data)]:
        found += list(reader.feed(data[at : at + size]))
        at += size
    return found


@given(frames, cuts)
def test_frames_come_out_whole_however_they_are_cut(sent: list[Frame], sizes: list[int]) -> None:
    assert read(b"".join(encode(*frame) for frame in sent), sizes) == sent


@given(frames, st.binary(max_size=40), cuts)
def test_what_the_kernel_writes_between_is_passed_over(
    sent: list[Frame], noise: bytes, sizes: list[int]
) -> None:
    data = b"".join(noise + encode(*frame) for frame in sent)
    assert read(data, sizes) == sent


def test_a_mark_in_the_noise_hides_no_frame() -> None:
    real = encode(Kind.STATUS, b"0")
    looks_like_one = encode(Kind.STDOUT, b"abc")[:-1] + b"\xff"
    assert read(looks_like_one + real, []) == [Frame(Kind.STATUS, b"0")]


def test_a_frame_that_is_cut_short_is_none() -> None:
    assert read(encode(Kind.STATUS, b"0")[:-1], []) == []


def test_a_frame_is_not_longer_than_can_be_told_from_noise() -> None:
    with pytest.raises(ValueError, match="at most"):
        encode(Kind.STDOUT, bytes(MAX_PAYLOAD + 1))


def test_a_named_payload_is_a_path_and_the_rest() -> None:
    assert Frame(Kind.FILE, b"/a b\xff\0x\0y").named() == ("/a b\udcff", b"x\0y")

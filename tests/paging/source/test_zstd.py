"""Packed snapshots: whatever is in them, and whatever is done to them."""

from __future__ import annotations

import io
import shutil
import struct
import subprocess
import threading
import time
from collections import Counter

import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from guestfault.paging.source.base import SourceError, SourceUnavailableError
from guestfault.paging.source.zstd import PackedSource, is_packed
from guestfault.paging.source.zstd_format import HEAD_SIZE, Head, digest, pack_index, skippable
from guestfault.paging.source.zstd_writer import write_packed

PAGE = 4096
MANIFEST, VCPUS = b'{"manifest": 1}', b"[]"


class Bytes:
    """A source of bytes in memory, which counts what is read and can break."""

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.size = len(content)
        self.reads: Counter[int] = Counter()
        self.error: SourceError | None = None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.reads[offset] += 1
        if self.error is not None:
            raise self.error
        buffer[:] = self.content[offset : offset + len(buffer)]


def packed(memory: bytes, block_size: int = PAGE) -> bytes:
    file = io.BytesIO()
    blocks = (memory[at : at + block_size] for at in range(0, len(memory), block_size))
    made = write_packed(file, blocks, MANIFEST, VCPUS, block_size)
    assert made.file_size == len(file.getvalue())
    assert made.memory_size == len(memory)
    return file.getvalue()


def page(n: int) -> bytes:
    """One of 256 pages; the one of zeros among them, and all of them compressible."""
    return bytes([n]) * (PAGE // 2) + bytes([n, 0, n, n]) * (PAGE // 8)


memories = st.lists(st.integers(0, 5), min_size=1, max_size=24).map(
    lambda numbers: b"".join(map(page, numbers))
)
block_sizes = st.integers(1, 9).map(lambda pages: pages * PAGE)


@given(memories, block_sizes, st.data())
def test_any_read_gives_the_memorys_bytes(memory: bytes, block_size: int, data) -> None:
    source = PackedSource(Bytes(packed(memory, block_size) + b"and more, as on a device"))
    assert (source.size, source.manifest, source.vcpus) == (len(memory), MANIFEST, VCPUS)
    pages = len(memory) // PAGE
    for _ in range(4):
        first = data.draw(st.integers(0, pages - 1)) * PAGE
        length = data.draw(st.integers(1, pages - first // PAGE)) * PAGE
        buffer = bytearray(length)
        source.read_into(first, memoryview(buffer))
        assert buffer == memory[first : first + length]


SAMPLE = page(1) + bytes(2 * PAGE) + page(2) + page(1) + page(3)
SAMPLE_PACKED = packed(SAMPLE)


@given(st.integers(0, 8 * len(SAMPLE_PACKED) - 1))
@example(8 * 3)  # in the frame header of the head, which nobody reads
def test_a_flipped_bit_is_found_out_or_makes_no_difference(bit: int) -> None:
    content = bytearray(SAMPLE_PACKED)
    content[bit // 8] ^= 1 << bit % 8
    reads_right_or_not_at_all(bytes(content))


def test_every_bit_of_head_and_index() -> None:
    index = Head.parse(SAMPLE_PACKED).index_offset
    for at in [*range(HEAD_SIZE), *range(index, len(SAMPLE_PACKED))]:
        for bit in range(8):
            content = bytearray(SAMPLE_PACKED)
            content[at] ^= 1 << bit
            reads_right_or_not_at_all(bytes(content))


@given(st.integers(0, len(SAMPLE_PACKED) - 1))
def test_a_file_that_was_cut_is_refused_when_it_is_opened(length: int) -> None:
    with pytest.raises(SourceError, match=r"it was cut|not a packed snapshot"):
        PackedSource(Bytes(SAMPLE_PACKED[:length]))


@given(st.binary(max_size=200), st.integers(0, len(SAMPLE_PACKED)))
def test_rubbish_anywhere_is_found_out_or_makes_no_difference(rubbish: bytes, at: int) -> None:
    reads_right_or_not_at_all(SAMPLE_PACKED[:at] + rubbish + SAMPLE_PACKED[at + len(rubbish) :])


def reads_right_or_not_at_all(content: bytes) -> None:
    try:
        source = PackedSource(Bytes(content))
    except SourceError:
        return
    assert source.size == len(SAMPLE)
    assert (source.manifest, source.vcpus) == (MANIFEST, VCPUS)
    for start in range(0, len(SAMPLE), PAGE):
        buffer = bytearray(b"\xee" * PAGE)
        try:
            source.read_into(start, memoryview(buffer))
        except SourceError:
            assert buffer == b"\xee" * PAGE, "bytes were handed on before they were checked"
        else:
            assert buffer == SAMPLE[start : start + PAGE]


def test_a_damaged_block_fails_alone_and_says_where() -> None:
    content = bytearray(SAMPLE_PACKED)
    content[HEAD_SIZE + 20] ^= 1
    source = PackedSource(Bytes(bytes(content)))
    says = r"4096 bytes at 0x0: block 0, \d+ bytes at 0x60 of the packed file, is damaged"
    buffer = memoryview(bytearray(PAGE))
    with pytest.raises(SourceError, match=says) as caught:
        source.read_into(0, buffer)
    assert not isinstance(caught.value, SourceUnavailableError)
    source.read_into(3 * PAGE, buffer)
    assert buffer == page(2)


def test_zeros_are_not_stored_and_copies_once() -> None:
    memory = bytes(1 << 20) + page(1) * 256 + bytes(1 << 20)
    file = io.BytesIO()
    blocks = (memory[at : at + PAGE] for at in range(0, len(memory), PAGE))
    made = write_packed(file, blocks, MANIFEST, VCPUS, PAGE)
    assert (made.blocks, made.zeros, made.copies) == (768, 512, 255)
    inner = Bytes(file.getvalue())
    source = PackedSource(inner)
    opening = inner.reads.total()
    buffer = memoryview(bytearray(b"\xee" * (1 << 20)))
    source.read_into(0, buffer)
    assert buffer == bytes(1 << 20)
    assert inner.reads.total() == opening


def test_zstd_itself_finds_nothing_wrong_with_it(tmp_path) -> None:
    if shutil.which("zstd") is None:
        pytest.skip("no zstd(1) here")
    path = tmp_path / "packed.zst"
    path.write_bytes(SAMPLE_PACKED)
    done = subprocess.run(["zstd", "-dc", path], check=True, capture_output=True)
    assert done.stdout == page(1) + page(2) + page(3)


def test_the_layout_is_the_documented_one() -> None:
    head = SAMPLE_PACKED[:96]
    assert struct.unpack_from("<II", head) == (0x184D2A50, 88)
    assert head[8:24] == b"guestfault pack\0"
    version, block_size, memory_size, index = struct.unpack_from("<IIQQ", head, 24)
    assert (version, block_size, memory_size) == (1, PAGE, len(SAMPLE))
    assert struct.unpack_from("<II", head, 48) == (len(MANIFEST), len(VCPUS))
    content = SAMPLE_PACKED[index:]
    assert struct.unpack_from("<II", SAMPLE_PACKED, index - 8) == (0x184D2A51, len(content))
    assert head[72:88] == digest(content)
    assert head[88:] == digest(head[8:88])[:8]
    assert content.startswith(MANIFEST + VCPUS)
    entries = content[len(MANIFEST + VCPUS) :]
    assert len(entries) == 6 * 28
    for n in range(6):
        offset, size, name = struct.unpack_from("<QI16s", entries, n * 28)
        block = SAMPLE[n * PAGE : (n + 1) * PAGE]
        if block == bytes(PAGE):
            assert (offset, size, name) == (0, 0, bytes(16))
        else:
            frame = SAMPLE_PACKED[offset : offset + size]
            assert zstandard.ZstdDecompressor().decompress(frame) == block
            assert name == digest(block)


def test_a_version_to_come_is_refused_by_its_number() -> None:
    content = bytearray(SAMPLE_PACKED)
    content[24] = 2
    with pytest.raises(SourceError, match="its version is 2; this program reads 1"):
        PackedSource(Bytes(bytes(content)))


# -- made by somebody who can compute digests ------------------------------------------------------


def forged(entries: bytes, frames: bytes = b"", memory: int = PAGE, block: int = PAGE) -> bytes:
    index = entries
    at = HEAD_SIZE + len(frames) + 8
    head = Head(block, memory, at, 0, 0, digest(index))
    return head.pack() + frames + skippable(0x184D2A51, len(index)) + index


def test_a_frame_that_would_grow_without_end_is_not_decompressed() -> None:
    bomb = zstandard.ZstdCompressor().compress(bytes(1 << 26))
    entry = struct.pack("<QI16s", HEAD_SIZE, len(bomb), digest(bytes(1 << 26)))
    source = PackedSource(Bytes(forged(entry, bomb)))
    with pytest.raises(SourceError, match="the frame has another size"):
        source.read_into(0, memoryview(bytearray(PAGE)))


@pytest.mark.parametrize(("offset", "size"), [(0, 100), (1 << 40, 100), (HEAD_SIZE, 1 << 31)])
def test_an_entry_that_leads_elsewhere_is_refused(offset: int, size: int) -> None:
    source = PackedSource(Bytes(forged(struct.pack("<QI16s", offset, size, bytes(16)))))
    with pytest.raises(SourceError, match="leads out of the blocks"):
        source.read_into(0, memoryview(bytearray(PAGE)))


@pytest.mark.parametrize(
    ("memory", "block"), [(0, PAGE), (100, PAGE), (PAGE, 0), (PAGE, 5000), (PAGE, 1 << 30)]
)
def test_sizes_that_cannot_be_are_refused(memory: int, block: int) -> None:
    head = Head(block, memory, HEAD_SIZE + 8, 0, 0, digest(b""))
    with pytest.raises(SourceError, match=r"its (memory|block) size is"):
        PackedSource(Bytes(head.pack() + bytes(8)))


def test_a_memory_of_exabytes_takes_none_of_ours() -> None:
    with pytest.raises(SourceError, match="it was cut"):
        PackedSource(Bytes(forged(b"", memory=1 << 61)))


# -- several readers -------------------------------------------------------------------------------


def test_a_block_is_read_once_for_all_its_pages_and_readers() -> None:
    """Who needs a block that is being read waits for it; who needs another does not."""
    memory = b"".join(page(1 + n % 250) for n in range(64))
    inner = Bytes(packed(memory, 16 * PAGE))
    source = PackedSource(inner)
    inner.reads.clear()
    read = inner.read_into
    under_way = []

    def slowly(offset: int, buffer: memoryview) -> None:
        under_way.append(offset)
        most.append(len(under_way))
        time.sleep(0.05)
        under_way.remove(offset)
        read(offset, buffer)

    most: list[int] = []
    inner.read_into = slowly  # type: ignore[method-assign]
    wrong = []

    def reader(first: int) -> None:
        buffer = memoryview(bytearray(PAGE))
        for n in range(first, 64, 8):
            source.read_into(n * PAGE, buffer)
            if buffer != memory[n * PAGE : (n + 1) * PAGE]:
                wrong.append(n)

    threads = [threading.Thread(target=reader, args=(n,)) for n in range(8)]
    threads += [threading.Thread(target=reader, args=(56 + n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert set(inner.reads.values()) == {1}
    assert len(inner.reads) == 4
    assert max(most) > 1


def test_a_failure_keeps_its_kind_and_is_not_remembered() -> None:
    inner = Bytes(SAMPLE_PACKED)
    source = PackedSource(inner)
    buffer = memoryview(bytearray(PAGE))
    inner.error = SourceUnavailableError(0, 0, "gone")
    with pytest.raises(SourceUnavailableError, match=r"0x3000: block 3, .*gone"):
        source.read_into(3 * PAGE, buffer)
    inner.error = None
    source.read_into(3 * PAGE, buffer)
    assert buffer == page(2)


@pytest.mark.parametrize(
    ("block_size", "level", "says"),
    [
        (0, 3, "block size"),
        (5000, 3, "block size"),
        (1 << 27, 3, "block size"),
        (PAGE, 99, "level"),
    ],
)
def test_what_cannot_be_written_is_refused(block_size: int, level: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        write_packed(io.BytesIO(), [], b"", b"", block_size, level)


def test_what_is_packed() -> None:
    assert is_packed(Bytes(SAMPLE_PACKED))
    assert not is_packed(Bytes(bytes(1000)))
    assert not is_packed(Bytes(b""))


def test_an_index_is_its_parts() -> None:
    assert pack_index(b"m", b"v", []) == b"mv"

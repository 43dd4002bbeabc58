"""Snapshots as directories, packed files, and URLs of packed files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from guestfault.guest.layout import Mode
from guestfault.guest.packed import OpenSnapshot, open_snapshot, pack, unpack
from guestfault.guest.snapshot import Snapshot, SnapshotError, build, save
from guestfault.guest.walk import Walk
from guestfault.paging.source.base import SourceError


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    path = tmp_path_factory.mktemp("snapshot") / "guest"
    return build(path, 1 << 18, Mode.LONG_CPL3, Walk.RANDOM, vcpus=2)


@pytest.fixture
def packed(taken: Snapshot, tmp_path: Path) -> Path:
    path = tmp_path / "packed"
    with open_snapshot(taken.path) as opened:
        pack(opened, path)
    return path


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in path.iterdir()}


def all_of(opened: OpenSnapshot) -> bytes:
    memory = bytearray(opened.source.size)
    opened.source.read_into(0, memoryview(memory))
    return bytes(memory)


def test_what_was_packed_is_the_same_when_it_is_unpacked(taken, packed, tmp_path) -> None:
    with open_snapshot(packed) as opened:
        assert opened.snapshot.manifest == taken.manifest
        assert all_of(opened) == taken.memory_path.read_bytes()
        opened.snapshot.verify_memory(opened.source)
        unpack(opened, tmp_path / "unpacked")
    assert files(tmp_path / "unpacked") == files(taken.path)
    assert packed.stat().st_mode & 0o777 == 0o600
    assert sorted(os.listdir(tmp_path)) == ["packed", "unpacked"]


def test_zeros_take_no_room_packed_or_unpacked(taken, tmp_path) -> None:
    memory = b"x" * 4096 + bytes(64 << 20) + b"y" * 4096
    sparse = save(tmp_path / "sparse", memory, taken.vcpus)
    with open_snapshot(sparse.path) as opened:
        made = pack(opened, tmp_path / "packed")
    assert made.file_size < 100_000
    assert (made.blocks, made.zeros) == (1025, 1023)
    with open_snapshot(tmp_path / "packed") as opened:
        again = unpack(opened, tmp_path / "again")
    assert again.memory_path.read_bytes() == memory
    assert again.memory_path.stat().st_blocks * 512 < 1 << 20


def test_over_http_and_nbd_it_is_the_same(taken, packed, serve) -> None:
    for kind in ("http", "nbd"):
        with open_snapshot(serve(kind, packed).url) as opened:
            assert opened.snapshot.manifest == taken.manifest
            assert all_of(opened) == taken.memory_path.read_bytes()


def test_memory_may_be_elsewhere_and_the_directory_without(taken, packed, serve, tmp_path) -> None:
    slim = tmp_path / "slim"
    slim.mkdir()
    for name in ("manifest.json", "vcpus.json"):
        (slim / name).write_bytes((taken.path / name).read_bytes())
    with pytest.raises(SnapshotError, match="memory: No such file"):
        open_snapshot(slim)
    raw, memory = taken.memory_path, taken.memory_path.read_bytes()
    for where in (str(raw), str(packed), serve("http", raw).url, serve("nbd", packed).url):
        with open_snapshot(slim, where) as opened:
            assert all_of(opened) == memory
    with open_snapshot(packed, str(raw)) as opened:
        assert all_of(opened) == memory


def test_the_memory_of_another_snapshot_is_refused(taken, tmp_path) -> None:
    other = build(tmp_path / "other", 1 << 18, Mode.LONG_CPL3, Walk.RANDOM, vcpus=2, seed=1)
    with open_snapshot(other.path) as opened:
        pack(opened, tmp_path / "packed")
    with pytest.raises(SnapshotError, match="it is the memory of another snapshot"):
        open_snapshot(taken.path, str(tmp_path / "packed"))
    (tmp_path / "short").write_bytes(bytes(4096))
    with pytest.raises(SnapshotError, match="it has 4096 bytes, the snapshot's memory 262144"):
        open_snapshot(taken.path, str(tmp_path / "short"))


def test_a_damaged_snapshot_does_not_get_new_digests(taken, tmp_path) -> None:
    memory = bytearray(taken.memory_path.read_bytes())
    copy = save(tmp_path / "copy", memory, taken.vcpus)
    memory[5000] ^= 1
    copy.memory_path.write_bytes(memory)
    with open_snapshot(copy.path) as opened, pytest.raises(SnapshotError, match="the digest"):
        pack(opened, tmp_path / "packed")
    assert os.listdir(tmp_path) == ["copy"]


def test_a_damaged_pack_is_not_unpacked(packed, tmp_path) -> None:
    content = bytearray(packed.read_bytes())
    content[5000] ^= 1
    packed.write_bytes(content)
    with open_snapshot(packed) as opened, pytest.raises(SourceError, match="is damaged"):
        unpack(opened, tmp_path / "unpacked")
    assert os.listdir(tmp_path) == ["packed"]


def test_what_is_no_pack_is_not_overwritten(taken, packed, tmp_path) -> None:
    (tmp_path / "letter").write_text("Dear Ann")
    with open_snapshot(taken.path) as opened:
        for name in ("letter", "."):
            with pytest.raises(SnapshotError, match="so it is not replaced"):
                pack(opened, tmp_path / name)
        pack(opened, packed, block_size=4096)
        with pytest.raises(SnapshotError, match="No such file or directory"):
            pack(opened, tmp_path / "nowhere" / "packed")
        with pytest.raises(SnapshotError, match="a block size of 5000 bytes"):
            pack(opened, packed, block_size=5000)
    assert (tmp_path / "letter").read_text() == "Dear Ann"
    with open_snapshot(packed) as opened:
        opened.snapshot.verify_memory(opened.source)


def test_a_pack_that_was_cut_or_never_was_one(packed, tmp_path) -> None:
    whole = packed.read_bytes()
    packed.write_bytes(whole[:-1])
    says = f"it was cut: it has {len(whole) - 1} bytes of {len(whole)}"
    with pytest.raises(SnapshotError, match=says):
        open_snapshot(packed)
    packed.write_bytes(b"")
    with pytest.raises(SnapshotError, match="it is not a packed snapshot or a directory"):
        open_snapshot(packed)
    with pytest.raises(SnapshotError, match="there is no such directory or file"):
        open_snapshot(tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SnapshotError, match="Illegal seek"):
        open_snapshot(tmp_path / "pipe")


def test_an_interrupted_pack_leaves_the_old_one(packed, taken, monkeypatch) -> None:
    before = packed.read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupted)
    with open_snapshot(taken.path) as opened, pytest.raises(KeyboardInterrupt):
        pack(opened, packed, level=9)
    assert packed.read_bytes() == before
    assert [file.name for file in packed.parent.iterdir()] == [packed.name]

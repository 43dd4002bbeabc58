"""The file behind a guest_memfd: two open file descriptions, and who still has the first."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from guestfault.errors import KvmError
from guestfault.linux import process_memory
from guestfault.linux.mapping import Mapping
from guestfault.linux.memfd import Memfd
from guestfault.softkvm.gmem_file import GmemFile, HostGmemFiles

PAGE = 4096
SIZE = 4 * PAGE


@pytest.fixture
def made() -> Iterator[tuple[int, GmemFile]]:
    fd, file = HostGmemFiles().create(SIZE)
    yield fd, file
    file.close()


def test_it_is_open_until_the_descriptor_is_closed(made: tuple[int, GmemFile]) -> None:
    fd, file = made
    assert file.is_open()
    os.close(fd)
    assert not file.is_open()


def test_a_copy_of_the_descriptor_keeps_it(made: tuple[int, GmemFile]) -> None:
    fd, file = made
    copy = os.dup(fd)
    os.close(fd)
    assert file.is_open()
    os.close(copy)
    assert not file.is_open()


def test_a_mapping_keeps_it(made: tuple[int, GmemFile]) -> None:
    fd, file = made
    mapping = Mapping.from_memfd(Memfd.adopt(fd, "guest_memfd", SIZE))
    os.close(fd)
    assert file.is_open()
    mapping.close()
    assert not file.is_open()


def test_one_that_is_on_its_way_to_somebody_keeps_it(made: tuple[int, GmemFile]) -> None:
    fd, file = made
    here, there = socket.socketpair()
    with here, there:
        socket.send_fds(here, [b"."], [fd])
        os.close(fd)
        assert file.is_open()
        received = socket.recv_fds(there, 1, 1)[1][0]
        assert file.is_open()
        os.close(received)
        assert not file.is_open()


def test_both_see_the_same_memory(made: tuple[int, GmemFile]) -> None:
    fd, file = made
    os.pwrite(fd, b"by userspace", PAGE)
    assert process_memory.read(file.address + PAGE, 12) == b"by userspace"
    file.discard()
    assert process_memory.read(file.address + PAGE, 12) == bytes(12)
    assert os.fstat(fd).st_blocks <= 8  # the page that was just read
    os.close(fd)


def test_its_size_cannot_be_changed(made: tuple[int, GmemFile]) -> None:
    fd, _ = made
    for size in (0, PAGE, 2 * SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    os.close(fd)


def test_files_are_told_apart_by_any_descriptor(made: tuple[int, GmemFile]) -> None:
    fd, file = made
    files = HostGmemFiles()
    other_fd, other = files.create(PAGE)
    copy = os.dup(fd)
    assert files.inode_of(fd) == files.inode_of(copy) == file.inode
    assert files.inode_of(other_fd) == other.inode != file.inode
    for one in (fd, copy, other_fd):
        os.close(one)
    other.close()
    assert files.inode_of(-1) is None


def test_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> int:
        raise OSError(24, "too many")

    monkeypatch.setattr(os, "memfd_create", fails)
    with pytest.raises(KvmError, match="KVM_CREATE_GUEST_MEMFD: EMFILE"):
        HostGmemFiles().create(PAGE)

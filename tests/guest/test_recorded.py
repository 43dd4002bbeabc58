"""A working set belongs to one snapshot, wherever that is, and to no other."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from guestfault.guest.layout import Mode
from guestfault.guest.packed import open_snapshot, pack
from guestfault.guest.recorded import (
    WorkingSetError,
    check_replaceable,
    identity,
    load_recorded,
    save_recorded,
)
from guestfault.guest.snapshot import Snapshot, build, save
from guestfault.guest.walk import Walk

RUNS = (range(7, 20), range(3, 4))


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    path = tmp_path_factory.mktemp("snapshot") / "guest"
    return build(path, 1 << 18, Mode.LONG_CPL3, Walk.RANDOM, vcpus=2)


def test_it_is_read_as_it_was_written(taken, tmp_path) -> None:
    path = tmp_path / "wset"
    written = save_recorded(path, taken, RUNS)
    assert written.pages == 14
    assert load_recorded(path, taken) == written
    assert load_recorded(path, taken).runs == RUNS
    assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(tmp_path) == ["wset"]


def test_a_packed_copy_is_the_same_snapshot(taken, tmp_path) -> None:
    with open_snapshot(taken.path) as opened:
        pack(opened, tmp_path / "packed")
    with open_snapshot(tmp_path / "packed") as opened:
        assert identity(opened.snapshot) == identity(taken)


@pytest.mark.parametrize("differs", ["memory", "registers", "size"])
def test_that_of_another_snapshot_is_refused_with_the_mend(taken, tmp_path, differs) -> None:
    save_recorded(tmp_path / "wset", taken, RUNS)
    memory = bytearray(taken.memory_path.read_bytes())
    vcpus = list(taken.vcpus)
    match differs:
        case "memory":
            memory[-1] ^= 1
        case "registers":
            vcpus.reverse()
        case "size":
            memory += bytes(4096)
    other = save(tmp_path / "other", memory, vcpus)
    with pytest.raises(WorkingSetError) as caught:
        load_recorded(tmp_path / "wset", other)
    assert caught.value.path == tmp_path / "wset"
    assert "from another snapshot; record it again: guestfault run SNAPSHOT --record FILE" in str(
        caught.value
    )


@pytest.mark.parametrize("content", [None, b"", b"#!/bin/sh\n", b"guestfault wset\0 and more"])
def test_what_is_none_is_refused(taken, tmp_path, content) -> None:
    path = tmp_path / "wset"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(WorkingSetError, match=r"working set .*wset: .*; record it again"):
        load_recorded(path, taken)


def test_an_older_one_is_replaced_and_nothing_else_is(taken, tmp_path) -> None:
    path = tmp_path / "wset"
    save_recorded(path, taken, RUNS)
    check_replaceable(path)
    save_recorded(path, taken, RUNS[:1])
    assert load_recorded(path, taken).runs == RUNS[:1]
    for precious in (tmp_path / "letter", taken.path, tmp_path / "pipe"):
        if precious.name == "letter":
            precious.write_text("dear")
        if precious.name == "pipe":
            os.mkfifo(precious)
        for attempt in (check_replaceable, lambda path: save_recorded(path, taken, RUNS)):
            with pytest.raises(WorkingSetError, match="it exists and is not a working set"):
                attempt(precious)
    assert (tmp_path / "letter").read_text() == "dear"


def test_a_directory_that_is_not_there_is_said_before_the_run(tmp_path) -> None:
    with pytest.raises(WorkingSetError, match="the directory to hold it does not exist"):
        check_replaceable(tmp_path / "none" / "wset")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_may_not_be_written_is_said_before_the_run(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(WorkingSetError, match="the directory to hold it cannot be written to"):
            check_replaceable(tmp_path / "wset")
    finally:
        tmp_path.chmod(0o700)


def test_what_could_not_be_read_again_is_not_written(taken, tmp_path) -> None:
    with pytest.raises(WorkingSetError, match="it cannot be written: it has page 3 twice"):
        save_recorded(tmp_path / "wset", taken, (*RUNS, range(3, 4)))
    assert not os.listdir(tmp_path)

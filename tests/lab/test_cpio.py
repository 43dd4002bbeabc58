from __future__ import annotations

import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.lab.conftest import entries

from guestfault.lab.cpio import Archive

names = st.text("abc.-é", min_size=1, max_size=5).filter(lambda name: name.strip("."))
paths = st.lists(names, min_size=1, max_size=3).map(lambda parts: "/" + "/".join(parts))


@given(st.dictionaries(paths, st.binary(max_size=70)))
def test_what_is_put_in_is_read_out(files: dict[str, bytes]) -> None:
    # No file may be where another has its directory.
    files = {p: d for p, d in files.items() if not any(o.startswith(p + "/") for o in files)}
    archive = Archive()
    for path, data in files.items():
        archive.file(path, data)
    found = entries(bytes(archive))
    assert {p: d for p, (mode, d) in found.items() if stat.S_ISREG(mode)} == files


def test_archives_follow_one_another_without_a_gap() -> None:
    one, other = Archive(), Archive()
    one.file("/a/b", b"one")
    other.file("/a/b", b"another")
    other.file("/a/c", b"")
    found = entries(bytes(one) + bytes(other))
    assert found["/a/b"][1] == b"another"
    assert set(found) == {"/a", "/a/b", "/a/c"}


def test_modes_links_and_devices() -> None:
    archive = Archive()
    archive.file("/run", b"x", mode=0o755)
    archive.symlink("/bin/sh", "/run")
    archive.character_device("/dev/console", 5, 1)
    found = entries(bytes(archive))
    assert found["/run"][0] == stat.S_IFREG | 0o755
    assert found["/bin/sh"] == (stat.S_IFLNK | 0o777, b"/run")
    assert found["/dev/console"][0] == stat.S_IFCHR | 0o600
    assert found["/dev"][0] == stat.S_IFDIR | 0o755


def test_a_file_that_the_form_cannot_hold_is_refused() -> None:
    class Huge(bytes):
        def __len__(self) -> int:
            return 1 << 32

    with pytest.raises(ValueError, match="below 4 GiB"):
        Archive().file("/huge", Huge())

import hashlib
import json
import os
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestfault.guest import snapshot as module
from guestfault.guest.boot import entry_state, initial_memory
from guestfault.guest.expect import expect
from guestfault.guest.layout import PAGE_SIZE, Layout, LayoutError, Mode
from guestfault.guest.manifest import Slot
from guestfault.guest.snapshot import SnapshotError, build, load, save
from guestfault.guest.walk import Walk

SIZE = 16 * PAGE_SIZE
LAYOUT = Layout(SIZE, Mode.REAL, vcpus=2)
STATES = [entry_state(LAYOUT, vcpu) for vcpu in range(2)]
FILES = ("manifest.json", "memory", "vcpus.json")


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A snapshot that no test changes."""
    path = tmp_path_factory.mktemp("snapshots") / "sound"
    return build(path, SIZE, Mode.REAL, Walk.ZIPF, vcpus=2, seed=9)


@pytest.fixture
def path(sound, tmp_path):
    """A copy of it."""
    return shutil.copytree(sound.path, tmp_path / "copy")


def refusal(path):
    with pytest.raises(SnapshotError) as caught:
        load(path)
    assert caught.value.path == path
    assert str(caught.value) == f"snapshot {path}: {caught.value.what}"
    assert "\n" not in str(caught.value)
    return caught.value.what


def contents(path):
    return {file.name: file.read_bytes() for file in path.iterdir()}


def test_build_and_load(sound):
    memory = initial_memory(LAYOUT, Walk.ZIPF, seed=9)
    expected = expect(LAYOUT, Walk.ZIPF, memory)
    loaded = load(sound.path)
    assert sorted(contents(sound.path)) == list(FILES)
    assert loaded.memory_path.read_bytes() == memory
    assert loaded.manifest == sound.manifest
    assert loaded.memory_size == SIZE
    assert loaded.slots == (Slot(0, 0, SIZE, 0),)
    assert [bytes(v.regs) + bytes(v.sregs) for v in loaded.vcpus] == [
        bytes(v.regs) + bytes(v.sregs) for v in STATES
    ]
    assert loaded.guest.checksums == expected.checksums
    assert loaded.guest.final_sha256 == hashlib.sha256(expected.memory).hexdigest()
    assert (loaded.guest.mode, loaded.guest.walk, loaded.guest.seed) == (Mode.REAL, Walk.ZIPF, 9)
    loaded.verify_memory()


def test_build_is_reproducible(sound, tmp_path):
    again = build(tmp_path / "again", SIZE, Mode.REAL, Walk.ZIPF, vcpus=2, seed=9)
    assert contents(again.path) == contents(sound.path)


def test_build_refuses_before_it_writes(tmp_path):
    with pytest.raises(LayoutError):
        build(tmp_path / "small", PAGE_SIZE, Mode.REAL, Walk.ZIPF)
    assert not list(tmp_path.iterdir())


def test_open_memory_is_read_only(sound):
    fd = sound.open_memory()
    try:
        assert os.pread(fd, 8, 0) == sound.memory_path.read_bytes()[:8]
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.pwrite(fd, b"x", 0)
    finally:
        os.close(fd)


def test_slots_and_a_guest_that_is_not_ours(tmp_path):
    slots = (Slot(0, 0, 8 * PAGE_SIZE, 0), Slot(1, 1 << 32, 8 * PAGE_SIZE, 8 * PAGE_SIZE))
    memory = memoryview(os.urandom(SIZE))
    saved = save(tmp_path / "two", memory, STATES, slots=slots)
    assert load(saved.path).slots == slots
    assert load(saved.path).guest is None


def test_zeros_are_holes(tmp_path):
    memory = bytearray(16 << 20)
    memory[-1] = memory[5 << 20] = 1
    saved = save(tmp_path / "sparse", memory, STATES)
    assert saved.memory_path.stat().st_blocks * 512 < 1 << 20
    assert saved.memory_path.read_bytes() == memory
    saved.verify_memory()


def test_is_for_its_owner_only(sound):
    assert sound.path.stat().st_mode & 0o077 == 0


@given(cut=st.integers(0, SIZE - 1))
def test_refuses_truncated_memory(sound, tmp_path_factory, cut):
    path = copy_with(sound, tmp_path_factory, "memory", lambda content: content[:cut])
    assert refusal(path) == f"its memory is truncated: {cut} bytes instead of {SIZE}"


@given(st.data())
def test_refuses_a_cut_manifest_or_state(sound, tmp_path_factory, data):
    name = data.draw(st.sampled_from(["manifest.json", "vcpus.json"]))
    content = (sound.path / name).read_bytes().rstrip()
    cut = data.draw(st.integers(0, len(content) - 1))
    path = copy_with(sound, tmp_path_factory, name, lambda content: content[:cut])
    assert refusal(path).startswith(name)


@given(st.data())
def test_refuses_a_changed_byte_of_state(sound, tmp_path_factory, data):
    content = bytearray((sound.path / "vcpus.json").read_bytes())
    content[data.draw(st.integers(0, len(content) - 1))] ^= data.draw(st.integers(1, 255))
    path = copy_with(sound, tmp_path_factory, "vcpus.json", lambda _: bytes(content))
    assert refusal(path) == "vcpus.json does not have the digest in the manifest"


@given(at=st.integers(0, SIZE - 1), flip=st.integers(1, 255))
def test_finds_a_changed_byte_of_memory_when_asked(sound, tmp_path_factory, at, flip):
    def change(content):
        return content[:at] + bytes([content[at] ^ flip]) + content[at + 1 :]

    loaded = load(copy_with(sound, tmp_path_factory, "memory", change))
    with pytest.raises(SnapshotError, match="does not have the digest"):
        loaded.verify_memory()


def copy_with(sound, tmp_path_factory, name, change):
    """A copy of the sound snapshot with one file changed (links to the other two)."""
    path = tmp_path_factory.getbasetemp() / "changed"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    for file in FILES:
        if file == name:
            (path / file).write_bytes(change((sound.path / file).read_bytes()))
        else:
            (path / file).symlink_to(sound.path / file)
    return path


def test_refuses_memory_that_is_too_long(path):
    with open(path / "memory", "ab") as file:
        file.write(b"x")
    assert refusal(path) == f"its memory is too long: {SIZE + 1} bytes instead of {SIZE}"


def test_refuses_what_is_not_there(tmp_path):
    assert refusal(tmp_path / "none") == "there is no such directory"
    (tmp_path / "file").touch()
    assert refusal(tmp_path / "file") == "it is not a directory"
    assert refusal(tmp_path) == "it has no manifest.json, so it is not a snapshot"


@pytest.mark.parametrize("name", ["memory", "vcpus.json"])
def test_refuses_a_missing_file(path, name):
    (path / name).unlink()
    assert refusal(path) == f"{name}: No such file or directory"


def test_refuses_a_file_that_is_a_directory(path):
    (path / "manifest.json").unlink()
    (path / "manifest.json").mkdir()
    assert refusal(path) == "manifest.json: Is a directory"


@pytest.mark.parametrize(
    ("states", "what"),
    [
        ([], "vcpus.json: not the state of 2 vCPUs"),
        ({"regs": 1}, "vcpus.json: not the state of 2 vCPUs"),
        ([{}, {}], "vcpus.json: vcpu 0.regs is missing"),
    ],
)
def test_refuses_a_state_of_another_form_even_with_its_digest(path, states, what):
    text = json.dumps(states)
    (path / "vcpus.json").write_text(text)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["vcpus"]["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert refusal(path) == what


def test_loading_does_not_read_the_memory(path):
    # A memory file of 8 TiB, all hole: reading it would not end.
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["memory"]["size"] = 8 << 40
    (path / "manifest.json").write_text(json.dumps(manifest))
    os.truncate(path / "memory", 8 << 40)
    assert load(path).memory_size == 8 << 40


def test_replaces_a_snapshot(path):
    save(path, b"\1" * PAGE_SIZE, STATES[:1])
    assert load(path).memory_size == PAGE_SIZE
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_replaces_a_damaged_snapshot(path):
    (path / "memory").unlink()
    save(path, b"\1" * PAGE_SIZE, STATES[:1])
    load(path).verify_memory()


def test_replaces_what_a_link_points_to(path):
    link = path.with_name("link")
    link.symlink_to(path.name)
    save(link, b"\1" * PAGE_SIZE, STATES[:1])
    assert link.is_symlink()
    assert load(path).memory_size == PAGE_SIZE


@pytest.mark.parametrize("kind", ["file", "directory", "stranger"])
def test_overwrites_nothing_else(tmp_path, kind):
    name = tmp_path / "precious"
    if kind == "file":
        name.write_text("precious")
    else:
        name.mkdir()
        (name / "data").write_text("precious")
    if kind == "stranger":
        (name / "manifest.json").write_text('{"format": "container image"}')
    with pytest.raises(SnapshotError, match="is not a snapshot, so it is not overwritten"):
        save(name, bytes(PAGE_SIZE), STATES)
    assert (name if kind == "file" else name / "data").read_text() == "precious"
    assert [entry.name for entry in tmp_path.iterdir()] == ["precious"]


def test_save_says_where_it_cannot_write(tmp_path):
    with pytest.raises(SnapshotError, match="the directory to hold it does not exist"):
        save(tmp_path / "none" / "deep", bytes(PAGE_SIZE), STATES)


@pytest.mark.parametrize(
    ("memory", "states", "slots", "what"),
    [
        (bytes(PAGE_SIZE), [], (), "it has no vCPUs"),
        (bytes(100), STATES, (), "not made of whole pages"),
        (b"", STATES, (), "empty"),
        (bytes(PAGE_SIZE), STATES, [Slot(0, 0, 2 * PAGE_SIZE, 0)], "not all in the memory file"),
    ],
)
def test_save_refuses_what_it_could_not_load(path, memory, states, slots, what):
    before = contents(path)
    with pytest.raises(SnapshotError, match=f"it would be no snapshot: .*{what}"):
        save(path, memory, states, slots=slots)
    assert contents(path) == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    "step", ["snapshot._write_memory", "snapshot._write", "replace._move_into_place"]
)
def test_an_interrupted_save_leaves_the_old_snapshot(path, monkeypatch, step):
    def interrupted(*_):
        raise KeyboardInterrupt

    before = contents(path)
    monkeypatch.setattr(f"guestfault.guest.{step}", interrupted)
    with pytest.raises(KeyboardInterrupt):
        save(path, bytes(PAGE_SIZE), STATES)
    assert contents(path) == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_a_full_disk_is_reported(path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    before = contents(path)
    with pytest.raises(SnapshotError, match="No space left on device"):
        save(path, bytes(PAGE_SIZE), STATES)
    assert contents(path) == before


def test_a_failed_rename_puts_the_old_snapshot_back(path, monkeypatch):
    rename = module.Path.rename

    def fails_for_the_new(self, target):
        if target == path and not self.name.endswith(".old"):
            raise PermissionError(1, "Operation not permitted", str(self))
        return rename(self, target)

    before = contents(path)
    monkeypatch.setattr(module.Path, "rename", fails_for_the_new)
    with pytest.raises(SnapshotError, match="Operation not permitted"):
        save(path, bytes(PAGE_SIZE), STATES)
    assert contents(path) == before
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]

import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestfault.guest.layout import Mode
from guestfault.guest.manifest import BuiltinGuest, Manifest, Slot
from guestfault.guest.walk import Walk

PLAIN = Manifest(1 << 20, "ab" * 32, (Slot(0, 0, 1 << 20, 0),), 1, "cd" * 32)
GUEST = BuiltinGuest(Mode.REAL, Walk.ZIPF, -7, (0xFEED, 1 << 63), "ef" * 32)


def changed(path, value, manifest=PLAIN):
    """The manifest's text with the value at ``path`` replaced."""
    content = json.loads(manifest.to_json())
    *parents, last = path
    place = content
    for name in parents:
        place = place[name]
    place[last] = value
    return json.dumps(content).encode()


@pytest.mark.parametrize(
    "manifest",
    [
        PLAIN,
        replace(PLAIN, vcpus=2, guest=GUEST),
        replace(PLAIN, slots=(Slot(1, 0x10_0000, 0x8000, 0x8000), Slot(0, 0, 0x8000, 0))),
    ],
)
def test_round_trip(manifest):
    text = manifest.to_json().encode()
    assert Manifest.from_json(text) == manifest
    assert Manifest.claims(text)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["format"], "tar", "its format is not"),
        (["version"], 2, "its version is 2"),
        (["version"], None, "its version is None"),
        (["memory"], [], "'memory' is missing or not of type dict"),
        (["memory", "size"], "1", "'size' is missing or not of type int"),
        (["memory", "size"], True, "'size' is missing or not of type int"),
        (["memory", "page_size"], 16384, "its page size is not 4096"),
        (["memory", "sha256"], None, "'sha256' is missing"),
        (["vcpus", "count"], 0, "it has no vCPUs"),
        (["slots"], [], "it has no memory slots"),
        (["slots", 0], 5, "'slot' is missing"),
        (["slots", 0, "slot"], -1, "slot -1 is not"),
        (["slots", 0, "memory_size"], 4095, "slot 0 is not made of whole pages"),
        (["slots", 0, "memory_size"], 0, "slot 0 is empty"),
        (["slots", 0, "guest_phys_addr"], -4096, "slot 0 is not made of whole pages"),
        (["slots", 0, "offset"], 4096, "slot 0 is empty or not all in the memory file"),
        (["guest"], 5, "'guest' is missing or not of type dict"),
        (["guest"], {"mode": "v86"}, "'v86' is not a mode"),
    ],
)
def test_refuses(path, value, message):
    with pytest.raises(ValueError, match=message):
        Manifest.from_json(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["guest", "walk"], "moon", "'moon' is not a walk"),
        (["guest", "seed"], None, "'seed' is missing"),
        (["guest", "checksums"], ["0x1"], "one checksum for each of its 2 vCPUs"),
        (["guest", "checksums"], ["0x1", "x"], "'x' is not a checksum"),
        (["guest", "checksums"], ["0x1", 5], "5 is not a checksum"),
    ],
)
def test_refuses_a_bad_builtin_guest(path, value, message):
    with pytest.raises(ValueError, match=message):
        Manifest.from_json(changed(path, value, replace(PLAIN, vcpus=2, guest=GUEST)))


def test_refuses_slots_that_collide():
    def slots(*items):
        return replace(PLAIN, slots=items).to_json().encode()

    with pytest.raises(ValueError, match="slots 3 and 7 overlap"):
        Manifest.from_json(slots(Slot(7, 0x2000, 0x1000, 0), Slot(3, 0x1000, 0x2000, 0)))
    with pytest.raises(ValueError, match="the same number"):
        Manifest.from_json(slots(Slot(0, 0, 0x1000, 0), Slot(0, 0x1000, 0x1000, 0)))


@given(st.binary() | st.text().map(str.encode) | st.just(b"[" * 100_000))
def test_refuses_anything_else(text):
    assert not Manifest.claims(text)
    with pytest.raises(ValueError, match=r"it is not JSON|its format is not"):
        Manifest.from_json(text)


def test_claims_whatever_says_so():
    assert Manifest.claims(changed(["version"], 99))
    assert Manifest.claims(changed(["slots"], "none"))
    assert not Manifest.claims(changed(["format"], "tar"))


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists), st.data())
def test_any_value_anywhere_is_read_or_refused(value, data):
    content = json.loads(replace(PLAIN, vcpus=2, guest=GUEST).to_json())
    top = data.draw(st.sampled_from(sorted(content)))
    inner = content[top]
    path = [top, data.draw(st.sampled_from(sorted(inner)))] if isinstance(inner, dict) else [top]
    text = changed(path, value, replace(PLAIN, vcpus=2, guest=GUEST))
    try:
        manifest = Manifest.from_json(text)
    except ValueError:
        return
    assert Manifest.from_json(manifest.to_json().encode()) == manifest

"""Stops on port instructions: found in blocks, planted once, removed, and bounded in number."""

import iced_x86
import pytest

from guestfault.softkvm import planted
from guestfault.softkvm.planted import Planted


class Engine:
    """Counts hooks; the real one is under test in every guest that uses a port."""

    def __init__(self):
        self.hooks, self.flushes, self._next = {}, 0, 0

    def hook_instruction(self, address, _function):
        self._next += 1
        self.hooks[self._next] = address
        return self._next

    def unhook(self, hook):
        del self.hooks[hook]

    def flush_code(self):
        self.flushes += 1


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def stops(engine):
    return Planted(engine, lambda: None)


def look(stops, code, address=0x1000, size=64):
    return stops.look_through(bytes.fromhex(code), address, lambda: size)


@pytest.mark.parametrize(
    ("code", "at"),
    [
        ("90e442", [0x1001]),
        ("ee90ed", [0x1000, 0x1002]),
        ("f36c", [0x1000]),
        ("48b8e4e5e6e7ecedeeef ef", [0x100A]),  # an immediate is not an instruction
        ("0f05", [0x1000]),
        ("0f01f8", [0x1000]),
        ("0f34", [0x1000]),
    ],
)
def test_what_needs_a_stop(stops, engine, code, at):
    assert look(stops, code)
    stops.plant()
    assert sorted(engine.hooks.values()) == at
    assert engine.flushes == 1
    assert not look(stops, code)  # they have their stops


def test_clean_code_is_not_even_decoded(stops, monkeypatch):
    monkeypatch.setattr(iced_x86, "Decoder", None)
    assert not look(stops, "4889d8 90 c3")


def test_the_mode_decides_what_the_bytes_are(stops):
    code = "b80090e442"  # mov eax, 0x42e49000; or mov ax, 0x9000; in al, 0x42
    assert not look(stops, code, size=64)
    assert look(stops, code, size=16)


def test_a_stop_that_is_removed_can_be_planted_again(stops, engine):
    look(stops, "e442")
    stops.plant()
    stops.remove(0x1000)
    assert engine.hooks == {}
    assert engine.flushes == 2
    stops.remove(0x1000)  # there is none: nothing to throw away
    assert engine.flushes == 2
    assert look(stops, "e442")


def test_a_guest_that_makes_code_for_ever_does_not_make_hooks_for_ever(stops, engine, monkeypatch):
    monkeypatch.setattr(planted, "_MAX", 10)
    for i in range(35):
        assert look(stops, "e442", 0x1000 * i)
        stops.plant()
        assert len(engine.hooks) <= 10

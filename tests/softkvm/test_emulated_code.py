"""The copies of code that the engine executes while KVM emulates."""

import ctypes

import pytest

from guestfault.softkvm.emulated_code import EmulatedCode

AT = 1 << 47


class Engine:
    """What is mapped, and how often code was forgotten."""

    def __init__(self):
        self.flushed = 0

    def map(self, address, size, hva):
        self.address, self.size, self.hva = address, size, hva

    def flush_code(self):
        self.flushed += 1

    def bytes_at(self, address, size):
        return ctypes.string_at(self.hva + address - self.address, size)


@pytest.fixture
def engine():
    return Engine()


@pytest.fixture
def code(engine):
    code = EmulatedCode(engine, AT)
    yield code
    code.close()


def fetched(engine, code, linear, size):
    page = code.page(linear)
    return None if page is None else engine.bytes_at(page + (linear & 0xFFF), size)


def test_an_instruction_is_where_it_was(engine, code):
    code.begin(0x5123, b"\x8b\x07")
    assert fetched(engine, code, 0x5123, 2) == b"\x8b\x07"
    assert code.page(0x6000) is None
    assert code.page(0x4000) is None


def test_one_in_two_pages(engine, code):
    code.begin(0x5FFE, b"abcde")
    assert fetched(engine, code, 0x5FFE, 2) == b"ab"
    assert fetched(engine, code, 0x6000, 3) == b"cde"


def test_the_end_of_a_page_is_not_the_next_one(engine, code):
    code.begin(0x5FFE, b"ab")
    assert code.page(0x6000) is None


def test_a_copy_is_used_again_and_never_changed(engine, code):
    code.begin(0x5123, b"ab")
    first = code.page(0x5123)
    code.begin(0x5123, b"cd")
    second = code.page(0x5123)
    assert first != second
    code.begin(0x9123, b"ab")  # at another page: it is the same copy
    assert code.page(0x9123) == first
    assert engine.bytes_at(first + 0x123, 2) == b"ab"
    assert not engine.flushed


def test_room_is_made_by_forgetting_all(engine, code):
    for i in range(200):
        code.begin(0x5000, i.to_bytes(4, "little"))
        assert fetched(engine, code, 0x5000, 4) == i.to_bytes(4, "little")
    assert engine.flushed

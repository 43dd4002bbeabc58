"""The pieces in which the engine makes an access, put together again."""

from hypothesis import given
from hypothesis import strategies as st

from guestfault.softkvm.device_window import DEVICE_WINDOW, DeviceWindow

BASE = 0x7000_0000_0000


class Memory:
    """What is asked for, as a list; refuses from the ``refuses``-th access on."""

    def __init__(self, refuses=None):
        self.asked = []
        self._refuses = refuses

    def _refused(self):
        return self._refuses is not None and len(self.asked) > self._refuses

    def read(self, linear, size):
        self.asked.append(("read", linear, size))
        if self._refused():
            return None
        return bytes((linear + i) & 0xFF for i in range(size))

    def write(self, linear, data):
        self.asked.append(("write", linear, data))
        return not self._refused()


class Engine:
    """Makes accesses as Unicorn does: in aligned pieces of at most four bytes, or in bytes."""

    def __init__(self, memory, operand):
        self.window = DeviceWindow()
        self.window.begin(memory, operand)

    def _at(self, linear):
        return self.window.page(linear) - DEVICE_WINDOW + (linear & 0xFFF)

    def read(self, linear, size):
        self.window.on_access(False, DEVICE_WINDOW + self._at(linear), size)
        got = {}
        first = linear & -size if linear % size else linear
        end = linear + size if first == linear else (linear + size + size - 1) & -size
        step = min(size, 4)
        for at in range(first, end, step):
            value = self.window.on_read(self._at(at), step)
            for i, byte in enumerate(value.to_bytes(step, "little")):
                got[at + i] = byte
        return bytes(got[linear + i] for i in range(size))

    def write(self, linear, data):
        self.window.on_access(True, DEVICE_WINDOW + self._at(linear), len(data))
        step = 1 if linear % len(data) else min(len(data), 4)
        for at in range(0, len(data), step):
            value = int.from_bytes(data[at : at + step], "little")
            self.window.on_write(self._at(linear + at), step, value | 0xFF << 8 * step)


def operand_of(accesses):
    return max((size for _, _, size in accesses), default=0)


@given(
    offset=st.integers(0, 0x2000),
    size=st.sampled_from([1, 2, 4, 8]),
    write=st.booleans(),
    data=st.binary(min_size=8, max_size=8),
)
def test_an_access_comes_once_and_whole(offset, size, write, data):
    memory = Memory()
    engine = Engine(memory, size)
    linear = BASE + offset
    if write:
        engine.write(linear, data[:size])
        assert memory.asked == [("write", linear, data[:size])]
    else:
        expected = bytes((linear + i) & 0xFF for i in range(size))
        assert engine.read(linear, size) == expected
        assert memory.asked == [("read", linear, size)]


@given(offset=st.integers(0, 0x2000), data=st.binary(min_size=16, max_size=16))
def test_sixteen_bytes_are_one_access(offset, data):
    memory = Memory()
    engine, linear = Engine(memory, 16), BASE + offset
    engine.read(linear, 8)
    engine.read(linear + 8, 8)
    engine.write(linear, data[:8])
    engine.write(linear + 8, data[8:])
    assert memory.asked == [("read", linear, 16), ("write", linear, data)]


def test_ten_bytes_are_one_access():
    memory = Memory()
    engine = Engine(memory, 10)
    engine.write(BASE, bytes(range(8)))
    engine.write(BASE + 8, b"\x08\x09")
    assert memory.asked == [("write", BASE, bytes(range(10)))]


def test_what_follows_the_operand_is_for_itself():
    """A far call reads its pointer in two pieces and pushes twice."""
    memory = Memory()
    engine = Engine(memory, 6)
    engine.read(BASE, 4)
    engine.read(BASE + 4, 2)
    engine.write(BASE + 0x1004, b"cs__")
    engine.write(BASE + 0x1000, b"ip__")
    engine.window.finish()
    assert memory.asked == [
        ("read", BASE, 6),
        ("write", BASE + 0x1004, b"cs__"),
        ("write", BASE + 0x1000, b"ip__"),
    ]


def test_a_write_that_never_got_its_size_is_made_at_the_end():
    memory = Memory()
    engine = Engine(memory, 512)
    engine.write(BASE, b"abcd")
    assert memory.asked == []
    engine.window.finish()
    assert memory.asked == [("write", BASE, b"abcd")]


def test_the_same_place_twice_is_two_accesses():
    memory = Memory()
    engine = Engine(memory, 4)
    engine.read(BASE, 4)
    engine.read(BASE, 4)
    assert memory.asked == [("read", BASE, 4)] * 2


def test_nothing_is_asked_after_a_refusal():
    memory = Memory(refuses=1)
    engine = Engine(memory, 4)
    engine.read(BASE, 4)
    assert not engine.window.refused
    assert engine.read(BASE + 8, 4) == bytes(4)
    assert engine.window.refused
    engine.write(BASE, b"abcd")
    engine.read(BASE, 4)
    engine.window.finish()
    assert len(memory.asked) == 2


def test_two_addresses_of_one_page_stay_two():
    memory = Memory()
    engine = Engine(memory, 1)
    engine.write(BASE + 1, b"a")
    engine.write(BASE + 0x5001, b"b")
    engine.write(BASE + 2, b"c")
    assert [where for _, where, _ in memory.asked] == [BASE + 1, BASE + 0x5001, BASE + 2]

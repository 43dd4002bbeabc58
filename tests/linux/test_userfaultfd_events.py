import ctypes

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestfault.linux.userfaultfd_events import (
    MESSAGE_SIZE,
    Fork,
    PageFault,
    Remap,
    Remove,
    Unmap,
    decode,
)
from guestfault.uapi import userfaultfd as uapi

u64 = st.integers(0, 2**64 - 1)
u32 = st.integers(0, 2**32 - 1)


def message(event, **fields):
    """A struct uffd_msg, as the header lays it out."""
    msg = uapi.uffd_msg(event=event)
    for path, value in fields.items():
        *outer, last = path.split("__")
        target = msg.arg
        for name in outer:
            target = getattr(target, name)
        setattr(target, last, value)
    return bytes(msg)


def test_size_is_the_headers():
    assert ctypes.sizeof(uapi.uffd_msg) == MESSAGE_SIZE


@given(address=u64, flags=st.integers(0, 7), thread_id=u32)
def test_page_faults(address, flags, thread_id):
    raw = message(
        uapi.UFFD_EVENT_PAGEFAULT,
        pagefault__flags=flags,
        pagefault__address=address,
        pagefault__feat__ptid=thread_id,
    )
    write, wp, minor = bool(flags & 1), bool(flags & 2), bool(flags & 4)
    assert list(decode(raw, True)) == [PageFault(address, write, wp, minor, thread_id)]
    assert list(decode(raw)) == [PageFault(address, write, wp, minor, None)]


@given(a=u64, b=u64, c=u64, fd=u32)
def test_other_events_in_one_read(a, b, c, fd):
    raw = b"".join(
        [
            message(uapi.UFFD_EVENT_REMOVE, remove__start=a, remove__end=b),
            message(uapi.UFFD_EVENT_UNMAP, remove__start=a, remove__end=b),
            message(uapi.UFFD_EVENT_REMAP, remap__from_=a, remap__to=b, remap__len=c),
            message(uapi.UFFD_EVENT_FORK, fork__ufd=fd),
        ]
    )
    assert list(decode(raw)) == [Remove(a, b), Unmap(a, b), Remap(a, b, c), Fork(fd)]


def test_an_unknown_event_is_not_passed_over():
    with pytest.raises(ValueError, match="0x42"):
        list(decode(message(0x42)))

"""Layouts and numbers of userfaultfd that stand without a compiler."""

from __future__ import annotations

from ctypes import sizeof

from guestfault.uapi import userfaultfd as uapi


def test_a_message_is_read_in_place() -> None:
    message = uapi.uffd_msg.from_buffer_copy(
        bytes([uapi.UFFD_EVENT_PAGEFAULT]).ljust(8, b"\0")
        + (uapi.UFFD_PAGEFAULT_FLAG_WRITE | uapi.UFFD_PAGEFAULT_FLAG_MINOR).to_bytes(8, "little")
        + (0x7F0000001000).to_bytes(8, "little")
        + (1234).to_bytes(8, "little")
    )
    assert sizeof(message) == 32
    assert message.event == uapi.UFFD_EVENT_PAGEFAULT
    assert message.arg.pagefault.flags == 0b101
    assert message.arg.pagefault.address == 0x7F0000001000
    assert message.arg.pagefault.feat.ptid == 1234
    assert message.arg.remap.from_ == 0b101


def test_ioctl_numbers() -> None:
    assert uapi.USERFAULTFD_IOC_NEW == 0xAA00
    assert uapi.UFFDIO_API == 0xC018AA3F
    assert uapi.UFFDIO_REGISTER == 0xC020AA00
    assert uapi.UFFDIO_WAKE == 0x8010AA02
    assert uapi.UFFDIO_CONTINUE == 0xC020AA07

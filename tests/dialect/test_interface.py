import errno

import pytest

from guestfault.dialect.interface import EHWPOISON, LINUX_6_8, SEED, probe
from guestfault.uapi import kvm as uapi


@pytest.mark.parametrize(
    ("announced", "expected"),
    [
        ({}, None),
        ({232: 1}, LINUX_6_8),
        ({227: 1}, SEED),
        ({227: 3, 232: 1}, LINUX_6_8),
        ({226: 1, 228: 1, 231: 1, 233: 1}, None),
        ({232: 0, 227: 1}, SEED),
    ],
)
def test_probe_goes_by_capability_and_prefers_the_merged_one(announced, expected):
    assert probe(lambda cap: announced.get(cap, 0)) is expected


@pytest.mark.parametrize(
    ("interface", "ret", "exit_reason", "expected"),
    [
        (LINUX_6_8, -errno.EFAULT, 39, True),
        (LINUX_6_8, -EHWPOISON, 39, True),
        (LINUX_6_8, 0, 39, False),
        (LINUX_6_8, -errno.EINTR, 39, False),
        (LINUX_6_8, -errno.EFAULT, uapi.KVM_EXIT_LOONGARCH_IOCSR, False),
        (LINUX_6_8, -errno.EFAULT, uapi.KVM_EXIT_UNKNOWN, False),
        (SEED, -errno.EFAULT, 38, True),
        (SEED, -EHWPOISON, 38, False),
        (SEED, -errno.EPERM, 38, False),
        (SEED, -errno.EFAULT, 39, False),
    ],
)
def test_magic_combination(interface, ret, exit_reason, expected):
    assert interface.is_memory_fault(ret, exit_reason) is expected


def test_flag_names():
    assert LINUX_6_8.flag_names(0) == ()
    assert LINUX_6_8.flag_names(1 << 3) == ("PRIVATE",)
    assert LINUX_6_8.flag_names(1 << 4 | 1 << 3 | 1) == ("PRIVATE", "0x11")
    assert SEED.flag_names(3) == ("UNKNOWN", "ABSENT_MAPPING")


def test_interfaces_are_values():
    assert len({LINUX_6_8, SEED, LINUX_6_8}) == 2
    with pytest.raises(TypeError):
        SEED.flags["UNKNOWN"] = 7


def test_number_of_ehwpoison():
    """Python's errno names it from 3.14 on; os.strerror has always known it."""
    import os

    assert os.strerror(EHWPOISON) == "Memory page has hardware error"

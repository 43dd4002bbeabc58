"""Which interface a KVM is taken to speak, and which combination vouches for a memory fault."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestfault.dialect.interface import (
    EHWPOISON,
    LINUX_6_8,
    SEED,
    USERFAULT_V3,
    V1,
    V3,
    V4,
    V5,
    V7,
    WIP_V2,
    probe,
)
from guestfault.uapi import kvm as uapi

# What released kernels announce of the numbers that the series used, on x86.
RELEASED = {
    "6.1": {},
    "6.3": {226: 3},
    "6.8": {226: 3, 231: 1, 232: 1, 233: 8, 235: 1},
    "6.11": {226: 3, 231: 1, 232: 1, 233: 8, 235: 1, 236: 1, 237: 1, 238: 1},
    "6.18": {226: 3, 231: 1, 232: 1, 233: 8, 234: 1, 235: 3, 236: 1, 237: 1, 238: 1, 244: 3},
}
ALL = (V1, WIP_V2, SEED, V3, V4, V5, V7, LINUX_6_8, USERFAULT_V3)


@pytest.mark.parametrize("release", RELEASED)
def test_a_released_kernel_is_never_taken_for_another(release):
    announced = RELEASED[release]
    expected = LINUX_6_8 if 232 in announced else None
    assert probe(lambda cap: announced.get(cap, 0)) is expected


@pytest.mark.parametrize(
    ("announced", "expected"),
    [
        ({}, None),
        ({227: 1, 228: 1}, SEED),  # or one that reports nothing to who has not asked
        ({228: 1, 229: 1}, V4),
        ({230: 1, 231: 1}, V5),
        ({231: 1, 232: 1, 236: 1}, LINUX_6_8),  # v6 and v7 are read alike
        ({231: 1, 232: 1, 243: 1}, LINUX_6_8),
        ({227: 3, 228: 1, 232: 1}, LINUX_6_8),
        ({232: 0, 227: 1, 228: 1}, SEED),
        # Half of a pair, and the numbers of arm64, are nothing.
        ({226: 1, 228: 1, 231: 1, 233: 1}, None),
        ({227: 1}, None),
        ({229: 1}, None),
        ({230: 1}, None),
        ({227: 1, 228: 1, 229: 1}, None),
    ],
)
def test_probe_goes_by_pairs_of_capabilities_and_prefers_the_merged_one(announced, expected):
    assert probe(lambda cap: announced.get(cap, 0)) is expected


@given(st.sets(st.integers(224, 250)))
def test_who_announces_the_merged_exit_has_it_whatever_else_it_announces(announced):
    found = probe(lambda cap: int(cap in announced))
    assert (found is LINUX_6_8) == (232 in announced)
    assert found not in (V1, WIP_V2, V3, V7, USERFAULT_V3)


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
        (WIP_V2, -errno.EPERM, 38, True),
        (WIP_V2, -errno.EFAULT, 38, False),
        (WIP_V2, 0, 38, False),
        (V1, -errno.EFAULT, 38, True),
        (V3, -errno.EFAULT, 38, True),
        (V4, -errno.EFAULT, 38, True),
        (V7, -EHWPOISON, 39, True),
        (USERFAULT_V3, -errno.EFAULT, 39, True),
        (V5, -errno.EFAULT, 38, False),
        (V5, -errno.EFAULT, 0, False),
    ],
)
def test_magic_combination(interface, ret, exit_reason, expected):
    assert interface.is_memory_fault(ret, exit_reason) is expected


@pytest.mark.parametrize("exit_reason", [0, 6, 38, 39])
def test_v5_goes_by_its_flag_and_by_nothing_else(exit_reason):
    assert V5.is_memory_fault(-errno.EFAULT, exit_reason, 1 << 8)
    assert V5.is_memory_fault(-errno.EFAULT, exit_reason, 1 << 8 | uapi.KVM_RUN_X86_SMM)
    assert not V5.is_memory_fault(-errno.EFAULT, exit_reason, 0xFEFF)
    assert not V5.is_memory_fault(0, exit_reason, 1 << 8)
    assert not V5.is_memory_fault(-errno.EINTR, exit_reason, 1 << 8)


@pytest.mark.parametrize("interface", [i for i in ALL if i is not V5], ids=lambda i: str(i.cap))
def test_all_others_ignore_that_flag(interface):
    ret = -min(interface.errnos)
    assert interface.is_memory_fault(ret, interface.exit_reason, 0xFFFF)
    assert not interface.is_memory_fault(ret, 0, 0xFFFF)


def test_flag_names():
    assert LINUX_6_8.flag_names(0) == ()
    assert LINUX_6_8.flag_names(1 << 3) == ("PRIVATE",)
    assert LINUX_6_8.flag_names(1 << 4 | 1 << 3 | 1) == ("PRIVATE", "0x11")
    assert SEED.flag_names(3) == ("UNKNOWN", "ABSENT_MAPPING")
    assert V4.flag_names(3) == ("WRITE", "EXEC")
    assert V7.flag_names(0xA) == ("WRITE", "PRIVATE")
    assert USERFAULT_V3.flag_names(0x18) == ("PRIVATE", "USERFAULT")
    assert V3.flag_names(1) == ("0x1",)


def test_interfaces_are_values():
    assert len(set(ALL) | {LINUX_6_8}) == len(ALL)
    with pytest.raises(TypeError):
        SEED.flags["UNKNOWN"] = 7


def test_number_of_ehwpoison():
    """Python's errno names it from 3.14 on; os.strerror has always known it."""
    import os

    assert os.strerror(EHWPOISON) == "Memory page has hardware error"

"""The classification against an oracle that knows struct kvm_run by byte offsets only."""

import ctypes
import dataclasses
import errno
import struct
import typing

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from guestfault.dialect.interface import (
    LINUX_6_8,
    SEED,
    USERFAULT_V3,
    V1,
    V3,
    V4,
    V5,
    V7,
    WIP_V2,
    MemoryFaultInterface,
)
from guestfault.dialect.unmerged import kvm_run_v5
from guestfault.fault.outcome import (
    BareFault,
    Failed,
    FailEntry,
    Hlt,
    InternalError,
    Interrupted,
    Io,
    MemoryFault,
    Mmio,
    Outcome,
    Poisoned,
    RamMmio,
    Shutdown,
    SystemEvent,
    Unknown,
    outcome,
)
from guestfault.linux.sigbus import Sigbus
from guestfault.uapi import kvm as uapi

SIZE = 2352
UNION = 32
EFAULT, EHWPOISON, EINTR, EPERM = 14, 133, 4, 1

# The convention of arm64 in WIP v2: a fault is a success.
ZERO_INTERFACE = MemoryFaultInterface(227, 38, frozenset({0}), {})

MAGIC = {
    None: set(),
    V1: {(-EFAULT, 38)},
    WIP_V2: {(-EPERM, 38)},
    SEED: {(-EFAULT, 38)},
    V3: {(-EFAULT, 38)},
    V4: {(-EFAULT, 38)},
    V7: {(-EFAULT, 39), (-EHWPOISON, 39)},
    LINUX_6_8: {(-EFAULT, 39), (-EHWPOISON, 39)},
    USERFAULT_V3: {(-EFAULT, 39), (-EHWPOISON, 39)},
    ZERO_INTERFACE: {(0, 38)},
}

interfaces = st.sampled_from(list(MAGIC))
rets = st.sampled_from([0, 0, 0, -EFAULT, -EFAULT, -EHWPOISON, -EINTR, -EPERM]) | st.integers(
    -4095, 0
)
reasons = st.integers(0, 41) | st.integers(0, 2**32 - 1)
# All of the page is filled, from as many random bytes as the header and the union have.
pages = st.binary(min_size=288, max_size=288).map(lambda head: (head * 9)[:SIZE])
# Counts and lengths are small where a kernel wrote them, and anything where none did.
small = st.none() | st.integers(0, 20)


def ram_below_4g(gpa: int) -> bool:
    return gpa < 1 << 32


def oracle(ret, page, interface):
    """What the documentation says, read off the raw bytes."""

    def at(form, offset):
        return struct.unpack_from("<" + form, page, UNION + offset)

    (reason,) = struct.unpack_from("<I", page, 8)
    if ret == -EINTR:
        return Interrupted()
    if (ret, reason) in MAGIC[interface]:
        flags, gpa, size = at("QQQ", 0)
        return MemoryFault(gpa, size, 0 if interface is V1 else flags, -ret)
    if ret == -EFAULT or ret == -EHWPOISON:
        return BareFault(-ret)
    if ret:
        return Failed(-ret)
    if reason == 2:
        direction, size, port, count, offset = at("BBHIQ", 0)
        return Io(port, size, count, direction == 0, offset)
    if reason == 6:
        gpa, data, length, is_write = at("Q8sIB", 0)
        kind = RamMmio if ram_below_4g(gpa) else Mmio
        return kind(gpa, data[:length] if is_write else b"", length, is_write != 0)
    if reason == 9:
        return FailEntry(*at("QI", 0))
    if reason == 17:
        suberror, ndata, *data = at("II16Q", 0)
        flags, size, code = at("QB15s", 8)
        has_code = suberror == 1 and ndata >= 3 and flags & 1
        return InternalError(suberror, tuple(data[:ndata]), code[:size] if has_code else b"")
    if reason == 24:
        kind, ndata, *data = at("II16Q", 0)
        return SystemEvent(kind, tuple(data[:ndata]))
    return {5: Hlt(), 8: Shutdown(), 10: Interrupted()}.get(reason, Unknown(reason))


def kvm_run_of(page: bytes) -> uapi.kvm_run:
    return uapi.kvm_run.from_buffer_copy(page)


def with_reason(page: bytes, reason: int) -> bytes:
    return page[:8] + struct.pack("<I", reason) + page[12:]


@settings(max_examples=500)
@given(pages, rets, reasons, interfaces, small, st.none() | st.integers(0, 3))
@example(bytes(SIZE), -EFAULT, 39, LINUX_6_8, None, None)
@example(bytes(SIZE), -EFAULT, 38, LINUX_6_8, None, None)
@example(bytes(SIZE), 0, 39, LINUX_6_8, None, None)
@example(b"\xff" * SIZE, 0, 17, None, 3, 1)
@example(b"\xff" * SIZE, 0, 17, None, 2, 1)
def test_agrees_with_the_oracle(page, ret, reason, interface, count, first_word):
    page = bytearray(with_reason(page, reason))
    if count is not None:  # ndata of two exits; of a third, the length of the MMIO follows
        struct.pack_into("<I", page, UNION + 4, count)
        struct.pack_into("<I", page, UNION + 16, count)
    if first_word is not None:
        struct.pack_into("<I", page, UNION, first_word)
    assert outcome(ret, kvm_run_of(bytes(page)), interface, ram_below_4g) == oracle(
        ret, page, interface
    )


@given(pages, st.integers(-4095, 0), reasons, interfaces)
def test_memory_fault_only_for_the_magic_combination(page, ret, reason, interface):
    result = outcome(ret, kvm_run_of(with_reason(page, reason)), interface)
    assert isinstance(result, MemoryFault) == ((ret, reason) in MAGIC[interface])


@given(pages, rets, reasons, interfaces, pages)
def test_outcome_is_a_copy(page, ret, reason, interface, later):
    run = kvm_run_of(with_reason(page, reason))
    result = outcome(ret, run, interface)
    seen = dataclasses.asdict(result)
    ctypes.memmove(ctypes.addressof(run), later, SIZE)
    assert dataclasses.asdict(result) == seen


@given(pages, pages, rets, reasons, interfaces)
def test_a_failure_reads_nothing_of_the_union(page, other, ret, reason, interface):
    """Two pages that differ in all but the exit reason: one outcome, unless it is annotated."""
    if ret == 0 or (ret, reason) in MAGIC[interface]:
        return
    first = outcome(ret, kvm_run_of(with_reason(page, reason)), interface)
    assert first == outcome(ret, kvm_run_of(with_reason(other, reason)), interface)


@given(pages, reasons, st.integers(-4095, -1))
def test_without_an_interface_no_failure_depends_on_kvm_run(page, reason, ret):
    assert outcome(ret, kvm_run_of(with_reason(page, reason)), None) == outcome(
        ret, kvm_run_of(bytes(SIZE)), None
    )


# -- the one that leaves exit_reason alone ---------------------------------------------------------

FILLED = 1 << 8
SECOND_UNION = 2352
run_flags = st.sampled_from([0, FILLED, FILLED | 1, 0xFEFF]) | st.integers(0, 0xFFFF)


@given(pages, st.binary(min_size=256, max_size=256), rets, reasons, run_flags)
def test_v5_reads_the_second_union_iff_its_flag_stands_beside_efault(
    page, second, ret, reason, flags
):
    page = bytearray(with_reason(page, reason) + second)
    struct.pack_into("<H", page, 14, flags)
    result = outcome(ret, kvm_run_v5.from_buffer_copy(page), V5)
    filled = ret == -EFAULT and flags & FILLED != 0
    assert isinstance(result, MemoryFault) == filled
    if filled:
        bits, gpa, length = struct.unpack_from("<QQQ", page, SECOND_UNION)
        assert result == MemoryFault(gpa, length, bits, EFAULT)
    else:
        # As without any interface: what the second union holds is seen by nobody.
        assert result == outcome(ret, kvm_run_of(bytes(page[:SIZE])), None)


@given(pages, rets, reasons, run_flags, interfaces)
def test_its_flag_means_nothing_to_the_others(page, ret, reason, flags, interface):
    page = bytearray(with_reason(page, reason))
    struct.pack_into("<H", page, 14, flags)
    other = bytearray(page)
    struct.pack_into("<H", other, 14, flags ^ FILLED)
    assert outcome(ret, kvm_run_of(bytes(page)), interface) == outcome(
        ret, kvm_run_of(bytes(other)), interface
    )


def test_v5_wants_a_view_that_holds_its_union():
    with pytest.raises(TypeError, match="ends before the union"):
        outcome(-EFAULT, uapi.kvm_run(flags=FILLED), V5)
    assert outcome(-EFAULT, uapi.kvm_run(), V5) == BareFault(EFAULT)
    assert outcome(0, uapi.kvm_run(exit_reason=5), V5) == Hlt()


def test_v5_keeps_the_exit_that_was_prepared():
    """What the second union is for: an annotation that nobody delivers harms no exit."""
    run = kvm_run_v5(exit_reason=uapi.KVM_EXIT_MMIO, flags=FILLED)
    run.mmio.phys_addr, run.mmio.len = 0xFEE0_0000, 4
    run.speculative_exit.memory_fault.gpa = 0xDEAD000
    assert outcome(0, run, V5) == Mmio(0xFEE0_0000, b"", 4, False)


def test_v1_leaves_the_flags_of_an_earlier_exit():
    run = uapi.kvm_run(exit_reason=38)
    run.memory_fault.flags, run.memory_fault.gpa, run.memory_fault.size = 0x1234, 0x5000, 4096
    assert outcome(-EFAULT, run, V1) == MemoryFault(0x5000, 4096, 0, EFAULT)
    assert outcome(-EFAULT, run, V3) == MemoryFault(0x5000, 4096, 0x1234, EFAULT)


# -- stale fields ----------------------------------------------------------------------------------


def test_stale_annotation_after_a_bare_fault():
    """The danger the seed thread is about: the last exit's annotation beside another failure."""
    run = uapi.kvm_run(exit_reason=39)
    run.memory_fault.gpa, run.memory_fault.size = 0xDEAD000, 4096
    assert outcome(-EFAULT, run, LINUX_6_8) == MemoryFault(0xDEAD000, 4096, 0, EFAULT)
    for ret, expected in ((-EINTR, Interrupted()), (0, Unknown(39)), (-12, Failed(12))):
        assert outcome(ret, run, LINUX_6_8) == expected
    run.exit_reason = uapi.KVM_EXIT_UNKNOWN
    assert outcome(-EFAULT, run, LINUX_6_8) == BareFault(EFAULT)


@given(pages, rets, interfaces, st.integers(0, 2**47), st.integers(0, 30), st.booleans())
def test_a_signal_belongs_to_an_interrupted_run_and_to_no_other(
    page, ret, interface, address, lsb, required
):
    """Invariant: what KVM_RUN itself reports is never hidden by a signal that was pending too."""
    run = kvm_run_of(page)
    found = outcome(ret, run, interface, sigbus=Sigbus(address, lsb, required))
    if ret == -EINTR:
        assert found == Poisoned(address, lsb, required)
    else:
        assert found == outcome(ret, run, interface)


def test_mmio_is_ram_only_where_the_caller_knows_a_slot():
    run = uapi.kvm_run(exit_reason=uapi.KVM_EXIT_MMIO)
    run.mmio.phys_addr, run.mmio.len, run.mmio.is_write = 0x20123, 2, 1
    run.mmio.data[:] = range(1, 9)
    assert outcome(0, run, None) == Mmio(0x20123, b"\1\2", 2, True)
    assert outcome(0, run, None, lambda gpa: False) == Mmio(0x20123, b"\1\2", 2, True)
    assert outcome(0, run, None, ram_below_4g) == RamMmio(0x20123, b"\1\2", 2, True)
    run.mmio.is_write = 0
    assert outcome(0, run, None, ram_below_4g) == RamMmio(0x20123, b"", 2, False)


def test_instruction_of_an_emulation_failure():
    run = uapi.kvm_run(exit_reason=uapi.KVM_EXIT_INTERNAL_ERROR)
    run.emulation_failure.suberror, run.emulation_failure.ndata = 1, 3
    run.emulation_failure.flags, run.emulation_failure.insn_size = 1, 2
    run.emulation_failure.insn_bytes[:2] = b"\x0f\x0b"
    match outcome(0, run, LINUX_6_8):
        case InternalError(1, (1, _, _), b"\x0f\x0b"):
            pass
        case other:
            pytest.fail(f"{other}")


def test_errno_with_its_sign_lost():
    with pytest.raises(ValueError, match="not 14"):
        outcome(errno.EFAULT, uapi.kvm_run(), LINUX_6_8)


@pytest.mark.parametrize("kind", typing.get_args(Outcome), ids=lambda kind: kind.__name__)
def test_every_outcome_is_a_plain_value(kind):
    fields = dataclasses.fields(kind)
    value = kind(*range(len(fields)))
    assert kind.__match_args__ == tuple(f.name for f in fields)
    assert value == kind(*range(len(fields)))
    assert len({value, kind(*range(len(fields)))}) == 1
    assert not hasattr(value, "__dict__")
    for name in [f.name for f in fields] or ["anything"]:
        with pytest.raises((dataclasses.FrozenInstanceError, TypeError)):
            setattr(value, name, 99)

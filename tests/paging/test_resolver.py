"""A resolver on a vCPU of the software KVM, which it asks for RIP and hands the answers to."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from guestfault.fault.access import FoundBy
from guestfault.fault.outcome import MemoryFault, RamMmio
from guestfault.linux import process_memory
from guestfault.memory.ram import PAGE_SIZE, GuestRam
from guestfault.memory.slots import MemorySlot, SlotMap
from guestfault.memory.view import Unpopulated
from guestfault.paging.guard import FaultLoopError
from guestfault.paging.pager import Pager
from guestfault.paging.resolver import FaultResolver, UnresolvableError
from guestfault.paging.source.base import SourceError
from guestfault.softkvm.system import SoftSystem
from guestfault.uapi import mman

GPA = 0x10_0000  # of the RAM: not where its offsets begin


@pytest.fixture
def resolver(ram: GuestRam, source) -> Iterator[FaultResolver]:
    slots = SlotMap()
    slots.add(MemorySlot(GPA, ram.size, ram.guest.address, 0))
    system = SoftSystem()
    vm = system.create_vm()
    resolver = FaultResolver(vm.create_vcpu(0), Pager(ram, Unpopulated(ram), source), slots)
    yield resolver
    vm.close()
    system.close()


def annotated(gpa: int, size: int = PAGE_SIZE) -> MemoryFault:
    return MemoryFault(gpa, size, 0, 14)


def test_an_annotated_fault_brings_its_page_in(resolver, ram, source) -> None:
    resolver.resolve_annotated(annotated(GPA + 2 * PAGE_SIZE))
    assert process_memory.read(ram.guest.address + 2 * PAGE_SIZE, 1) == b"\3"
    assert source.reads == {2: 1}
    account = resolver.account
    assert (account.annotated, account.faults, account.again) == (1, 1, 0)
    assert account.latency.count == 1


def test_an_annotated_fault_of_several_pages_brings_them_all_in(resolver, source) -> None:
    resolver.resolve_annotated(annotated(GPA + PAGE_SIZE, 3 * PAGE_SIZE))
    assert source.reads == {1: 1, 2: 1, 3: 1}


def test_a_fault_on_a_page_that_is_in_is_counted_as_again(resolver, source) -> None:
    for _ in range(2):
        resolver.resolve_annotated(annotated(GPA))
    assert (resolver.account.annotated, resolver.account.again) == (2, 1)
    assert source.reads == {0: 1}


def test_an_mmio_read_of_ram_is_answered_with_the_pages_bytes(resolver, ram) -> None:
    run = resolver._vcpu.kvm_run
    run.mmio.data[:] = bytes(8)
    ram_page_5 = b"\6"
    resolver.resolve_ram_mmio(RamMmio(GPA + 5 * PAGE_SIZE + 8, b"", 4, is_write=False))
    assert bytes(run.mmio.data) == 4 * ram_page_5 + bytes(4)
    assert resolver.account.ram_mmio == 1


def test_an_mmio_write_to_ram_is_applied_to_the_page_after_it_was_filled(resolver, ram) -> None:
    at = 5 * PAGE_SIZE + 8
    resolver.resolve_ram_mmio(RamMmio(GPA + at, b"abcd", 4, is_write=True))
    seen = process_memory.read(ram.guest.address + at - 1, 6)
    assert seen == b"\6abcd\6"


@pytest.mark.parametrize("is_write", [False, True])
def test_memory_that_is_lost_stops_the_vcpu_and_not_the_process(resolver, ram, is_write) -> None:
    """As it is of a page that has failed; here the host's own view of it is shut instead."""
    run, at = resolver._vcpu.kvm_run, 5 * PAGE_SIZE
    resolver.pager.bring_in(at)
    run.mmio.data[:] = b"unasked!"
    exit_ = RamMmio(GPA + at, b"abcd" if is_write else b"", 4, is_write)
    ram.host.protect(at, PAGE_SIZE, mman.PROT_NONE)
    with pytest.raises(UnresolvableError) as caught:
        resolver.resolve_ram_mmio(exit_)
    assert caught.value.access.gpa == GPA + at
    assert (bytes(run.mmio.data), resolver.account.ram_mmio) == (b"unasked!", 0)
    ram.host.protect(at, PAGE_SIZE, mman.PROT_READ | mman.PROT_WRITE)
    resolver.resolve_ram_mmio(exit_)
    assert process_memory.read(ram.guest.address + at, 4) == (b"abcd" if is_write else 4 * b"\6")


def test_nothing_is_answered_from_a_page_that_cannot_be_had(resolver, source, ram) -> None:
    source.broken = {5}
    run = resolver._vcpu.kvm_run
    run.mmio.data[:] = b"unasked!"
    read = RamMmio(GPA + 5 * PAGE_SIZE, b"", 8, is_write=False)
    with pytest.raises(SourceError):
        resolver.resolve_ram_mmio(read)
    assert bytes(run.mmio.data) == b"unasked!"
    assert resolver.account.ram_mmio == 0
    source.broken.clear()
    resolver.resolve_ram_mmio(read)
    assert bytes(run.mmio.data) == b"\6" * 8


@pytest.mark.parametrize("gpa", [0, GPA - 8, GPA + 16 * PAGE_SIZE])
def test_an_access_outside_every_slot_cannot_be_resolved(resolver, source, gpa: int) -> None:
    with pytest.raises(UnresolvableError, match="it is in no memory slot") as caught:
        resolver.resolve_annotated(annotated(gpa))
    assert caught.value.access.gpa == gpa
    assert not source.reads


def test_a_fault_that_comes_again_and_again_is_a_loop_with_its_account(resolver) -> None:
    resolver._vcpu.set_regs(type(resolver._vcpu.get_regs())(rip=0xABC0))
    for _ in range(8):
        resolver.resolve_annotated(annotated(GPA))
    with pytest.raises(FaultLoopError) as caught:
        resolver.resolve_annotated(annotated(GPA))
    error = caught.value
    assert (error.vcpu_id, error.rip, error.count) == (0, 0xABC0, 9)
    assert error.access.gpa == GPA
    assert error.access.found_by is FoundBy.ANNOTATION
    assert (resolver.account.annotated, resolver.account.again) == (9, 7)

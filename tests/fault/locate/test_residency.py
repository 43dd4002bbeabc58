"""What the host says about real pages, and that asking changes nothing."""

from __future__ import annotations

import errno
from collections.abc import Iterator

import pytest

from guestfault.errors import Unavailable
from guestfault.fault.locate.residency import HostResidency, Verdict
from guestfault.linux.mapping import Mapping
from guestfault.linux.pagemap import Pagemap
from guestfault.memory.ram import PAGE_SIZE, GuestRam
from guestfault.memory.slots import MemorySlot
from guestfault.memory.view import Registered
from guestfault.uapi.kvm import KVM_MEM_READONLY
from guestfault.uapi.mman import PROT_NONE, PROT_READ

EXIT_ON_MISSING = 1 << 2
SIZE = 8 * PAGE_SIZE


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    with GuestRam(SIZE) as ram:
        yield ram


@pytest.fixture
def residency() -> Iterator[HostResidency]:
    residency = HostResidency(exit_on_missing=EXIT_ON_MISSING)
    yield residency
    residency.close()


def ask(residency: HostResidency, hva: int, *, writes: bool = False, flags: int = 0) -> Verdict:
    slot = MemorySlot(0, SIZE, hva & -SIZE, 0, flags)
    (verdict,) = residency.verdicts(slot, [(hva, writes)], errno.EFAULT)
    return verdict


def test_a_page_that_is_there(ram: GuestRam, residency: HostResidency) -> None:
    ram.guest.populate_write(0, PAGE_SIZE)
    for writes in (False, True):
        for flags in (0, EXIT_ON_MISSING, KVM_MEM_READONLY):
            said = ask(residency, ram.guest.address, writes=writes, flags=flags)
            assert said is Verdict.SERVED


def test_a_missing_page_by_who_would_bring_it_in(ram: GuestRam, residency: HostResidency) -> None:
    hva = ram.guest.address
    assert ask(residency, hva) is Verdict.UNSURE
    assert ask(residency, hva, flags=EXIT_ON_MISSING) is Verdict.ABSENT
    with Pagemap() as pagemap:
        assert not pagemap.present(hva), "asking must not fault it in"


def test_protection(ram: GuestRam, residency: HostResidency) -> None:
    hva = ram.guest.address
    ram.guest.populate_write(0, SIZE)
    ram.guest.protect(0, PAGE_SIZE, PROT_NONE)
    ram.guest.protect(PAGE_SIZE, PAGE_SIZE, PROT_READ)
    assert ask(residency, hva) is Verdict.ABSENT
    assert ask(residency, hva + PAGE_SIZE) is Verdict.SERVED
    assert ask(residency, hva + PAGE_SIZE, writes=True) is Verdict.ABSENT
    # Fast GUP asks for a writable page, so a slot that exits on it fails even a read.
    assert ask(residency, hva + PAGE_SIZE, flags=EXIT_ON_MISSING) is Verdict.ABSENT
    # A write to a read-only slot is an MMIO exit.
    said = ask(residency, hva + PAGE_SIZE, writes=True, flags=KVM_MEM_READONLY)
    assert said is Verdict.SERVED
    assert ask(residency, hva + 2 * PAGE_SIZE, writes=True) is Verdict.SERVED


def test_no_mapping(residency: HostResidency) -> None:
    gone = Mapping.anonymous(PAGE_SIZE)
    gone.close()
    assert ask(residency, gone.address) is Verdict.ABSENT


def test_past_the_end_of_the_file(ram: GuestRam, residency: HostResidency) -> None:
    assert ram.guest.memfd is not None
    ram.guest.memfd.truncate(4 * PAGE_SIZE)
    assert ask(residency, ram.guest.address + 3 * PAGE_SIZE) is Verdict.UNSURE
    assert ask(residency, ram.guest.address + 4 * PAGE_SIZE) is Verdict.ABSENT


@pytest.mark.parametrize("told", [None, True])
def test_userfaultfd(ram: GuestRam, told: bool | None) -> None:
    try:
        view = Registered(ram, sigbus=True)
    except Unavailable as error:
        pytest.skip(str(error))
    residency = HostResidency(registered=told)
    try:
        ram.bytes[:PAGE_SIZE] = b"x" * PAGE_SIZE
        assert ask(residency, ram.guest.address) is Verdict.ABSENT
        view.bring_in(0, PAGE_SIZE)
        assert ask(residency, ram.guest.address) is Verdict.SERVED
        assert ask(residency, ram.guest.address + PAGE_SIZE) is Verdict.ABSENT
    finally:
        residency.close()
        view.close()

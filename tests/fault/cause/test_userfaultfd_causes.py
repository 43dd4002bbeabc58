"""Causes in a userfaultfd, made to happen to a running vCPU.

With ``UFFD_FEATURE_SIGBUS`` an access fails where it would else sleep until it is resolved.
"""

from __future__ import annotations

import ctypes

import pytest

from guestfault.fault.access import Access, AccessKind, FoundBy
from guestfault.fault.cause.record import Kind, Remedy
from guestfault.fault.cause.why import why
from guestfault.fault.outcome import BareFault, Io, Poisoned
from guestfault.linux.ioctl import call, libc
from guestfault.linux.mapping import Mapping
from guestfault.linux.memfd import Memfd
from guestfault.linux.userfaultfd import Feature, Mode
from guestfault.uapi import mman

PAGE = 4096
READ, WRITE = AccessKind.READ, AccessKind.WRITE
SHMEM = Feature.SIGBUS | Feature.MISSING_SHMEM | Feature.MINOR_SHMEM


@pytest.mark.parametrize("kind", [READ, WRITE])
def test_missing(machine, ram, open_uffd, kind):
    uffd = open_uffd(SHMEM)
    uffd.register(ram.guest.address, ram.size, Mode.MISSING | Mode.MINOR)
    machine.back(ram.guest.address, ram.size)
    failure = machine.access(kind, PAGE)
    assert failure == BareFault(14)
    (cause,) = machine.causes(failure)
    assert (cause.kind, cause.by, cause.certain) == (Kind.UFFD_MISSING, Remedy.COPY, True)
    with Mapping.anonymous(PAGE) as source:
        assert uffd.copy(ram.guest.address + PAGE, source.address, PAGE).done == PAGE
    assert machine.completes()


@pytest.mark.parametrize("kind", [READ, WRITE])
def test_minor(machine, ram, open_uffd, kind):
    uffd = open_uffd(SHMEM)
    uffd.register(ram.guest.address, ram.size, Mode.MISSING | Mode.MINOR)
    machine.back(ram.guest.address, ram.size)
    ram.host.view()[PAGE : 2 * PAGE] = b"\x5a" * PAGE
    failure = machine.access(kind, PAGE)
    assert failure == BareFault(14)
    (cause,) = machine.causes(failure)
    assert (cause.kind, cause.by, cause.certain) == (Kind.UFFD_MINOR, Remedy.CONTINUE, True)
    assert uffd.continue_(ram.guest.address + PAGE, PAGE).done == PAGE
    assert machine.completes()
    assert machine.vcpu.get_regs().rax == (
        0x1122334455667788 if kind is WRITE else 0x5A5A5A5A5A5A5A5A
    )


def test_missing_in_anonymous_memory(machine, open_uffd):
    uffd = open_uffd(Feature.SIGBUS)
    with Mapping.anonymous(4 * PAGE) as guest, Mapping.anonymous(PAGE) as source:
        guest.no_hugepage()
        uffd.register(guest.address, guest.size, Mode.MISSING)
        machine.back(guest.address, guest.size)
        failure = machine.access(READ)
        assert failure == BareFault(14)
        (cause,) = machine.causes(failure)
        assert (cause.kind, cause.certain) == (Kind.UFFD_MISSING, True)
        assert uffd.copy(guest.address, source.address, PAGE).done == PAGE
        assert machine.completes()


def test_without_descriptor_or_privilege_mincore_tells_minor_from_missing(
    machine, open_uffd, monkeypatch
):
    from guestfault.linux import mapped_file

    monkeypatch.setattr(mapped_file, "_paths", lambda *_: iter(()))
    uffd = open_uffd(SHMEM)
    with Memfd("closed", 2 * PAGE) as file, Mapping.from_memfd(file) as guest:
        file_view = Mapping.from_memfd(file)
        file_view.view()[:PAGE] = bytes(PAGE)
        file_view.close()
        uffd.register(guest.address, guest.size, Mode.MISSING | Mode.MINOR)
        machine.back(guest.address, guest.size)
        for offset, kind in ((0, Kind.UFFD_MINOR), (PAGE, Kind.UFFD_MISSING)):
            (cause,) = machine.causes(machine.access(READ, offset))
            assert (cause.kind, cause.certain) == (kind, True)


def test_write_protected(machine, kvm, ram, open_uffd):
    uffd = open_uffd(Feature.SIGBUS | Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM)
    uffd.register(ram.guest.address, ram.size, Mode.WP)
    assert ram.guest.populate_write(0, PAGE) == 0
    uffd.writeprotect(ram.guest.address, PAGE, protect=True)
    machine.back(ram.guest.address, ram.size)
    assert isinstance(machine.access(READ), Io)
    failure = machine.access(WRITE)
    assert failure == BareFault(14)
    (cause,) = machine.causes(failure)
    assert (cause.kind, cause.by, cause.certain) == (
        Kind.UFFD_WRITE_PROTECTED,
        Remedy.WRITE_UNPROTECT,
        True,
    )
    uffd.writeprotect(ram.guest.address, PAGE, protect=False)
    assert machine.completes()


def test_missing_comes_before_write_protected(machine, ram, open_uffd):
    """A marker keeps the protection of a page that is out."""
    uffd = open_uffd(SHMEM | Feature.PAGEFAULT_FLAG_WP | Feature.WP_HUGETLBFS_SHMEM)
    uffd.register(ram.guest.address, ram.size, Mode.MISSING | Mode.MINOR | Mode.WP)
    machine.back(ram.guest.address, ram.size)
    uffd.writeprotect(ram.guest.address, PAGE, protect=True)
    failure = machine.access(WRITE)
    assert failure == BareFault(14)
    assert machine.causes(failure)[0].kind is Kind.UFFD_MISSING
    ram.host.view()[:PAGE] = bytes(PAGE)
    assert machine.causes(failure)[0].kind is Kind.UFFD_MINOR
    assert uffd.continue_(ram.guest.address, PAGE).done == PAGE
    again = machine.run()
    if again == BareFault(14):  # the marker outlived the fill
        assert machine.causes(again)[0].kind is Kind.UFFD_WRITE_PROTECTED
        uffd.writeprotect(ram.guest.address, PAGE, protect=False)
        again = machine.run()
    assert isinstance(again, Io)


@pytest.mark.parametrize("kind", [READ, WRITE])
def test_poison(machine, ram, open_uffd, kind):
    uffd = open_uffd(SHMEM | Feature.POISON)
    uffd.register(ram.guest.address, ram.size, Mode.MISSING | Mode.MINOR)
    assert uffd.poison(ram.guest.address + PAGE, PAGE).done == PAGE
    machine.back(ram.guest.address, ram.size)
    machine.prepare(kind, PAGE)
    failure = machine.run_holding_sigbus()
    assert failure == Poisoned(ram.guest.address + PAGE, 12, action_required=True)
    (cause,) = machine.causes(failure)
    assert (cause.kind, cause.by, cause.certain) == (Kind.HWPOISON, Remedy.NONE, True)
    assert f"the page at {failure.hva:#x} in the mapping" in cause.what
    assert machine.run_holding_sigbus() == failure, "it is met again"
    # What the account says of a new page is so.
    madvise = libc.madvise, ctypes.c_void_p(failure.hva), ctypes.c_size_t(PAGE), mman.MADV_DONTNEED
    assert call(*madvise) == 0
    ram.host.view()[PAGE : 2 * PAGE] = b"\x5a" * PAGE
    assert uffd.continue_(failure.hva, PAGE).done == PAGE
    assert isinstance(machine.run_holding_sigbus(), Io)


def test_of_two_pages_the_one_that_the_signal_names_is_poisoned(machine, ram, open_uffd):
    uffd = open_uffd(SHMEM | Feature.POISON)
    uffd.register(ram.guest.address, ram.size, Mode.MISSING | Mode.MINOR)
    assert uffd.poison(ram.guest.address + PAGE, PAGE).done == PAGE
    ram.host.view()[:PAGE] = bytes(PAGE)
    assert uffd.continue_(ram.guest.address, PAGE).done == PAGE
    machine.back(ram.guest.address, ram.size)
    machine.prepare(READ, PAGE - 4)
    failure = machine.run_holding_sigbus()
    assert failure == Poisoned(ram.guest.address + PAGE, 12, action_required=True)
    (cause,) = machine.causes(failure)
    assert (cause.kind, cause.certain) == (Kind.HWPOISON, True)
    assert f"the page at {failure.hva:#x}" in cause.what


def test_a_poison_marker_is_seen_without_any_errno(ram, open_uffd):
    uffd = open_uffd(SHMEM | Feature.POISON)
    uffd.register(ram.guest.address, ram.size, Mode.MISSING | Mode.MINOR)
    assert uffd.poison(ram.guest.address, PAGE).done == PAGE
    cause = why(Access(None, 8, FoundBy.DECODE, hva=ram.guest.address, kind=READ))
    if cause.kind is Kind.PRESENT:
        assert not cause.certain
        pytest.skip("needs CAP_SYS_ADMIN to see a marker in the pagemap")
    assert cause.kind is Kind.HWPOISON

"""Causes in the slot, the mapping and its file, made to happen to a running vCPU."""

from __future__ import annotations

import ctypes

import pytest

from guestfault.fault.access import Access, AccessKind, FoundBy
from guestfault.fault.cause.record import Cause, Kind, Remedy
from guestfault.fault.cause.why import causes, why
from guestfault.fault.outcome import BareFault, Io, MemoryFault, RamMmio
from guestfault.linux import vma
from guestfault.linux.ioctl import call, check, libc
from guestfault.linux.mapping import Mapping
from guestfault.linux.memfd import Memfd
from guestfault.linux.mmu_notifier import invalidating
from guestfault.uapi import kvm as uapi
from guestfault.uapi import mman

PAGE = 4096
READ, WRITE = AccessKind.READ, AccessKind.WRITE
RW = mman.PROT_READ | mman.PROT_WRITE

_mmap = libc.mmap
_munmap = libc.munmap


def the_one(found: tuple[Cause, ...]) -> Cause:
    """The cause, where the evidence leaves no other."""
    assert [cause.certain for cause in found] == [True], found
    return found[0]


@pytest.mark.parametrize("kind", [READ, WRITE])
def test_no_access(machine, ram, kind):
    machine.back(ram.guest.address, ram.size)
    ram.guest.protect(PAGE, PAGE, mman.PROT_NONE)
    failure = machine.access(kind, PAGE)
    assert failure == BareFault(14)
    cause = the_one(machine.causes(failure))
    assert (cause.kind, cause.by, cause.resolvable) == (Kind.NO_ACCESS, Remedy.PROTECT, True)
    assert "protection ---" in cause.what
    assert f"{ram.guest.address + PAGE:#x}-{ram.guest.address + 2 * PAGE:#x}" in cause.what
    assert "/memfd:test-ram" in cause.what
    ram.guest.protect(PAGE, PAGE, RW)
    assert machine.completes()


def test_a_read_without_prot_read(machine, ram):
    ram.guest.protect(0, PAGE, mman.PROT_WRITE)
    machine.back(ram.guest.address, ram.size)
    failure = machine.access(READ)
    assert failure == BareFault(14)
    cause = the_one(machine.causes(failure))
    assert (cause.kind, cause.by) == (Kind.NO_ACCESS, Remedy.PROTECT)
    assert "PROT_READ" in cause.how
    ram.guest.protect(0, PAGE, RW)
    assert machine.completes()


def test_read_only_mapping(machine, ram):
    machine.back(ram.guest.address, ram.size)
    ram.guest.protect(0, ram.size, mman.PROT_READ)
    assert isinstance(machine.access(READ), Io)
    failure = machine.access(WRITE)
    assert failure == BareFault(14)
    cause = the_one(machine.causes(failure))
    assert (cause.kind, cause.by) == (Kind.READ_ONLY_MAPPING, Remedy.PROTECT)
    ram.guest.protect(0, ram.size, RW)
    assert machine.completes()


def test_a_mapping_that_may_not_become_writable_must_be_mapped_anew(machine, tmp_path):
    path = tmp_path / "ram"
    path.write_bytes(bytes(PAGE))
    with path.open("rb") as file:
        address = check(_mmap(None, PAGE, mman.PROT_READ, mman.MAP_SHARED, file.fileno(), 0), "")
    machine.back(address, PAGE)
    failure = machine.access(WRITE)
    assert failure == BareFault(14)
    cause = the_one(machine.causes(failure))
    assert (cause.kind, cause.by) == (Kind.READ_ONLY_MAPPING, Remedy.MAP)
    with path.open("r+b") as file, invalidating(address, address + PAGE):
        flags = mman.MAP_SHARED | mman.MAP_FIXED
        check(_mmap(address, PAGE, RW, flags, file.fileno(), 0), "mmap")
    assert machine.completes()
    with invalidating(address, address + PAGE):
        call(_munmap, address, PAGE)


def test_read_only_slot(machine, ram):
    machine.back(ram.guest.address, ram.size, uapi.KVM_MEM_READONLY)
    assert isinstance(machine.access(READ), Io)
    failure = machine.access(WRITE, 8)
    assert isinstance(failure, RamMmio)
    assert failure.is_write
    cause = the_one(machine.causes(failure))
    assert (cause.kind, cause.by) == (Kind.READ_ONLY_SLOT, Remedy.ADD_SLOT)
    assert "slot 1" in cause.what
    # The write is the VMM's to apply; the slot without the flag takes the next one.
    assert machine.completes()
    machine.vm.set_user_memory_region(1, 2 << 20, 0, 0)
    machine.vm.set_user_memory_region(1, 2 << 20, ram.size, ram.guest.address)
    assert isinstance(machine.access(WRITE, 8), Io)
    assert ram.host.view()[8:16] == bytes.fromhex("8877665544332211")


@pytest.mark.parametrize("kind", [READ, WRITE])
def test_no_mapping(machine, ram, kind):
    with Mapping.from_memfd(ram.file) as hole:
        machine.back(hole.address, hole.size)
        at = hole.address + 3 * PAGE
        with invalidating(at, at + PAGE):
            check(call(_munmap, at, PAGE), "munmap")
        failure = machine.access(kind, 3 * PAGE)
        assert failure == BareFault(14)
        cause = the_one(machine.causes(failure))
        assert (cause.kind, cause.by) == (Kind.NO_MAPPING, Remedy.MAP)
        assert f"{at:#x}" in cause.what
        flags = mman.MAP_SHARED | mman.MAP_FIXED_NOREPLACE
        check(_mmap(at, PAGE, RW, flags, ram.file.fd, 3 * PAGE), "mmap")
        assert machine.completes()


@pytest.mark.parametrize("kind", [READ, WRITE])
def test_past_the_end_of_the_file(machine, kind):
    with Memfd("short", 4 * PAGE) as file, Mapping.from_memfd(file) as guest:
        machine.back(guest.address, guest.size)
        file.truncate(PAGE + 100)
        assert isinstance(machine.access(kind, PAGE), Io), "the last page is there to its end"
        failure = machine.access(kind, 2 * PAGE)
        assert failure == BareFault(14)
        cause = the_one(machine.causes(failure))
        assert (cause.kind, cause.by) == (Kind.PAST_END_OF_FILE, Remedy.GROW_FILE)
        assert "0x1064 bytes" in cause.what
        assert "0x3000 bytes" in cause.how
        file.truncate(3 * PAGE)
        assert machine.completes()


def test_a_file_that_is_out_of_reach_for_map_files_is_found_by_its_descriptor(machine, monkeypatch):
    """What a VMM without CAP_CHECKPOINT_RESTORE sees."""
    from guestfault.linux import mapped_file

    paths = mapped_file._paths
    monkeypatch.setattr(
        mapped_file, "_paths", lambda *a: (p for p in paths(*a) if "map_files" not in p)
    )
    with Memfd("short", 2 * PAGE) as file, Mapping.from_memfd(file) as guest:
        machine.back(guest.address, guest.size)
        file.truncate(PAGE)
        failure = machine.access(READ, PAGE)
        assert the_one(machine.causes(failure)).kind is Kind.PAST_END_OF_FILE


def test_device_mapping(machine, kvm):
    """The kernel's own time page: VM_PFNMAP, and never to be written.

    The model's GUP takes no PFNMAP at all; KVM takes a read through the entry that is there.
    """
    vvar = next(v for v in vma.vmas(flags=True) if v.path == "[vvar]")
    if "pf" not in (vvar.flags or ()):
        pytest.skip("needs a time page that is VM_PFNMAP; here it is VM_MIXEDMAP (Linux 7.3)")
    machine.back(vvar.start, PAGE)
    if kvm == "/dev/kvm":
        assert isinstance(machine.access(READ), Io)
    kind = READ if kvm == "softkvm" else WRITE
    failure = machine.access(kind, PAGE - 8)  # behind all that the kernel keeps there
    assert isinstance(failure, BareFault | RamMmio)
    cause = the_one(machine.causes(failure))
    assert (cause.kind, cause.by, cause.resolvable) == (Kind.DEVICE_MAPPING, Remedy.NONE, False)
    assert "[vvar]" in cause.what
    if isinstance(failure, BareFault):
        assert machine.run() == failure, "it cannot be resolved, and so it is met again"


def test_guard_region(machine, ram):
    with Mapping.anonymous(2 * PAGE) as guest:
        machine.back(guest.address, guest.size)
        madvise = libc.madvise
        with invalidating(guest.address, guest.end):
            result = call(madvise, guest.address, PAGE, mman.MADV_GUARD_INSTALL)
        if result < 0:
            pytest.skip("needs MADV_GUARD_INSTALL (Linux 6.13)")
        failure = machine.access(READ)
        assert failure == BareFault(14)
        found = machine.causes(failure)
        if found[0].kind is Kind.PRESENT:
            pytest.skip("needs PM_GUARD_REGION in the pagemap (Linux 6.15)")
        assert (found[0].kind, found[0].by) == (Kind.GUARD_REGION, Remedy.REMOVE_GUARD)
        check(call(madvise, guest.address, PAGE, mman.MADV_GUARD_REMOVE), "madvise")
        assert machine.completes()


def test_what_is_resolved_meanwhile_is_present(machine, ram):
    machine.back(ram.guest.address, ram.size)
    ram.guest.protect(0, PAGE, mman.PROT_NONE)
    failure = machine.access(WRITE)
    assert failure == BareFault(14)
    ram.guest.protect(0, PAGE, RW)
    ram.guest.populate_write(0, PAGE)
    cause = the_one(machine.causes(failure))
    assert (cause.kind, cause.by) == (Kind.PRESENT, Remedy.RETRY)
    assert machine.completes()


def test_a_page_that_nothing_keeps_out_is_no_certain_cause_of_a_bare_fault(ram):
    access = Access(None, 8, FoundBy.DECODE, hva=ram.guest.address, kind=READ)
    bare, told = why(access, BareFault(14)), why(access, MemoryFault(0, PAGE, 2, 14))
    assert (bare.kind, bare.by, bare.certain) == (Kind.NOT_MAPPED_IN, Remedy.POPULATE, False)
    assert told.certain, "a KVM that exits on every page that is out means just that"


def test_looking_changes_nothing(ram):
    access = Access(None, 8, FoundBy.DECODE, hva=ram.guest.address, kind=WRITE)
    assert causes(access) == causes(access)
    assert vma.find(ram.guest.address) is not None
    status = ctypes.c_ubyte(1)
    check(call(libc.mincore, ctypes.c_void_p(ram.guest.address), PAGE, ctypes.byref(status)), "")
    assert status.value & 1 == 0, "no page came to be"


def test_of_two_pages_the_one_to_blame_is_told(machine, ram):
    ram.host.view()[: 2 * PAGE] = bytes(2 * PAGE)
    machine.back(ram.guest.address, ram.size)
    assert isinstance(machine.access(READ, 0), Io)
    ram.guest.protect(PAGE, PAGE, mman.PROT_NONE)
    failure = machine.access(READ, PAGE - 4)
    assert failure == BareFault(14)
    cause = the_one(machine.causes(failure))
    assert cause.kind is Kind.NO_ACCESS
    ram.guest.protect(PAGE, PAGE, RW)
    assert machine.completes()

"""Shadow paging, two-dimensional paging and the bare walk give one answer, whatever the tables.

Each example is a history: tables of random entries, then accesses, writes to the tables, and
changes of control registers, by two VMs with memory of their own, one on shadow pages and one with
NPT.
Before each access :func:`guestfault.x86.paging.walk` says what a processor would do; both must.
"""

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestfault.dialect.published import DIALECTS
from guestfault.memory.ram import GuestRam
from guestfault.softkvm.emulated_access import emulator_write_phys
from guestfault.softkvm.guest_access import kvm_mmu_gva_to_gpa
from guestfault.softkvm.guest_mmu import tlb_fill
from guestfault.softkvm.kvm_host import vcpu_load, vcpu_put
from guestfault.softkvm.mm import HostMm
from guestfault.softkvm.page_track import kvm_slot_page_track_is_active
from guestfault.softkvm.processor import Access
from guestfault.softkvm.refusal import Emulate, GuestException, Retry
from guestfault.softkvm.shadow import kvm_mmu_change_mmu_pages
from guestfault.softkvm.vm import SoftVm
from guestfault.uapi import kvm as uapi
from guestfault.x86.entries import (
    PT64_NX_MASK,
    PT_ACCESSED_MASK,
    PT_DIRTY_MASK,
    PT_PAGE_SIZE_MASK,
    PT_PRESENT_MASK,
    PT_USER_MASK,
    PT_WRITABLE_MASK,
    PagingMode,
)
from guestfault.x86.paging import (
    EntryUnreadable,
    NonCanonical,
    PageFault,
    PagingState,
    Translation,
    walk,
)
from guestfault.x86.paging_state import AccessKind
from guestfault.x86.registers import (
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
    GP_VECTOR,
    PF_VECTOR,
    PFERR_FETCH_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    X86_EFLAGS_AC,
)

PAGES = 256
READ_ONLY = range(240, 256)  # frames of a read-only slot
TABLES = range(1, 12)
PDPTS = 0x1_0000
KINDS = {
    Access.READ: AccessKind.READ,
    Access.WRITE: AccessKind.WRITE,
    Access.FETCH: AccessKind.FETCH,
}
PERM = {AccessKind.READ: 1, AccessKind.WRITE: 2, AccessKind.FETCH: 4}
MODES = {
    PagingMode.BITS32: (0, 0),
    PagingMode.PAE: (CR4_PAE, 0),
    PagingMode.FOUR_LEVEL: (CR4_PAE, EFER_LME | EFER_LMA),
    PagingMode.FIVE_LEVEL: (CR4_PAE | CR4_LA57, EFER_LME | EFER_LMA),
}


class NoProcessor:
    """Only the MMU is tried here: the registers that it asks for, and nothing that executes."""

    def __init__(self, _hooks: Any) -> None:
        self.rflags = 2

    def read_rflags(self) -> int:
        return self.rflags

    def read_cs(self) -> int:
        return 0

    def __getattr__(self, _name: str) -> Any:
        return lambda *_: None


class Half:
    """One VM, and the memory that it has for itself."""

    def __init__(self, mm: HostMm, tdp_enabled: bool, image: bytes) -> None:
        self.ram = GuestRam(PAGES << 12)
        self.ram.bytes[:] = image
        self.ram.guest.populate_write(0, PAGES << 12)
        self.vm = SoftVm(
            DIALECTS["linux-6.8"], mm, tdp_enabled=tdp_enabled, make_processor=NoProcessor
        )
        first, address = READ_ONLY.start << 12, self.ram.guest.address
        self.vm.set_user_memory_region(0, 0, first, address)
        self.vm.set_user_memory_region(
            1, first, len(READ_ONLY) << 12, address + first, uapi.KVM_MEM_READONLY
        )
        self.vcpu = self.vm.create_vcpu(0).arch

    def load(self, registers: dict[str, int]) -> None:
        for name, value in registers.items():
            setattr(self.vcpu.sregs, name, value)
        self.vcpu.load_sregs()
        at = registers["cr3"] & 0xFFF_FFE0
        words = bytes(self.ram.bytes[at : at + 32])
        self.pdptes = tuple(int.from_bytes(words[i : i + 8], "little") for i in range(0, 32, 8))
        if self.vcpu.mmu is not None:
            self.vcpu.mmu.pdptrs_cr3 = None  # as MOV to CR3 has it

    def access(self, gva: int, access: Access, cpl: int, ac: bool) -> Any:
        """The answer to a TLB miss: (page, rights), or the refusal."""
        self.vcpu.cpl = cpl
        self.vcpu.cpu.rflags = 2 | (X86_EFLAGS_AC if ac else 0)  # type: ignore[attr-defined]
        self.vcpu.forget_walks()  # it has no TLB, so that nothing stale is remembered
        for _ in range(20):
            found = tlb_fill(self.vcpu, gva, access)
            self.vcpu.requests.clear()
            if found is not None:
                return found
            if not isinstance(self.vcpu.refusal, Retry):
                return self.vcpu.refusal
        raise AssertionError("it retries for ever")

    def emulated(self, gva: int, kind: AccessKind) -> Any:
        """What KVM's emulator finds for the access that was just refused."""
        found = kvm_mmu_gva_to_gpa(self.vcpu, gva, kind)
        return found if isinstance(found, GuestException) else Emulate(found, kind)

    def tracked(self, gpa: int) -> bool:
        slot = self.vcpu.kvm.memslots.gfn_to_memslot(gpa >> 12)
        return kvm_slot_page_track_is_active(slot, gpa >> 12)

    def guest_writes(self, gpa: int, data: bytes) -> None:
        """As the guest itself does it, or as KVM does for it, if the frame is tracked."""
        if self.tracked(gpa):
            assert emulator_write_phys(self.vcpu, gpa, data)
            self.vcpu.requests.clear()
        else:
            self.ram.bytes[gpa : gpa + len(data)] = data

    def close(self) -> None:
        self.vm.close()
        self.ram.close()


class Guest:
    """Random tables, and random addresses that lead through them."""

    def __init__(self, seed: int, mode: PagingMode) -> None:
        self.random = random.Random(seed)
        self.mode = mode
        self.on = {"wp": True, "smep": False, "smap": False, "nxe": True, "pse": True}
        self.root = 0
        self.image = bytearray(PAGES << 12)
        for table in TABLES:
            for index in (*range(6), *range(508, 512), 1023):
                for size in (8,) if mode is not PagingMode.BITS32 else (4,):
                    if index * size < 4096:
                        at = (table << 12) + index * size
                        self.image[at : at + size] = self.entry(size)

    def entry(self, size: int) -> bytes:
        """Usually one that leads on."""
        r = self.random
        flags = PT_PRESENT_MASK | PT_WRITABLE_MASK | PT_USER_MASK | PT_ACCESSED_MASK
        chances = {
            PT_PRESENT_MASK: 0.03,
            PT_WRITABLE_MASK: 0.15,
            PT_USER_MASK: 0.15,
            PT_ACCESSED_MASK: 0.1,
        }
        for bit, chance in chances.items():
            if r.random() < chance:
                flags &= ~bit
        if r.random() < 0.5:
            flags |= PT_DIRTY_MASK
        if r.random() < 0.06:
            flags |= PT_PAGE_SIZE_MASK
        if size == 8 and r.random() < 0.15:
            flags |= PT64_NX_MASK
        if size == 8 and r.random() < 0.01:
            flags |= 1 << 50  # reserved
        target = r.choice(TABLES) if r.random() < 0.9 else r.randrange(PAGES + 8)
        if flags & PT_PAGE_SIZE_MASK and r.random() < 0.9:
            target = 0
        if target == PDPTS >> 12:
            # As a table it would get accessed flags, which PAE's registers, loaded from there, have
            # reserved: nested paging reads them anew, shadow paging does not.
            target = 0
        return (target << 12 | flags).to_bytes(8, "little")[:size]

    def pdpte(self) -> bytes:
        """One of PAE paging: nothing reserved is set, for then it could not be loaded."""
        r = self.random
        return (r.choice(TABLES) << 12 | (r.random() < 0.9)).to_bytes(8, "little")

    def new_root(self) -> None:
        """CR3: a table, or for PAE four entries of their own."""
        self.root = self.random.choice(TABLES) << 12
        if self.random.random() < 0.05:
            self.root = 0x4000_0000  # where no slot is
        if self.mode is PagingMode.PAE:
            self.root = PDPTS + 32 * self.random.randrange(4)

    def registers(self) -> dict[str, int]:
        cr4, efer = MODES[self.mode]
        on = self.on
        return {
            "cr0": CR0_PE | CR0_PG | (CR0_WP if on["wp"] else 0),
            "cr3": self.root,
            "cr4": cr4
            | (CR4_SMEP if on["smep"] else 0)
            | (CR4_SMAP if on["smap"] else 0)
            | (CR4_PSE if on["pse"] else 0),
            "efer": efer | (EFER_NXE if on["nxe"] else 0),
        }

    def addresses(self) -> list[int]:
        """Some of which differ at one level only, so that they share tables."""
        r = self.random
        found = []
        for _ in range(4):
            gva = self.address()
            shift = self.mode.shift(r.randint(1, self.mode.levels))
            found += [gva, gva ^ r.randint(1, 3) << shift]
        return found

    def address(self) -> int:
        r = self.random
        bits, width = self.mode.linear_bits, 10 if self.mode is PagingMode.BITS32 else 9
        gva, shift = 0, 12
        while shift < bits:
            last = (1 << min(width, bits - shift)) - 1
            index = r.choice((*range(6), *range(max(0, last - 3), last + 1)))
            gva |= min(index, last) << shift
            shift += width
        if bits > 32 and gva >> bits - 1 and r.random() < 0.9:
            gva |= (1 << 64) - (1 << bits)
        return gva | r.randrange(4096)


@pytest.mark.timeout(300)
@settings(max_examples=80, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from(list(MODES)), st.booleans())
def test_one_answer(seed: int, mode: PagingMode, small: bool) -> None:
    """Same translation, same exception, same flags set in the tables; nothing granted beyond."""
    guest, mm = Guest(seed, mode), HostMm()
    r = guest.random
    if mode is PagingMode.PAE:
        for at in range(PDPTS, PDPTS + 0x80, 8):
            guest.image[at : at + 8] = guest.pdpte()
    guest.new_root()
    halves = [Half(mm, False, bytes(guest.image)), Half(mm, True, bytes(guest.image))]
    shadow, nested = halves
    if small:
        kvm_mmu_change_mmu_pages(shadow.vcpu.kvm, 0)
    vcpu_load(shadow.vcpu)
    try:
        for half in halves:
            half.load(guest.registers())
        addresses = guest.addresses()
        for _ in range(100):
            what = r.random()
            if what < 0.7:
                access = r.choice(list(KINDS))
                check(guest, shadow, nested, r.choice(addresses), access, r.choice((0, 3)))
            elif what < 0.9:
                write(guest, halves, r.choice(addresses))
            else:
                change(guest, halves)
        assert bytes(shadow.ram.bytes) == bytes(nested.ram.bytes)
    finally:
        vcpu_put()
        for half in halves:
            half.close()
        mm.close()


def check(guest: Guest, shadow: Half, nested: Half, gva: int, access: Access, cpl: int) -> None:
    kind, user, ac = KINDS[access], cpl == 3, guest.random.random() < 0.3
    state = paging(guest, shadow)

    def read_entry(gpa: int, size: int) -> int | None:
        if gpa >> 12 >= PAGES:
            return None
        return int.from_bytes(shadow.ram.bytes[gpa : gpa + size], "little")

    expected = walk(state, gva, kind, user, read_entry, ac=ac)
    found = shadow.access(gva, access, cpl, ac)
    other = nested.access(gva, access, cpl, ac)
    barred = [at for at, *_ in getattr(expected, "entries", ()) if at >> 12 in READ_ONLY]
    if barred:
        # The first difference: to NPT the walk writes.  KVM makes the access in its place.
        assert other == Emulate(barred[0], AccessKind.WRITE)
        other = nested.emulated(gva, kind)
    match expected:
        case NonCanonical():
            assert found == other == GuestException(GP_VECTOR, 0)
        case PageFault(_, code):
            address = gva if state.linear_bits > 32 else gva & 0xFFFF_FFFF
            assert found == other == GuestException(PF_VECTOR, code, address)
        case EntryUnreadable(entry_gpa):
            # The other: to KVM's own walk it is an entry that is not present.
            code = PFERR_USER_MASK if user else 0
            if kind is AccessKind.WRITE:
                code |= PFERR_WRITE_MASK
            elif kind is AccessKind.FETCH and state.reports_fetch:
                code |= PFERR_FETCH_MASK
            assert found == GuestException(PF_VECTOR, code, gva)
            assert other == (found if barred else Emulate(entry_gpa, AccessKind.WRITE))
        case Translation(gpa):
            gfn = gpa >> 12
            if gfn >= PAGES or (gfn in READ_ONLY and kind is AccessKind.WRITE):
                for each in (found, other):
                    assert isinstance(each, Emulate)
                    assert each.gpa >> 12 == gfn
            elif isinstance(found, Emulate):
                assert (found.gpa >> 12, kind) == (gfn, AccessKind.WRITE)
                assert shadow.tracked(gpa)
            else:
                granted(state, expected, found, kind, user, ac)
                assert other == Emulate(gpa, kind) if barred else other[0] == found[0]
                assert not (found[1] & 2 and shadow.tracked(gpa))
            for at, value, size in expected.updates:
                if at >> 12 not in READ_ONLY:
                    written = bytes(shadow.ram.bytes[at : at + size])
                    assert int.from_bytes(written, "little") & value == value
    assert bytes(shadow.ram.bytes) == bytes(nested.ram.bytes)


def granted(
    state: PagingState,
    expected: Translation,
    found: tuple[int, int],
    kind: AccessKind,
    user: bool,
    ac: bool,
) -> None:
    """What the TLB is given is the right page, with the right asked for and none too many."""
    page, rights = found
    assert page == expected.gpa & -4096
    assert rights & PERM[kind]
    for each, perm in PERM.items():
        if rights & perm:
            assert state.permits(expected.rights, each, user, ac=ac)
    if rights & PERM[AccessKind.WRITE]:
        assert expected.dirty


def paging(guest: Guest, half: Half) -> PagingState:
    """The registers, and for PAE those that KVM has read from memory."""
    registers = guest.registers()
    pdptes = half.pdptes if guest.mode is PagingMode.PAE else None
    return PagingState(**registers, maxphyaddr=46, pdptes=pdptes)


def write(guest: Guest, halves: list[Half], gva: int) -> None:
    """The guest changes an entry, perhaps one on the way to an address that is accessed."""
    r, size = guest.random, guest.mode.entry_size
    index = gva >> guest.mode.shift(r.randint(1, guest.mode.levels)) & guest.mode.index_mask
    gpa, data = (r.choice(TABLES) << 12) + index % (4096 // size) * size, guest.entry(size)
    if r.random() < 0.1:
        data = data[:4]
    for half in halves:
        half.guest_writes(gpa, data)


def change(guest: Guest, halves: list[Half]) -> None:
    """The guest writes a control register."""
    name = guest.random.choice([*guest.on, "cr3"])
    if name == "cr3":
        guest.new_root()
    else:
        guest.on[name] = not guest.on[name]
    if not guest.on["wp"]:
        # With both, a supervisor can read what it was let write to: see FNAME(page_fault).
        guest.on["smap"] = False
    for half in halves:
        half.load(guest.registers())

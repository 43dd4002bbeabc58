"""The walk against two that are not ours: the Unicorn engine's MMU, and KVM's walker.

Unicorn runs one instruction through the same tables, in its default TLB mode, where it walks them
itself: it must take a page fault when our walk says so, and reach the page our walk names.
KVM answers ``KVM_TRANSLATE`` for tables with each bit of each entry flipped in turn.
"""

import ctypes
import fcntl
import itertools
import mmap
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import unicorn
from unicorn import x86_const as uc_x86

from guestfault.uapi import kvm as uapi
from guestfault.x86 import registers as reg
from guestfault.x86.paging import AccessKind, PageFault, PagingState, Translation, walk
from guestfault.x86.segments import FLAT_GDT, Segments
from guestfault.x86.tables import SIZE_4K, SIZE_4M, Mapping, PagingMode, TableBuilder

KINDS = READ, WRITE, FETCH = AccessKind.READ, AccessKind.WRITE, AccessKind.FETCH
MODES = [mode for mode in PagingMode if mode is not PagingMode.NONE]

# Guest physical layout.  Every page of data starts with "mov eax, <its own number>", which is also
# what a load from it returns.
CODE, GDT, STACK, DATA, TABLES, MEMORY = 0x1000, 0x2000, 0x3000, 0x8000, 0x10_0000, 0x40_0000
LOAD, STORE, IRETQ = b"\x8b\x03", b"\x89\x0b", b"\x48\xcf"  # mov eax,[rbx]; mov [rbx],ecx; iretq
STORED = 0xC0FFEE


def page_bytes(gpa: int) -> bytes:
    """``mov eax, gpa >> 12`` and some nops."""
    return b"\xb8" + (gpa >> 12).to_bytes(4, "little") + b"\x90\x90\x90"


def run_on_unicorn(
    tables: TableBuilder, state: PagingState, gva: int, kind: AccessKind, user: bool, ac: bool
) -> int | None:
    """One access at ``gva``: the guest physical page that it reached, or ``None`` for a page fault.

    The tables map CODE, GDT and STACK at their own addresses; CODE to the user too, if ``user``.
    """
    long = state.linear_bits > 32
    uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64 if long else unicorn.UC_MODE_32)
    # The models that have SMAP and LA57.
    five = state.mode is PagingMode.FIVE_LEVEL
    uc.ctl_set_cpu_model(uc_x86.UC_CPU_X86_ICELAKE_SERVER if five else uc_x86.UC_CPU_X86_BROADWELL)
    uc.mem_map(0, MEMORY)
    uc.mem_write(TABLES, tables.image())
    for gpa in range(DATA, TABLES, SIZE_4K):
        uc.mem_write(gpa, page_bytes(gpa))
    uc.mem_write(CODE, LOAD + STORE)
    uc.mem_write(GDT, FLAT_GDT)
    uc.mem_write(GDT + 0x800, IRETQ)
    uc.reg_write(uc_x86.UC_X86_REG_MSR, (reg.MSR_EFER, state.efer))
    for register, value in [("CR4", state.cr4), ("CR3", state.cr3), ("CR0", state.cr0)]:
        uc.reg_write(getattr(uc_x86, f"UC_X86_REG_{register}"), value)
    uc.reg_write(uc_x86.UC_X86_REG_GDTR, (0, GDT, len(FLAT_GDT) - 1, 0))
    flags = reg.X86_EFLAGS_FIXED | ac * reg.X86_EFLAGS_AC
    uc.reg_write(uc_x86.UC_X86_REG_EFLAGS, flags)
    if long:
        accumulator, base, counter = (
            uc_x86.UC_X86_REG_RAX,
            uc_x86.UC_X86_REG_RBX,
            uc_x86.UC_X86_REG_RCX,
        )
    else:
        accumulator, base, counter = (
            uc_x86.UC_X86_REG_EAX,
            uc_x86.UC_X86_REG_EBX,
            uc_x86.UC_X86_REG_ECX,
        )
    uc.reg_write(base, gva)
    uc.reg_write(counter, STORED)
    ip = {READ: CODE, WRITE: CODE + len(LOAD), FETCH: gva}[kind]

    exceptions: list[tuple[int, int]] = []

    def on_exception(uc: unicorn.Uc, vector: int, _: object) -> None:
        exceptions.append((vector, uc.reg_read(uc_x86.UC_X86_REG_CR2)))
        uc.emu_stop()

    uc.hook_add(unicorn.UC_HOOK_INTR, on_exception)
    if user:
        # Unicorn's CPL changes only as a processor's does: by a return to the outer ring.
        selectors = Segments.long_mode(3)
        frame = (ip, selectors.cs.selector, flags, STACK + 0x800, selectors.ss.selector)
        uc.mem_write(STACK, b"".join(word.to_bytes(8, "little") for word in frame))
        uc.reg_write(uc_x86.UC_X86_REG_RSP, STACK)
        uc.emu_start(GDT + 0x800, 0, count=1)
    if not exceptions:
        uc.emu_start(ip, 0, count=1)
    if exceptions:
        assert exceptions[0] == (reg.PF_VECTOR, gva)
        return None
    if kind is WRITE:
        stored = STORED.to_bytes(4, "little")
        pages = range(DATA, TABLES, SIZE_4K)
        return next(gpa for gpa in pages if uc.mem_read(gpa, 4) == stored)
    value: int = uc.reg_read(accumulator)
    if kind is READ:
        return int.from_bytes(value.to_bytes(8, "little")[1:4], "little") << 12
    return value << 12


def our_page(
    tables: TableBuilder, state: PagingState, gva: int, kind: AccessKind, user: bool, ac: bool
) -> int | None:
    """What :func:`run_on_unicorn` must return, from our walk."""
    result = walk(state, gva, kind, user, tables.read_entry, ac=ac)
    assert isinstance(result, Translation | PageFault)
    return result.gpa if isinstance(result, Translation) else None


def runtime(tables: TableBuilder, user: bool) -> None:
    """Map what :func:`run_on_unicorn` itself needs."""
    tables.map(Mapping(CODE, CODE, SIZE_4K, user=user))
    tables.map(Mapping(GDT, GDT, 2 * SIZE_4K))


@pytest.mark.parametrize("mode", MODES)
def test_unicorn_reaches_the_same_pages(mode: PagingMode):
    tables = TableBuilder(mode, TABLES)
    runtime(tables, user=False)
    for index, page in enumerate(mode.page_sizes):
        # Large pages can only map guest physical 0 onwards here, and that is where DATA is.
        gpa = 0xB000 if page == SIZE_4K else 0
        tables.map(Mapping((index + 1) * mode.page_sizes[-1], gpa, page, page_size=page))
    top = (1 << 64) - SIZE_4K if mode.linear_bits > 32 else 0xFFFF_F000
    tables.map(Mapping(top, 0xC000, SIZE_4K))
    places = [top]
    for index, page in enumerate(mode.page_sizes):
        start = (index + 1) * mode.page_sizes[-1]
        places += [start, start + SIZE_4K] if page == SIZE_4K else [start + 0xD000]
    reached = []
    for gva, kind in itertools.product(places, KINDS):
        expected = our_page(tables, tables.state, gva, kind, False, False)
        assert run_on_unicorn(tables, tables.state, gva, kind, False, False) == expected
        reached.append(expected)
    assert {0xB000, 0xC000, 0xD000, None} == set(reached)


@pytest.mark.parametrize(
    ("user", "wp", "cr4", "ac"),
    [
        (False, False, 0, False),
        (False, True, 0, False),
        (False, True, reg.CR4_SMEP, False),
        (False, True, reg.CR4_SMAP, False),
        (False, True, reg.CR4_SMAP | reg.CR4_SMEP, True),
        (False, False, reg.CR4_SMAP, False),
        (True, True, 0, False),
        (True, False, reg.CR4_SMAP | reg.CR4_SMEP, False),
    ],
)
def test_unicorn_knows_the_same_rights(user: bool, wp: bool, cr4: int, ac: bool):
    tables = TableBuilder(PagingMode.FOUR_LEVEL, TABLES)
    runtime(tables, user=user)
    start = 0x40_0000
    for number, (us, rw, x) in enumerate(itertools.product((False, True), repeat=3)):
        at = number * SIZE_4K
        tables.map(Mapping(start + at, DATA + at, SIZE_4K, user=us, writable=rw, executable=x))
    base = tables.state
    state = replace(base, cr0=base.cr0 if wp else base.cr0 & ~reg.CR0_WP, cr4=base.cr4 | cr4)
    for number, kind in itertools.product(range(8), KINDS):
        gva = start + number * SIZE_4K
        expected = our_page(tables, state, gva, kind, user, ac)
        assert run_on_unicorn(tables, state, gva, kind, user, ac) == expected, (number, kind)


class KvmTranslator:
    """A vCPU of ``/dev/kvm`` that only translates: raw ioctls, so that this room needs no other."""

    def __init__(self, vcpu: int, memory: mmap.mmap, maxphyaddr: int, gbpages: bool) -> None:
        self.vcpu = vcpu
        self.memory = memory
        self.maxphyaddr = maxphyaddr
        self.gbpages = gbpages

    def load(self, state: PagingState) -> None:
        """``KVM_SET_SREGS`` with the control registers and the segments that go with them."""
        sregs = uapi.kvm_sregs()
        fcntl.ioctl(self.vcpu, uapi.KVM_GET_SREGS, sregs)
        long = state.linear_bits > 32
        segments = Segments.long_mode() if long else Segments.protected_mode()
        for name, segment in vars(segments).items():
            setattr(sregs, name, uapi.kvm_segment(**vars(segment)))
        sregs.cr0, sregs.cr3, sregs.cr4 = state.cr0, state.cr3, state.cr4
        sregs.efer = state.efer
        missing = f"this KVM has no {state.mode.value} paging for guests"
        try:
            fcntl.ioctl(self.vcpu, uapi.KVM_SET_SREGS, sregs)
        except OSError as error:
            pytest.skip(f"{missing}: {error.strerror}")
        # kvm-pvm takes the registers, but leaves CR0.PG clear outside long mode.
        fcntl.ioctl(self.vcpu, uapi.KVM_GET_SREGS, sregs)
        if (sregs.cr0, sregs.cr4, sregs.efer) != (state.cr0, state.cr4, state.efer):
            pytest.skip(f"{missing}: CR0 reads back as {sregs.cr0:#x}, EFER as {sregs.efer:#x}")

    def translate(self, gva: int) -> int | None:
        """``KVM_TRANSLATE``: a supervisor read that raises nothing."""
        answer = uapi.kvm_translation(linear_address=gva)
        fcntl.ioctl(self.vcpu, uapi.KVM_TRANSLATE, answer)
        return answer.physical_address if answer.valid else None


@contextmanager
def kvm_translator() -> Iterator[KvmTranslator]:
    """A VM with MEMORY bytes at 0 and one vCPU with all that the host offers."""
    try:
        system = os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        pytest.skip(f"/dev/kvm: {error.strerror}")
    opened = [system]
    memory = mmap.mmap(-1, MEMORY)
    view = ctypes.c_char.from_buffer(memory)
    try:
        vm = fcntl.ioctl(system, uapi.KVM_CREATE_VM, 0)
        opened.append(vm)
        region = uapi.kvm_userspace_memory_region(
            slot=0, guest_phys_addr=0, memory_size=MEMORY, userspace_addr=ctypes.addressof(view)
        )
        fcntl.ioctl(vm, uapi.KVM_SET_USER_MEMORY_REGION, region)
        vcpu = fcntl.ioctl(vm, uapi.KVM_CREATE_VCPU, 0)
        opened.append(vcpu)
        size = ctypes.sizeof(uapi.kvm_cpuid_entry2)
        cpuid = bytearray(ctypes.sizeof(uapi.kvm_cpuid2) + 256 * size)
        head = uapi.kvm_cpuid2.from_buffer(cpuid)
        head.nent = 256
        fcntl.ioctl(system, uapi.KVM_GET_SUPPORTED_CPUID, cpuid)
        fcntl.ioctl(vcpu, uapi.KVM_SET_CPUID2, cpuid)
        maxphyaddr, gbpages = 36, False  # what a processor without the leaves has
        for index in range(head.nent):
            entry = uapi.kvm_cpuid_entry2.from_buffer(
                cpuid, ctypes.sizeof(uapi.kvm_cpuid2) + index * size
            )
            if entry.function == 0x8000_0008:
                maxphyaddr = entry.eax & 0xFF
            if entry.function == 0x8000_0001:
                gbpages = bool(entry.edx >> 26 & 1)
        yield KvmTranslator(vcpu, memory, maxphyaddr, gbpages)
    finally:
        for fd in reversed(opened):
            os.close(fd)
        del view
        memory.close()


@pytest.mark.parametrize("mode", MODES)
def test_kvm_translates_alike(mode: PagingMode):
    """Whichever bit of the tables is flipped, KVM and we agree on every address.

    The accessed flags that KVM sets on the way are those that the walk announces.
    """
    draw = random.Random(mode.value)
    tables = TableBuilder(mode, TABLES, accessed=False, dirty=False)
    places = []
    for index, page in enumerate(mode.page_sizes):
        start = (index + 1) * mode.page_sizes[-1]
        tables.map(Mapping(start, 0, page, page_size=page, user=bool(index & 1)))
        places += [start + draw.randrange(page), start + page]
    if mode is PagingMode.BITS32:
        tables.map(Mapping(7 * SIZE_4M, 0xA_0040_0000, SIZE_4M, page_size=SIZE_4M))
        places.append(7 * SIZE_4M + 0x123)
    image = tables.image()
    size = mode.entry_size
    # PDPTEs of PAE paging are registers, which a change in memory does not reach.
    first = SIZE_4K if mode is PagingMode.PAE else 0
    used = [at for at in range(first, len(image), size) if any(image[at : at + size])]
    # Bit 8 of an entry for a table is reserved by AMD alone; bits 59 to 62 hold protection keys.
    bits = [bit for bit in range(8 * size) if bit != 8 and not 59 <= bit <= 62]

    with kvm_translator() as kvm:
        kvm.memory[TABLES : TABLES + len(image)] = image
        # KVM has PSE-36 to the letter: 36 bits, whatever the processor has.
        maxphyaddr = 36 if mode is PagingMode.BITS32 else kvm.maxphyaddr
        state = replace(tables.state, maxphyaddr=maxphyaddr, gbpages=kvm.gbpages)
        kvm.load(state)

        def read_entry(gpa: int, size: int) -> int | None:
            if gpa + size > MEMORY:
                return None
            return int.from_bytes(kvm.memory[gpa : gpa + size], "little")

        valid = 0
        for flip, bit in [(used[0], None), *itertools.product(used, bits)]:
            kvm.memory[TABLES : TABLES + len(image)] = image
            if bit is not None:
                at = TABLES + flip + bit // 8
                kvm.memory[at] ^= 1 << bit % 8
            for gva in places:
                ours = walk(state, gva, READ, False, read_entry)
                before = kvm.memory[TABLES : TABLES + len(image)]
                theirs = kvm.translate(gva)
                if not isinstance(ours, Translation):
                    assert theirs is None, (hex(gva), hex(flip), bit, ours)
                    continue
                assert theirs == ours.gpa, (hex(gva), hex(flip), bit, ours)
                valid += 1
                after = bytearray(before)
                for gpa, value, width in ours.updates:
                    if gpa >= TABLES:
                        after[gpa - TABLES : gpa - TABLES + width] = value.to_bytes(width, "little")
                assert kvm.memory[TABLES : TABLES + len(image)] == bytes(after)
        assert valid > 100

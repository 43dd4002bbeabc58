"""A machine of a few pages, with everything that a scenario needs to ask its question.

A :class:`Machine` is one VM of the software KVM over a modelled address space, with scripted
guests.  A scenario lays out pages and slots, gives each vCPU a script and each thread a name, and
says at the end what the guest must have seen.  How a page is made *absent* depends on what the
dialect offers, as it does for a VMM (:class:`Absence`); that is the only place where worlds differ
from one dialect to another.

What went wrong meanwhile is a *finding*; the verdict is the worst of them.
"""

from __future__ import annotations

import enum
import errno
import functools
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace

from guestfault.dialect.record import Ask, Dialect, Enabling, Site
from guestfault.errors import KernelError
from guestfault.explore.model_mm import ModelMm
from guestfault.explore.model_userfaultfd import ModelUserfaultfd
from guestfault.explore.scenario import Kind, Verdict
from guestfault.explore.scheduler import spawn
from guestfault.explore.scripted_cpu import Insn, ScriptedCpu
from guestfault.linux.userfaultfd import PageFault
from guestfault.memory.ram import PAGE_SIZE
from guestfault.memory.view import Registered
from guestfault.softkvm.kvm_host import kvm_get_running_vcpu, vcpu_load, vcpu_put
from guestfault.softkvm.mmu import kvm_mmu_do_page_fault
from guestfault.softkvm.preempt import preemption_point, wait
from guestfault.softkvm.processor import Hooks
from guestfault.softkvm.vcpu import SoftVcpu
from guestfault.softkvm.vm import SoftVm
from guestfault.uapi import kvm as uapi

__all__ = [
    "CODE",
    "END_PORT",
    "HVA",
    "Absence",
    "Machine",
    "flat_real_mode",
    "reports_guest_faults",
]

HVA = 0x7F00_0000_0000
"""Where guest memory is in the host's address space."""
CODE = 0x1000
"""The page that the guests' code is in; vCPU n's begins at ``CODE + n * 0x100``."""
END_PORT = 0xF4
_CODE_STEP = 0x100
_HANDLERS = 0x800
_RANK = {kind: rank for rank, kind in enumerate(Kind)}
_RIGHTS = 0x202  # RFLAGS: interrupts are on


class Absence(enum.Enum):
    """What makes a guest's access to an absent page come back to userspace."""

    FAST_ONLY = "the slot's flag, or the VM's switch; userfaultfd for KVM's own accesses"
    BITMAP = "the slot's bitmap; userfaultfd for KVM's own accesses"
    SIGBUS = "userfaultfd with SIGBUS, for everybody's"

    @classmethod
    def of(cls, dialect: Dialect) -> Absence:
        """The best that the dialect has."""
        if dialect.missing is None:
            return cls.SIGBUS
        return cls.BITMAP if dialect.missing.ask is Ask.BITMAP else cls.FAST_ONLY


def reports_guest_faults(dialect: Dialect) -> str | None:
    """``applies`` of a scenario in which the dialect must annotate the guest's own faults."""
    sites = {Site.HANDLE_ERROR_PFN, Site.FAULTIN_PFN, Site.DO_USERFAULT}
    if dialect.annotated & sites:
        return None
    return "no fault in an ordinary slot is annotated"


class Machine:
    """One VM, ``pages`` pages of memory at :data:`HVA`, and what has been found out.

    ``actors`` are the threads; ``check`` is asked at the end, if all have ended, and adds findings.
    """

    rewindable = True

    def __init__(
        self,
        dialect: Dialect,
        pages: int,
        *,
        tdp_enabled: bool = True,
        vm_type: int = uapi.KVM_X86_DEFAULT_VM,
    ) -> None:
        self.dialect = dialect
        self.mm = ModelMm(HVA, pages)
        self.vm = SoftVm(
            dialect,
            self.mm,
            tdp_enabled=tdp_enabled,
            make_processor=self._make_processor,
            vm_type=vm_type,
        )
        self.kvm = self.vm.kvm
        self.kvm.schedule_work = self._schedule_work
        self._running = 0  # vCPUs, if somebody wants to know
        self._given_up: set[int] = set()
        self._works: dict[int, int] = {}
        self.actors: dict[str, Callable[[], None]] = {}
        self.vcpus: list[SoftVcpu] = []
        self.cpus: list[ScriptedCpu] = []
        self.uffd: ModelUserfaultfd | None = None
        self.bitmap_hva = 0
        self._findings: list[Verdict] = []
        self._next_program: dict[int, Insn] = {}
        self.check: Callable[[], None] = lambda: None
        self.in_slot: Callable[[int], bool] = self._in_slot
        _opt_in(self.vm, dialect)

    # -- building ----------------------------------------------------------------------------------

    def slot(self, number: int, gpa: int, pages: int, hva: int, flags: int = 0) -> None:
        """``KVM_SET_USER_MEMORY_REGION``, whose successor takes a bitmap."""
        bitmap = 0
        if flags & self.kvm.userfault_flag:
            bitmap = self.bitmap_hva
        self.vm.set_user_memory_region(
            number, gpa, pages * PAGE_SIZE, hva, flags, userfault_bitmap=bitmap
        )

    def vcpu(
        self,
        *program: Insn,
        registers: Mapping[str, int] | None = None,
        sregs: uapi.kvm_sregs | None = None,
    ) -> SoftVcpu:
        """One more vCPU, in real mode with flat segments, at the beginning of its script."""
        number = len(self.vcpus)
        at = CODE + number * _CODE_STEP
        code, by_address = _assemble(at, program)
        self._next_program = dict(by_address)
        page = self.mm.pages[HVA + CODE]
        if page.cached is None:
            page.map()
        assert page.cached is not None
        page.cached[at - CODE : at - CODE + len(code)] = code
        vcpu = self.vm.create_vcpu(number)
        vcpu.set_sregs(sregs or flat_real_mode())
        vcpu.arch.cpu.write_gprs({"rip": at, "rflags": _RIGHTS, **(registers or {})})
        self.vcpus.append(vcpu)
        return vcpu

    def _make_processor(self, hooks: Hooks) -> ScriptedCpu:
        cpu = ScriptedCpu(hooks, self.mm, len(self.cpus), self._next_program, self.in_vain)
        self.cpus.append(cpu)
        return cpu

    def handler(self, vector: int, *program: Insn) -> None:
        """What vCPU 0 runs when it gets this interrupt; its code is behind its script."""
        at = CODE + _HANDLERS
        code, by_address = _assemble(at, program)
        page, table = self.mm.pages[HVA + CODE], self.mm.pages[HVA]
        table.map()
        assert page.cached is not None
        assert table.cached is not None
        page.cached[at - CODE : at - CODE + len(code)] = code
        table.cached[vector * 4 : vector * 4 + 4] = at.to_bytes(4, "little")
        self._next_program.update(by_address)

    def prefault(self, gpa: int = CODE, error_code: int = 0) -> None:
        """Have an entry for a page before anything begins."""
        arch = self.vcpus[0].arch
        vcpu_load(arch)
        if arch.sregs_changed:
            arch.load_sregs()
        kvm_mmu_do_page_fault(arch, gpa, error_code)
        vcpu_put()

    def postcopy(self, number: int, gpa: int, pages: int) -> Callable[[int], None]:
        """A slot whose pages are absent, each in the way that the dialect has for it.

        They are in the page cache, whole: what remains is to let them in.  Returns what does that
        for a host address.
        """
        hva = HVA + gpa
        for at in range(hva, hva + pages * PAGE_SIZE, PAGE_SIZE):
            if self.mm.pages[at].cached is None:
                self.mm.pages[at].set(b"")
        absence = Absence.of(self.dialect)
        view = self.register(hva, pages, sigbus=absence is Absence.SIGBUS)

        def bring_in(page: int) -> None:
            view.bring_in(page - hva, PAGE_SIZE)

        self.slot(number, gpa, pages, hva, self.ask_for_exits(pages))
        if absence is not Absence.BITMAP:
            return bring_in

        def bring_in_and_clear(page: int) -> None:
            bring_in(page)
            self.set_userfault((page - hva) // PAGE_SIZE, False)

        return bring_in_and_clear

    def ask_for_exits(self, pages: int) -> int:
        """Turn the VM's switch on, if that is how the dialect is asked; else the slot's flags.

        Where it is done by a bitmap, it lies at the end of memory, all ones.
        """
        missing = self.dialect.missing
        if missing is None:
            return 0
        if missing.ask is Ask.VM_SWITCH:
            self.vm.set_mem_fault_nowait(True)
            return 0
        if missing.ask is Ask.BITMAP:
            last = self.mm.pages[max(self.mm.pages)]
            last.set(((1 << pages) - 1).to_bytes(8, "little"))
            last.map()
            self.bitmap_hva = last.hva
        return missing.value

    def set_userfault(self, index: int, absent: bool) -> None:
        """Set or clear the bit of the slot's page ``index``, as userspace does."""
        page = self.mm.pages[self.bitmap_hva]
        preemption_point("userspace: change the bitmap", page.key, True)
        if page.cached is None or not page.permits(True):
            raise KernelError("the bitmap", errno.EFAULT, f"at {page.hva:#x}")
        byte, bit = index // 8, 1 << index % 8
        page.cached[byte] = page.cached[byte] | bit if absent else page.cached[byte] & ~bit

    def register(self, hva: int, pages: int, *, sigbus: bool = False) -> Registered:
        """Register a range with a userfaultfd; how pages are brought into it."""
        self.uffd = ModelUserfaultfd(self.mm, sigbus=sigbus)
        mapping = SimpleNamespace(
            address=hva, protect=lambda at, size, prot: self.mm.protect(hva + at, size, prot)
        )
        return Registered.over(SimpleNamespace(size=pages * PAGE_SIZE, guest=mapping), self.uffd)

    def in_vain(self, vcpu: int, gpa: int) -> None:
        """A guest makes one access again and again, and no KVM_RUN returns: kick it out."""
        text = f"vCPU {vcpu} makes its access to {gpa:#x} again and again in one KVM_RUN"
        self.found(Kind.STUCK, f"{text}, and userspace hears nothing")
        self._given_up.add(vcpu)
        self.vcpus[vcpu].kick()

    def given_up(self, vcpu: int) -> bool:
        """Whether that has happened to it."""
        return vcpu in self._given_up

    def handle_faults(self, bring_in: Callable[[int], None]) -> None:
        """Have a thread that reads the userfaultfd and lets pages in, while there are vCPUs."""
        uffd = self.uffd
        assert uffd is not None

        def handler() -> None:
            while True:
                wait("handler: poll", "uffd", lambda: uffd.readable() or not self._running)
                events = uffd.read_events()
                if not events:
                    return
                for event in events:
                    assert isinstance(event, PageFault)
                    bring_in(event.address)

        self._running = len(self.vcpus)
        self.actors["handler"] = handler

    def ended(self, vcpu: int) -> None:
        """Said by the thread of a vCPU when it ends."""
        if self._running:
            preemption_point(f"vCPU {vcpu}'s thread ends", "uffd", True)
            self._running -= 1

    def _schedule_work(self, work: Callable[[], None]) -> None:
        vcpu = kvm_get_running_vcpu()
        number = -1 if vcpu is None else vcpu.vcpu_id
        count = self._works[number] = self._works.get(number, 0) + 1
        spawn(f"worker {count} of vCPU {number}", work)

    def populate(self, hva: int) -> None:
        """Fault a page in as userspace does; if there is no memory for it, again."""
        r = -errno.ENOMEM
        while r == -errno.ENOMEM:
            r = self.mm.populate(hva, PAGE_SIZE)
        if r < 0:
            raise KernelError("madvise(MADV_POPULATE_WRITE)", -r, f"{hva:#x}")

    # -- finding out -------------------------------------------------------------------------------

    def found(self, kind: Kind, text: str) -> None:
        """Something that the verdict must tell."""
        self._findings.append(Verdict(kind, text))

    def expect_registers(self, vcpu: int, *allowed: Mapping[str, int]) -> None:
        """What the guest must have loaded: one of these."""
        if self.stopped(vcpu):
            return
        gprs = self.cpus[vcpu].named_gprs()
        if not any(all(gprs[name] == value for name, value in one.items()) for one in allowed):
            seen = ", ".join(f"{name} {gprs[name]:#x}" for name in allowed[0])
            self.found(Kind.MEMORY, f"vCPU {vcpu} has loaded {seen}")

    def stopped(self, vcpu: int) -> bool:
        """Whether userspace has given the vCPU up."""
        return bool(getattr(self.actors[f"vcpu{vcpu}"], "stopped", ""))

    def expect_memory(self, hva: int, *allowed: bytes) -> None:
        """What memory must hold: one of these."""
        page = self.mm.pages[hva & -PAGE_SIZE]
        at, size = hva % PAGE_SIZE, len(allowed[0])
        held = bytes(size) if page.cached is None else bytes(page.cached[at : at + size])
        if held not in allowed:
            self.found(Kind.MEMORY, f"memory at {hva:#x} holds {held.hex(' ')}")

    def verdict(self, *, stuck: str | None) -> Verdict:
        """See :meth:`guestfault.explore.scenario.World.verdict`."""
        for number, cpu in enumerate(self.cpus):
            for text in cpu.violations:
                self.found(Kind.MEMORY, f"vCPU {number}: {text}")
        if stuck is not None:
            self.found(Kind.STUCK, stuck)
        else:
            self.check()
        for text in self.kvm.warned:
            self.found(Kind.WARNED, text)
        if not self._findings:
            return Verdict(Kind.CORRECT)
        return max(self._findings, key=lambda finding: (_RANK[finding.kind], finding.text))

    def close(self) -> None:
        """Nothing is held that outlives it.  (``SoftVm.close`` would wait for who is stuck.)"""

    def _in_slot(self, gpa: int) -> bool:
        return self.kvm.memslots.gfn_to_memslot(gpa >> 12) is not None


def _opt_in(vm: SoftVm, dialect: Dialect) -> None:
    """Ask for annotations, where the dialect wants to be asked."""
    info = dialect.info
    if info is not None and info.enabling is not Enabling.INFORMATIONAL:
        reasons = dialect.flag_unknown | dialect.flag_missing
        vm.enable_cap(info.number, (1 if info.enabling is Enabling.OPT_IN else reasons,))


@functools.cache
def _assemble(at: int, program: Sequence[Insn]) -> tuple[bytes, dict[int, Insn]]:
    """The code of a script, and its instructions by address."""
    code, by_address = b"", {}
    for insn in program:
        by_address[at + len(code)] = insn
        code += insn.code
    return code, by_address


@functools.cache
def flat_real_mode() -> uapi.kvm_sregs:
    """The system registers of a guest in real mode.  Do not change them, but a copy."""
    sregs = uapi.kvm_sregs()
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment = getattr(sregs, name)
        segment.limit, segment.type, segment.s, segment.present = 0xFFFF, 3, 1, 1
    sregs.cs.type = 11
    sregs.ldt.limit, sregs.ldt.type, sregs.ldt.present = 0xFFFF, 2, 1
    sregs.tr.limit, sregs.tr.type, sregs.tr.present = 0xFFFF, 11, 1
    sregs.gdt.limit = sregs.idt.limit = 0xFFFF
    sregs.cr0 = 0x60000010
    sregs.apic_base = 0xFEE00900
    return sregs

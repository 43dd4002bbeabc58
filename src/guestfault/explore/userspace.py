"""The VMM's side of a vCPU: run, look at the outcome, resolve, run again; and what it was told.

What userspace knows, it knows through the same code as elsewhere
(:func:`guestfault.fault.outcome.outcome`, :mod:`guestfault.memory.view`).  What it cannot know is
here as well: the processor's last miss and the model's last :class:`.model_mm.Failure` say which
access it really was, and each exit is judged by that:

- a fault that is reported must be the access that failed;
- a failure that comes back bare is :attr:`~.scenario.Kind.LOST` if the dialect annotates that kind
  of access, and honestly :attr:`~.scenario.Kind.BARE` if it does not;
- a device access must be one that the guest makes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from guestfault.dialect.interface import EHWPOISON
from guestfault.dialect.record import Site
from guestfault.errors import KernelError
from guestfault.explore.model_mm import Failure
from guestfault.explore.scenario import Kind
from guestfault.explore.scheduler import annotate, recording
from guestfault.explore.scripted_cpu import Asked
from guestfault.explore.world import END_PORT, Machine
from guestfault.fault.outcome import (
    BareFault,
    Interrupted,
    Io,
    MemoryFault,
    Mmio,
    Outcome,
    RamMmio,
    Shutdown,
    outcome,
)
from guestfault.memory.ram import PAGE_SIZE
from guestfault.softkvm.preempt import preemption_point

__all__ = ["Userspace"]

_PAGE = -PAGE_SIZE
_SAME_FAULT = 6  # as often as a guest's page may be resolved in vain before the VMM gives up


class Userspace:
    """The thread of one vCPU.  Call it: it runs until the guest is done, or it must stop.

    ``bring_in(hva)`` lets a page in; it may raise :class:`~guestfault.errors.KernelError`.
    ``devices`` maps the gpas of device registers to what a read gives.  :attr:`seen` are the
    outcomes, in order; :attr:`written` what the guest wrote to devices.
    """

    def __init__(
        self,
        machine: Machine,
        vcpu: int = 0,
        *,
        bring_in: Callable[[int], None],
        devices: Mapping[int, bytes] | None = None,
        expected_writes: Sequence[tuple[int, bytes]] = (),
    ) -> None:
        self.machine = machine
        self.vcpu = machine.vcpus[vcpu]
        self.cpu = machine.cpus[vcpu]
        self.number = vcpu
        self.bring_in = bring_in
        self.devices = devices or {}
        self.expected_writes = expected_writes
        self.seen: list[Outcome] = []
        self.written: list[tuple[int, bytes]] = []
        self.done = False
        self.stopped = ""
        self._last_fault = -1, -1
        self._repeats = 0
        self._answer = b""
        self._interface = machine.dialect.interface

    def __call__(self) -> None:
        """Run the vCPU until the guest is done, or it must stop."""
        while not self.done and not self.stopped:
            self.once()
        self.machine.ended(self.number)

    def once(self) -> Outcome:
        """One ``KVM_RUN`` and what follows from it."""
        self.machine.mm.last_failure.pop(self.number, None)
        self.cpu.begin()
        self._look_at_answer()
        ret = self.vcpu.run()
        preemption_point("userspace: read kvm_run", ("kvm_run", self.number))
        came_to = outcome(ret, self.vcpu.kvm_run, self._interface, self.machine.in_slot)
        self.seen.append(came_to)
        if recording():
            annotate(f"KVM_RUN returns {ret}: {came_to}")
        match came_to:
            case MemoryFault():
                self._judge_fault(came_to)
                self._resolve(came_to.gpa)
            case BareFault():
                self._judge_bare(came_to)
                self._resolve(self._truth()[0])
            case RamMmio():
                self._ram_mmio(came_to)
            case Mmio():
                self._mmio(came_to)
            case Io(port=port) if port == END_PORT:
                self.done = True
            case Interrupted():
                if self.machine.given_up(self.number):
                    self.stopped = "it gets nowhere"
            case Shutdown():
                self.stopped = "the guest shut down"
            case _:
                self._unexpected(ret, came_to)
        return came_to

    def _unexpected(self, ret: int, came_to: Outcome) -> None:
        self.stopped = f"KVM_RUN returns {ret}: {came_to}"
        self.machine.found(Kind.CORRUPTED, f"vCPU {self.number}: {self.stopped}")

    def _look_at_answer(self) -> None:
        """What stands in kvm_run for the next KVM_RUN to take is what we left there."""
        answer, self._answer = self._answer, b""
        if answer:
            preemption_point("userspace: look at its answer", ("kvm_run", self.number))
        if answer and bytes(self.vcpu.kvm_run.mmio.data[: len(answer)]) != answer:
            text = "the answer to its device read has changed before KVM has taken it"
            self.machine.found(Kind.CORRUPTED, f"vCPU {self.number}: {text}")

    def _answer_mmio(self, data: bytes) -> None:
        preemption_point("userspace: answer in kvm_run", ("kvm_run", self.number), True)
        self.vcpu.kvm_run.mmio.data[: len(data)] = data
        self._answer = data

    # -- what it really was ------------------------------------------------------------------------

    def _truth(self) -> tuple[int | None, bool, str]:
        """The access that failed last: its gpa, whether it is a write, and whose it is."""
        failure: Failure | None = self.machine.mm.last_failure.get(self.number)
        asked: Asked | None = self.cpu.asked
        gpas = [] if failure is None else failure.gpas
        if failure is not None and gpas:
            gpa = gpas[0]
            if asked is not None and asked.gpa & _PAGE == gpa & _PAGE:
                return asked.gpa, asked.write, failure.how
            return gpa, failure.write, failure.how
        return (None, False, "") if asked is None else (asked.gpa, asked.write, "guest fault")

    def _judge_fault(self, fault: MemoryFault) -> None:
        gpa, write, how = self._truth()
        found = self.machine.found
        told = f"vCPU {self.number} is told of {fault.size} bytes at {fault.gpa:#x}"
        if gpa is None:
            found(Kind.WRONG, f"{told}, and no access has failed")
            return
        if not (fault.gpa <= gpa < fault.gpa + max(fault.size, 1)) and fault.gpa != gpa & _PAGE:
            found(Kind.WRONG, f"{told}; what failed is {gpa:#x} ({how})")
            return
        flag = self._interface.flags.get("WRITE", 0)
        if flag and bool(fault.flags & flag) is not write:
            found(Kind.WRONG, f"{told} as a {'write' if not write else 'read'}, which it was not")

    def _judge_bare(self, bare: BareFault) -> None:
        gpa, write, how = self._truth()
        where = "an access" if gpa is None else f"the {'write' if write else 'read'} at {gpa:#x}"
        text = f"vCPU {self.number}: {where} ({how}) fails with a bare errno {bare.errno}"
        due = bare.errno != EHWPOISON and gpa is not None and self._is_annotated(gpa, how)
        self.machine.found(Kind.LOST if due else Kind.BARE, text)

    def _is_annotated(self, gpa: int, how: str) -> bool:
        """Whether the dialect annotates such a failure, as far as its record says."""
        dialect, kvm = self.machine.dialect, self.machine.kvm
        sites = dialect.annotated
        if how == "copy_from_user":
            return Site.VCPU_READ_GUEST_PAGE in sites
        if how == "copy_to_user":
            return Site.VCPU_WRITE_GUEST_PAGE in sites
        slot = kvm.memslots.gfn_to_memslot(gpa >> 12)
        if slot is None:
            return False
        if dialect.annotates_only_missing:
            return Site.FAULTIN_PFN in sites and how == "fast GUP"
        return Site.HANDLE_ERROR_PFN in sites

    # -- what userspace does -----------------------------------------------------------------------

    def hva(self, gpa: int) -> int | None:
        """The host address behind a gpa, as the slots are now."""
        slot = self.machine.kvm.memslots.gfn_to_memslot(gpa >> 12)
        if slot is None:
            return None
        return slot.hva_of_gfn(gpa >> 12) + (gpa & ~_PAGE)

    def _resolve(self, gpa: int | None) -> None:
        hva = None if gpa is None else self.hva(gpa)
        if hva is None:
            self.stopped = "no slot is where the fault is said to be"
            where = "nowhere" if gpa is None else f"at {gpa:#x}, where no slot is"
            self.machine.found(Kind.WRONG, f"vCPU {self.number} is told of a fault {where}")
            return
        fault = self.cpu.rip, hva & _PAGE
        self._repeats = self._repeats + 1 if fault == self._last_fault else 0
        self._last_fault = fault
        if self._repeats >= _SAME_FAULT:
            self.stopped = f"the same fault {self._repeats + 1} times"
            self.machine.found(Kind.STUCK, f"vCPU {self.number}: {self.stopped}, each resolved")
            return
        try:
            self.bring_in(hva & _PAGE)
        except KernelError as error:
            self.stopped = f"the page cannot be had: {error}"

    def _ram_mmio(self, exit_: RamMmio) -> None:
        """KVM's emulator could not reach memory: bring it in and do the access in its place."""
        hva = self.hva(exit_.gpa)
        assert hva is not None
        self._resolve(exit_.gpa)
        if self.stopped:
            return
        if exit_.is_write:
            self._look_at_write(exit_.gpa, exit_.data)
            self.machine.mm.write_file(hva, exit_.data)
        else:
            self._answer_mmio(self.machine.mm.read_file(hva, exit_.length))

    def _look_at_write(self, gpa: int, data: bytes) -> None:
        if (gpa, data) not in self.expected_writes:
            text = f"a write of {data.hex(' ')} to {gpa:#x}"
            told = f"vCPU {self.number} is told of {text}, which nobody makes"
            self.machine.found(Kind.CORRUPTED, told)

    def _mmio(self, exit_: Mmio) -> None:
        found = self.machine.found
        if exit_.is_write:
            self._look_at_write(exit_.gpa, exit_.data)
            self.written.append((exit_.gpa, exit_.data))
            return
        value = self.devices.get(exit_.gpa)
        if value is None or len(value) != exit_.length:
            text = f"a device read of {exit_.length} bytes at {exit_.gpa:#x}"
            found(Kind.CORRUPTED, f"vCPU {self.number} is told of {text}, which nobody makes")
            self.stopped = "no such device"
            return
        self._answer_mmio(value)

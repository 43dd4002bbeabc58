"""What one vCPU's thread does: run, look at the outcome, resolve or report, run again."""

from __future__ import annotations

import errno as _errno
import signal
from collections.abc import Callable
from dataclasses import replace
from typing import NoReturn

from guestfault.dialect.interface import MemoryFaultInterface
from guestfault.errors import GuestfaultError
from guestfault.fault.access import Access, AccessKind
from guestfault.fault.cause.why import why
from guestfault.fault.locate.chain import Locators
from guestfault.fault.locate.poison import from_poison
from guestfault.fault.outcome import (
    BareFault,
    Hlt,
    InternalError,
    Interrupted,
    Io,
    MemoryFault,
    Poisoned,
    RamMmio,
    Shutdown,
    outcome,
)
from guestfault.kvm.protocols import Vcpu
from guestfault.linux.sigbus import SigbusHeld, take_sigbus
from guestfault.memory.slots import SlotMap
from guestfault.paging.guard import FaultLoopError
from guestfault.paging.resolver import FaultResolver
from guestfault.paging.watchdog import Watchdog
from guestfault.vmm.arming import TracepointArming
from guestfault.vmm.compiled import Compiled
from guestfault.vmm.console import GuestConsole
from guestfault.vmm.errors import GuestStoppedError, PoisonedPageError, UnlocatedFaultError

__all__ = ["VcpuLoop"]


class VcpuLoop:
    """Runs one vCPU until the guest is done, someone stops it, or it cannot go on.

    ``stopping`` is asked after every interruption: with it, a failed access too is an effect of the
    stop and not a fault.  Without ``locators`` a bare failure stays without a name, and stops it.
    With ``compiled`` most failed accesses are resolved before they come here.

    The thread that runs it holds SIGBUS meanwhile (:mod:`guestfault.linux.sigbus`).
    """

    def __init__(
        self,
        vcpu: Vcpu,
        interface: MemoryFaultInterface | None,
        slots: SlotMap,
        resolver: FaultResolver,
        stopping: Callable[[], bool],
        locators: Locators | None = None,
        arming: TracepointArming | None = None,
        compiled: Compiled | None = None,
    ) -> None:
        self.vcpu = vcpu
        self.resolver = resolver
        self.console = GuestConsole()
        self.error: GuestfaultError | None = None
        self._interface = interface
        self._slots = slots
        self._stopping = stopping
        self._locators = locators
        self._arming = arming
        self._compiled = compiled
        self._unanswered: RamMmio | None = None
        self._silent: tuple[int, Access] | None = None
        self.watchdog = Watchdog()
        self.lost: dict[Access, bool] = {}
        """Pages that KVM sent SIGBUS for in this run, and whether the vCPU had accessed them."""
        vcpu.set_interrupting_signals({signal.SIGBUS})

    def run(self) -> bool:
        """Run the vCPU; whether its guest is done.

        ``False`` means that it was stopped: :attr:`error` says why, or is ``None`` if it was asked
        to.  It can be run again: an access that failed is made again, an exit that was not answered
        is answered then.
        """
        self.error = None
        self.lost.clear()
        self._got_on()  # what stopped it last may have been mended
        try:
            with SigbusHeld():
                while not self.console.done and not self._stopping():
                    self._once()
        except GuestfaultError as error:
            self.error = error
        finally:
            if self._compiled is not None:
                self._compiled.leave()
            if self._arming is not None:
                self._arming.disarm()
        return self.console.done

    def _once(self) -> None:
        vcpu = self.vcpu
        if self._unanswered is not None:
            # The next KVM_RUN takes what stands in kvm_run.mmio for the answer, whatever it is.
            self.resolver.resolve_ram_mmio(self._unanswered)
            self._unanswered = None
        self.watchdog.entering()
        entry = self._compiled.entry() if self._compiled is not None else None
        ret = vcpu.run() if entry is None else entry.run()
        self.watchdog.left()
        if ret is None:  # nothing but faults that have been resolved
            self.watchdog.progress()
            return
        sigbus = take_sigbus() if ret == -_errno.EINTR else None
        match outcome(ret, vcpu.kvm_run, self._interface, self._in_slot, sigbus):
            case MemoryFault() as fault:
                if not self._stopping():
                    self.resolver.resolve_annotated(fault)
            case RamMmio() as exit_:
                self._unanswered = exit_
            case Io() as io:
                self._got_on()
                self._port_io(io)
            case Interrupted():
                if not self._stopping():
                    self._look_for_progress()
            case Poisoned() as poisoned:
                self._poisoned(poisoned)
            case BareFault() as bare:
                if not self._stopping():
                    self._bare(bare)
            case Shutdown():
                self._stop("the guest shut down (a triple fault)")
            case Hlt():
                self._stop("the guest halted before it was done, and nothing can wake it")
            case InternalError() as error:
                self._internal_error(error)
            case other:
                self._stop(f"KVM_RUN ended with {other}, which a built-in guest never causes")

    def _got_on(self) -> None:
        """The vCPU left KVM_RUN for another reason than a failed access."""
        self.resolver.guard.progress()
        self.watchdog.progress()
        self._silent = None

    def _bare(self, fault: BareFault) -> None:
        if self._locators is None:
            self.resolver.account.bare += 1
            name = _errno.errorcode.get(fault.errno, "EHWPOISON")
            why = f"KVM_RUN failed with a bare -{name}: this KVM does not say which access it was"
            why += "; use --locate all, or --mode uffd"
            raise UnlocatedFaultError(self.vcpu.vcpu_id, self.rip, fault.errno, why)
        if self._arming is not None:
            self._arming.bare_fault()
        self.resolver.resolve_bare(fault, self._locators.locate(fault))

    def _poisoned(self, poisoned: Poisoned) -> None:
        """Told while it is being stopped, too: a page that is lost is no effect of that."""
        # The RAM is mapped twice, and the kernel that finds memory broken by itself (not in a
        # KVM_RUN) names either place (collect_procs, mm/memory-failure.c).
        ram = self.resolver.pager.ram
        offset = poisoned.hva - ram.host.address
        if 0 <= offset < ram.size:
            poisoned = replace(poisoned, hva=ram.guest.address + offset)
        access = from_poison(poisoned, self._slots)
        self.lost[access] = poisoned.action_required
        if poisoned.action_required:
            if self._locators is not None:
                access = self._locators.locate(poisoned)[0]
            cause = why(access, poisoned)
            raise PoisonedPageError(self.vcpu.vcpu_id, self.rip, access, cause)
        # Nobody has accessed it.  It may be overwritten as a whole before anybody does.

    def _internal_error(self, error: InternalError) -> None:
        """KVM's emulator gave an instruction up: perhaps because it could not fetch it."""
        if not self._stopping():
            access = self._locators.standing_at() if self._locators is not None else None
            if access is None or access.kind is not AccessKind.FETCH:
                code = f" at bytes {error.instruction.hex(' ')}" if error.instruction else ""
                self._stop(f"KVM internal error, suberror {error.suberror}{code}")
            self.resolver.resolve_fetch(access)
        # KVM has queued an invalid-opcode exception along with the exit
        # (handle_emulation_failure, arch/x86/kvm/x86.c); KVM_SET_REGS takes it back.
        self.vcpu.set_regs(self.vcpu.get_regs())

    def _look_for_progress(self) -> None:
        """After a kick of the watchdog's: is the vCPU waiting for a page without saying so?"""
        rip = self.rip
        if self._locators is None or not self.watchdog.stands_still(rip):
            return
        access = self._locators.standing_at()
        if access is not None:
            self.resolver.resolve_silent(access)
            self.watchdog.progress()
            self._silent = rip, access
        elif self._silent is not None and self._silent[0] == rip:
            # The page that it waited for is there, and still it stands where it stood.
            raise FaultLoopError(self.vcpu.vcpu_id, self._silent[1], rip, 2, "no exit was made")

    def _port_io(self, io: Io) -> None:
        data = bytes(self.vcpu.run_area[io.data_offset : io.data_offset + io.size * io.count])
        if io.is_in or not self.console.wrote(io.port, data):
            self._stop(f"the guest accessed port {io.port:#x}, where no device is")

    @property
    def rip(self) -> int:
        """Where the vCPU stands."""
        return int(self.vcpu.get_regs().rip)

    def _stop(self, what: str) -> NoReturn:
        raise GuestStoppedError(self.vcpu.vcpu_id, self.rip, what)

    def _in_slot(self, gpa: int) -> bool:
        return self._slots.find(gpa) is not None

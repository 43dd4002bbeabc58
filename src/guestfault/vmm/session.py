"""A VM restored from a snapshot with none of its memory present.

:class:`Session` puts the parts together and runs them: RAM and the view in which its pages are
absent, the VM with its slots, a thread per vCPU, and in ``uffd`` mode the handler's thread.

It stops as a whole.  When a vCPU cannot go on, or a source fails, that vCPU does not run on, every
other is stopped too, and :attr:`Session.failure` says why; :meth:`Session.run` may be called again
once what failed has been mended, and every vCPU goes on where it stood.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from enum import StrEnum

from guestfault.closing import Closing
from guestfault.dialect.interface import MemoryFaultInterface
from guestfault.dialect.published import recognise
from guestfault.dialect.record import Dialect
from guestfault.errors import GuestfaultError, Unavailable
from guestfault.fault.locate.chain import Locators
from guestfault.fault.locate.decode import DecodeLocator
from guestfault.fault.locate.host_view import HostView
from guestfault.fault.locate.residency import HostResidency
from guestfault.guest.snapshot import Snapshot
from guestfault.kvm.protocols import System, Vcpu, Vm
from guestfault.linux.userfaultfd import PageFault
from guestfault.memory.ram import GuestRam
from guestfault.memory.slots import MemorySlot, SlotMap
from guestfault.memory.view import Registered
from guestfault.paging.around import OFF, slot_pages
from guestfault.paging.handler import UserfaultHandler
from guestfault.paging.pager import Pager
from guestfault.paging.prefetcher import Plan, Prefetcher
from guestfault.paging.resolver import FaultResolver
from guestfault.paging.source.base import (
    PageSource,
    SourceInterruptedError,
    interrupt,
    resume,
)
from guestfault.paging.working_set import RecordingSource
from guestfault.uapi import kvm as uapi
from guestfault.vmm.arming import TracepointArming
from guestfault.vmm.compiled import Compiled, Loop
from guestfault.vmm.eager import bring_in_eagerly
from guestfault.vmm.exits import Absence, ask_for_annotations, ask_for_exits
from guestfault.vmm.vcpu_loop import VcpuLoop

__all__ = ["Mode", "Session"]

_STOP_GRACE = 0.05  # seconds for a kicked vCPU to come back by itself


class Mode(StrEnum):
    """Who brings an absent page in."""

    EXIT = "exit"  # the access fails, and the vCPU's own thread does it
    UFFD = "uffd"  # the vCPU's thread sleeps, and a handler's thread does it


class Session(Closing):
    """One VM of ``snapshot`` on ``system``, its pages brought in from ``source``.

    The session takes the source's bytes to be the snapshot's memory and leaves both, and the
    system, to be closed by the caller; to stop, it interrupts the source, which must not serve
    another session at the same time.  With ``locate`` a bare failure is named by the locators;
    without it the kernel's word is all there is, and a bare failure stops the session.

    ``dialect`` is the version of the interface to speak with the KVM: to enable, and to decode by.
    Without it, it is the one that the KVM's capabilities tell
    (:func:`guestfault.dialect.interface.probe`), which some versions cannot be known by.

    ``loop`` chooses who resolves failed accesses (:mod:`guestfault.vmm.compiled`), ``fault_around``
    how many pages may come in with one that was asked for (:mod:`guestfault.paging.around`).

    ``ahead`` is what to bring in before it is asked for (:mod:`guestfault.paging.prefetcher`).
    With ``record`` nothing is, and no loop is compiled: :attr:`recording` then has the pages in the
    order in which the guest touched them.

    Raises :class:`~guestfault.errors.Unavailable` if this machine cannot do ``mode`` or ``loop``,
    and :class:`~guestfault.errors.KvmError` if the KVM refuses what belongs to ``dialect``.
    """

    def __init__(
        self,
        system: System,
        snapshot: Snapshot,
        source: PageSource,
        mode: Mode = Mode.EXIT,
        *,
        dialect: Dialect | None = None,
        locate: bool = True,
        loop: Loop = Loop.AUTO,
        fault_around: int = OFF,
        ahead: Plan | None = None,
        record: bool = False,
    ) -> None:
        self.began = time.monotonic()
        self.system = system
        self.snapshot = snapshot
        self.mode = mode
        self.why_plain: Unavailable | None = None  # loop, where the compiled one would serve
        self.recording = RecordingSource(source) if record else None
        self.prefetcher: Prefetcher | None = None
        self.fault_around = OFF if record else fault_around
        self._source = source = self.recording or source
        self._undo: list[Callable[[], None]] = []
        self._stopping = False
        self._threads: dict[VcpuLoop, threading.Thread] = {}
        self._defect: Exception | None = None  # a fault of ours or of a source's, not of the run
        self.failure: GuestfaultError | None = None
        self._ran_on: dict[int | None, VcpuLoop] = {}  # the threads of earlier runs, too
        self._unserved: PageFault | None = None  # the one that the handler's source failed at
        self.failed_vcpu: VcpuLoop | None = None  # the one that the failure stopped, if known
        try:
            self._build(source, dialect, locate, Loop.PLAIN if record else loop)
            if ahead is not None and not record:
                self.prefetcher = Prefetcher(self.pager, ahead)
        except BaseException:
            self.close()
            raise

    def _build(self, source: PageSource, dialect: Dialect | None, locate: bool, loop: Loop) -> None:
        self.ram = GuestRam(self.snapshot.memory_size)
        self._undo.append(self.ram.close)
        self._require_vcpus(len(self.snapshot.vcpus))
        vm = self.system.create_vm()
        self._undo.append(vm.close)
        self.dialect = dialect or recognise(vm.check_extension)
        self.interface: MemoryFaultInterface | None = None
        if self.dialect is not None:
            self.interface = self.dialect.interface
        self._absence = self._choose_absence(vm)
        self.view = self._absence.view
        # Undone last to first: the VM goes before the view, whose absent pages then read as zeros.
        self._undo.insert(-1, self.view.close)
        self.slots = SlotMap()
        for slot in self.snapshot.slots:
            hva = self.ram.guest.address + slot.offset
            flags = self._absence.slot_flags
            self.slots.add(
                MemorySlot(slot.guest_phys_addr, slot.memory_size, hva, slot.slot, flags)
            )
        for added in self.slots:
            vm.set_user_memory_region(
                added.slot,
                added.gpa,
                added.size,
                added.hva,
                added.flags,
                userfault_bitmap=self._absence.bitmap_of(added.hva - self.ram.guest.address),
            )
        self.pager = Pager(self.ram, self.view, source)
        self.handler: UserfaultHandler | None = None
        if self.mode is Mode.UFFD:
            assert isinstance(self.view, Registered)
            self.handler = UserfaultHandler(
                self.pager,
                self.view,
                self._source_failed,
                fault_around=self.fault_around,
                parts=slot_pages(self.slots, self.ram.guest.address),
            )
            self._undo.append(self.handler.close)
        self.vcpus = []
        for vcpu_id, state in enumerate(self.snapshot.vcpus):
            vcpu = vm.create_vcpu(vcpu_id)
            vcpu.set_sregs(state.sregs)
            vcpu.set_regs(state.regs)
            self.vcpus.append(self._loop(vcpu, locate and self.mode is Mode.EXIT, loop))
        self.eager_pages = 0
        # With two-dimensional paging, a KVM that exits on a missing page does so on a page table.
        if not (self._absence.asked and self.system.tdp_enabled):
            self.eager_pages = bring_in_eagerly(self.snapshot, self.pager, self.slots)

    def _loop(self, vcpu: Vcpu, locate: bool, loop: Loop) -> VcpuLoop:
        resolver = FaultResolver(vcpu, self.pager, self.slots, fault_around=self.fault_around)
        locators = arming = compiled = None
        if loop is Loop.COMPILED and not locate:
            why = "in this mode no vCPU resolves a failed access"
            raise Unavailable("the compiled loop", why, "use --mode exit --locate all")
        if locate:
            locators = Locators(vcpu, self.slots, self._decode_locator())
            arming = TracepointArming(self.system, vcpu, self.slots, locators)
            compiled = Compiled(
                loop,
                self.system,
                vcpu,
                self.interface,
                self.slots,
                resolver,
                arming.locator,
                annotates=self.dialect is not None and self.dialect.missing is not None,
            )
            self.why_plain = self.why_plain or compiled.why_not
        return VcpuLoop(
            vcpu,
            self.interface,
            self.slots,
            resolver,
            lambda: self._stopping,
            locators,
            arming,
            compiled,
        )

    def _decode_locator(self) -> DecodeLocator:
        residency = HostResidency(registered=self._absence.registered)
        self._undo.append(residency.close)
        memory = HostView(self.slots, self.ram, self.pager.is_in)
        return DecodeLocator(self.slots, memory, residency)

    def _require_vcpus(self, count: int) -> None:
        limit = self.system.check_extension(uapi.KVM_CAP_MAX_VCPUS)
        if count > limit > 0:
            why = f"{self.system.name} can have {limit} in a VM"
            raise Unavailable(f"{count} vCPUs", why, "use a guest with fewer")

    def _choose_absence(self, vm: Vm) -> Absence:
        """How pages are absent, and what is asked of the VM for it."""
        if self.dialect is not None:
            ask_for_annotations(vm, self.dialect)
        if self.mode is Mode.UFFD:
            return Absence(Registered(self.ram, sigbus=False), registered=True)
        return ask_for_exits(vm, self.dialect, self.ram, self.snapshot)

    # -- running -----------------------------------------------------------------------------------

    def run(self, watch: Callable[[], None] | None = None, interval: float = 0.1) -> bool:
        """Run every vCPU until all are done or the session has stopped; whether all are done.

        ``watch`` is called on this thread every ``interval`` seconds meanwhile.  An exception on
        this thread, Ctrl-C included, stops the session before it goes on its way.  Stopping takes
        as long as a source that is being read takes to answer, unless it can be interrupted
        (:class:`~guestfault.paging.source.base.Interruptible`).
        """
        self._stopping = False
        resume(self._source)
        self.failure = self.failed_vcpu = self._defect = self._unserved = None
        if self.handler is not None:
            self.handler.start()
        self._threads = {
            loop: threading.Thread(
                target=self._run_vcpu, args=(loop,), name=f"vcpu{loop.vcpu.vcpu_id}"
            )
            for loop in self.vcpus
            if not loop.console.done
        }
        try:
            for thread in self._threads.values():
                thread.start()
            if self.prefetcher is not None:
                self.prefetcher.start()
            while not self._stopping and (alive := self._alive()):
                alive[0].join(interval)
                self._kick_those_who_stand_still()
                if watch is not None:
                    watch()
        finally:
            self._come_to_rest()
        if self.failure is not None and self.failed_vcpu is None and self._unserved is not None:
            self.failed_vcpu = self._who_stands_at(self._unserved)
        if self._defect is not None:
            raise self._defect
        return all(loop.console.done for loop in self.vcpus)

    def stop(self) -> None:
        """From any thread: make every vCPU stop, wherever it is.  :meth:`run` returns then."""
        self._stopping = True
        interrupt(self._source)
        for loop in self.vcpus:
            loop.vcpu.kick()

    def _kick_those_who_stand_still(self) -> None:
        """Where failed accesses come back, a vCPU that does not may be waiting for one that won't.

        In uffd mode a vCPU sleeps for as long as its source takes, and nothing is wrong.
        """
        if self.mode is Mode.EXIT:
            now = time.monotonic()
            for loop in self.vcpus:
                if loop.watchdog.overdue(now):
                    loop.vcpu.kick()

    def _alive(self) -> list[threading.Thread]:
        return [thread for thread in self._threads.values() if thread.is_alive()]

    def _come_to_rest(self) -> None:
        """Stop, and wait for every thread.  A second Ctrl-C must not leave one running."""
        interrupt: KeyboardInterrupt | None = None
        while True:
            try:
                if self._alive():
                    self.stop()
                while alive := self._alive():
                    alive[0].join(_STOP_GRACE)
                    if self.handler is not None and self._alive():
                        self.handler.release()
                if self.handler is not None:
                    self.handler.stop()
                if self.prefetcher is not None:
                    self.prefetcher.stop()
                break
            except KeyboardInterrupt as again:
                interrupt = again
        if interrupt is not None:
            raise interrupt

    def _run_vcpu(self, loop: VcpuLoop) -> None:
        try:
            loop.run()
        except Exception as defect:
            self._fail(defect, loop)
        else:
            if loop.error is not None:
                self._fail(loop.error, loop)

    def _source_failed(self, fault: PageFault, error: Exception) -> None:
        """On the handler's thread: a page that a vCPU sleeps in cannot be had."""
        loop = None
        if fault.thread_id is not None:
            self._ran_on |= {thread.native_id: lp for lp, thread in self._threads.items()}
            loop = self._ran_on.get(fault.thread_id)
        if not self._is_effect_of_stop(error):
            self._unserved = fault
        self._fail(error, loop)

    def _who_stands_at(self, fault: PageFault) -> VcpuLoop | None:
        """The vCPU whose instruction accesses the page, now that all have stopped.

        For a fault whose thread is not a vCPU's: a KVM may have another one wait for the page.
        """
        locator = self._decode_locator()
        for loop in self.vcpus:
            if not loop.console.done:
                regs, sregs = loop.vcpu.get_regs(), loop.vcpu.get_sregs()
                accesses = locator.locate(regs, sregs)
                if any(a.hva is not None and a.hva >> 12 == fault.address >> 12 for a in accesses):
                    return loop
        return None

    def _fail(self, error: Exception, loop: VcpuLoop | None) -> None:
        if self._is_effect_of_stop(error):
            return
        if not isinstance(error, GuestfaultError):
            self._defect = error
        elif self.failure is None:
            self.failure, self.failed_vcpu = error, loop
        self.stop()

    def _is_effect_of_stop(self, error: Exception) -> bool:
        return self._stopping and isinstance(error, SourceInterruptedError)

    def close(self) -> None:
        """Release the VM and its memory.  Not while :meth:`run` is under way."""
        while self._undo:
            self._undo.pop()()

"""Many vCPUs at two absent pages, again and again: is everybody always woken?

In each run both pages are absent again, half of the vCPUs write to the one and then the other, and
half the other way round.  So in each run every page has one who brings it in and several who wait
for him, in the pager (exit way) or in userfaultfd (uffd way), and he waits in turn for the second
page.  A wake-up that is lost leaves a vCPU asleep, and the run does not end.
"""

from __future__ import annotations

import threading
import time
from contextlib import ExitStack, closing

from guestfault.bench.experiment import ExperimentError
from guestfault.bench.guest import header, layout_for
from guestfault.bench.shape import Way
from guestfault.dialect.interface import MemoryFaultInterface
from guestfault.guest.assembler import Assembler
from guestfault.guest.boot import entry_state
from guestfault.guest.layout import PAGE_SIZE
from guestfault.guest.program import DONE_PORT
from guestfault.kvm.protocols import System, Vcpu
from guestfault.memory.ram import GuestRam
from guestfault.memory.slots import MemorySlot, SlotMap
from guestfault.memory.view import Registered
from guestfault.paging.handler import UserfaultHandler
from guestfault.paging.pager import Pager
from guestfault.paging.resolver import FaultResolver
from guestfault.paging.source.function import FunctionSource
from guestfault.vmm.vcpu_loop import VcpuLoop

__all__ = ["ping_pong"]

_PAGES = 2
_MOMENT = 200e-6
_LEAST_PAGES = 16  # of a guest; the others are never touched


def ping_pong(
    system: System,
    interface: MemoryFaultInterface | None,
    way: Way,
    vcpus: int,
    runs: int,
    patience: float = 30.0,
) -> int:
    """Do ``runs`` runs; how many faults were met.

    Raises :class:`~guestfault.bench.experiment.ExperimentError` if one has not ended after
    ``patience`` seconds, or left a page wrong, or a vCPU stopped.
    """
    with ExitStack() as stack:
        table = _Table(stack, system, interface, way, vcpus)
        for _ in range(runs):
            table.run(patience)
        return table.faults


class _Slow:
    """The view, which takes a moment to let a page in: long enough for the others to come."""

    name = "slow"

    def __init__(self, view: Registered) -> None:
        self._view = view
        self.shut, self.reopen, self.close = view.shut, view.reopen, view.close

    def bring_in(self, offset: int, size: int) -> None:
        time.sleep(_MOMENT)
        self._view.bring_in(offset, size)


class _Table:
    """The VM, its two pages, and a thread for each vCPU that waits for the next run."""

    def __init__(
        self,
        stack: ExitStack,
        system: System,
        interface: MemoryFaultInterface | None,
        way: Way,
        vcpus: int,
    ) -> None:
        self._interface = interface
        self._way = way
        layout = layout_for(1, _LEAST_PAGES)
        self._first = layout.header_pages * PAGE_SIZE
        self._addresses = [layout.gva(self._first + n * PAGE_SIZE) for n in range(_PAGES)]
        self._ram = stack.enter_context(GuestRam(layout.memory_size))
        head = bytearray(header(layout))
        code = _code(layout.gva(0))
        head[: len(code)] = code
        self._content = bytes(head) + b"\x5a" * (_LEAST_PAGES * PAGE_SIZE)
        self._ram.bytes[:] = self._content
        self._view = Registered(self._ram, sigbus=way is Way.EXIT)
        stack.callback(self._view.close)
        self._view.bring_in(0, len(head))
        vm = stack.enter_context(closing(system.create_vm()))
        self._slots = SlotMap()
        self._slots.add(MemorySlot(0, self._ram.size, self._ram.guest.address, 0))
        vm.set_user_memory_region(0, 0, self._ram.size, self._ram.guest.address)
        self._state = entry_state(layout, 0)
        self._vcpus = [vm.create_vcpu(n) for n in range(vcpus)]
        for vcpu in self._vcpus:
            vcpu.set_sregs(self._state.sregs)
        self.faults = 0
        self._handler: UserfaultHandler | None = None
        if way is Way.UFFD:
            self._handler = UserfaultHandler(self._pager(), self._view, self._failed)
            self._handler.start()
            stack.callback(self._handler.close)
        self._errors: list[str] = []
        self._over = False
        self._turn = threading.Barrier(vcpus + 1)
        threads = [
            threading.Thread(target=self._serve, args=(n, vcpu), daemon=True)
            for n, vcpu in enumerate(self._vcpus)
        ]
        for thread in threads:
            thread.start()
        stack.callback(self._end, threads)

    def run(self, patience: float) -> None:
        """One run, from two absent pages to the last vCPU's end."""
        self._ram.guest.discard(self._first, _PAGES * PAGE_SIZE)
        self._shared = self._pager()
        try:
            self._turn.wait(patience)
            self._turn.wait(patience)
        except threading.BrokenBarrierError:
            for vcpu in self._vcpus:
                vcpu.kick()
            raise ExperimentError(f"a run has not ended after {patience:g} seconds") from None
        if self._errors:
            raise ExperimentError(self._errors[0])
        for n, address in enumerate(self._addresses):
            at = self._first + n * PAGE_SIZE
            page = bytes(self._ram.bytes[at : at + PAGE_SIZE])
            if page != address.to_bytes(8, "little") + self._content[at + 8 : at + PAGE_SIZE]:
                raise ExperimentError(f"page {n} does not hold what was written to it")
        if self._handler is not None:
            self.faults = self._handler.account.faults

    def _pager(self) -> Pager:
        def read(offset: int, length: int) -> bytes:
            return self._content[offset : offset + length]

        return Pager(self._ram, _Slow(self._view), FunctionSource(self._ram.size, read))

    def _serve(self, n: int, vcpu: Vcpu) -> None:
        regs = self._state.regs
        one, other = self._addresses if n % 2 else reversed(self._addresses)
        while True:
            try:
                self._turn.wait()
            except threading.BrokenBarrierError:
                return
            if self._over:
                return
            regs_now = type(regs).from_buffer_copy(regs)
            regs_now.rsi, regs_now.rdi = one, other
            vcpu.set_regs(regs_now)
            resolver = FaultResolver(vcpu, self._shared, self._slots)
            loop = VcpuLoop(vcpu, self._interface, self._slots, resolver, lambda: False)
            if not loop.run():
                self._errors.append(f"vCPU {n} stopped: {loop.error}")
            self.faults += resolver.account.faults
            # What KVM still has to do about the port write it does as it enters, not over new ones.
            vcpu.kvm_run.immediate_exit = 1
            vcpu.run()
            vcpu.kvm_run.immediate_exit = 0
            try:
                self._turn.wait()
            except threading.BrokenBarrierError:
                return

    def _failed(self, fault: object, error: Exception) -> None:
        self._errors.append(f"{fault}: {error}")

    def _end(self, threads: list[threading.Thread]) -> None:
        self._over = True
        if not self._turn.broken:
            self._turn.wait()
        for thread in threads:
            thread.join(1.0)


def _code(address: int) -> bytes:
    """Write to the page at RSI, to the one at RDI, and say that it is done."""
    asm = Assembler(64)
    for name in ("SI", "DI"):
        asm.store(asm.word(name), asm.word(name))
    end = asm.label()
    asm.out(DONE_PORT, bits=8)
    asm.branch("JMP", end)
    return asm.encode(address)

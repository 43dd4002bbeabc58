"""When a vCPU is worth running by the compiled loop, and when it can be.

The loop (:mod:`guestfault.paging.hot`) saves a few tens of microseconds a fault, and what Python
cannot give at all: vCPUs that do not wait for each other's turn at the interpreter.  It costs a
quarter of a second, once in a process, for numba to be loaded, and more the first time of all, when
it compiles.  So a small guest is better off without, and with ``auto`` each vCPU begins in the
plain loop and changes over when it has had :data:`PAYS_AFTER` faults.

It takes three things: numba, a KVM that is the kernel's (the software one is Python itself), and
somebody besides the decoder who names the failed accesses, which is the kernel's annotation or its
tracepoints.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from importlib.util import find_spec
from typing import Protocol

from guestfault.dialect.interface import MemoryFaultInterface
from guestfault.errors import Unavailable
from guestfault.fault.locate.tracepoint import TracepointLocator
from guestfault.kvm.protocols import System, Vcpu
from guestfault.kvm.vcpu import KvmVcpu
from guestfault.memory.slots import SlotMap
from guestfault.paging.resolver import FaultResolver
from guestfault.uapi import kvm as uapi

__all__ = ["PAYS_AFTER", "Compiled", "Loop", "require_numba"]

PAYS_AFTER = 4096
"""Faults of one vCPU after which ``auto`` changes over."""

_LOOP = "the compiled loop"


class Loop(StrEnum):
    """Which loop resolves the failed accesses of a vCPU."""

    AUTO = "auto"  # the compiled one where it can be had and pays
    PLAIN = "plain"
    COMPILED = "compiled"


class _Entry(Protocol):
    def run(self) -> int | None: ...

    def close(self) -> None: ...


def require_numba() -> None:
    """Raises :class:`~guestfault.errors.Unavailable` if numba is not installed."""
    if find_spec("numba") is None:
        raise Unavailable(_LOOP, "numba is not installed", "pip install 'guestfault[fast]'")


class Compiled:
    """The compiled loop of one vCPU, once it is worth having; belongs to the vCPU's thread.

    ``trace`` gives the thread's locator, once there is one; ``annotates`` says that the KVM names
    absent pages itself.

    With ``COMPILED`` it raises :class:`~guestfault.errors.Unavailable` if it is not to be had here;
    with ``AUTO`` :attr:`why_not` is that error.
    """

    def __init__(
        self,
        loop: Loop,
        system: System,
        vcpu: Vcpu,
        interface: MemoryFaultInterface | None,
        slots: SlotMap,
        resolver: FaultResolver,
        trace: Callable[[], TracepointLocator | None],
        *,
        annotates: bool,
    ) -> None:
        self._loop = loop
        self._system = system
        self._vcpu = vcpu
        self._interface = interface
        self._slots = slots
        self._resolver = resolver
        self._trace = trace
        self._annotates = annotates
        self._entry: _Entry | None = None
        self.why_not: Unavailable | None = None
        self._wanted = loop is Loop.COMPILED or (loop is Loop.AUTO and isinstance(vcpu, KvmVcpu))
        if self._wanted:
            self._or_not(self._require)
            self._wanted = self.why_not is None
        self._after = PAYS_AFTER if loop is Loop.AUTO else 0

    def entry(self) -> _Entry | None:
        """What to run the vCPU by, if it is not to be run by KVM_RUN alone."""
        if self._entry is not None or not self._wanted:
            return self._entry
        account = self._resolver.account
        if account.faults >= self._after:
            locator = self._trace()
            if locator is not None or self._annotates:
                self._or_not(lambda: self._make(locator))
                self._wanted = self.why_not is None
        return self._entry

    def leave(self) -> None:
        """The thread ends, and with it its trace."""
        if self._entry is not None:
            self._entry.close()
            self._entry = None

    def _or_not(self, attempt: Callable[[], None]) -> None:
        try:
            attempt()
        except Unavailable as error:
            self.why_not = error
            if self._loop is Loop.COMPILED:
                raise

    def _require(self) -> None:
        if not isinstance(self._vcpu, KvmVcpu):
            why = f"{self._system.name} is Python itself"
            raise Unavailable(_LOOP, why, "use --kvm kvm, or --loop plain")
        require_numba()
        if self._loop is Loop.COMPILED and not self._annotates:
            TracepointLocator(self._system).close()

    def _make(self, locator: TracepointLocator | None) -> None:
        # numba is loaded here and not sooner: most runs never come this far.
        from guestfault.paging.hot_loop import CompiledLoop

        assert isinstance(self._vcpu, KvmVcpu)
        sync_regs = self._system.check_extension(uapi.KVM_CAP_SYNC_REGS)
        self._entry = CompiledLoop(
            self._vcpu, self._interface, self._slots, self._resolver, locator, sync_regs
        )

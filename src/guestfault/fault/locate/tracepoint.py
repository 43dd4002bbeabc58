"""The tracepoint locator: the access behind a bare -EFAULT, from what KVM passed on its way there.

No patched kernel, no decoding and no guess: KVM's own tracepoint has the faulting address to the
byte and the kind of access, for the processor's accesses and for the fetch alike.  What may be
believed of the records is :mod:`~guestfault.fault.locate.run_trace`'s subject, what their numbers
mean on this host that of :mod:`~guestfault.fault.locate.probe_guest`.

It takes tracefs and the right to raw trace records (``guestfault check`` says how they are had),
and costs the thread one short record at each beginning and end that it passes.

**One locator per vCPU thread**, made on that thread::

    with TracepointLocator(system, translate=gpa_from(vcpu)) as locator:
        while True:
            match outcome(vcpu.run(), vcpu.kvm_run, interface):
                case BareFault():
                    access = locator.locate()
"""

from __future__ import annotations

from collections.abc import Callable

from guestfault.closing import Closing
from guestfault.fault.access import Access, FoundBy
from guestfault.fault.locate.probe_guest import meanings
from guestfault.fault.locate.run_trace import RunTrace
from guestfault.kvm.protocols import System, Vcpu
from guestfault.linux.tracefs import Tracefs
from guestfault.memory.slots import SlotMap

__all__ = ["TracepointLocator", "gpa_from"]

_TRACEPOINT = FoundBy.TRACEPOINT


def gpa_from(vcpu: Vcpu) -> Callable[[int], int | None]:
    """``KVM_TRANSLATE`` as a translation from gva to gpa, ``None`` where the guest maps nothing."""

    def translate(gva: int) -> int | None:
        translation = vcpu.translate(gva)
        return translation.physical_address if translation.valid else None

    return translate


class TracepointLocator(Closing):
    """Listens to the calling thread's runs, of vCPUs of ``system``, until :meth:`close`.

    ``translate`` turns a gva into its gpa, or ``None``; it is asked only on hosts whose records
    hold gvas, and without it the gpa stays unknown there.  With ``slots`` the access has its slot
    and hva too.  ``tracefs`` is looked for if not given; ``pages``, a power of two, is the size of
    the ring.

    The first one in a process runs a small guest, for some milliseconds.

    Raises :class:`~guestfault.errors.Unavailable`, with the mend: tracefs is not mounted, the
    events are not there, this process may not have their records, or none fires on this host.
    """

    def __init__(
        self,
        system: System,
        *,
        translate: Callable[[int], int | None] | None = None,
        slots: SlotMap | None = None,
        tracefs: Tracefs | None = None,
        pages: int = 1,
    ) -> None:
        tracefs = tracefs or Tracefs.find()
        self.meanings = meanings(system, tracefs)
        """What the numbers of each event are on this host."""
        self._translate = translate
        self._slots = slots
        self.trace = RunTrace(tracefs, pages=pages)

    def locate(self) -> Access | None:
        """The access with which this thread's last ``KVM_RUN`` failed; ``None`` if it is not known.

        To be asked after a ``KVM_RUN`` that returned -EFAULT or -EHWPOISON; after any other there
        is no answer.  The address is exact and ``size`` is 1: the byte at which the access failed,
        where the length of the access is not told.  An access that crosses into an absent page
        fails at that page's first byte, but a large one (FXSAVE) or a masked one at any of its own.

        Raises :class:`RuntimeError` on another thread than the locator's own.
        """
        failed = self.trace.failed()
        if failed is None:
            return None
        event, number, code = failed
        meaning = self.meanings.get(event)
        if meaning is None:
            return None
        kind = meaning.kind(code)
        gva: int | None = None
        gpa: int | None = number
        if meaning.is_gva:
            gva, gpa = number, self._translate(number) if self._translate else None
        if gpa is None or self._slots is None or (slot := self._slots.find(gpa)) is None:
            return Access(gpa, 1, _TRACEPOINT, gva, None, None, kind)
        return Access(gpa, 1, _TRACEPOINT, gva, slot.hva_of(gpa), slot, kind)

    def close(self) -> None:
        """Stop listening.  May be called again."""
        self.trace.close()

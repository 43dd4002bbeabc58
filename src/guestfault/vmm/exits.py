"""How a VM is told to exit where a page is missing, in the dialect that its KVM speaks.

The dialects differ in what userspace must do before the first fault.  Some want to be asked for
annotations at all (``KVM_ENABLE_CAP``).  To fail rather than wait for a page is asked for with a
switch for the whole VM, with a flag of each slot, or with a bitmap for each slot; a released kernel
knows none of these, and then the page must be absent in a way that makes every access to it fail.
"""

from __future__ import annotations

from dataclasses import dataclass

from guestfault.dialect.record import Ask, Dialect, Enabling
from guestfault.errors import Unavailable
from guestfault.guest.snapshot import Snapshot
from guestfault.kvm.protocols import Vm
from guestfault.memory.ram import GuestRam
from guestfault.memory.userfault import Userfault
from guestfault.memory.view import GuestView, Protected, Registered, Unpopulated

__all__ = ["Absence", "ask_for_annotations", "ask_for_exits"]


@dataclass(frozen=True, slots=True)
class Absence:
    """A view of the RAM with no page in, and what its slots must be given so that accesses fail.

    ``registered`` says that userfaultfd keeps the pages out.
    """

    view: GuestView
    slot_flags: int = 0
    registered: bool = False

    def bitmap_of(self, offset: int) -> int:
        """The bitmap for the slot that shows the RAM from ``offset`` on; 0 if it needs none."""
        return self.view.bitmap_of(offset) if isinstance(self.view, Userfault) else 0


def ask_for_annotations(vm: Vm, dialect: Dialect) -> None:
    """Enable what must be enabled for failed accesses to be annotated, if anything must be.

    Raises :class:`~guestfault.errors.KvmError` if the KVM refuses.
    """
    info = dialect.info
    if info is None or info.enabling is Enabling.INFORMATIONAL:
        return
    if info.enabling is Enabling.OPT_IN_PER_REASON:
        vm.enable_cap(info.number, (dialect.flag_unknown | dialect.flag_missing,))
    else:
        vm.enable_cap(info.number, (1,))


def ask_for_exits(vm: Vm, dialect: Dialect | None, ram: GuestRam, snapshot: Snapshot) -> Absence:
    """Have accesses to absent pages fail, in the cheapest way that the KVM has.

    Raises :class:`~guestfault.errors.KvmError` if the KVM refuses what it announces.
    """
    match dialect and dialect.missing and dialect.missing.ask:
        case Ask.VM_SWITCH:
            vm.set_mem_fault_nowait(True)
            return Absence(Unpopulated(ram))
        case Ask.SLOT_FLAG:
            assert dialect is not None
            return Absence(Unpopulated(ram), dialect.slot_flag)
        case Ask.BITMAP:
            assert dialect is not None
            below = _failing(ram)
            ranges = [(slot.offset, slot.memory_size) for slot in snapshot.slots]
            view = Userfault(ram, below.view, ranges)
            return Absence(view, dialect.userfault_flag, below.registered)
    return _failing(ram)


def _failing(ram: GuestRam) -> Absence:
    """Pages that nobody can access, KVM or not."""
    try:
        return Absence(Registered(ram, sigbus=True), registered=True)
    except Unavailable:
        return Absence(Protected(ram))

"""How a VM is told to exit where a page is missing, in the dialect that its KVM speaks.

The dialects differ in what userspace must do before the first fault.  Some want to be asked for
annotations at all (``KVM_ENABLE_CAP``).  To fail rather than wait for a page is asked for with a
switch for the whole VM, with a flag of each slot, or with a bitmap for each slot; a released kernel
knows none of these.

In each of them the pages are also absent in a way that makes every access to them fail: KVM's own
copies (``kvm_vcpu_read_guest_page``, by its instruction emulator) go by the switch, the flag and
the bitmap unseen, and would fill a hole with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from guestfault.dialect.record import Ask, Dialect, Enabling
from guestfault.errors import Unavailable
from guestfault.guest.snapshot import Snapshot
from guestfault.kvm.protocols import Vm
from guestfault.memory.ram import GuestRam
from guestfault.memory.userfault import Userfault
from guestfault.memory.view import GuestView, Protected, Registered

__all__ = ["Absence", "ask_for_annotations", "ask_for_exits"]


@dataclass(frozen=True, slots=True)
class Absence:
    """A view of the RAM with no page in, and what its slots must be given so that accesses fail.

    ``registered`` says that userfaultfd keeps the pages out, ``asked`` that KVM has been asked to
    exit where one is missing.
    """

    view: GuestView
    slot_flags: int = 0
    registered: bool = False
    asked: bool = False

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
    below = _failing(ram)
    ask = dialect.missing.ask if dialect is not None and dialect.missing is not None else None
    if dialect is None or ask is None:
        return below
    match ask:
        case Ask.VM_SWITCH:
            vm.set_mem_fault_nowait(True)
            return replace(below, asked=True)
        case Ask.SLOT_FLAG:
            return replace(below, slot_flags=dialect.slot_flag, asked=True)
        case Ask.BITMAP:
            ranges = [(slot.offset, slot.memory_size) for slot in snapshot.slots]
            view = Userfault(ram, below.view, ranges)
            return Absence(view, dialect.userfault_flag, below.registered, asked=True)


def _failing(ram: GuestRam) -> Absence:
    """Pages that nobody can access, KVM or not."""
    try:
        return Absence(Registered(ram, sigbus=True), registered=True)
    except Unavailable:
        return Absence(Protected(ram))

"""The VM of an experiment: its memory absent in the way that is to be measured."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

from guestfault.bench.guest import header, layout_for
from guestfault.bench.shape import Fault, Shape, Uffds, Way
from guestfault.closing import Closing
from guestfault.guest.boot import entry_state
from guestfault.guest.layout import PAGE_SIZE
from guestfault.kvm.protocols import System, Vcpu
from guestfault.linux.mapping import Mapping
from guestfault.linux.userfaultfd import Feature, Mode, Userfaultfd
from guestfault.memory.ram import GuestRam
from guestfault.memory.slots import MemorySlot, SlotMap

__all__ = ["Machine", "Share"]

_BYTE = 0xA5  # what the pages are full of


@dataclass(frozen=True, slots=True)
class Share:
    """One vCPU, its pages (numbers in the RAM), and the userfaultfd that has them."""

    vcpu: Vcpu
    pages: range
    uffd: Userfaultfd


class Machine(Closing):
    """A VM of ``shape`` on ``system``, ready to run; a context manager.

    Code and page tables are present; every data page is absent.  Raises
    :class:`~guestfault.errors.Unavailable` if this machine has no userfaultfd for it.
    """

    def __init__(self, system: System, shape: Shape) -> None:
        self.shape = shape
        self.layout = layout = layout_for(shape.vcpus, shape.pages)
        self._stack = ExitStack()
        try:
            self.ram = GuestRam(layout.memory_size)
            self._stack.callback(self.ram.close)
            head = header(layout)
            self.ram.bytes[: len(head)] = head
            self.source = self._prepare()
            self.uffds = [
                self._register(pages)
                for pages in (
                    [layout.data]
                    if shape.uffds is Uffds.SHARED
                    else map(layout.share, range(shape.vcpus))
                )
            ]
            # A VM must be gone before its memory is given back to the kernel, which fills it.
            vm = system.create_vm()
            self._stack.callback(vm.close)
            slot = MemorySlot(0, self.ram.size, self.ram.guest.address, 0)
            self.slots = SlotMap()
            self.slots.add(slot)
            vm.set_user_memory_region(slot.slot, slot.gpa, slot.size, slot.hva)
            self.shares = []
            for n in range(shape.vcpus):
                state, vcpu = entry_state(layout, n), vm.create_vcpu(n)
                vcpu.set_sregs(state.sregs)
                vcpu.set_regs(state.regs)
                uffd = self.uffds[0 if shape.uffds is Uffds.SHARED else n]
                self.shares.append(Share(vcpu, layout.share(n), uffd))
        except BaseException:
            self.close()
            raise

    def _prepare(self) -> Mapping | None:
        """Put the bytes where a fault will find them: in the page cache, or in other memory."""
        first = self.layout.header_pages * PAGE_SIZE
        if self.shape.fault is Fault.MINOR:
            self.ram.bytes[first:] = bytes([_BYTE]) * (self.ram.size - first)
            return None
        source = Mapping.anonymous(self.ram.size)
        self._stack.callback(source.close)
        with source.view() as view:
            view[first:] = bytes([_BYTE]) * (self.ram.size - first)
        return source

    def _register(self, pages: range) -> Userfaultfd:
        required = Feature.MISSING_SHMEM | Feature.MINOR_SHMEM
        if self.shape.way is Way.EXIT:
            uffd = Userfaultfd.open(required=required | Feature.SIGBUS, user_mode_only=True)
        else:
            uffd = Userfaultfd.open(required=required)
        self._stack.callback(uffd.close)
        address = self.ram.guest.address + pages.start * PAGE_SIZE
        uffd.register(address, len(pages) * PAGE_SIZE, Mode.MISSING | Mode.MINOR)
        return uffd

    def wrong_pages(self) -> int:
        """After the run: how many pages do not hold what the guest wrote on what they held."""
        wrong = 0
        rest = bytes([_BYTE]) * (PAGE_SIZE - 8)
        for page in self.layout.data:
            at = page * PAGE_SIZE
            written = self.layout.gva(at).to_bytes(8, "little")
            wrong += self.ram.bytes[at : at + PAGE_SIZE] != written + rest
        return wrong

    def close(self) -> None:
        """Release everything."""
        self._stack.close()

"""A modelled host memory for the fault path, and a VM on it: each test changes it where it likes.

:class:`ModelMm` has pages that are present, writable, that fail with an errno or must be waited
for, and hooks that run in the middle of a lookup, where another thread would come in.
:class:`FaultPath` is a VM with one slot and one vCPU on it; the fixture
``make`` builds them.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Hashable, Iterator
from contextlib import AbstractContextManager

import pytest

from guestfault.dialect.published import SEED
from guestfault.dialect.record import Dialect
from guestfault.softkvm.kvm_host import vcpu_load, vcpu_put
from guestfault.softkvm.mm import Task
from guestfault.softkvm.mmu import kvm_mmu_do_page_fault, kvm_mmu_page_fault
from guestfault.softkvm.preempt import scheduled_by
from guestfault.softkvm.second_stage import PT_READ, PT_WRITABLE
from guestfault.softkvm.second_stage import SPTE_HOST_WRITABLE as HOST
from guestfault.softkvm.second_stage import SPTE_MMU_WRITABLE as MMU
from guestfault.softkvm.vm import SoftVm
from guestfault.x86.registers import PFERR_PRESENT_MASK, PFERR_WRITE_MASK

HVA, NPAGES = 0x7000_0000_0000, 16
READ, WRITE, PRESENT = 0, PFERR_WRITE_MASK, PFERR_PRESENT_MASK
READ_ONLY = PT_READ
PROTECTED = PT_READ | HOST | MMU
"""The flags of an entry that may be made writable again without a look at the page."""
WRITABLE = PROTECTED | PT_WRITABLE


def nothing(*_: object) -> None:
    """A hook that does nothing."""


class ModelMm:
    """See the module.  Addresses in the sets are those of pages."""

    def __init__(self) -> None:
        self.present: set[int] = set()
        self.writable: set[int] = set()
        self.failing: dict[int, int] = {}  # page -> errno
        self.slow_to_come: set[int] = set()  # must be waited for
        self.valid = True  # what vma_is_valid says
        self.user: dict[int, bytes] = {}  # what copy_from_user finds
        self.fast: list[tuple[int, bool]] = []
        self.slow: list[tuple[int, bool]] = []
        self.in_gup: Callable[[], None] = nothing
        self.in_copy: Callable[[], None] = nothing
        self.asleep: Callable[[], None] = nothing

    def get_user_page_fast_only(self, hva: int, write: bool) -> bool:
        self.fast.append((hva, write))
        return hva in self.present and (not write or hva in self.writable)

    def get_user_pages_unlocked(
        self, hva: int, write: bool, *, nowait: bool = False, interruptible: Task | None = None
    ) -> int:
        self.slow.append((hva, write))
        if hva in self.failing:
            return -self.failing[hva]
        if hva in self.slow_to_come:
            if nowait:
                return -errno.EAGAIN
            self.asleep()
            if interruptible is not None and interruptible.signal_pending():
                return -errno.EINTR
        self.bring_in(hva, write)
        self.in_gup()
        return 0

    def bring_in(self, hva: int, write: bool = True) -> None:
        self.slow_to_come.discard(hva)
        self.present.add(hva)
        if write:
            self.writable.add(hva)

    def vma_is_valid(self, hva: int, write: bool) -> bool:
        return self.valid

    def copy_from_user(self, hva: int, size: int) -> bytes | None:
        self.in_copy()
        if self.user and hva not in self.user:
            return None
        return self.user.get(hva, bytes(size))

    def copy_to_user(self, hva: int, data: bytes) -> bool:
        return True

    def mmu_notifier_register(self, notifier: object) -> None:
        pass

    def mmu_notifier_unregister(self, notifier: object) -> None:
        pass


class FaultPath:
    """A VM with one slot of :data:`NPAGES` at 0, and a vCPU that this thread has loaded."""

    def __init__(
        self, dialect: Dialect = SEED, flags: int = 0, *, bitmap: int = 0, vm_type: int = 0
    ) -> None:
        self.mm = ModelMm()
        self.vm = SoftVm(dialect, self.mm, vm_type=vm_type)
        self.slot(flags, bitmap=bitmap)
        self.vcpu = self.vm.create_vcpu(0).arch
        self.vcpu.emulating = False  # its faults are the guest's
        self.kvm, self.stage = self.vm.kvm, self.vm.kvm.second_stage
        vcpu_load(self.vcpu)

    def slot(self, flags: int = 0, *, gpa: int = 0, npages: int = NPAGES, bitmap: int = 0) -> None:
        self.vm.set_user_memory_region(0, gpa, npages << 12, HVA, flags, userfault_bitmap=bitmap)

    def fault(self, gfn: int, code: int = READ, *, prefetch: bool = False) -> int:
        """``kvm_mmu_do_page_fault``."""
        return kvm_mmu_do_page_fault(self.vcpu, gfn << 12, code, prefetch=prefetch)

    def violation(self, gfn: int, code: int = READ) -> bool:
        """``kvm_mmu_page_fault``."""
        return kvm_mmu_page_fault(self.vcpu, gfn << 12, code)

    def all_present(self) -> None:
        self.mm.present = self.mm.writable = {HVA + (i << 12) for i in range(NPAGES)}

    def invalidate(self, start: int = HVA, end: int = HVA + 0x1000) -> None:
        self.vm.invalidate_range_start(start, end)
        self.vm.invalidate_range_end(start, end)


class At:
    """A scheduler for one thread: the first time that it comes to a point, something happens."""

    def __init__(self, **happens: Callable[[], None]) -> None:
        self.happens: dict[str, Callable[[], None]] = dict(happens)
        self.seen: list[str] = []

    def point(self, name: str, shared: Hashable, write: bool) -> None:
        self.seen.append(name)
        action = self.happens.pop(name, None)
        if action is not None:
            action()

    def wait(
        self, name: str, shared: Hashable, until: Callable[[], bool], acts: bool = False
    ) -> None:
        self.point(name, shared, True)
        assert until(), name


def at(name: str, action: Callable[[], object]) -> AbstractContextManager[None]:
    """Have ``action`` done when a preemption point is first reached, before what it covers."""
    return scheduled_by(At(**{name: lambda: (action(), None)[1]}))


def once(function: Callable[[], None]) -> Callable[[], None]:
    """A hook that does it the first time only."""
    turns: list[int] = []

    def hook() -> None:
        if not turns:
            turns.append(1)
            function()

    return hook


Make = Callable[..., FaultPath]


@pytest.fixture
def make() -> Iterator[Make]:
    """Builds a :class:`FaultPath`; takes its arguments."""
    made: list[FaultPath] = []

    def build(*args: object, **options: object) -> FaultPath:
        made.append(FaultPath(*args, **options))  # type: ignore[arg-type]
        return made[-1]

    yield build
    vcpu_put()
    for one in made:
        one.vm.close()

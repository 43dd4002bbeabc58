"""``struct kvm`` and ``struct kvm_vcpu``: the state that all of the fault path works on.

As in the kernel, the structures stand below the functions: each module of this room takes one of
them and does its part.  What userspace holds are the objects of :mod:`guestfault.softkvm.system`.
"""

from __future__ import annotations

import functools
import threading
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from guestfault.dialect.interface import Payload
from guestfault.dialect.record import Dialect, Enabling, Reset
from guestfault.softkvm import preempt
from guestfault.softkvm.apf_state import VcpuApf, VcpuAsyncPf
from guestfault.softkvm.emulate_ctxt import EmulateCtxt
from guestfault.softkvm.gmem import KvmGmem
from guestfault.softkvm.gmem_file import GmemFiles, HostGmemFiles
from guestfault.softkvm.lapic import KvmLapic
from guestfault.softkvm.mem_attr_array import MemAttrArray
from guestfault.softkvm.memslots import KvmMemorySlot, Memslots
from guestfault.softkvm.mm import Mm
from guestfault.softkvm.mmu_internal import KvmPageFault
from guestfault.softkvm.preempt import Mutex, Sleeper, preemption_point, wait
from guestfault.softkvm.processor import MAX_PHYS, REQUESTED, MakeProcessor, Processor, Stop
from guestfault.softkvm.refusal import GuestException, Refusal, Retry
from guestfault.softkvm.second_stage import SecondStage
from guestfault.softkvm.shadow_page import KvmMmu
from guestfault.softkvm.vmcb import VMEXIT_INVALID
from guestfault.softkvm.workqueue import Workqueue
from guestfault.uapi import kvm as uapi
from guestfault.x86.paging import PagingState, Table
from guestfault.x86.registers import CR0_PE, CR0_PG, CR4_SMAP, EFER_LMA, X86_EFLAGS_AC

__all__ = [
    "Kvm",
    "KvmVcpu",
    "MmioInfo",
    "PageTrackNotifier",
    "Request",
    "VcpuStat",
    "kvm_check_request",
    "kvm_flush_remote_tlbs",
    "kvm_get_running_vcpu",
    "kvm_make_all_cpus_request",
    "kvm_make_request",
    "kvm_test_request",
    "kvm_vcpu_kick",
    "kvm_vcpu_wake_up",
    "vcpu_load",
    "vcpu_put",
]

MAX_PHYS_BITS = MAX_PHYS.bit_length() - 1

# What cannot change is every vCPU's.
_RETRY = Retry()
_NO_SLOTS = Memslots()
_RESET_PAGING = PagingState(0, 0, 0, 0)

Walked = tuple[int, int, bool, int]
"""A translation: (guest physical page, rights, dirty, what was asked for)."""


class Request:
    """``KVM_REQ_*``: what :attr:`KvmVcpu.requests` may hold."""

    TLB_FLUSH = 1
    SIGNAL = 2  # somebody kicked the vCPU: what a pending signal is to the kernel
    TRIPLE_FAULT = 3
    APF_HALT = 4
    APF_READY = 5
    EVENT = 6


@dataclass(slots=True)
class VcpuStat:
    """Counters under KVM's names (``struct kvm_vcpu_stat``)."""

    exits: int = 0
    pf_taken: int = 0
    pf_fixed: int = 0
    pf_spurious: int = 0
    pf_emulate: int = 0
    pf_fast: int = 0
    pf_mmio_spte_created: int = 0
    mmio_exits: int = 0
    io_exits: int = 0
    halt_exits: int = 0
    signal_exits: int = 0
    req_event: int = 0


class PageTrackNotifier(Protocol):
    """``struct kvm_page_track_notifier_node``: one who must know of writes to tracked frames."""

    def track_write(self, vcpu: KvmVcpu, gpa: int, data: bytes) -> None:
        """KVM has written ``data`` there for the guest."""

    def track_flush_slot(self, slot: KvmMemorySlot) -> None:
        """The slot is going or moving: forget what was found in it."""


class MmioInfo(NamedTuple):
    """``vcpu->arch.mmio_*``: the frame found last to be no memory, and in which slots.

    ``gva`` is its page's linear address under shadow paging, 0 otherwise.
    """

    gva: int
    gfn: int
    generation: int


@dataclass(eq=False, slots=True)
class Kvm:
    """``struct kvm``."""

    dialect: Dialect
    mm: Mm
    tdp_enabled: bool = True
    """Two-dimensional paging (NPT, EPT); without it KVM keeps shadow page tables."""
    unrestricted_guest: bool = True
    """Whether the processor delivers events in real mode; if not, as on VMX without the feature of
    that name, KVM's emulator does."""
    enable_mmio_caching: bool = True
    """Whether a frame that is no memory gets an entry that says so (``kvm.mmio_caching``)."""
    make_processor: MakeProcessor | None = None
    vm_type: int = uapi.KVM_X86_DEFAULT_VM
    second_stage: SecondStage = field(default_factory=SecondStage)
    memslots: Memslots = field(default_factory=Memslots)
    slots_lock: Mutex = field(default_factory=lambda: Mutex("slots_lock"))
    mn_active_invalidate_count: int = 0
    """Invalidations between their start and their end: as long, the slots stay what they are."""
    mn_invalidate_lock: threading.Lock = field(default_factory=threading.Lock)
    irqchip_in_kernel: bool = False
    workqueue: Workqueue = field(default_factory=Workqueue)
    schedule_work: Callable[[Callable[[], None]], None] = field(init=False)
    """Has a work done by another thread; by one of :attr:`workqueue` unless replaced."""
    vcpus: dict[int, KvmVcpu] = field(default_factory=dict)
    track_notifiers: list[PageTrackNotifier] = field(default_factory=list)
    """Who hears of writes to tracked frames: :mod:`guestfault.softkvm.page_track`."""
    mem_attr_array: MemAttrArray = field(default_factory=MemAttrArray)
    gmem_files: GmemFiles = field(default_factory=HostGmemFiles)
    gmems: list[KvmGmem] = field(default_factory=list)
    """Its guest_memfds, and those that are closed as long as a slot has them."""
    # What userspace has asked for, in the dialects in which it must ask (KVM_ENABLE_CAP, and the
    # ioctl of v1).
    memfault_exit_reasons: int = 0
    fill_efault_info: bool = False
    mem_fault_nowait: bool = False
    warned: set[str] = field(default_factory=set)
    # The dialect's answers to what every fault asks.
    missing_flag: int = field(init=False)
    userfault_flag: int = field(init=False)
    gmem_flag: int = field(init=False)
    must_opt_in: bool = field(init=False)
    fast_gup_reads: bool = field(init=False)
    filters_reasons: bool = field(init=False)
    reset: Reset = field(init=False)
    second_union: bool = field(init=False)
    has_private_mem: bool = field(init=False)
    has_gmem: bool = field(init=False)
    """Whether it has that, or ever had a guest_memfd."""

    def __post_init__(self) -> None:
        self.schedule_work = self.workqueue.schedule_work
        self.missing_flag = self.dialect.slot_flag
        self.userfault_flag = self.dialect.userfault_flag
        self.gmem_flag = uapi.KVM_MEM_GUEST_MEMFD if self.dialect.has_guest_memfd else 0
        info = self.dialect.info
        self.must_opt_in = info is not None and info.enabling is not Enabling.INFORMATIONAL
        self.filters_reasons = self.must_opt_in or self.dialect.annotates_only_missing
        self.fast_gup_reads, self.reset = self.dialect.fast_gup_reads, self.dialect.reset
        self.second_union = self.dialect.interface.payload is Payload.SECOND_UNION
        self.has_private_mem = self.vm_type == uapi.KVM_X86_SW_PROTECTED_VM
        self.has_gmem = self.has_private_mem
        self.second_stage.keeps_mmio = self.has_private_mem and self.dialect.private_in_error_code

    def warn_on_once(self, text: str) -> None:
        """``WARN_ON_ONCE``: complain, the first time."""
        if text not in self.warned:
            self.warned.add(text)
            warnings.warn(text, stacklevel=3)


class KvmVcpu:
    """``struct kvm_vcpu``.  It belongs to the thread that runs it, but for three things.

    *Requests*: whoever needs the vCPU's attention puts one into ``requests``
    (:func:`kvm_make_request`) and kicks the vCPU: wakes it from ``wait``, where it sleeps while it
    is halted, or stops the processor if it is ``in_guest_mode``, which is ``vcpu->mode``
    (:func:`kvm_vcpu_kick`).  It leaves guest mode under ``mode_lock``, so that no stop can come
    after and hit something else that the processor does.

    *Asynchronous page faults* that workers have done with: ``async_pf.done``, under its lock.

    *Interrupts* that anybody has made pending in ``apic``.
    """

    def __init__(self, kvm: Kvm, vcpu_id: int, run: uapi.kvm_run, run_area: memoryview) -> None:
        self.kvm = kvm
        self.vcpu_id = vcpu_id
        self.run = run
        self.run_area = run_area
        self.stat = VcpuStat()
        # A set, for a signal handler may add to it in the midst of anything: one call does it.
        self.requests: set[int] = set()
        self.shared = "requests", vcpu_id
        """What preemption points call all that others may ask of it or wait for: its requests, its
        mode, whether it reads the slots, whether it was kicked."""
        self.in_guest_mode = False
        self.mode_lock = threading.RLock()  # for the same reason
        self.srcu_seq = 0  # odd while it reads the slots: see srcu.py
        self.wait = Sleeper(("wait", vcpu_id))
        self.in_run = False  # a thread is in KVM_RUN with it, which a kick must end
        self.wants_to_run = False  # what immediate_exit said as that began
        self.sregs = uapi.kvm_sregs()
        self.sregs_changed = True
        self.mapped_memslots = _NO_SLOTS
        self.mp_state = uapi.KVM_MP_STATE_RUNNABLE
        self.async_pf = VcpuAsyncPf()
        self.apf = VcpuApf()
        self.apic: KvmLapic | None = None
        self.interrupt_injected: int | None = None  # taken from the APIC, not yet delivered
        self.shadow_passed = False  # one instruction was executed alone for a possible STI
        # Whether an access to guest memory is KVM's own: but for what the guest's code does, all.
        self.emulating = True
        self.pending_exception: GuestException | None = None
        self.complete_userspace_io: Callable[[], int] | None = None
        self.refusal: Refusal = _RETRY
        self.refused_page: int | None = None  # linear; what a TLB miss was refused, once translated
        self.exit_code = VMEXIT_INVALID  # what the processor stopped with, if it was no fault
        self.emulate_ctxt = EmulateCtxt()
        self.last_error = ""
        # The first stage: the registers that decide a walk, and the last tables walked to, as in a
        # processor's paging-structure caches.
        self.cpl = 0
        self.paging = _RESET_PAGING
        self.protected = self.smap = False
        self.table_shift = 0
        self.tables: dict[int, Table] = {}
        self.walked: Walked | None = None
        self.system_page: int | None = None  # linear; what the processor accesses for itself
        self.refused_fetch: int | None = None  # linear; the TLB miss refused last was this fetch
        self.mmio: MmioInfo | None = None
        # Of shadow paging; with NPT or EPT there is nothing of it.
        self.mmu: KvmMmu | None = None
        self.mmu_page_fault: Callable[[KvmVcpu, KvmPageFault], int] | None = None
        self.speculative_exit_canary = 0  # KVM_SPEC_EXIT_* of the dialect that has it
        self.cpu: Processor  # set by the owner: its hooks are functions over this structure

    def enter_guest(self, execute: Callable[[], Stop]) -> Stop:
        """Have the processor execute guest code; REQUESTED if a request must be served first."""
        if preempt.scheduler is not None:
            preemption_point("vcpu_enter_guest: enter", self.shared, True)
        self.in_guest_mode = True
        self.srcu_seq += 1
        if self.requests:
            # Made before we were in guest mode: nobody would stop us.
            self.in_guest_mode = False
            self.srcu_seq |= 1
            return REQUESTED
        try:
            return execute()
        finally:
            if preempt.scheduler is not None:
                preemption_point("vcpu_enter_guest: leave", self.shared, True)
            with self.mode_lock:
                self.in_guest_mode = False
            # It is that already if a question of the processor's has ended in an exception.
            self.srcu_seq |= 1

    def slots_changed(self) -> bool:
        """Whether the processor has the memory of other slots than those that are now."""
        if preempt.scheduler is not None:
            preemption_point("vcpu_enter_guest: look at the slots", "memslots")
        return self.mapped_memslots is not self.kvm.memslots

    def forget_walks(self) -> None:
        """Forget what was found out about the guest's page tables."""
        self.tables.clear()
        self.walked = None

    def signal_pending(self) -> bool:
        """Whether the thread that runs it is wanted elsewhere: a sleep for it ends."""
        return Request.SIGNAL in self.requests

    @property
    def rflags(self) -> int:
        """RFLAGS."""
        return self.cpu.read_rflags()

    @property
    def long_mode(self) -> bool:
        """EFER.LMA."""
        return bool(self.sregs.efer & EFER_LMA)

    @property
    def smap_ac(self) -> bool:
        """RFLAGS.AC, where it matters."""
        return self.smap and self.cpu.read_rflags() & X86_EFLAGS_AC != 0

    def refresh_cpl(self) -> None:
        """Read the privilege level from the processor; the guest changes it without telling."""
        self.cpl = self.cpu.read_cs() & 3 if self.protected else 0

    def load_sregs(self) -> None:
        """Make the processor's system registers those in :attr:`sregs`."""
        s = self.sregs
        self.cpu.load(s)
        # Shadow paging tells by the object that the registers were loaded anew.
        make = _paging_state if self.mmu is None else _new_paging_state
        self.paging = make(s.cr0, s.cr3, s.cr4, s.efer)
        self.table_shift = self.paging.mode.shift(2) if s.cr0 & CR0_PG else 0
        self.protected, self.smap = bool(s.cr0 & CR0_PE), bool(s.cr4 & CR4_SMAP)
        self.forget_walks()
        if self.apic is not None:
            self.apic.apic_base, self.apic.cr8 = int(s.apic_base), int(s.cr8)
        self.sregs_changed = False
        self.refresh_cpl()

    def sync_sregs(self) -> uapi.kvm_sregs:
        """Bring :attr:`sregs` up to date with what the guest has loaded by itself, and give it."""
        if not self.sregs_changed:
            self.cpu.read_system(self.sregs)
        return self.sregs


def _new_paging_state(cr0: int, cr3: int, cr4: int, efer: int) -> PagingState:
    return PagingState(cr0, cr3, cr4, efer, maxphyaddr=MAX_PHYS_BITS)


# One for all that load the same registers: it keeps what follows from them.
_paging_state = functools.lru_cache(maxsize=64)(_new_paging_state)


# A context variable, so that a coroutine can stand for a thread.
_kvm_running_vcpu: ContextVar[KvmVcpu | None] = ContextVar("kvm_running_vcpu", default=None)


def kvm_get_running_vcpu() -> KvmVcpu | None:
    """The vCPU that this thread has loaded."""
    return _kvm_running_vcpu.get()


def vcpu_load(vcpu: KvmVcpu) -> None:
    """Make ``vcpu`` this thread's running vCPU, as every vCPU ioctl does first."""
    _kvm_running_vcpu.set(vcpu)


def vcpu_put() -> None:
    """The thread has no running vCPU any more."""
    _kvm_running_vcpu.set(None)


def kvm_make_request(vcpu: KvmVcpu, request: int) -> None:
    """Have the vCPU serve a request before it enters the guest next."""
    preemption_point("kvm_make_request: set the bit", vcpu.shared, True)
    vcpu.requests.add(request)


def kvm_test_request(vcpu: KvmVcpu, request: int) -> bool:
    """Whether there is such a request."""
    return request in vcpu.requests


def kvm_check_request(vcpu: KvmVcpu, request: int) -> bool:
    """Whether there is such a request; it is taken."""
    if request not in vcpu.requests:
        return False
    preemption_point("kvm_check_request: take the bit", vcpu.shared, True)
    vcpu.requests.discard(request)
    return True


def kvm_vcpu_wake_up(vcpu: KvmVcpu) -> None:
    """If the vCPU is blocking, have it look again whether it still must."""
    vcpu.wait.wake_up("kvm_vcpu_wake_up")


def kvm_vcpu_kick(vcpu: KvmVcpu) -> None:
    """Wake the vCPU, or make it leave guest mode for a request that was made before.

    Returns when it has been outside guest mode since.  It may be in again: then it has taken the
    request, as it must on the way.
    """
    kvm_vcpu_wake_up(vcpu)
    _leave_guest_mode(vcpu, "kvm_vcpu_kick: until it has left guest mode")


def kvm_make_all_cpus_request(kvm: Kvm, request: int) -> None:
    """Make a request of every vCPU; returns when each has been outside guest mode since.

    A vCPU that sleeps sleeps on (``KVM_REQUEST_NO_WAKEUP``): it will serve it when it wakes.
    """
    vcpus = list(kvm.vcpus.values())
    for vcpu in vcpus:
        kvm_make_request(vcpu, request)
    for vcpu in vcpus:
        _leave_guest_mode(vcpu, "kvm_make_all_cpus_request: until it has left guest mode")


def kvm_flush_remote_tlbs(kvm: Kvm) -> None:
    """When it returns, no vCPU uses an entry that was zapped.  ``mmu_lock`` is not held."""
    kvm_make_all_cpus_request(kvm, Request.TLB_FLUSH)


def _leave_guest_mode(vcpu: KvmVcpu, name: str) -> None:
    def left() -> bool:
        if not (vcpu.in_guest_mode and vcpu.requests):
            return True
        with vcpu.mode_lock:
            if vcpu.in_guest_mode:
                # One that comes before the processor has begun is lost: it is repeated.
                vcpu.cpu.stop()
        # A signal handler, called in the midst of a hook: the run ends with that.
        return kvm_get_running_vcpu() is vcpu

    preemption_point("kvm_vcpu_exiting_guest_mode", vcpu.shared, True)
    wait(name, vcpu.shared, left, acts=True)

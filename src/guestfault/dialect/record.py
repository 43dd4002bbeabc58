"""What one published version of the interface says, as one frozen record.

The fault path of the software KVM is written once and asks the record wherever versions differ.  A
new version is a new record in :mod:`guestfault.dialect.published`, and a new field here only where
it differs in a way that no version before it did.

The bugs that a version was published with are part of it: where one decides what the guest's fault
comes to, it is a value of the field that it is about (:attr:`Dialect.sizes_in_pages`,
:attr:`Dialect.checks_reasons`, :attr:`Dialect.reset`), and every one is told in
:attr:`Dialect.flaws` with where it was found.
"""

from __future__ import annotations

import enum
import errno
from dataclasses import dataclass

from guestfault.dialect.interface import MemoryFaultInterface

__all__ = [
    "NO_COUNTERPART",
    "Ask",
    "Capability",
    "Dialect",
    "Enabling",
    "Flaw",
    "Guard",
    "MissingExit",
    "Reason",
    "Reset",
    "Site",
]


class Enabling(enum.StrEnum):
    """What userspace must do for a capability to have an effect."""

    INFORMATIONAL = "informational"  # nothing; KVM_ENABLE_CAP is EINVAL
    OPT_IN = "opt-in"  # KVM_ENABLE_CAP with 1 in args[0], and 0 takes it back
    OPT_IN_PER_REASON = "opt-in per reason"  # KVM_ENABLE_CAP with the reasons' bits in args[0]


@dataclass(frozen=True, slots=True)
class Capability:
    """A capability's name, number, and how it is enabled."""

    name: str
    number: int
    enabling: Enabling


class Ask(enum.StrEnum):
    """How a VM is told to exit rather than wait for a page."""

    VM_SWITCH = "VM ioctl"  # for all of its slots at once
    SLOT_FLAG = "slot flag"  # where fast GUP fails, in a slot with the flag
    BITMAP = "slot flag and bitmap"  # where a bit of the slot's bitmap is set


@dataclass(frozen=True, slots=True)
class MissingExit:
    """The means by which userspace asks for an exit on a page that it has yet to provide.

    ``name`` is the slot flag's or the ioctl's and ``value`` its number.  ``cap`` announces it.
    """

    ask: Ask
    name: str
    value: int
    cap: Capability


class Guard(enum.StrEnum):
    """What the filling helper checks before it writes to ``kvm_run``."""

    VCPU_NOT_NULL = "vCPU not NULL"
    LOADED_VCPU = "loaded vCPU"
    EXIT_REASON_UNKNOWN = "exit_reason unknown"  # nothing else is prepared for userspace
    CANARY = "canary"  # nothing was filled since KVM_RUN began


class Reset(enum.StrEnum):
    """When ``KVM_RUN`` overwrites the ``exit_reason`` that the last one left."""

    NEVER = "never"
    AT_ENTRY = "at entry"  # near the start of kvm_arch_vcpu_ioctl_run, before the last exit is over
    BEFORE_LOOP = "before vcpu_run's loop"


class Reason(enum.Enum):
    """Why an access could not be served, as far as KVM knows."""

    UNKNOWN = enum.auto()
    MISSING = enum.auto()  # userspace asked not to wait for the page
    USERFAULT = enum.auto()  # the page's bit is set in the slot's bitmap


class Site(enum.StrEnum):
    """A place in KVM where a failed guest access can be annotated, under Linux's name."""

    FAULTIN_PFN = "__kvm_faultin_pfn"
    HANDLE_ERROR_PFN = "kvm_handle_error_pfn"
    DIRECT_MAP = "direct_map"
    FETCH = "FNAME(fetch)"
    HANDLE_PAGE_FAULT = "kvm_handle_page_fault"
    MMU_PAGE_FAULT = "kvm_mmu_page_fault"
    VCPU_READ_GUEST_PAGE = "kvm_vcpu_read_guest_page"
    VCPU_WRITE_GUEST_PAGE = "kvm_vcpu_write_guest_page"
    VCPU_MAP = "kvm_vcpu_map"
    DO_USERFAULT = "kvm_do_userfault"
    # Private memory (guest_memfd)
    HANDLE_NOSLOT_FAULT = "kvm_handle_noslot_fault"  # a private access where no slot is
    FAULTIN_PFN_PRIVATE_MISMATCH = "kvm_mmu_faultin_pfn"  # private against shared
    FAULTIN_PFN_GMEM = "kvm_mmu_faultin_pfn_gmem"
    DO_PAGE_FAULT_PRIVATE = "kvm_mmu_do_page_fault"  # a private access that would be emulated
    # What the software KVM has no counterpart for
    SETUP_VMGEXIT_SCRATCH = "setup_vmgexit_scratch"  # SEV-ES
    HV_GET_ASSIST_PAGE = "kvm_hv_get_assist_page"  # Hyper-V
    PV_CLOCK_PAIRING = "kvm_pv_clock_pairing"
    USER_MEM_ABORT = "user_mem_abort"  # arm64
    GMEM_ABORT = "gmem_abort"  # arm64


NO_COUNTERPART = frozenset(
    {
        Site.SETUP_VMGEXIT_SCRATCH,
        Site.HV_GET_ASSIST_PAGE,
        Site.PV_CLOCK_PAIRING,
        Site.USER_MEM_ABORT,
        Site.GMEM_ABORT,
    }
)
"""Sites that the software KVM has nothing of: encrypted state, Hyper-V, PV clocks, arm64."""


@dataclass(frozen=True, slots=True)
class Flaw:
    """What is wrong with a version as published, and where that was said or can be read."""

    what: str
    source: str


@dataclass(frozen=True, slots=True)
class Dialect:
    """One version of the interface.

    ``interface`` is what userspace sees of a fault; ``info`` the capability that announces it, if
    it has one of its own; ``missing`` how a VM is told to exit on a missing page; ``annotated`` the
    sites that fill ``kvm_run``; ``source`` where the version was published, a Message-ID or a
    commit.
    """

    name: str
    published: str
    title: str
    source: str
    interface: MemoryFaultInterface
    info: Capability | None
    missing: MissingExit | None
    annotated: frozenset[Site]
    reset: Reset
    guards: tuple[Guard, ...] = ()
    """In the order in which the helper looks; the first that trips keeps it from filling."""
    warns_only: frozenset[Guard] = frozenset()
    """Guards that complain and let the helper fill nevertheless."""
    fill_errno: int = errno.EFAULT
    """What the helper makes ``KVM_RUN`` fail with once it has filled."""
    annotates_only_missing: bool = False
    """Whether only faults are annotated that the VM asked to be told of."""
    fast_gup_reads: bool = False
    """Whether fast GUP is tried for a read that wants no writable page."""
    async_when_fast: str = ""
    """What becomes of ``async`` where a lookup is made fast-only."""
    async_pf_error_code: bool = False
    """Whether kvm_arch_async_page_ready() makes the guest's fault again as what it was, and not as
    a read."""
    guest_memfd_flags: int | None = None
    """``GUEST_MEMFD_FLAG_*`` that a guest_memfd may have; ``None``: there is none to be had."""
    private_in_error_code: bool = False
    """Whether a fault's error code says that it is private, from its beginning on; else that is
    asked when the fault is handled, and for a prefetch anew."""
    checks_reasons: bool = True
    """Whether an opt-in per reason refuses bits that are no reasons."""
    readonly_excluded: bool = False
    """Whether a slot that exits on a missing page cannot be read-only (EINVAL)."""
    sizes_in_pages: frozenset[Site] = frozenset()
    """Sites that report a length in pages, for one in bytes."""
    arm64: str = ""
    """Where arm64 differs from what is said here, which is x86."""
    flaws: tuple[Flaw, ...] = ()
    """What was found to be wrong with it."""
    changed: str = ""
    """What it changed against the version before, and why, in a sentence or two."""
    # Bits of memory_fault.flags; 0 where the version has none for it.
    flag_read: int = 0
    flag_write: int = 0
    flag_exec: int = 0
    flag_private: int = 0
    flag_unknown: int = 0
    flag_missing: int = 0
    flag_userfault: int = 0

    @property
    def slot_flag(self) -> int:
        """The slot flag that asks for an exit as soon as fast GUP fails; 0 if there is none."""
        missing = self.missing
        return missing.value if missing is not None and missing.ask is Ask.SLOT_FLAG else 0

    @property
    def userfault_flag(self) -> int:
        """The slot flag that gives the slot a bitmap of pages to exit on; 0 if there is none."""
        missing = self.missing
        return missing.value if missing is not None and missing.ask is Ask.BITMAP else 0

    @property
    def has_guest_memfd(self) -> bool:
        """Whether it has guest_memfd, and private memory with it."""
        return self.guest_memfd_flags is not None

    @property
    def capabilities(self) -> tuple[Capability, ...]:
        """Its capabilities, the one that announces the exit first."""
        missing = () if self.missing is None else (self.missing.cap,)
        return missing if self.info is None else (self.info, *missing)

    @property
    def must_be_enabled(self) -> bool:
        """Whether a VMM gets no annotation unless it asks for them."""
        opt_in = self.info is not None and self.info.enabling is not Enabling.INFORMATIONAL
        return opt_in or self.annotates_only_missing

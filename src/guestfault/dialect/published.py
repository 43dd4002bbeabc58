"""Every published version of the interface, one record each, oldest first.

The facts are those of the patches themselves; each record says where they were posted.  A message
is read at ``https://lore.kernel.org/kvm/<Message-ID>/``.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from guestfault.dialect import interface as spoken
from guestfault.dialect.record import (
    Ask,
    Capability,
    Dialect,
    Enabling,
    Flaw,
    Guard,
    MissingExit,
    Reset,
    Site,
)
from guestfault.dialect.unmerged import KVM_MEM_USERFAULT, KVM_SET_MEM_FAULT_NOWAIT
from guestfault.errors import Unavailable
from guestfault.uapi import kvm as uapi

__all__ = [
    "DIALECTS",
    "LINUX_6_8",
    "LINUX_7_3",
    "SEED",
    "USERFAULT_V3",
    "V1",
    "V3",
    "V4",
    "V5",
    "V6",
    "V7",
    "WIP_V2",
    "dialect_named",
    "recognise",
]

_INFO = Enabling.INFORMATIONAL

V1 = Dialect(
    name="v1",
    published="February 2023",
    title="Add memory fault exits to avoid slow GUP",
    source="20230215011614.725983-1-amoorthy@google.com",
    interface=spoken.V1,
    info=None,
    missing=MissingExit(
        Ask.VM_SWITCH,
        "KVM_SET_MEM_FAULT_NOWAIT",
        KVM_SET_MEM_FAULT_NOWAIT,
        Capability("KVM_CAP_MEM_FAULT_NOWAIT", 226, _INFO),
    ),
    annotated=frozenset({Site.FAULTIN_PFN}),
    annotates_only_missing=True,
    reset=Reset.NEVER,
    fast_gup_reads=True,
    async_when_fast="the caller passes NULL for it",
    changed="The first: a switch for the whole VM, by which a guest fault does fast GUP only, and"
    " a fault that fast GUP cannot serve fills the run page.",
    flaws=(
        Flaw(
            "kvm_run is filled in __kvm_faultin_pfn() and the -EFAULT comes from"
            " kvm_handle_error_pfn(): they are two places that must agree, and nothing makes them",
            "Y+0VK6vZpMqAQ2Dc@google.com",
        ),
        Flaw(
            "memory_fault.flags is not written: what an earlier exit left there stays",
            "20230215011614.725983-6-amoorthy@google.com",
        ),
        Flaw(
            "an rwlock protects the one bool, which needs none",
            "Y+0RYMfw6pHrSLX4@google.com",
        ),
        Flaw(
            "the switch is a new ioctl for all of the VM, where a slot flag would have done, and"
            " the slots' SRCU would have ordered it against faults under way",
            "Y+6iX6a22+GEuH1b@google.com",
        ),
        Flaw(
            "exit_reason is never reset, so that a bare -EFAULT can stand beside a stale 38",
            "ZBiBkwIF4YHnphPp@google.com",
        ),
    ),
)

WIP_V2 = Dialect(
    name="wip-v2",
    published="March 2023",
    title="Avoiding slow get-user-pages via memory fault exit",
    source="20230315021738.1151386-1-amoorthy@google.com",
    interface=spoken.WIP_V2,
    info=Capability("KVM_CAP_X86_MEMORY_FAULT_EXIT", 227, Enabling.OPT_IN_PER_REASON),
    missing=MissingExit(
        Ask.SLOT_FLAG,
        "KVM_MEM_ABSENT_MAPPING_FAULT",
        1 << 2,
        Capability("KVM_CAP_MEMORY_FAULT_NOWAIT", 228, _INFO),
    ),
    annotated=frozenset(
        {
            Site.HANDLE_ERROR_PFN,
            Site.DIRECT_MAP,
            Site.FETCH,
            Site.HANDLE_PAGE_FAULT,
            Site.SETUP_VMGEXIT_SCRATCH,
            Site.USER_MEM_ABORT,
        }
    ),
    reset=Reset.NEVER,
    fill_errno=errno.EPERM,
    fast_gup_reads=True,
    async_when_fast=V1.async_when_fast,
    checks_reasons=False,
    sizes_in_pages=frozenset({Site.DIRECT_MAP, Site.FETCH}),
    flag_unknown=spoken.WIP_V2.flags["UNKNOWN"],
    flag_missing=spoken.WIP_V2.flags["ABSENT_MAPPING"],
    arm64="user_mem_abort fills kvm_run and returns 0, with flags 0 and the length of the"
    " mapping's page",
    changed="A memory fault exit of its own, for more failures than a missing page: userspace"
    " enables it for each reason, and what is not enabled stays a bare -EFAULT.  The switch becomes"
    " a flag of the slot.",
    flaws=(
        Flaw(
            "the helper returns -1, which is -EPERM, where an exit that was meant as one would"
            " return 0, and a failure -EFAULT",
            "20230317000226.GA408922@ls.amr.corp.intel.com",
        ),
        Flaw(
            "kvm_memfault_exit_flags_valid() takes the logical for the bitwise complement of the"
            " valid bits, and so accepts every reason",
            "20230315021738.1151386-5-amoorthy@google.com",
        ),
        Flaw(
            "direct_map() and FNAME(fetch) report a length of pages; it is documented as bytes",
            "20230315021738.1151386-1-amoorthy@google.com",
        ),
        Flaw(
            "the selftest expects flags of 0, which no annotated site reports",
            "20230315021738.1151386-1-amoorthy@google.com",
        ),
        Flaw(
            "exit_reason is never reset, so that a bare -EFAULT can stand beside a stale 38",
            "ZBiBkwIF4YHnphPp@google.com",
        ),
    ),
)

SEED = Dialect(
    name="seed",
    published="March 2023",
    title="Re: [WIP Patch v2 04/14] Add KVM_CAP_X86_MEMORY_FAULT_EXIT",
    source="CAF7b7mof8HkcaSthEO8Wu9kf8ZHjE9c1TDzQGAYDYv7FN9+k9w@mail.gmail.com",
    interface=spoken.SEED,
    info=Capability("KVM_CAP_X86_MEMORY_FAULT_EXIT", 227, _INFO),
    missing=WIP_V2.missing,
    annotated=WIP_V2.annotated,
    reset=Reset.BEFORE_LOOP,
    guards=(Guard.LOADED_VCPU,),
    fast_gup_reads=True,
    async_when_fast=WIP_V2.async_when_fast,
    flag_unknown=WIP_V2.flag_unknown,
    flag_missing=WIP_V2.flag_missing,
    changed="What the discussion of WIP v2 arrived at: -EFAULT and a filled run page, always and"
    " without an opt-in, behind the guard of the sketch kvm_handle_efault().  Nobody posted it as a"
    " patch: numbers and sites are WIP v2's.  exit_reason is overwritten as KVM_RUN starts, as the"
    " discussion asks (ZBiBkwIF4YHnphPp@google.com); it does not say where, and here it is where"
    " Linux does it now.",
    flaws=(
        Flaw(
            "whoever annotates a failure that is then suppressed overwrites whatever exit is"
            " prepared: the question that this message ends with",
            "CAF7b7mof8HkcaSthEO8Wu9kf8ZHjE9c1TDzQGAYDYv7FN9+k9w@mail.gmail.com",
        ),
    ),
)

V3 = Dialect(
    name="v3",
    published="April 2023",
    title="Improve scalability of KVM + userfaultfd live migration via annotated memory faults.",
    source="20230412213510.1220557-1-amoorthy@google.com",
    interface=spoken.V3,
    info=Capability("KVM_CAP_MEMORY_FAULT_INFO", 227, Enabling.OPT_IN),
    missing=MissingExit(
        Ask.SLOT_FLAG,
        "KVM_MEM_ABSENT_MAPPING_FAULT",
        1 << 2,
        Capability("KVM_CAP_ABSENT_MAPPING_FAULT", 228, _INFO),
    ),
    annotated=frozenset(
        {
            Site.VCPU_WRITE_GUEST_PAGE,
            Site.VCPU_READ_GUEST_PAGE,
            Site.VCPU_MAP,
            Site.MMU_PAGE_FAULT,
            Site.SETUP_VMGEXIT_SCRATCH,
            Site.HANDLE_PAGE_FAULT,
            Site.HV_GET_ASSIST_PAGE,
            Site.PV_CLOCK_PAIRING,
            Site.DIRECT_MAP,
            Site.HANDLE_ERROR_PFN,
            Site.USER_MEM_ABORT,
        }
    ),
    reset=Reset.AT_ENTRY,
    guards=(Guard.LOADED_VCPU, Guard.EXIT_REASON_UNKNOWN),
    fast_gup_reads=True,
    async_when_fast=V1.async_when_fast,
    changed="The run page is filled beside the -EFAULT and decides nothing, so reasons and flags"
    " go; a single opt-in stays.  It annotates widely, KVM's own accesses for the guest included,"
    " and guards against a second fill by the exit_reason, which KVM_RUN therefore resets.",
    flaws=(
        Flaw(
            "exit_reason is reset near the start of kvm_arch_vcpu_ioctl_run(), before the last exit"
            " is complete, and also where KVM_RUN then returns -EINTR: userspace that reads it"
            " between two runs loses it",
            "ZFFbwOXZ5uI/gdaf@google.com",
        ),
        Flaw(
            "kvm_vcpu_ioctl() warns at every -EFAULT that is not annotated, and there are many",
            "20230412213510.1220557-1-amoorthy@google.com",
        ),
    ),
)

V4 = Dialect(
    name="v4",
    published="June 2023",
    title="Improve scalability of KVM + userfaultfd live migration via annotated memory faults.",
    source="20230602161921.208564-1-amoorthy@google.com",
    interface=spoken.V4,
    info=Capability("KVM_CAP_MEMORY_FAULT_INFO", 228, _INFO),
    missing=MissingExit(
        Ask.SLOT_FLAG,
        "KVM_MEM_NOWAIT_ON_FAULT",
        1 << 2,
        Capability("KVM_CAP_NOWAIT_ON_FAULT", 229, _INFO),
    ),
    annotated=frozenset(
        {
            Site.VCPU_WRITE_GUEST_PAGE,
            Site.VCPU_READ_GUEST_PAGE,
            Site.HANDLE_ERROR_PFN,
            Site.USER_MEM_ABORT,
        }
    ),
    reset=Reset.BEFORE_LOOP,
    guards=(Guard.VCPU_NOT_NULL, Guard.LOADED_VCPU, Guard.EXIT_REASON_UNKNOWN),
    fast_gup_reads=True,
    async_when_fast=V1.async_when_fast,
    flag_write=spoken.V4.flags["WRITE"],
    flag_exec=spoken.V4.flags["EXEC"],
    changed="No opt-in any more (ZHjqkdEOVUiazj5d@google.com).  Flags say what the access was."
    "  Fewer sites, and the warning about bare ones is gone.",
    flaws=(
        Flaw(
            "an exit is prepared, then an access whose failure is ignored annotates: if the guard"
            " does not see it, the prepared exit completes with another one's payload (case A)",
            "ZIn6VQSebTRN1jtX@google.com",
        ),
        Flaw(
            "an annotated failure is suppressed, and a later -EFAULT that is not annotated is"
            " returned with its payload (case B)",
            "ZIn6VQSebTRN1jtX@google.com",
        ),
        Flaw(
            "an annotated failure is suppressed, and the exit_reason guard then keeps a later one,"
            " which is returned, from being annotated (case C)",
            "ZIn6VQSebTRN1jtX@google.com",
        ),
        Flaw(
            "nothing says that an access was a read; a flags of 0 is not the same",
            "ZIn6VQSebTRN1jtX@google.com",
        ),
    ),
)

V5 = Dialect(
    name="v5",
    published="September 2023",
    title="Improve KVM + userfaultfd live migration via annotated memory faults.",
    source="20230908222905.1321305-1-amoorthy@google.com",
    interface=spoken.V5,
    info=Capability("KVM_CAP_MEMORY_FAULT_INFO", 230, _INFO),
    missing=MissingExit(
        Ask.SLOT_FLAG,
        "KVM_MEM_USERFAULT_ON_MISSING",
        1 << 2,
        Capability("KVM_CAP_USERFAULT_ON_MISSING", 231, _INFO),
    ),
    annotated=V4.annotated,
    reset=Reset.NEVER,
    guards=(Guard.LOADED_VCPU, Guard.CANARY),
    warns_only=frozenset({Guard.CANARY}),
    fast_gup_reads=True,
    async_when_fast="__gfn_to_pfn_memslot() makes what it points to false, and it NULL",
    flag_read=spoken.V5.flags["READ"],
    flag_write=spoken.V5.flags["WRITE"],
    flag_exec=spoken.V5.flags["EXEC"],
    changed="The payload moves to a second union, where it cannot overwrite an exit that is"
    " prepared, and exit_reason is left alone: a bit of kvm_run.flags says that it is filled.  A"
    " canary stands in for the exit_reason guard.  The"
    " slot's flag is looked at in __gfn_to_pfn_memslot(), for every caller that does not opt out,"
    " as kvm_vcpu_map() does.",
    flaws=(
        Flaw(
            "the canary's warning can be made to fire by userspace: an event injected in real mode"
            " writes to a stack that is not there, the failure is swallowed, and the next one finds"
            " the canary taken",
            "202309141107.30863e9d-oliver.sang@intel.com",
        ),
        Flaw(
            "the guard is documented to keep a second fill out, and only warns",
            "20230908222905.1321305-5-amoorthy@google.com",
        ),
        Flaw(
            "a second union for one exit is not worth its price: accuracy is owed for guest page"
            " faults only, and the rest is best effort",
            "ZR4N8cwzTMDanPUY@google.com",
        ),
    ),
)

_GUEST_MEMFD_SITES = frozenset({Site.FAULTIN_PFN_PRIVATE_MISMATCH, Site.FAULTIN_PFN_GMEM})

V6 = Dialect(
    name="v6",
    published="November 2023",
    title="Improve KVM + userfaultfd performance via KVM_MEMORY_FAULT_EXITs on stage-2 faults",
    source="20231109210325.3806151-1-amoorthy@google.com",
    interface=spoken.V7,
    info=Capability("KVM_CAP_MEMORY_FAULT_INFO", 232, _INFO),
    missing=MissingExit(
        Ask.SLOT_FLAG,
        "KVM_MEM_EXIT_ON_MISSING",
        1 << 3,
        Capability("KVM_CAP_EXIT_ON_MISSING", 236, _INFO),
    ),
    annotated=_GUEST_MEMFD_SITES | {Site.HANDLE_ERROR_PFN, Site.USER_MEM_ABORT},
    reset=Reset.BEFORE_LOOP,
    fast_gup_reads=True,
    async_when_fast=V5.async_when_fast,
    flag_read=spoken.V7.flags["READ"],
    flag_write=spoken.V7.flags["WRITE"],
    flag_exec=spoken.V7.flags["EXEC"],
    flag_private=spoken.V7.flags["PRIVATE"],
    changed="On top of guest_memfd, whose helper (kvm_prepare_memory_fault_exit) and exit it takes"
    " over: no second union, no guard.  Only stage-2 faults are annotated.",
    flaws=(
        Flaw(
            "fast GUP for reads finds pages that a write elsewhere is about to replace (copy on"
            " write)",
            "20240215235405.368539-1-amoorthy@google.com",
        ),
    ),
)

V7 = Dialect(
    name="v7",
    published="February 2024",
    title="Improve KVM + userfaultfd performance via KVM_EXIT_MEMORY_FAULTs on stage-2 faults",
    source="20240215235405.368539-1-amoorthy@google.com",
    interface=spoken.V7,
    info=V6.info,
    missing=V6.missing,
    annotated=V6.annotated,
    reset=Reset.BEFORE_LOOP,
    async_when_fast=V5.async_when_fast,
    readonly_excluded=True,
    flag_read=V6.flag_read,
    flag_write=V6.flag_write,
    flag_exec=V6.flag_exec,
    flag_private=V6.flag_private,
    changed="Fast GUP is for writable pages again, and so a slot cannot both be read-only and exit"
    " on a missing page.",
    flaws=(
        Flaw(
            "not merged: KVM Userfault was expected to make its ABI a dead one",
            "ZeuMEdQTFADDSFkX@google.com",
        ),
    ),
)

LINUX_6_8 = Dialect(
    name="linux-6.8",
    published="March 2024",
    title="KVM: Add KVM_EXIT_MEMORY_FAULT exit to report faults to userspace",
    source="Linux 6.8, commit 16f95f3b95ca",
    interface=spoken.LINUX_6_8,
    info=V6.info,
    missing=None,
    annotated=_GUEST_MEMFD_SITES,
    reset=Reset.BEFORE_LOOP,
    guest_memfd_flags=0,
    flag_private=uapi.KVM_MEMORY_EXIT_FLAG_PRIVATE,
    changed="What was merged, with guest_memfd: the exit is there for private memory.  Bits 0 to 2"
    " are kept for read, write and exec, and not written.",
    flaws=(
        Flaw(
            "an ordinary slot's failure is a bare -EFAULT (kvm_handle_error_pfn), although the"
            " manual names just that as its example: a valid slot and no mapping behind it",
            "Documentation/virt/kvm/api.rst, KVM_CAP_MEMORY_FAULT_INFO; arch/x86/kvm/mmu/mmu.c",
        ),
    ),
)

LINUX_7_3 = Dialect(
    name="linux-7.3",
    published="the newest release read",
    title="what a released kernel does today",
    source="Linux 7.3, arch/x86/kvm/mmu/mmu.c",
    interface=spoken.LINUX_6_8,
    info=V6.info,
    missing=None,
    annotated=_GUEST_MEMFD_SITES
    | {Site.HANDLE_NOSLOT_FAULT, Site.DO_PAGE_FAULT_PRIVATE, Site.GMEM_ABORT},
    reset=Reset.BEFORE_LOOP,
    async_pf_error_code=True,
    guest_memfd_flags=uapi.GUEST_MEMFD_FLAG_MMAP | uapi.GUEST_MEMFD_FLAG_INIT_SHARED,
    private_in_error_code=True,
    flag_private=uapi.KVM_MEMORY_EXIT_FLAG_PRIVATE,
    changed="A private access that would have to be emulated is annotated too, and one where no"
    " slot is has a site of its own; an ordinary slot's failure is as bare as it was.",
    flaws=LINUX_6_8.flaws,
)

USERFAULT_V3 = Dialect(
    name="userfault-v3",
    published="June 2025",
    title="KVM: Introduce KVM Userfault",
    source="20250618042424.330664-1-jthoughton@google.com",
    interface=spoken.USERFAULT_V3,
    info=V6.info,
    missing=MissingExit(
        Ask.BITMAP,
        "KVM_MEM_USERFAULT",
        KVM_MEM_USERFAULT,
        Capability("KVM_CAP_USERFAULT", 243, _INFO),
    ),
    annotated=(LINUX_7_3.annotated - {Site.GMEM_ABORT}) | {Site.DO_USERFAULT},
    reset=Reset.BEFORE_LOOP,
    flag_private=uapi.KVM_MEMORY_EXIT_FLAG_PRIVATE,
    flag_userfault=spoken.USERFAULT_V3.flags["USERFAULT"],
    changed="Another author's, and another idea: userspace keeps a bitmap of the slot's pages, and"
    " a guest access to one whose bit is set exits before the page is looked up at all, however"
    " present it may be.",
    flaws=(
        Flaw(
            "KVM's own accesses (emulation, PV clocks) do not look at the bitmap: userfaultfd is"
            " still needed for them",
            "20250618042424.330664-1-jthoughton@google.com",
        ),
        Flaw(
            "a word of the bitmap that cannot be read is a bare -EFAULT",
            "20250618042424.330664-1-jthoughton@google.com",
        ),
        Flaw(
            "another bitmap for a slot whose flags stay as they are is taken and not used",
            "20250618042424.330664-1-jthoughton@google.com",
        ),
    ),
)

_ALL = (V1, WIP_V2, SEED, V3, V4, V5, V6, V7, LINUX_6_8, LINUX_7_3, USERFAULT_V3)

DIALECTS = {dialect.name: dialect for dialect in _ALL}


def dialect_named(name: str) -> Dialect:
    """The published version of that name; :class:`~guestfault.errors.Unavailable` if none is."""
    if name not in DIALECTS:
        raise Unavailable(f"dialect {name!r}", "not known", f"known are {', '.join(DIALECTS)}")
    return DIALECTS[name]


def recognise(check_extension: Callable[[int], int]) -> Dialect | None:
    """The dialect that a KVM speaks to one who asks for none: see :func:`.interface.probe`.

    ``None`` if it announces no memory-fault exit.  A released kernel is ``linux-6.8``: what the
    later ones annotate besides does not show.
    """
    interface = spoken.probe(check_extension)
    return next((d for d in (SEED, V4, V5, LINUX_6_8) if d.interface is interface), None)

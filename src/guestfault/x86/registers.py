"""Control registers, EFER, RFLAGS, exception vectors and page-fault error codes, bit by bit.

Why it exists: the walk, the segments, the software processor and everyone who reads ``kvm_sregs``
speak about the same bits, and should speak about them under one name, the usual one.  The values
are the processor's, so plain ``int`` it is: they are or-ed into registers that are plain ``int``
too.

Sources: Intel SDM vol. 3 sections 2.5 (control registers), 2.2.1 (IA32_EFER), 2.3 (RFLAGS), 6.3.1
(vectors) and 4.7 (page-fault error codes); AMD APM vol. 2 section 3.1.7 (EFER) and chapter 8.  The
names are those of Linux (``asm/processor-flags.h``, ``asm/msr-index.h``, ``asm/kvm_host.h``), less
the prefix ``X86_`` where a register's name is prefix enough.
"""

from __future__ import annotations

from typing import Final

__all__ = [
    "AC_VECTOR",
    "BP_VECTOR",
    "BR_VECTOR",
    "CONTRIBUTORY_VECTORS",
    "CP_VECTOR",
    "CR0_AM",
    "CR0_CD",
    "CR0_EM",
    "CR0_ET",
    "CR0_MP",
    "CR0_NE",
    "CR0_NW",
    "CR0_PE",
    "CR0_PG",
    "CR0_TS",
    "CR0_WP",
    "CR3_PCID_MASK",
    "CR4_CET",
    "CR4_DE",
    "CR4_FSGSBASE",
    "CR4_LA57",
    "CR4_MCE",
    "CR4_OSFXSR",
    "CR4_OSXMMEXCPT",
    "CR4_OSXSAVE",
    "CR4_PAE",
    "CR4_PCE",
    "CR4_PCIDE",
    "CR4_PGE",
    "CR4_PKE",
    "CR4_PSE",
    "CR4_PVI",
    "CR4_SMAP",
    "CR4_SMEP",
    "CR4_TSD",
    "CR4_UMIP",
    "CR4_VME",
    "DB_VECTOR",
    "DE_VECTOR",
    "DF_VECTOR",
    "EFER_LMA",
    "EFER_LME",
    "EFER_NXE",
    "EFER_SCE",
    "EFER_SVME",
    "ERROR_CODE_VECTORS",
    "EXCEPTION_NAMES",
    "GP_VECTOR",
    "MC_VECTOR",
    "MF_VECTOR",
    "MSR_EFER",
    "MSR_FS_BASE",
    "MSR_GS_BASE",
    "MSR_KERNEL_GS_BASE",
    "MSR_LSTAR",
    "MSR_STAR",
    "MSR_SYSCALL_MASK",
    "NMI_VECTOR",
    "NM_VECTOR",
    "NP_VECTOR",
    "OF_VECTOR",
    "PFERR_FETCH_MASK",
    "PFERR_GUEST_FINAL_MASK",
    "PFERR_GUEST_PAGE_MASK",
    "PFERR_PK_MASK",
    "PFERR_PRESENT_MASK",
    "PFERR_PRIVATE_ACCESS",
    "PFERR_RSVD_MASK",
    "PFERR_SS_MASK",
    "PFERR_USER_MASK",
    "PFERR_WRITE_MASK",
    "PF_VECTOR",
    "SS_VECTOR",
    "TS_VECTOR",
    "UD_VECTOR",
    "VE_VECTOR",
    "X86_EFLAGS_AC",
    "X86_EFLAGS_AF",
    "X86_EFLAGS_CF",
    "X86_EFLAGS_DF",
    "X86_EFLAGS_FIXED",
    "X86_EFLAGS_ID",
    "X86_EFLAGS_IF",
    "X86_EFLAGS_IOPL",
    "X86_EFLAGS_IOPL_BIT",
    "X86_EFLAGS_NT",
    "X86_EFLAGS_OF",
    "X86_EFLAGS_PF",
    "X86_EFLAGS_RF",
    "X86_EFLAGS_SF",
    "X86_EFLAGS_TF",
    "X86_EFLAGS_VIF",
    "X86_EFLAGS_VIP",
    "X86_EFLAGS_VM",
    "X86_EFLAGS_ZF",
    "XM_VECTOR",
    "describe_error_code",
]

CR0_PE: Final = 1 << 0  # protected mode
CR0_MP: Final = 1 << 1
CR0_EM: Final = 1 << 2
CR0_TS: Final = 1 << 3
CR0_ET: Final = 1 << 4  # reads as 1 on every processor since the 486
CR0_NE: Final = 1 << 5
CR0_WP: Final = 1 << 16  # supervisor writes respect R/W = 0
CR0_AM: Final = 1 << 18
CR0_NW: Final = 1 << 29
CR0_CD: Final = 1 << 30
CR0_PG: Final = 1 << 31

CR3_PCID_MASK: Final = 0xFFF  # the process-context identifier, when CR4.PCIDE is set

CR4_VME: Final = 1 << 0
CR4_PVI: Final = 1 << 1
CR4_TSD: Final = 1 << 2
CR4_DE: Final = 1 << 3
CR4_PSE: Final = 1 << 4  # 4 MiB pages in 32-bit paging; no effect with PAE
CR4_PAE: Final = 1 << 5
CR4_MCE: Final = 1 << 6
CR4_PGE: Final = 1 << 7
CR4_PCE: Final = 1 << 8
CR4_OSFXSR: Final = 1 << 9
CR4_OSXMMEXCPT: Final = 1 << 10
CR4_UMIP: Final = 1 << 11
CR4_LA57: Final = 1 << 12  # 5-level paging; may only change outside long mode
CR4_FSGSBASE: Final = 1 << 16
CR4_PCIDE: Final = 1 << 17
CR4_OSXSAVE: Final = 1 << 18
CR4_SMEP: Final = 1 << 20
CR4_SMAP: Final = 1 << 21
CR4_PKE: Final = 1 << 22
CR4_CET: Final = 1 << 23

EFER_SCE: Final = 1 << 0
EFER_LME: Final = 1 << 8  # long mode asked for
EFER_LMA: Final = 1 << 10  # long mode active: LME and CR0.PG
EFER_NXE: Final = 1 << 11
EFER_SVME: Final = 1 << 12

MSR_EFER: Final = 0xC000_0080
MSR_STAR: Final = 0xC000_0081
MSR_LSTAR: Final = 0xC000_0082
MSR_SYSCALL_MASK: Final = 0xC000_0084
MSR_FS_BASE: Final = 0xC000_0100
MSR_GS_BASE: Final = 0xC000_0101
MSR_KERNEL_GS_BASE: Final = 0xC000_0102

X86_EFLAGS_CF: Final = 1 << 0
X86_EFLAGS_FIXED: Final = 1 << 1  # always 1; entry into a guest fails without it
X86_EFLAGS_PF: Final = 1 << 2
X86_EFLAGS_AF: Final = 1 << 4
X86_EFLAGS_ZF: Final = 1 << 6
X86_EFLAGS_SF: Final = 1 << 7
X86_EFLAGS_TF: Final = 1 << 8
X86_EFLAGS_IF: Final = 1 << 9
X86_EFLAGS_DF: Final = 1 << 10
X86_EFLAGS_OF: Final = 1 << 11
X86_EFLAGS_IOPL_BIT: Final = 12
X86_EFLAGS_IOPL: Final = 3 << X86_EFLAGS_IOPL_BIT
X86_EFLAGS_NT: Final = 1 << 14
X86_EFLAGS_RF: Final = 1 << 16
X86_EFLAGS_VM: Final = 1 << 17  # virtual-8086 mode
X86_EFLAGS_AC: Final = 1 << 18  # alignment checks at CPL 3; lifts SMAP below it
X86_EFLAGS_VIF: Final = 1 << 19
X86_EFLAGS_VIP: Final = 1 << 20
X86_EFLAGS_ID: Final = 1 << 21

DE_VECTOR: Final = 0
DB_VECTOR: Final = 1
NMI_VECTOR: Final = 2
BP_VECTOR: Final = 3
OF_VECTOR: Final = 4
BR_VECTOR: Final = 5
UD_VECTOR: Final = 6
NM_VECTOR: Final = 7
DF_VECTOR: Final = 8
TS_VECTOR: Final = 10
NP_VECTOR: Final = 11
SS_VECTOR: Final = 12
GP_VECTOR: Final = 13
PF_VECTOR: Final = 14
MF_VECTOR: Final = 16
AC_VECTOR: Final = 17
MC_VECTOR: Final = 18
XM_VECTOR: Final = 19
VE_VECTOR: Final = 20
CP_VECTOR: Final = 21

EXCEPTION_NAMES: Final[dict[int, str]] = {
    DE_VECTOR: "#DE",
    DB_VECTOR: "#DB",
    NMI_VECTOR: "NMI",
    BP_VECTOR: "#BP",
    OF_VECTOR: "#OF",
    BR_VECTOR: "#BR",
    UD_VECTOR: "#UD",
    NM_VECTOR: "#NM",
    DF_VECTOR: "#DF",
    TS_VECTOR: "#TS",
    NP_VECTOR: "#NP",
    SS_VECTOR: "#SS",
    GP_VECTOR: "#GP",
    PF_VECTOR: "#PF",
    MF_VECTOR: "#MF",
    AC_VECTOR: "#AC",
    MC_VECTOR: "#MC",
    XM_VECTOR: "#XM",
    VE_VECTOR: "#VE",
    CP_VECTOR: "#CP",
}
"""Vector -> the manual's mnemonic."""

ERROR_CODE_VECTORS: Final = frozenset(
    {DF_VECTOR, TS_VECTOR, NP_VECTOR, SS_VECTOR, GP_VECTOR, PF_VECTOR, AC_VECTOR, CP_VECTOR}
)
"""The exceptions that push an error code in protected and long mode (real mode pushes none)."""

CONTRIBUTORY_VECTORS: Final = frozenset(
    {DE_VECTOR, TS_VECTOR, NP_VECTOR, SS_VECTOR, GP_VECTOR, CP_VECTOR}
)
"""Two of these in a row, or one while a page fault is delivered, make a #DF (SDM table 6-5)."""

PFERR_PRESENT_MASK: Final = 1 << 0  # a right was missing, not an entry
PFERR_WRITE_MASK: Final = 1 << 1
PFERR_USER_MASK: Final = 1 << 2  # a user-mode access, which is not quite the same as CPL 3
PFERR_RSVD_MASK: Final = 1 << 3
PFERR_FETCH_MASK: Final = 1 << 4
PFERR_PK_MASK: Final = 1 << 5
PFERR_SS_MASK: Final = 1 << 6
# Of a nested page fault only (AMD64 APM volume 2, "Nested Paging").
PFERR_GUEST_FINAL_MASK: Final = 1 << 32  # the access itself, its address translated
PFERR_GUEST_PAGE_MASK: Final = 1 << 33  # the walk of the guest's page tables
# KVM's own (arch/x86/include/asm/kvm_host.h, 6.10): no processor sets it.
PFERR_PRIVATE_ACCESS: Final = 1 << 49  # the access wants private memory


def describe_error_code(error_code: int) -> str:
    """A page-fault error code in words.

    >>> describe_error_code(PFERR_PRESENT_MASK | PFERR_WRITE_MASK | PFERR_USER_MASK)
    'user write, protection'
    >>> describe_error_code(PFERR_FETCH_MASK)
    'supervisor fetch, not present'
    """
    who = "user" if error_code & PFERR_USER_MASK else "supervisor"
    if error_code & PFERR_FETCH_MASK:
        what = "fetch"
    elif error_code & PFERR_WRITE_MASK:
        what = "write"
    else:
        what = "read"
    if error_code & PFERR_RSVD_MASK:
        why = "reserved bit set"
    elif error_code & PFERR_PK_MASK:
        why = "protection key"
    elif error_code & PFERR_PRESENT_MASK:
        why = "protection"
    else:
        why = "not present"
    shadow_stack = " (shadow stack)" if error_code & PFERR_SS_MASK else ""
    return f"{who} {what}{shadow_stack}, {why}"

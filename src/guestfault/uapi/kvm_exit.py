"""Why a vCPU stopped: the exit reasons, and the numbers inside the members of ``struct kvm_run``.

The facts come from ``include/uapi/linux/kvm.h`` and x86's ``asm/kvm.h``: Linux 6.1 up to
``KVM_EXIT_NOTIFY``, 6.8 for ``KVM_EXIT_MEMORY_FAULT``, 7.3 for what is after it.  The exits of
other architectures are here so that a report can name them.
"""

from __future__ import annotations

from typing import Final

# kvm_run.exit_reason
KVM_EXIT_UNKNOWN: Final = 0
KVM_EXIT_EXCEPTION: Final = 1
KVM_EXIT_IO: Final = 2
KVM_EXIT_HYPERCALL: Final = 3
KVM_EXIT_DEBUG: Final = 4
KVM_EXIT_HLT: Final = 5
KVM_EXIT_MMIO: Final = 6
KVM_EXIT_IRQ_WINDOW_OPEN: Final = 7
KVM_EXIT_SHUTDOWN: Final = 8
KVM_EXIT_FAIL_ENTRY: Final = 9
KVM_EXIT_INTR: Final = 10
KVM_EXIT_SET_TPR: Final = 11
KVM_EXIT_TPR_ACCESS: Final = 12
KVM_EXIT_S390_SIEIC: Final = 13
KVM_EXIT_S390_RESET: Final = 14
KVM_EXIT_DCR: Final = 15
KVM_EXIT_NMI: Final = 16
KVM_EXIT_INTERNAL_ERROR: Final = 17
KVM_EXIT_OSI: Final = 18
KVM_EXIT_PAPR_HCALL: Final = 19
KVM_EXIT_S390_UCONTROL: Final = 20
KVM_EXIT_WATCHDOG: Final = 21
KVM_EXIT_S390_TSCH: Final = 22
KVM_EXIT_EPR: Final = 23
KVM_EXIT_SYSTEM_EVENT: Final = 24
KVM_EXIT_S390_STSI: Final = 25
KVM_EXIT_IOAPIC_EOI: Final = 26
KVM_EXIT_HYPERV: Final = 27
KVM_EXIT_ARM_NISV: Final = 28
KVM_EXIT_X86_RDMSR: Final = 29
KVM_EXIT_X86_WRMSR: Final = 30
KVM_EXIT_DIRTY_RING_FULL: Final = 31
KVM_EXIT_AP_RESET_HOLD: Final = 32
KVM_EXIT_X86_BUS_LOCK: Final = 33
KVM_EXIT_XEN: Final = 34
KVM_EXIT_RISCV_SBI: Final = 35
KVM_EXIT_RISCV_CSR: Final = 36
KVM_EXIT_NOTIFY: Final = 37
KVM_EXIT_LOONGARCH_IOCSR: Final = 38
KVM_EXIT_MEMORY_FAULT: Final = 39
KVM_EXIT_TDX: Final = 40
KVM_EXIT_ARM_SEA: Final = 41
KVM_EXIT_ARM_LDST64B: Final = 42
KVM_EXIT_SNP_REQ_CERTS: Final = 43

# kvm_run.internal.suberror
KVM_INTERNAL_ERROR_EMULATION: Final = 1
KVM_INTERNAL_ERROR_SIMUL_EX: Final = 2
KVM_INTERNAL_ERROR_DELIVERY_EV: Final = 3
KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON: Final = 4
# kvm_run.emulation_failure.flags
KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES: Final = 1 << 0

# kvm_run.io.direction
KVM_EXIT_IO_IN: Final = 0
KVM_EXIT_IO_OUT: Final = 1

# kvm_run.flags
KVM_RUN_X86_SMM: Final = 1 << 0
KVM_RUN_X86_BUS_LOCK: Final = 1 << 1
KVM_RUN_X86_GUEST_MODE: Final = 1 << 2

# kvm_run.hypercall.flags
KVM_EXIT_HYPERCALL_LONG_MODE: Final = 1 << 0

# kvm_run.system_event.type
KVM_SYSTEM_EVENT_SHUTDOWN: Final = 1
KVM_SYSTEM_EVENT_RESET: Final = 2
KVM_SYSTEM_EVENT_CRASH: Final = 3
KVM_SYSTEM_EVENT_WAKEUP: Final = 4
KVM_SYSTEM_EVENT_SUSPEND: Final = 5
KVM_SYSTEM_EVENT_SEV_TERM: Final = 6
KVM_SYSTEM_EVENT_TDX_FATAL: Final = 7

# kvm_run.msr.reason
KVM_MSR_EXIT_REASON_INVAL: Final = 1 << 0
KVM_MSR_EXIT_REASON_UNKNOWN: Final = 1 << 1
KVM_MSR_EXIT_REASON_FILTER: Final = 1 << 2

# kvm_run.notify.flags
KVM_NOTIFY_CONTEXT_INVALID: Final = 1 << 0

# kvm_run.memory_fault.flags.  Bits 0 to 2 are kept for read, write and execute.
KVM_MEMORY_EXIT_FLAG_PRIVATE: Final = 1 << 3

# kvm_run.hyperv.type, kvm_run.xen.type
KVM_EXIT_HYPERV_SYNIC: Final = 1
KVM_EXIT_HYPERV_HCALL: Final = 2
KVM_EXIT_HYPERV_SYNDBG: Final = 3
KVM_EXIT_XEN_HCALL: Final = 1

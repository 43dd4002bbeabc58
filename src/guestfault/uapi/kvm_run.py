"""``struct kvm_run``: the page that a vCPU shares with KVM, and what each exit leaves in it.

``KVM_RUN`` returns 0 or a negative errno; why it returned is here.  ``exit_reason`` says which
member of the 256-byte union was written.  The others hold whatever an earlier exit left, and after
some failures so does ``exit_reason`` itself: read the page through
:func:`guestfault.fault.outcome.outcome`.  The numbers in it are in
:mod:`~guestfault.uapi.kvm_exit`.

The facts come from ``include/uapi/linux/kvm.h`` and x86's ``asm/kvm.h``: Linux 6.1, 6.8 for
``memory_fault``, 7.3 for ``tdx`` and ``snp_req_certs``.  The union has the members of x86 only.
Most of them have no type name in the kernel: the classes that begin with an underscore are theirs.
"""

from __future__ import annotations

from ctypes import Structure, Union, c_uint8, c_uint16, c_uint32, c_uint64
from typing import Final

from guestfault.uapi.kvm_x86 import kvm_debug_exit_arch, kvm_sync_regs

# What mmap of a vCPU's descriptor shows, by page: kvm_run is page 0, then the data of port I/O.
KVM_PIO_PAGE_OFFSET: Final = 1
KVM_COALESCED_MMIO_PAGE_OFFSET: Final = 2

SYNC_REGS_SIZE_BYTES: Final = 2048


class _hw(Structure):
    _fields_ = [("hardware_exit_reason", c_uint64)]


class _fail_entry(Structure):
    _fields_ = [("hardware_entry_failure_reason", c_uint64), ("cpu", c_uint32)]


class _ex(Structure):
    _fields_ = [("exception", c_uint32), ("error_code", c_uint32)]


class _io(Structure):
    _fields_ = [
        ("direction", c_uint8),
        ("size", c_uint8),
        ("port", c_uint16),
        ("count", c_uint32),
        ("data_offset", c_uint64),
    ]


class _debug(Structure):
    _fields_ = [("arch", kvm_debug_exit_arch)]


class _mmio(Structure):
    _fields_ = [
        ("phys_addr", c_uint64),
        ("data", c_uint8 * 8),
        ("len", c_uint32),
        ("is_write", c_uint8),
    ]


class _hypercall_flags(Union):
    # longmode came first; flags took it and the padding after it over.
    _fields_ = [("longmode", c_uint32), ("flags", c_uint64)]


class _hypercall(Structure):
    _anonymous_ = ("_flags",)
    _fields_ = [
        ("nr", c_uint64),
        ("args", c_uint64 * 6),
        ("ret", c_uint64),
        ("_flags", _hypercall_flags),
    ]


class _tpr_access(Structure):
    _fields_ = [("rip", c_uint64), ("is_write", c_uint32), ("pad", c_uint32)]


class _internal(Structure):
    _fields_ = [("suberror", c_uint32), ("ndata", c_uint32), ("data", c_uint64 * 16)]


class _emulation_failure(Structure):
    _fields_ = [
        ("suberror", c_uint32),
        ("ndata", c_uint32),
        ("flags", c_uint64),
        ("insn_size", c_uint8),
        ("insn_bytes", c_uint8 * 15),
    ]


class _system_event_data(Union):
    _fields_ = [("flags", c_uint64), ("data", c_uint64 * 16)]


class _system_event(Structure):
    _anonymous_ = ("_data",)
    _fields_ = [("type", c_uint32), ("ndata", c_uint32), ("_data", _system_event_data)]


class _eoi(Structure):
    _fields_ = [("vector", c_uint8)]


class _hyperv_synic(Structure):
    _fields_ = [
        ("msr", c_uint32),
        ("pad2", c_uint32),
        ("control", c_uint64),
        ("evt_page", c_uint64),
        ("msg_page", c_uint64),
    ]


class _hyperv_hcall(Structure):
    _fields_ = [("input", c_uint64), ("result", c_uint64), ("params", c_uint64 * 2)]


class _hyperv_syndbg(Structure):
    _fields_ = [
        ("msr", c_uint32),
        ("pad2", c_uint32),
        ("control", c_uint64),
        ("status", c_uint64),
        ("send_page", c_uint64),
        ("recv_page", c_uint64),
        ("pending_page", c_uint64),
    ]


class _hyperv_u(Union):
    _fields_ = [("synic", _hyperv_synic), ("hcall", _hyperv_hcall), ("syndbg", _hyperv_syndbg)]


class kvm_hyperv_exit(Structure):
    _fields_ = [("type", c_uint32), ("pad1", c_uint32), ("u", _hyperv_u)]


class _xen_hcall(Structure):
    _fields_ = [
        ("longmode", c_uint32),
        ("cpl", c_uint32),
        ("input", c_uint64),
        ("result", c_uint64),
        ("params", c_uint64 * 6),
    ]


class _xen_u(Union):
    _fields_ = [("hcall", _xen_hcall)]


class kvm_xen_exit(Structure):
    _fields_ = [("type", c_uint32), ("u", _xen_u)]


class _msr(Structure):
    _fields_ = [
        ("error", c_uint8),
        ("pad", c_uint8 * 7),
        ("reason", c_uint32),
        ("index", c_uint32),
        ("data", c_uint64),
    ]


class _notify(Structure):
    _fields_ = [("flags", c_uint32)]


class _memory_fault(Structure):
    _fields_ = [("flags", c_uint64), ("gpa", c_uint64), ("size", c_uint64)]


class _tdx_unknown(Structure):
    _fields_ = [("ret", c_uint64), ("data", c_uint64 * 5)]


class _tdx_get_quote(Structure):
    _fields_ = [("ret", c_uint64), ("gpa", c_uint64), ("size", c_uint64)]


class _tdx_get_tdvmcall_info(Structure):
    _fields_ = [(name, c_uint64) for name in ("ret", "leaf", "r11", "r12", "r13", "r14")]


class _tdx_setup_event_notify(Structure):
    _fields_ = [("ret", c_uint64), ("vector", c_uint64)]


class _tdx_calls(Union):
    _fields_ = [
        ("unknown", _tdx_unknown),
        ("get_quote", _tdx_get_quote),
        ("get_tdvmcall_info", _tdx_get_tdvmcall_info),
        ("setup_event_notify", _tdx_setup_event_notify),
    ]


class _tdx(Structure):
    _anonymous_ = ("_calls",)
    _fields_ = [("flags", c_uint64), ("nr", c_uint64), ("_calls", _tdx_calls)]


class kvm_exit_snp_req_certs(Structure):
    _fields_ = [("gpa", c_uint64), ("npages", c_uint64), ("ret", c_uint64)]


class _exit(Union):
    _fields_ = [
        ("hw", _hw),
        ("fail_entry", _fail_entry),
        ("ex", _ex),
        ("io", _io),
        ("debug", _debug),
        ("mmio", _mmio),
        ("hypercall", _hypercall),
        ("tpr_access", _tpr_access),
        ("internal", _internal),
        ("emulation_failure", _emulation_failure),
        ("system_event", _system_event),
        ("eoi", _eoi),
        ("hyperv", kvm_hyperv_exit),
        ("msr", _msr),
        ("xen", kvm_xen_exit),
        ("notify", _notify),
        ("memory_fault", _memory_fault),
        ("tdx", _tdx),
        ("snp_req_certs", kvm_exit_snp_req_certs),
        ("padding", c_uint8 * 256),
    ]


class _s(Union):
    _fields_ = [("regs", kvm_sync_regs), ("padding", c_uint8 * SYNC_REGS_SIZE_BYTES)]


class kvm_run(Structure):
    _anonymous_ = ("_exit",)
    _fields_ = [
        # to KVM
        ("request_interrupt_window", c_uint8),
        ("immediate_exit", c_uint8),
        ("padding1", c_uint8 * 6),
        # from KVM
        ("exit_reason", c_uint32),
        ("ready_for_interrupt_injection", c_uint8),
        ("if_flag", c_uint8),
        ("flags", c_uint16),
        # both ways
        ("cr8", c_uint64),
        ("apic_base", c_uint64),
        ("_exit", _exit),
        ("kvm_valid_regs", c_uint64),
        ("kvm_dirty_regs", c_uint64),
        ("s", _s),
    ]

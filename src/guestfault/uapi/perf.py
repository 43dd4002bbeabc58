"""``perf_event_open(2)``: its attributes, the page that heads its ring buffer, and its records.

Only what a listener to tracepoints needs is here; the structures are whole.  The facts come from
``include/uapi/linux/perf_event.h`` of Linux 6.1.  ``perf_event_attr`` has grown since, and the
kernel takes every size that it ever had: this is ``PERF_ATTR_SIZE_VER7``.  Its reserved bits, which
later kernels give names to, are padding here.  ``SYS_perf_event_open`` is named as in the man
page, for ``__NR_perf_event_open``.
"""

from __future__ import annotations

from ctypes import (
    Structure,
    Union,
    c_int32,
    c_int64,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
    sizeof,
)
from typing import Final

from guestfault.uapi.ioctl_numbers import _IO, _IOC, _IOR

SYS_perf_event_open: Final = 298  # x86-64

PERF_FLAG_FD_NO_GROUP: Final = 1 << 0
PERF_FLAG_FD_OUTPUT: Final = 1 << 1
PERF_FLAG_PID_CGROUP: Final = 1 << 2
PERF_FLAG_FD_CLOEXEC: Final = 1 << 3

# perf_event_attr.type
PERF_TYPE_HARDWARE: Final = 0
PERF_TYPE_SOFTWARE: Final = 1
PERF_TYPE_TRACEPOINT: Final = 2

# perf_event_attr.sample_type: what a PERF_RECORD_SAMPLE holds, in an order of its own
PERF_SAMPLE_IP: Final = 1 << 0
PERF_SAMPLE_TID: Final = 1 << 1
PERF_SAMPLE_TIME: Final = 1 << 2
PERF_SAMPLE_ADDR: Final = 1 << 3
PERF_SAMPLE_ID: Final = 1 << 6
PERF_SAMPLE_CPU: Final = 1 << 7
PERF_SAMPLE_PERIOD: Final = 1 << 8
PERF_SAMPLE_RAW: Final = 1 << 10

PERF_ATTR_SIZE_VER7: Final = 128

PERF_EVENT_IOC_ENABLE: Final = _IO(ord("$"), 0)
PERF_EVENT_IOC_DISABLE: Final = _IO(ord("$"), 1)
PERF_EVENT_IOC_RESET: Final = _IO(ord("$"), 3)
PERF_EVENT_IOC_SET_OUTPUT: Final = _IO(ord("$"), 5)
PERF_EVENT_IOC_SET_FILTER: Final = _IOC(1, ord("$"), 6, sizeof(c_void_p))
PERF_EVENT_IOC_ID: Final = _IOR(ord("$"), 7, c_uint64)  # the header's argument is a pointer
PERF_EVENT_IOC_PAUSE_OUTPUT: Final = _IOC(1, ord("$"), 9, sizeof(c_uint32))

# perf_event_header.type
PERF_RECORD_LOST: Final = 2  # u64 id, u64 lost
PERF_RECORD_THROTTLE: Final = 5
PERF_RECORD_UNTHROTTLE: Final = 6
PERF_RECORD_SAMPLE: Final = 9


class _sample(Union):
    _fields_ = [("sample_period", c_uint64), ("sample_freq", c_uint64)]


class _flags(Structure):
    _fields_ = [
        ("disabled", c_uint64, 1),
        ("inherit", c_uint64, 1),
        ("pinned", c_uint64, 1),
        ("exclusive", c_uint64, 1),
        ("exclude_user", c_uint64, 1),
        ("exclude_kernel", c_uint64, 1),
        ("exclude_hv", c_uint64, 1),
        ("exclude_idle", c_uint64, 1),
        ("mmap", c_uint64, 1),
        ("comm", c_uint64, 1),
        ("freq", c_uint64, 1),
        ("inherit_stat", c_uint64, 1),
        ("enable_on_exec", c_uint64, 1),
        ("task", c_uint64, 1),
        ("watermark", c_uint64, 1),
        ("precise_ip", c_uint64, 2),
        ("mmap_data", c_uint64, 1),
        ("sample_id_all", c_uint64, 1),
        ("exclude_host", c_uint64, 1),
        ("exclude_guest", c_uint64, 1),
        ("exclude_callchain_kernel", c_uint64, 1),
        ("exclude_callchain_user", c_uint64, 1),
        ("mmap2", c_uint64, 1),
        ("comm_exec", c_uint64, 1),
        ("use_clockid", c_uint64, 1),
        ("context_switch", c_uint64, 1),
        ("write_backward", c_uint64, 1),
        ("namespaces", c_uint64, 1),
        ("ksymbol", c_uint64, 1),
        ("bpf_event", c_uint64, 1),
        ("aux_output", c_uint64, 1),
        ("cgroup", c_uint64, 1),
        ("text_poke", c_uint64, 1),
        ("build_id", c_uint64, 1),
        ("inherit_thread", c_uint64, 1),
        ("remove_on_exec", c_uint64, 1),
        ("sigtrap", c_uint64, 1),
    ]


class _wakeup(Union):
    _fields_ = [("wakeup_events", c_uint32), ("wakeup_watermark", c_uint32)]


class _config1(Union):
    _fields_ = [
        ("bp_addr", c_uint64),
        ("kprobe_func", c_uint64),
        ("uprobe_path", c_uint64),
        ("config1", c_uint64),
    ]


class _config2(Union):
    _fields_ = [
        ("bp_len", c_uint64),
        ("kprobe_addr", c_uint64),
        ("probe_offset", c_uint64),
        ("config2", c_uint64),
    ]


class perf_event_attr(Structure):
    _anonymous_ = ("_sample", "_flags", "_wakeup", "_config1", "_config2")
    _fields_ = [
        ("type", c_uint32),
        ("size", c_uint32),
        ("config", c_uint64),
        ("_sample", _sample),
        ("sample_type", c_uint64),
        ("read_format", c_uint64),
        ("_flags", _flags),
        ("_wakeup", _wakeup),
        ("bp_type", c_uint32),
        ("_config1", _config1),
        ("_config2", _config2),
        ("branch_sample_type", c_uint64),
        ("sample_regs_user", c_uint64),
        ("sample_stack_user", c_uint32),
        ("clockid", c_int32),
        ("sample_regs_intr", c_uint64),
        ("aux_watermark", c_uint32),
        ("sample_max_stack", c_uint16),
        ("aux_sample_size", c_uint32),
        ("sig_data", c_uint64),
    ]


class perf_event_mmap_page(Structure):
    _fields_ = [
        ("version", c_uint32),
        ("compat_version", c_uint32),
        ("lock", c_uint32),
        ("index", c_uint32),
        ("offset", c_int64),
        ("time_enabled", c_uint64),
        ("time_running", c_uint64),
        ("capabilities", c_uint64),
        ("pmc_width", c_uint16),
        ("time_shift", c_uint16),
        ("time_mult", c_uint32),
        ("time_offset", c_uint64),
        ("time_zero", c_uint64),
        ("size", c_uint32),
        ("__reserved_1", c_uint32),
        ("time_cycles", c_uint64),
        ("time_mask", c_uint64),
        ("__reserved", c_uint8 * (116 * 8)),
        ("data_head", c_uint64),
        ("data_tail", c_uint64),
        ("data_offset", c_uint64),
        ("data_size", c_uint64),
        ("aux_head", c_uint64),
        ("aux_tail", c_uint64),
        ("aux_offset", c_uint64),
        ("aux_size", c_uint64),
    ]


class perf_event_header(Structure):
    _fields_ = [("type", c_uint32), ("misc", c_uint16), ("size", c_uint16)]

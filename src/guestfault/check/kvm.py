"""``/dev/kvm``: whether it is there, lets this user in, and has what guestfault asks of it.

The capabilities are asked on a VM, not on the device: since guest_memfd the two answers can differ,
and the VM's is the one that counts (``Documentation/virt/kvm/api.rst``, 4.4).

``KVM_CAP_MEMORY_FAULT_INFO`` promises more than upstream keeps.  It is there on every x86 kernel
since 6.8, and the kernel describes failed accesses to guest_memfd with it; an access to ordinary
memory that fails (no mapping, a protection, an exhausted pool) still ends in a bare ``-EFAULT``,
for ``kvm_handle_error_pfn`` does not fill ``kvm_run.memory_fault``.  No question to the kernel
tells, therefore the finding does.
"""

from __future__ import annotations

import grp
import os
import platform
import pwd
import stat
from pathlib import Path
from typing import NamedTuple

from guestfault.check.finding import Finding, Status, Use
from guestfault.errors import GuestfaultError, Unavailable
from guestfault.kvm.system import KvmSystem
from guestfault.uapi import kvm as uapi

__all__ = ["probe"]

DEVICE = "/dev/kvm"

NEEDED_FOR = (Use.KERNEL_KVM, Use.ANNOTATED_EXITS, Use.GUEST_MEMFD)


class _Capability(NamedTuple):
    """A capability that guestfault uses: what it gives, and since when."""

    name: str
    gives: str
    since: str
    needed_for: tuple[Use, ...]

    @property
    def number(self) -> int:
        number: int = getattr(uapi, f"KVM_CAP_{self.name}")
        return number


_CAPABILITIES = (
    _Capability(
        "SYNC_MMU",
        "slots follow the mappings of the process",
        "2.6.28",
        (Use.KERNEL_KVM, Use.DEMAND_PAGING),
    ),
    _Capability("IMMEDIATE_EXIT", "a vCPU can be kicked without a race", "4.13", (Use.KERNEL_KVM,)),
    _Capability("READONLY_MEM", "read-only slots", "3.7", (Use.KERNEL_KVM,)),
    _Capability("MEMORY_FAULT_INFO", "", "6.8", (Use.ANNOTATED_EXITS,)),
    _Capability("USER_MEMORY2", "slots that hold a guest_memfd", "6.8", (Use.GUEST_MEMFD,)),
    _Capability("GUEST_MEMFD", "memory only the guest can reach", "6.8", (Use.GUEST_MEMFD,)),
    _Capability("MEMORY_ATTRIBUTES", "pages turn private and back", "6.8", ()),
    _Capability("PRE_FAULT_MEMORY", "pages mapped in before the guest runs", "6.12", ()),
)


def probe(device: str = DEVICE) -> tuple[Finding, ...]:
    """Open the device, create a VM, and ask it for the capabilities that bear on guestfault.

    If it cannot be opened there is one finding, which says why.
    """
    try:
        system = KvmSystem(device)
    except Unavailable as refusal:
        return (_unusable(device, refusal.why, _mend(device) or refusal.mend),)
    try:
        types = max(system.check_extension(uapi.KVM_CAP_VM_TYPES), 0)
        vm = system.create_vm()
    except GuestfaultError as refusal:
        return (_unusable(device, str(refusal), "see dmesg for what KVM said"),)
    finally:
        system.close()
    try:
        detail = f"API version {uapi.KVM_API_VERSION}, makes VMs for this user"
        opened = Finding(device, Status.OK, detail, needed_for=NEEDED_FOR)
        found = (_capability(c, vm.check_extension(c.number), types) for c in _CAPABILITIES)
        return (opened, *found)
    finally:
        vm.close()


def _unusable(device: str, why: str, mend: str) -> Finding:
    return Finding(device, Status.MISSING, why, mend, NEEDED_FOR)


def _capability(capability: _Capability, answer: int, types: int) -> Finding:
    """What a VM's answer means, where VMs of these ``types`` (a bit each) can be had."""
    name, gives, since, needed_for = capability
    number = capability.number
    if name == "MEMORY_FAULT_INFO" and answer:
        return Finding(
            name,
            Status.LIMITED,
            f"cap {number} present; ordinary memory still gives a bare -EFAULT",
            "upstream annotates guest_memfd only (as of 7.3): guestfault finds the access itself",
            needed_for,
        )
    if answer:
        # Some answer with a bit mask of what they offer.
        value = f" = {answer:#x}" if answer > 1 and answer != number else ""
        return Finding(name, Status.OK, f"cap {number}{value}: {gives}", needed_for=needed_for)
    if name == "MEMORY_ATTRIBUTES" and types >> uapi.KVM_X86_SW_PROTECTED_VM & 1:
        detail = f"cap {number}: {gives}, in a VM of the type KVM_X86_SW_PROTECTED_VM"
        return Finding(name, Status.OK, detail, needed_for=needed_for)
    if name == "MEMORY_ATTRIBUTES":
        mend = "a kernel with CONFIG_KVM_SW_PROTECTED_VM, SEV-SNP or TDX, and a VM of that type"
    elif name == "PRE_FAULT_MEMORY":
        mend = f"Linux {since} or newer, and a KVM with two-dimensional paging (ept=1, npt=1)"
    else:
        mend = f"Linux {since} or newer"
    detail = f"no cap {number}" + (f": {gives}" if gives else "")
    return Finding(name, Status.MISSING, detail, mend, needed_for)


def _mend(device: str) -> str:
    """What would let this user open the device; empty if that cannot be told from here."""
    try:
        status = os.stat(device)
    except FileNotFoundError:
        return _mend_absent()
    except OSError:
        return ""
    if os.access(device, os.R_OK | os.W_OK):
        return ""
    if not stat.S_ISCHR(status.st_mode):
        return f"make {device} KVM's device node"
    user, group = _user_name(), _group_name(status.st_gid)
    if status.st_mode & 0o060 == 0o060 and group != "root":
        return f"usermod -aG {group} {user} (as root), then log in again"
    return f"setfacl -m u:{user}:rw {device} (as root)"


def _mend_absent() -> str:
    """Why there would be no device: no module, no hardware, or a container that hides it."""
    if Path("/sys/module/kvm").is_dir():
        return "KVM is loaded: pass the device into this container (docker run --device /dev/kvm)"
    flags = _cpu_flags()
    for flag, module in (("vmx", "kvm_intel"), ("svm", "kvm_amd")):
        if flag in flags:
            return f"modprobe {module} (as root)"
    if platform.machine() == "x86_64":
        return (
            "the processor shows neither vmx nor svm: enable virtualization in the firmware, "
            "or nested virtualization on the host above"
        )
    return "a processor and a kernel with KVM"


def _cpu_flags() -> frozenset[str]:
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            for line in cpuinfo:
                if line.startswith("flags"):
                    return frozenset(line.split())
    except OSError:
        pass
    return frozenset()


def _user_name() -> str:
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:  # a container's uid that no passwd knows
        return str(os.getuid())


def _group_name(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return str(gid)

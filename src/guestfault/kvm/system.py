"""``/dev/kvm``: what this host's KVM can do, and the door to virtual machines.

Opening it is where a machine that cannot run guests shows: no such file, no permission, something
else under that name.  Each is an :class:`~guestfault.errors.Unavailable` that says what to do about
it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from ctypes import byref
from pathlib import Path

from guestfault.errors import KvmError, Unavailable
from guestfault.kvm.call import kvm_call
from guestfault.kvm.vm import KvmVm
from guestfault.uapi import kvm as uapi

__all__ = ["KvmSystem"]


class KvmSystem:
    """The KVM of this host, by the path of its device.

    Raises :class:`~guestfault.errors.Unavailable` if it cannot be opened, is not KVM, or speaks
    another version of the interface than 12, the only one that Linux has had since 2.6.22.
    """

    def __init__(self, path: str = "/dev/kvm") -> None:
        self._path = path
        self._fd = _open(path)
        try:
            require_api_version(path, _api_version(path, self._fd))
            self._run_area_size = kvm_call(self._fd, "KVM_GET_VCPU_MMAP_SIZE")
        except BaseException:
            self.close()
            raise

    @property
    def name(self) -> str:
        """What it is, for people: the path of the device."""
        return self._path

    @property
    def tdp_enabled(self) -> bool | None:
        """Whether guests run with EPT or NPT: a module parameter; ``None`` if it cannot be read."""
        for path in _TDP_PARAMETERS:
            with contextlib.suppress(OSError):
                return Path(path).read_text().strip() in ("Y", "1")
        return None

    def check_extension(self, cap: int) -> int:
        """``KVM_CHECK_EXTENSION``: 0 if absent, else 1 or the capability's number.

        Ask the VM where there is one: some capabilities are only its own.
        """
        return kvm_call(self._fd, "KVM_CHECK_EXTENSION", cap, f"capability {cap}")

    def create_vm(self, vm_type: int = uapi.KVM_X86_DEFAULT_VM) -> KvmVm:
        """``KVM_CREATE_VM`` of a type ``KVM_X86_*_VM``.

        Raises :class:`~guestfault.errors.KvmError` with EINVAL for a type that the host does not
        have (``KVM_CAP_VM_TYPES`` is the bit mask of those it has).
        """
        cpuid = self._supported_cpuid()
        fd = kvm_call(self._fd, "KVM_CREATE_VM", vm_type, f"VM type {vm_type}")
        return KvmVm(fd, self._run_area_size, cpuid)

    def close(self) -> None:
        """Release the system's file descriptor; its VMs live on.  Again is harmless."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _supported_cpuid(self) -> uapi.kvm_cpuid2:
        """``KVM_GET_SUPPORTED_CPUID``: every CPUID leaf that KVM can give a guest."""
        nent = 128
        while True:
            cpuid = uapi.flexible(uapi.kvm_cpuid2, nent)()
            cpuid.nent = nent
            try:
                kvm_call(self._fd, "KVM_GET_SUPPORTED_CPUID", byref(cpuid), f"{nent} entries")
            except KvmError as error:
                if error.errno != errno.E2BIG:
                    raise
                nent *= 2
            else:
                return cpuid


_TDP_PARAMETERS = "/sys/module/kvm_intel/parameters/ept", "/sys/module/kvm_amd/parameters/npt"
_LOAD = (
    "load kvm_intel or kvm_amd, and enable virtualization in the firmware, "
    "or nested virtualization on the host above"
)
_JOIN = "add yourself to its group (mostly 'kvm'), or be root"
_MENDS = {
    errno.ENOENT: _LOAD,
    errno.ENODEV: _LOAD,
    errno.ENXIO: _LOAD,
    errno.EACCES: _JOIN,
    errno.EPERM: _JOIN,
}


def _open(path: str) -> int:
    try:
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        number = error.errno or 0
        raise Unavailable(path, os.strerror(number), _MENDS.get(number, "")) from None


def _api_version(path: str, fd: int) -> int:
    try:
        return kvm_call(fd, "KVM_GET_API_VERSION")
    except KvmError as error:
        why = f"it does not answer as KVM does ({os.strerror(error.errno)})"
        raise Unavailable(path, why, "name the device node of KVM, mostly /dev/kvm") from None


def require_api_version(path: str, version: int) -> None:
    """Raise :class:`~guestfault.errors.Unavailable` for any version of KVM's interface but 12."""
    if version != uapi.KVM_API_VERSION:
        raise Unavailable(
            path,
            f"its interface has version {version}, not {uapi.KVM_API_VERSION}",
            "use a kernel from 2.6.22 on",
        )

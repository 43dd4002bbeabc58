"""One ioctl of KVM's, by name, that either works or raises.

For every ioctl but ``KVM_RUN``.  The name rather than the number is the argument, so that the error
can say it; the numbers are :mod:`guestfault.uapi.kvm`'s.
"""

from __future__ import annotations

import errno
from typing import Any

from guestfault.errors import KvmError
from guestfault.linux.ioctl import ioctl
from guestfault.uapi import kvm as uapi

__all__ = ["kvm_call"]


def kvm_call(fd: int, name: str, arg: Any = 0, detail: str = "") -> int:
    """Issue the ioctl called ``name`` and return its result, 0 or positive.

    ``arg`` is a number or :func:`ctypes.byref` of a structure.  Raises
    :class:`~guestfault.errors.KvmError` with ``detail``.  A call that a signal interrupted is
    issued again, as Python does for its own system calls.
    """
    request: int = getattr(uapi, name)
    while (ret := ioctl(fd, request, arg)) == -errno.EINTR:
        pass
    if ret < 0:
        raise KvmError(name, -ret, detail)
    return ret

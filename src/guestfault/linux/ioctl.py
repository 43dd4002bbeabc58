"""System calls whose failure is a number: ``ioctl(2)``, and any other that libc has no name for.

Python's own wrappers do three things that a virtual machine monitor cannot have.  They turn a
failure into an exception, where for ``KVM_RUN`` and ``UFFDIO_COPY`` a failure is an ordinary
answer.  Some retry after ``EINTR`` (:pep:`475`), where ``EINTR`` is how a vCPU is kicked.  And they
hide ``errno`` behind the exception's construction, which costs more than the call.

Everything here returns what the kernel itself returned: a result >= 0, or a *negative errno*.
Calls go through :mod:`ctypes`, which lets go of the GIL for their duration, so that a thread
blocked in ``KVM_RUN`` or on a userfaultfd does not stop the thread that will serve it.

``errno`` is per thread, and :mod:`ctypes` keeps a private copy of it per thread for libraries
opened with ``use_errno``: nothing that Python runs in between can change it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

from guestfault.errors import KernelError

__all__ = ["call", "check", "ioctl", "libc", "syscall"]

libc = ctypes.CDLL(None, use_errno=True)
"""The C library of this process, opened so that ``errno`` survives until it is read."""

_ioctl = libc.ioctl
_ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
_ioctl.restype = ctypes.c_int

_syscall = libc.syscall
_syscall.restype = ctypes.c_long


def ioctl(fd: int, request: int, arg: Any = 0) -> int:
    """``ioctl(2)``: a result >= 0, or a negative errno.  Never raises, never retries.

    ``arg`` is an integer (a value or an address) or what :mod:`ctypes` takes for a pointer:
    ``byref(structure)``, an array, ``None``.
    """
    result: int = _ioctl(fd, request, arg)
    return result if result >= 0 else -ctypes.get_errno()


def syscall(number: int, *args: int) -> int:
    """``syscall(2)`` with integer arguments: a result >= 0, or a negative errno."""
    result: int = _syscall(ctypes.c_long(number), *map(ctypes.c_long, args))
    return result if result >= 0 else -ctypes.get_errno()


def call(function: Callable[..., int], *args: Any) -> int:
    """Call a function of :data:`libc` that fails with -1: a result >= 0, or a negative errno.

    The function's ``argtypes`` must be set: without them an address is cut to 32 bits.
    """
    result = function(*args)
    return result if result >= 0 else -ctypes.get_errno()


def check(result: int, what: str, detail: str = "") -> int:
    """Pass a result >= 0 through; raise :class:`~guestfault.errors.KernelError` for another."""
    if result < 0:
        raise KernelError(what, -result, detail)
    return result

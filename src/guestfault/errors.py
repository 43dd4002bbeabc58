"""The errors this package raises, few and with their data.

Nothing in the public API lets a bare :class:`OSError` out.  Each error names the thing it is about,
carries the numbers in fields, and its message ends with what to do about it.  The command line
prints the message as one line and exits with status 2.
"""

from __future__ import annotations

import errno as _errno
import os

__all__ = ["GuestfaultError", "KernelError", "KvmError", "Unavailable"]


class GuestfaultError(Exception):
    """The root of every error raised on purpose here."""


class Unavailable(GuestfaultError):
    """This machine, kernel or user cannot provide something that was asked for.

    Raised before any work is done.  ``what`` is the thing (``/dev/kvm``), ``why`` what is missing,
    ``mend`` the step that would provide it.
    """

    def __init__(self, what: str, why: str, mend: str = "") -> None:
        self.what = what
        self.why = why
        self.mend = mend
        super().__init__(f"{what}: {why}" + (f"; {mend}" if mend else ""))


class KernelError(GuestfaultError):
    """A system call failed in a way that its wrapper does not report as a plain result.

    ``call`` names the system call or ioctl, ``errno`` is positive, ``detail`` says with what
    arguments.  Raised by the ``linux`` room.
    """

    def __init__(self, call: str, errno: int, detail: str = "") -> None:
        self.call = call
        self.errno = errno
        self.detail = detail
        name = _errno.errorcode.get(errno, str(errno))
        text = f"{call}: {name} ({os.strerror(errno)})"
        super().__init__(f"{text}: {detail}" if detail else text)


class KvmError(KernelError):
    """An ioctl of KVM's, real or software, refused its arguments.

    ``KVM_RUN`` never raises: its result is data (:mod:`guestfault.fault.outcome`).
    """

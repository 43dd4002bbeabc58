"""What can go wrong with a kernel that is started here, each with its data.

Two families.  A :class:`LabError` alone says that nothing was started: a file is not a kernel, its
modules are not to be found, a package cannot be had, the disk is full.  A :class:`MachineError`
says how a machine that was started ended, when it was not by the end of its command; it holds what
the kernel wrote on its console and what the command wrote until then.
"""

from __future__ import annotations

from pathlib import Path

from guestfault.errors import GuestfaultError

__all__ = [
    "CannotEmulateError",
    "EmulatorError",
    "FetchError",
    "HungError",
    "InsideError",
    "KernelPanicError",
    "LabError",
    "MachineError",
    "NeverBootedError",
    "NoKvmError",
    "NoModulesError",
    "NotAKernelError",
    "StorageError",
    "TooSmallError",
    "UnknownKernelError",
]


class LabError(GuestfaultError):
    """The root of the lab's own errors."""


class NotAKernelError(LabError):
    """The file at ``path`` cannot be started as an x86 kernel; ``why`` says what it is."""

    def __init__(self, path: Path, why: str) -> None:
        self.path = path
        self.why = why
        super().__init__(f"{path}: {why}")


class NoModulesError(LabError):
    """KVM's modules for a kernel are not in ``path``, or not usable with it."""

    def __init__(self, path: Path, why: str) -> None:
        self.path = path
        self.why = why
        super().__init__(f"{path}: {why}")


class UnknownKernelError(LabError):
    """No kernel of this ``name`` has been fetched, or none is to be had."""

    def __init__(self, name: str, why: str) -> None:
        self.name = name
        super().__init__(f"kernel {name}: {why}")


class FetchError(LabError):
    """A program of apt's or dpkg's failed: ``what`` it was to do, ``why`` in its own words."""

    def __init__(self, what: str, why: str) -> None:
        self.what = what
        self.why = why
        super().__init__(f"{what}: {why}")


class StorageError(LabError):
    """A file of the lab's could not be read or written at ``path``; ``errno`` is positive."""

    def __init__(self, path: Path | str, errno: int, why: str) -> None:
        self.path = path
        self.errno = errno
        super().__init__(f"{path}: {why}")


class MachineError(LabError):
    """A machine ended otherwise than with the end of its command.

    ``console`` is what the kernel wrote, ``stdout`` and ``stderr`` what the command did.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.console = b""
        self.stdout = b""
        self.stderr = b""


class EmulatorError(MachineError):
    """The emulator, ``program``, ended by itself, with ``status`` (negative: a signal)."""

    def __init__(self, program: str, status: int, why: str) -> None:
        self.program = program
        self.status = status
        ended = f"exit status {status}" if status >= 0 else f"signal {-status}"
        super().__init__(f"{program} ended with {ended}" + (f": {why}" if why else ""))


class NeverBootedError(MachineError):
    """The kernel did not come as far as the first process in ``seconds``."""

    def __init__(self, seconds: float, last: str) -> None:
        self.seconds = seconds
        said = f"its console ends with: {last}" if last else "its console stayed empty"
        mend = "--verbose shows the console, --boot-timeout gives it longer"
        super().__init__(f"the kernel did not boot within {seconds:g} s; {said}; {mend}")


class KernelPanicError(MachineError):
    """The kernel panicked, an oops included.  ``reason`` is in its own words."""

    def __init__(self, reason: str, cause: str = "") -> None:
        self.reason = reason
        self.cause = cause
        first = f" (first: {cause})" if cause and cause not in reason else ""
        super().__init__(f"the kernel panicked: {reason}{first}")


class HungError(MachineError):
    """The command had not ended after ``seconds``."""

    def __init__(self, seconds: float, last: str) -> None:
        self.seconds = seconds
        said = f"; its console ends with: {last}" if last else ""
        super().__init__(f"the command did not end within {seconds:g} s{said}")


class TooSmallError(LabError):
    """A machine of ``memory`` MiB cannot hold what goes into it; ``least`` would do."""

    def __init__(self, memory: int, least: int) -> None:
        self.memory = memory
        self.least = least
        super().__init__(f"{memory} MiB of memory are too few; this machine needs {least}")


class CannotEmulateError(LabError):
    """The emulator, ``program``, has no such machine; ``why`` says which it has."""

    def __init__(self, program: str, why: str) -> None:
        self.program = program
        super().__init__(f"{program} emulates {why}")


class NoKvmError(MachineError):
    """The kernel booted and offers no ``/dev/kvm``; ``why`` in its own words."""

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(f"the kernel has no KVM: {why}")


class InsideError(MachineError):
    """Our own first process failed inside; ``why`` is its account."""

    def __init__(self, why: str) -> None:
        self.why = why
        super().__init__(f"the first process failed: {why}")

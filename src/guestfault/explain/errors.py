"""The one error of this room."""

from __future__ import annotations

from guestfault.errors import GuestfaultError

__all__ = ["ExplainError"]


class ExplainError(GuestfaultError):
    """There is nothing to explain, or the memory image cannot serve.

    Raised for text without a register dump, a file that cannot be read, and an image of a format
    that is not supported.  ``what`` is the input, ``why`` its defect, ``mend`` the way out.
    """

    def __init__(self, what: str, why: str, mend: str = "") -> None:
        self.what = what
        self.why = why
        self.mend = mend
        super().__init__(f"{what}: {why}" + (f"; {mend}" if mend else ""))

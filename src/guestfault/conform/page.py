"""The table in a page of the documentation, between two marks that stay."""

from __future__ import annotations

from pathlib import Path

from guestfault.errors import GuestfaultError

__all__ = ["BEGIN", "END", "put_into_page"]

BEGIN, END = "<!-- the table begins -->", "<!-- the table ends -->"


def put_into_page(path: str, table: str) -> None:
    """Put ``table`` in the place of the one that is there.

    Raises :class:`~guestfault.errors.GuestfaultError` for a file without the marks, or that cannot
    be read or written.
    """
    file = Path(path)
    try:
        text = file.read_text()
        before, begin, rest = text.partition(BEGIN)
        _, end, after = rest.partition(END)
        if not begin or not end:
            raise GuestfaultError(f"{path}: the table goes between {BEGIN} and {END}")
        file.write_text(f"{before}{begin}\n\n{table}\n{end}{after}")
    except OSError as error:
        raise GuestfaultError(f"{path}: {error.strerror}") from None

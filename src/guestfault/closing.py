"""What holds something open: a context manager whose end is its :meth:`Closing.close`."""

from __future__ import annotations

from typing import Self

__all__ = ["Closing"]


class Closing:
    """To be closed once it is done with, by ``close()`` or at the end of a ``with``."""

    __slots__ = ()

    def close(self) -> None:
        """Let go of what is held."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

"""Waiting until a descriptor can be read, or until somebody says that it is enough."""

from __future__ import annotations

import select
from collections.abc import Iterator

__all__ = ["readable"]


def readable(fd: int, stop_fd: int) -> Iterator[None]:
    """Go on each time that ``fd`` can be read; end when ``stop_fd`` can, which comes first."""
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    poll.register(stop_fd, select.POLLIN)
    while stop_fd not in {ready for ready, _ in poll.poll()}:
        yield

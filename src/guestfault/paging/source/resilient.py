"""A source that fails and comes back: how long to wait for it.

A server may be restarted, a network may be cut.  The vCPU that needs a page then has two ways to
go: wait until the page can be had, while the others run on; or stop, with the whole VM.
:class:`Patience` says which, :class:`ResilientSource` does it: it tries again, with a pause that
doubles from try to try, has a limit, and is cut short at random, so that a thousand vCPUs do not
fall upon the server in the moment in which it is back.

Only what may pass is waited for
(:class:`~guestfault.paging.source.base.SourceUnavailableError`).  A source that contradicts itself,
or whose bytes do not have their digest, is not asked again: to wait would be to hope for another
lie.
"""

from __future__ import annotations

import math
import random
import time
from dataclasses import dataclass

from guestfault.paging.source.base import (
    PageSource,
    SourceError,
    SourceInterruptedError,
    SourceUnavailableError,
    SourceUpon,
    let_go,
)
from guestfault.paging.source.interrupt import Interrupt, WaitInterrupted

__all__ = ["FOREVER", "Patience", "ResilientSource"]

FOREVER = math.inf


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for a source.  Times in seconds.

    ``wait`` is how long a read goes on trying after its first failure: 0 stops at once,
    :data:`FOREVER` never.  ``first`` and ``limit`` are the first pause and the longest.
    """

    wait: float = 30.0
    first: float = 0.05
    limit: float = 2.0


class ResilientSource(SourceUpon):
    """``inner``, read again and again while it is unavailable.

    Raises :class:`~guestfault.paging.source.base.SourceUnavailableError` when patience is at its
    end, and any other :class:`~guestfault.paging.source.base.SourceError` at once.
    """

    def __init__(self, inner: PageSource, patience: Patience | None = None) -> None:
        super().__init__(inner)
        self.size = inner.size
        self._patience = patience or Patience()
        self._interrupt = Interrupt()
        self._waiting: list[SourceError] = []  # the last failure of each read that waits
        self.retries = 0
        """How often a read was made again; several threads count, so it may miss a few."""

    @property
    def trouble(self) -> SourceError | None:
        """Why some read waits now for the source to come back, if one does."""
        waiting = self._waiting[:1]
        return waiting[0] if waiting else None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See :class:`~guestfault.paging.source.base.PageSource`."""
        try:
            self._inner.read_into(offset, buffer)
        except SourceUnavailableError as error:
            failure = _bare(error)
        else:
            return
        self._read_again(offset, buffer, failure)

    def _read_again(self, offset: int, buffer: memoryview, failure: SourceUnavailableError) -> None:
        patience = self._patience
        began = time.monotonic()
        pause, tries = patience.first, 1
        while True:
            left = began + patience.wait - time.monotonic()
            if left <= 0:
                raise _given_up(failure, patience, tries)
            shown = failure
            self._waiting.append(shown)
            try:
                self._interrupt.sleep(min(left, pause * random.uniform(0.5, 1)))
                self.retries += 1
                tries += 1
                return self._inner.read_into(offset, buffer)
            except WaitInterrupted:
                raise SourceInterruptedError(offset, len(buffer)) from None
            except SourceUnavailableError as error:
                failure = _bare(error)
                pause = min(patience.limit, 2 * pause)
            finally:
                self._waiting.remove(shown)

    def interrupt(self) -> None:
        """See :class:`~guestfault.paging.source.base.Interruptible`."""
        self._interrupt.set()
        super().interrupt()

    def resume(self) -> None:
        """See :class:`~guestfault.paging.source.base.Interruptible`."""
        self._interrupt.clear()
        super().resume()

    def close(self) -> None:
        """Close the source underneath.  Not while it is being read."""
        super().close()
        self._interrupt.close()


def _bare(error: SourceUnavailableError) -> SourceUnavailableError:
    """Without its traceback, which refers to pieces of the buffer and, if we kept it, to itself."""
    let_go(error)
    return error.at(error.offset, error.length)


def _given_up(
    error: SourceUnavailableError, patience: Patience, tries: int
) -> SourceUnavailableError:
    if tries == 1:
        return error
    why = f"{error.why}; tried {tries} times in {patience.wait:g} s"
    return SourceUnavailableError(error.offset, error.length, why)

"""The walks: in which order a built-in guest goes over its pages, and what it does to each.

A pager is only as good as the access pattern it was tried on, so there are four: the stream that
read-ahead likes best, the permutation that it likes least, the skewed one of real programs, and the
one whose first access to a page is a store.  A :class:`Walk` is data, a sequence of :class:`Phase`;
:mod:`~guestfault.guest.program` turns it into instructions, and :mod:`~guestfault.guest.expect`
into Python that predicts them.  They share the numbers below and no code.

**The order.**  A phase visits pages by index, 0 to n - 1 within the share of one vCPU.  One step,
*next(x) = (a x + c) mod m, again while the result is not below n*, serves three purposes.  With m
a power of two not below n, c odd and a = 1 mod 4 it is one full cycle over the indices (Knuth, The
Art of Computer Programming, 3.2.1.2, theorem A): ``LINEAR`` has a = c = 1, ``SHUFFLED`` the
multiplier and increment below.  ``ZIPF`` draws a rank from a generator of its own and scatters
neighbouring ranks over memory by the same step, which is a permutation.

**The ranks.**  Zipf's law with exponent 1 gives every octave of ranks, [2^j, 2^(j+1)), nearly the
same weight (log 2), so a rank is drawn as an octave, then a place within it, both uniformly, both
from the high bits of a 32-bit generator; one past the last page is drawn again.

**The visit.**  s is the sum of the page's words; h becomes (h xor h >> half a word) * M + s; then
every word of the page is xored with h.  So h depends on every byte read before, each page's content
depends on h, and one wrong byte anywhere changes all that follows.  For a page that is met once the
proof is that each of these steps is one-to-one.  The shift is for pages that are met again: without
it a wrong *top* bit, which no carry leaves, cancels itself out on every second visit.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Final

__all__ = [
    "HASH_MULTIPLIER",
    "LCG_INCREMENT",
    "LCG_MULTIPLIER",
    "ZIPF_BITS",
    "Order",
    "Phase",
    "Walk",
    "initial_hash",
]

LCG_MULTIPLIER: Final = 1664525  # Knuth and Lewis, as in Numerical Recipes, 7.1
LCG_INCREMENT: Final = 1013904223
ZIPF_BITS: Final = 32  # the width of the generator that draws octaves and places
HASH_MULTIPLIER: Final = 0x2545F491  # odd; positive as imul's signed 32-bit immediate


class Order(Enum):
    """How one phase chooses its next page."""

    LINEAR = "linear"
    SHUFFLED = "shuffled"
    ZIPF = "zipf"

    @property
    def step(self) -> tuple[int, int]:
        """(a, c) of the step that ends in a page's index."""
        return (1, 1) if self is Order.LINEAR else (LCG_MULTIPLIER, LCG_INCREMENT)


@dataclass(frozen=True)
class Phase:
    """``passes`` times as many visits as the vCPU has pages, in one order.

    With ``store_first`` a visit begins with a plain store of h into the page's first word, so the
    page's first access is a write, and what that word held before is lost.
    """

    order: Order
    passes: int = 1
    store_first: bool = False


class Walk(StrEnum):
    """The access patterns of the built-in guests."""

    SEQUENTIAL = "sequential"  # each page once, upwards
    RANDOM = "random"  # each page once, in a pseudo-random order
    ZIPF = "zipf"  # n skewed visits, then each page once so that none is left out
    WRITE_HEAVY = "write-heavy"  # each page once, store first; then three rounds of rewriting

    @property
    def phases(self) -> tuple[Phase, ...]:
        """What the walk consists of, in order."""
        return _PHASES[self]


_PHASES: Final = {
    Walk.SEQUENTIAL: (Phase(Order.LINEAR),),
    Walk.RANDOM: (Phase(Order.SHUFFLED),),
    Walk.ZIPF: (Phase(Order.ZIPF), Phase(Order.LINEAR)),
    Walk.WRITE_HEAVY: (Phase(Order.LINEAR, store_first=True), Phase(Order.SHUFFLED, passes=3)),
}


def initial_hash(vcpu: int, word_bits: int) -> int:
    """The h that a vCPU starts with: its own, so that equal shares give unequal results."""
    return (vcpu + 1) * 0x9E3779B97F4A7C15 & (1 << word_bits) - 1

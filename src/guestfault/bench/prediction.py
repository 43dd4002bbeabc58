"""From what this machine does with one and two vCPUs to what it would do with 256.

The simulation (:mod:`guestfault.scale`) knows what costs there are.  Those that a machine shows
with one vCPU or two are measured: what a fault takes alone, and what it takes more as soon as there
is company.  Those that only a crowd shows cannot be had here, and are **taken over from the
published machine** (:data:`~guestfault.scale.costs.PUBLISHED_MACHINE`), as they are: how long the
turns at the address space and at the wait queue's lock are, what it takes to look at a waiter, and
how many processors a socket has.  So a prediction says where this machine's curves would lie if it
met a crowd as that one does.  A rate that no such costs give, as of a machine that was busy with
something else, is met as nearly as can be; the prediction shows both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, Final

from guestfault.errors import GuestfaultError
from guestfault.scale.costs import PUBLISHED_MACHINE, Costs
from guestfault.scale.model import Way, pages_per_second
from guestfault.scale.published import Layout

__all__ = ["TAKEN_OVER", "CalibrationError", "calibrate", "rates_of"]

_ALONE_UFFD: Final = ("vcpu", "reader_wake", "vcpu_wake", "handler")
TAKEN_OVER: Final = (
    "enqueue",
    "read",
    "wake",
    "space_alone",
    "space_each",
    "space_handoff",
    "space_batch",
    "walk",
    "lock_handoff",
    "lock_queue",
    "space_far",
    "cores_per_socket",
    "sockets",
)
"""The costs that are the published machine's in every prediction."""

_EFFORT = 0.4
_STEPS = 14

Rates = Mapping[tuple[str, int], float]
"""Pages per second of the whole VM, by way and number of vCPUs."""


class CalibrationError(GuestfaultError):
    """The rates do not do for a prediction."""


def rates_of(measured: Mapping[str, Any]) -> tuple[dict[tuple[str, int], float], Layout]:
    """The rates in what ``bench paging --json`` wrote, and how the memory was registered.

    Raises :class:`CalibrationError` if it is something else.
    """
    try:
        rates = {(r["way"], int(r["vcpus"])): float(r["rate"]) for r in measured["results"]}
        layouts = {Layout[r["uffds"].upper()] for r in measured["results"]}
        (layout,) = layouts
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CalibrationError(
            f"not what 'guestfault bench paging --json' writes ({error})"
        ) from None
    return rates, layout


def calibrate(rates: Rates, layout: Layout = Layout.SHARED) -> Costs:
    """The costs with which the simulation comes out at these rates at one and two vCPUs.

    Raises :class:`CalibrationError` without both ways at one vCPU.
    """
    try:
        exit_alone = 1e6 / rates["exit", 1]
        uffd = rates["uffd", 1]
    except KeyError:
        raise CalibrationError("it takes the rates of both ways at 1 vCPU") from None
    # What is measured must leave room for the part of it that is taken over.
    costs = replace(PUBLISHED_MACHINE, exit_alone=max(exit_alone, PUBLISHED_MACHINE.space_each))
    costs = _solve(_scaled(costs, _ALONE_UFFD), Way.UFFD, 1, layout, uffd)
    for key, way, name in (
        ("exit", Way.EXITS, "exit_shared"),
        ("uffd", Way.UFFD, "space_near"),
    ):
        if (key, 2) in rates:
            costs = _solve(_scaled(costs, (name,)), way, 2, layout, rates[key, 2])
    return costs


def _scaled(costs: Costs, names: Iterable[str]) -> Callable[[float], Costs]:
    """``costs``, but those named are the published machine's times a factor."""
    published = {name: getattr(PUBLISHED_MACHINE, name) for name in names}
    return lambda factor: replace(costs, **{n: cost * factor for n, cost in published.items()})


def _solve(
    costs: Callable[[float], Costs], way: Way, vcpus: int, layout: Layout, rate: float
) -> Costs:
    """The costs at the factor, between a 1000th and 1000, at which the simulation has the rate."""
    low, high = 1e-3, 1e3  # the higher, the slower
    for _ in range(_STEPS):
        middle = (low * high) ** 0.5
        if pages_per_second(costs(middle), vcpus, way, layout, effort=_EFFORT) > rate:
            low = middle
        else:
            high = middle
    return costs((low * high) ** 0.5)

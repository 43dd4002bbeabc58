"""What a condition is: something that may be the matter with a page behind a memory slot.

A condition *arranges* the target of a :class:`~guestfault.conform.bench.Bench` and says how it is
mended.  One that this machine or this KVM cannot have raises
:class:`~guestfault.errors.Unavailable` as it is arranged, and the case is skipped with that for its
reason.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field

from guestfault.conform.bench import Bench, Target
from guestfault.conform.places import PAGE, TARGET_SIZE
from guestfault.errors import KernelError
from guestfault.kvm.protocols import System, Vm
from guestfault.linux.userfaultfd import Userfaultfd

__all__ = ["THE_PAGE", "Arranged", "Condition", "by_name", "neighbours", "nothing", "present"]

THE_PAGE = (PAGE, PAGE)
"""Offset and size of the page that a case is about, in the target's views."""


@dataclass
class Arranged:
    """A condition that is in force: ``mend`` ends it, whoever sleeps in ``uffd`` included.

    ``to_close`` is for when the VM is gone.  ``slept`` is set once somebody was found asleep.
    """

    mend: Callable[[], None]
    uffd: Userfaultfd | None = None
    to_close: ExitStack = field(default_factory=ExitStack)
    slept: bool = False


@dataclass(frozen=True)
class Condition:
    """What may be the matter with the page.

    ``later`` arranges it only once the guest has made its access, and with success: what KVM has
    mapped by then must go.  ``hostile`` ones damage the machine, for good or until it boots again.
    ``in_child`` may cost the process its life.  ``create_vm`` makes the VM
    where it takes one of another type.
    """

    name: str
    title: str
    arrange: Callable[[Bench], Arranged]
    later: bool = False
    hostile: bool = False
    in_child: bool = False
    create_vm: Callable[[System], Vm] | None = None


def nothing() -> None:
    """The mend of what is not broken, or cannot be mended."""


def present(target: Target) -> None:
    """All pages in our page tables, the one included, as those of a process that used them."""
    target.write(0, 4)
    _check(target.guest.populate_write(0, TARGET_SIZE), "populate")


def neighbours(target: Target) -> None:
    """All pages but the one."""
    target.write(0)
    target.write(2, 2)
    _check(target.guest.populate_write(0, PAGE), "populate")
    _check(target.guest.populate_write(2 * PAGE, 2 * PAGE), "populate")


def _check(result: int, what: str) -> None:
    if result < 0:
        raise KernelError(what, -result)


def by_name(*conditions: Condition) -> dict[str, Condition]:
    """The conditions of a module."""
    return {condition.name: condition for condition in conditions}

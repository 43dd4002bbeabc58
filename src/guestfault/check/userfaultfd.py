"""userfaultfd: what sort of handle this process may have, and which features the kernel offers.

A handle that delivers every fault, those that the kernel makes on the process's behalf included,
takes any *one* of three grants: ``CAP_SYS_PTRACE``, the sysctl ``vm.unprivileged_userfaultfd``, or
the right to open ``/dev/userfaultfd`` (:mod:`guestfault.linux.userfaultfd_open`).

Without any of them a process may still have a handle for *user-mode* faults only (Linux 5.11).
KVM's own faults are kernel-mode ones: under such a handle they do not wait for the page, they fail,
and KVM_RUN ends in -EFAULT.  A VMM that resolves that exit can live with it; others die.

Whether a grant holds is found out by using it.
"""

from __future__ import annotations

from typing import NamedTuple

from guestfault.check.finding import Finding, Status, Use
from guestfault.errors import Unavailable
from guestfault.linux.userfaultfd import Feature, Userfaultfd
from guestfault.linux.userfaultfd_open import WAYS

__all__ = ["probe"]

NAME = "userfaultfd"
NEEDED_FOR = (Use.DEMAND_PAGING,)


class _Wanted(NamedTuple):
    """A feature that guestfault uses: what it gives, since when, and for what."""

    feature: Feature
    gives: str
    since: str
    needed_for: tuple[Use, ...]


_WANTED = (
    _Wanted(Feature.MISSING_SHMEM, "absent pages of a memfd are reported", "4.11", NEEDED_FOR),
    _Wanted(Feature.MINOR_SHMEM, "a page is filled in place, without a copy", "5.14", NEEDED_FOR),
    _Wanted(Feature.SIGBUS, "a fault can be an exit instead of a sleep", "4.14", NEEDED_FOR),
    _Wanted(Feature.EVENT_REMOVE, "pages that a balloon discards are reported", "4.11", ()),
    _Wanted(Feature.THREAD_ID, "a fault says which vCPU thread waits", "4.14", ()),
    _Wanted(Feature.EXACT_ADDRESS, "a fault says the byte, not only the page", "5.18", ()),
    _Wanted(Feature.POISON, "a lost page stops whoever touches it", "6.6", ()),
    _Wanted(Feature.MOVE, "a page is filled without a copy, by moving it", "6.8", ()),
)


def probe(ways: tuple[str, ...] = WAYS) -> tuple[Finding, ...]:
    """Try each of ``ways`` to get a handle, and ask one for the features.

    Without any handle there is one finding, which says why.
    """
    handle, offered = _handle(ways)
    if handle.status is Status.MISSING:
        return (handle,)
    return (handle, *(_feature(wanted, offered) for wanted in _WANTED))


def _handle(ways: tuple[str, ...]) -> tuple[Finding, Feature]:
    """The best handle to be had, and what the kernel offers through it."""
    try:
        with Userfaultfd.open(ways=ways) as uffd:
            open_ways = [way for way in ways if _offered((way,)) is not None]
            detail = f"every fault, KVM's own included, by {' and by '.join(open_ways)}"
            return Finding(NAME, Status.OK, detail, needed_for=NEEDED_FOR), uffd.offered
    except Unavailable as error:
        refusal = error
    user_mode = _offered(ways, user_mode_only=True)
    if user_mode is None:
        return Finding(NAME, Status.MISSING, refusal.why, refusal.mend, NEEDED_FOR), Feature(0)
    detail = f"user-mode faults only, KVM's own end in -EFAULT: {refusal.why}"
    return Finding(NAME, Status.LIMITED, detail, refusal.mend, NEEDED_FOR), user_mode


def _offered(ways: tuple[str, ...], user_mode_only: bool = False) -> Feature | None:
    """The features that a handle gives, or ``None`` if there is no such handle to be had."""
    try:
        with Userfaultfd.open(user_mode_only=user_mode_only, ways=ways) as uffd:
            return uffd.offered
    except Unavailable:
        return None


def _feature(wanted: _Wanted, offered: Feature) -> Finding:
    feature, gives, since, needed_for = wanted
    name = str(feature.name)
    if feature in offered:
        return Finding(name, Status.OK, gives, needed_for=needed_for)
    detail, mend = f"not offered: {gives}", f"Linux {since} or newer"
    return Finding(name, Status.MISSING, detail, mend, needed_for)

"""Conditions of userfaultfd: who comes to the page sleeps, or fails, until somebody fills it."""

from __future__ import annotations

from collections.abc import Callable

from guestfault.conform.bench import Bench, Target
from guestfault.conform.condition import (
    THE_PAGE,
    Arranged,
    Condition,
    by_name,
    neighbours,
    nothing,
    present,
)
from guestfault.conform.places import PAGE
from guestfault.errors import Unavailable
from guestfault.linux.userfaultfd import Feature, Mode, Userfaultfd

__all__ = ["USERFAULT"]


def _userfaultfd(
    bench: Bench, mode: Mode, features: Feature, *, user_mode_only: bool = False
) -> Arranged:
    """The page registered; nothing is in the slot yet."""
    kinds = {Mode.MISSING: Feature.MISSING_SHMEM, Mode.MINOR: Feature.MINOR_SHMEM}
    needed = kinds.get(mode, Feature.WP_HUGETLBFS_SHMEM | Feature.PAGEFAULT_FLAG_WP)
    uffd = Userfaultfd.open(required=features | needed, user_mode_only=user_mode_only)
    arranged = Arranged(nothing, uffd)
    arranged.to_close.callback(uffd.close)
    # With MINOR alone, shmem fills what is in no cache with zeros and asks nobody.
    also = Mode.MISSING if mode is Mode.MINOR else Mode(0)
    try:
        uffd.register(bench.target.the_page, PAGE, mode | also)
    except BaseException:
        arranged.to_close.close()
        raise
    return arranged


def _missing(features: Feature, *, user_mode_only: bool = False) -> Callable[[Bench], Arranged]:
    def arrange(bench: Bench) -> Arranged:
        target = bench.target
        neighbours(target)
        arranged = _userfaultfd(bench, Mode.MISSING, features, user_mode_only=user_mode_only)
        uffd = arranged.uffd
        assert uffd is not None

        def mend() -> None:
            uffd.copy(target.the_page, target.fresh_page(), PAGE)
            uffd.wake(target.the_page, PAGE)

        arranged.mend = mend
        bench.set_target()
        return arranged

    return arrange


def _minor(features: Feature) -> Callable[[Bench], Arranged]:
    def arrange(bench: Bench) -> Arranged:
        target = bench.target
        neighbours(target)
        arranged = _userfaultfd(bench, Mode.MINOR, features)
        target.write(1)
        uffd = arranged.uffd
        assert uffd is not None

        def mend() -> None:
            uffd.continue_(target.the_page, PAGE)
            uffd.wake(target.the_page, PAGE)

        arranged.mend = mend
        bench.set_target()
        return arranged

    return arrange


def _write_protected(features: Feature) -> Callable[[Bench], Arranged]:
    def arrange(bench: Bench) -> Arranged:
        target = bench.target
        present(target)
        arranged = _userfaultfd(bench, Mode.WP, features)
        uffd = arranged.uffd
        assert uffd is not None
        uffd.writeprotect(target.the_page, PAGE, protect=True)
        arranged.mend = lambda: _lift(uffd, target)
        bench.set_target()
        return arranged

    return arrange


def _lift(uffd: Userfaultfd, target: Target) -> None:
    uffd.writeprotect(target.the_page, PAGE, protect=False)


def _closed(bench: Bench) -> Arranged:
    arranged = _missing(Feature(0))(bench)
    arranged.to_close.close()
    # Nobody can tell the page any more from one that was never written: there is no mend.
    return Arranged(nothing)


def _discarded(bench: Bench) -> Arranged:
    target = bench.target
    target.write(1)
    arranged = _userfaultfd(bench, Mode.MINOR, Feature.SIGBUS)
    uffd = arranged.uffd
    assert uffd is not None
    target.guest.discard(*THE_PAGE)

    def mend() -> None:
        uffd.continue_(target.the_page, PAGE)

    arranged.mend = mend
    return arranged


def _poisoned(bench: Bench) -> Arranged:
    target = bench.target
    neighbours(target)
    arranged = _userfaultfd(bench, Mode.MISSING, Feature.POISON)
    uffd = arranged.uffd
    assert uffd is not None
    result = uffd.poison(target.the_page, PAGE)
    if result.errno:
        raise Unavailable("UFFDIO_POISON", f"errno {result.errno}")

    def mend() -> None:
        # Discarded, it is missing again.
        target.guest.discard(*THE_PAGE)
        target.write(1)
        uffd.unregister(target.the_page, PAGE)

    arranged.mend = mend
    bench.set_target()
    return arranged


_SIGBUS, _WAIT = Feature.SIGBUS, Feature(0)

USERFAULT: dict[str, Condition] = by_name(
    Condition("missing", "userfaultfd MISSING, waiting", _missing(_WAIT)),
    Condition("missing-sigbus", "userfaultfd MISSING, failing", _missing(_SIGBUS)),
    Condition(
        "missing-user",
        "userfaultfd MISSING, UFFD_USER_MODE_ONLY",
        _missing(_WAIT, user_mode_only=True),
    ),
    Condition("missing-closed", "userfaultfd MISSING, closed before the access", _closed),
    Condition("minor", "userfaultfd MINOR, waiting", _minor(_WAIT)),
    Condition("minor-sigbus", "userfaultfd MINOR, failing", _minor(_SIGBUS)),
    Condition(
        "discarded-later",
        "MADV_DONTNEED under userfaultfd MINOR, failing, once KVM has it mapped",
        _discarded,
        later=True,
    ),
    Condition("wp", "userfaultfd WP, waiting", _write_protected(_WAIT)),
    Condition("wp-sigbus", "userfaultfd WP, failing", _write_protected(_SIGBUS)),
    Condition("uffd-poison", "UFFDIO_POISON", _poisoned, in_child=True),
)
"""By their names."""

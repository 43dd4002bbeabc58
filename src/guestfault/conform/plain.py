"""Conditions that take nothing but the memory's own system calls, and the memory slot."""

from __future__ import annotations

from guestfault.conform import places
from guestfault.conform.bench import Bench
from guestfault.conform.condition import THE_PAGE, Arranged, Condition, by_name, nothing, present
from guestfault.conform.places import PAGE
from guestfault.uapi.kvm import KVM_MEM_READONLY
from guestfault.uapi.mman import PROT_NONE, PROT_READ, PROT_WRITE

__all__ = ["PLAIN"]

_RW = PROT_READ | PROT_WRITE


def _normal(bench: Bench) -> Arranged:
    present(bench.target)
    bench.set_target()
    return Arranged(nothing)


def _prot_none(bench: Bench) -> Arranged:
    present(bench.target)
    bench.target.guest.protect(*THE_PAGE, PROT_NONE)
    bench.set_target()
    return Arranged(lambda: bench.target.guest.protect(*THE_PAGE, _RW))


def _prot_none_later(bench: Bench) -> Arranged:
    bench.target.write(1)
    bench.target.guest.protect(*THE_PAGE, PROT_NONE)
    return Arranged(lambda: bench.target.guest.protect(*THE_PAGE, _RW))


def _unmapped(bench: Bench) -> Arranged:
    present(bench.target)
    bench.set_target()
    # One page between two of ours: nothing else that this process maps is as small.
    bench.target.guest.unmap(*THE_PAGE)
    return Arranged(lambda: bench.target.guest.map_again(*THE_PAGE))


def _read_only(bench: Bench) -> Arranged:
    present(bench.target)
    bench.target.guest.protect(*THE_PAGE, PROT_READ)
    bench.set_target()
    return Arranged(lambda: bench.target.guest.protect(*THE_PAGE, _RW))


def _read_only_slot(bench: Bench) -> Arranged:
    present(bench.target)
    bench.set_target(KVM_MEM_READONLY)

    def mend() -> None:
        bench.remove_target()
        bench.set_target()

    return Arranged(mend)


def _past_eof(bench: Bench) -> Arranged:
    target = bench.target
    present(target)
    target.memfd.truncate(PAGE)
    bench.set_target()

    def mend() -> None:
        target.memfd.truncate(places.TARGET_SIZE)
        target.write(1, 3)

    return Arranged(mend)


def _no_slot(bench: Bench) -> Arranged:
    present(bench.target)
    return Arranged(bench.set_target)


def _hwpoison(bench: Bench) -> Arranged:
    present(bench.target)
    bench.set_target()
    target = bench.target
    target.guest.hwpoison(*THE_PAGE)

    def mend() -> None:
        # The file gives up the broken page, then each mapping its mark of it, and a new one comes.
        target.memfd.punch_hole(*THE_PAGE)
        target.guest.discard(*THE_PAGE)
        target.host.discard(*THE_PAGE)
        target.write(1)

    return Arranged(mend)


PLAIN: dict[str, Condition] = by_name(
    Condition("normal", "nothing is the matter", _normal),
    Condition("prot-none", "PROT_NONE", _prot_none),
    Condition("prot-none-later", "PROT_NONE, once KVM has it mapped", _prot_none_later, later=True),
    Condition("unmapped", "nothing is mapped there", _unmapped),
    Condition("read-only", "a read-only mapping", _read_only),
    Condition("read-only-slot", "a slot with KVM_MEM_READONLY", _read_only_slot),
    Condition("past-eof", "past the end of its file", _past_eof),
    Condition("no-slot", "in no slot", _no_slot),
    Condition("hwpoison", "MADV_HWPOISON", _hwpoison, hostile=True, in_child=True),
)
"""By their names."""

"""A page of the guest's that KVM accesses in two ways is one thing to the search."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest

from guestfault.dialect.record import Dialect
from guestfault.explore.scenario import Kind, Scenario, Verdict
from guestfault.explore.search import Bound, explore
from guestfault.softkvm.guest_access import copy_from_guest_page, copy_to_guest_page
from guestfault.softkvm.guest_cache import (
    kvm_gfn_to_hva_cache_init,
    kvm_read_guest_offset_cached,
    kvm_write_guest_offset_cached,
)
from guestfault.softkvm.kvm_host import Kvm, KvmVcpu
from guestfault.softkvm.memslots import KvmMemorySlot
from guestfault.uapi import kvm as uapi

HVA, GPA = 0x7000_0000_0000, 0x40


class PlainMm:
    """Memory that has no preemption points: those that are needed stand before its use."""

    def __init__(self) -> None:
        self.bytes = bytearray(4096)

    def copy_from_user(self, hva: int, size: int) -> bytes:
        return bytes(self.bytes[hva - HVA :][:size])

    def copy_to_user(self, hva: int, data: bytes) -> bool:
        self.bytes[hva - HVA : hva - HVA + len(data)] = data
        return True


class Token:
    """One writes a token again and again, and one reads it: by the cache, or as the emulator does.

    ``ended`` collects what was read.
    """

    def __init__(self, dialect: Dialect, cached_write: bool, ended: set[bytes]) -> None:
        mm = PlainMm()
        kvm = Kvm(dialect, mm)  # type: ignore[arg-type]
        kvm.memslots = kvm.memslots.replaced(None, KvmMemorySlot(0, 0, 1, HVA, 0))
        area = bytearray(4096)
        vcpu = KvmVcpu(kvm, 0, uapi.kvm_run.from_buffer(area), memoryview(area))
        cache = kvm_gfn_to_hva_cache_init(kvm.memslots, GPA, 8)
        assert cache is not None
        self._found: list[bytes | None] = []
        self._ended = ended

        def write() -> None:
            for token in (b"1", b"2", b"3"):
                if cached_write:
                    slots, stage = kvm.memslots, kvm.second_stage
                    kvm_write_guest_offset_cached(cache, token, 0, slots, kvm.mm, stage)
                else:
                    copy_to_guest_page(vcpu, GPA, token)

        def read() -> None:
            for _ in range(3):
                if cached_write:
                    found = copy_from_guest_page(vcpu, GPA, 1)
                else:
                    found = kvm_read_guest_offset_cached(cache, 0, 1, kvm.memslots, kvm.mm)
                self._found.append(found)

        self.actors: Mapping[str, Callable[[], None]] = {"writer": write, "reader": read}

    def verdict(self, *, stuck: str | None) -> Verdict:
        assert stuck is None
        self._ended.add(b"".join(found or b"?" for found in self._found))
        return Verdict(Kind.CORRECT)

    def close(self) -> None:
        pass


def ends(dialect: Dialect, cached_write: bool, *, hashing: bool) -> set[bytes]:
    """What can be read."""
    ended: set[bytes] = set()
    scenario = Scenario("token", "a token", "a test", lambda d: Token(d, cached_write, ended))
    assert explore(scenario, dialect, Bound(4), hashing=hashing).stopped is None
    return ended


@pytest.mark.timeout(60)
@pytest.mark.parametrize("cached_write", [True, False])
def test_the_order_of_its_accesses_counts(dialect: Dialect, cached_write: bool) -> None:
    """The search drops no order of accesses to one page, whichever of KVM's copies they are."""
    every = ends(dialect, cached_write, hashing=False)
    assert len(every) == 20  # four values that never go back, three times
    assert ends(dialect, cached_write, hashing=True) == every

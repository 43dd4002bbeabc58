"""What the probe concludes: from the records of hosts that are known, and on this one."""

from __future__ import annotations

from contextlib import closing

import pytest

from guestfault.errors import Unavailable
from guestfault.fault.access import AccessKind
from guestfault.fault.locate.probe_guest import Meaning, learn, meanings, run_probe_guest
from guestfault.fault.locate.run_trace import FaultRecord
from guestfault.kvm import KvmSystem
from guestfault.linux.tracefs import Tracefs
from guestfault.softkvm.system import SoftSystem

GPA, GVA = 0xC123, 0x1_0000_C123
READ, WRITE, FETCH = AccessKind.READ, AccessKind.WRITE, AccessKind.FETCH


def probed(event: str, number: int, *codes: int) -> dict[AccessKind, list[FaultRecord]]:
    kinds = zip((READ, WRITE, FETCH), codes, strict=True)
    return {kind: [FaultRecord(event, number, code)] for kind, code in kinds}


def test_npt() -> None:
    meaning = learn(probed("kvm_page_fault", GPA, 0x1_0000_0004, 0x1_0000_0006, 0x1_0000_0014))
    assert meaning == {"kvm_page_fault": Meaning(is_gva=False, write_mask=2, fetch_mask=16)}


def test_ept_reports_an_exit_qualification() -> None:
    meaning = learn(probed("kvm_page_fault", GPA, 0x181, 0x182, 0x184))["kvm_page_fault"]
    assert not meaning.is_gva
    # Bits 3 to 5 are the rights of the entry: of a fetch from a page that may be written, say.
    assert [meaning.kind(code) for code in (0x181, 0x182, 0x184, 0x18C)] == [
        READ,
        WRITE,
        FETCH,
        FETCH,
    ]
    assert meaning.kind(0x1B1) is READ


def test_two_events_of_each_access_are_both_learnt() -> None:
    both = probed("kvm_page_fault", GVA, 4, 6, 20)
    for kind, records in probed("kvm_mmu_pagetable_walk", GVA, 4, 6, 20).items():
        both[kind] = records + both[kind]
    expected = Meaning(is_gva=True, write_mask=2, fetch_mask=16)
    assert learn(both) == {"kvm_page_fault": expected, "kvm_mmu_pagetable_walk": expected}


def test_kinds_that_cannot_be_told_apart_are_not_told() -> None:
    meaning = learn(probed("kvm_page_fault", GPA, 4, 6, 4))["kvm_page_fault"]
    assert meaning.kind(6) is WRITE
    assert meaning.kind(4) is None


@pytest.mark.parametrize(
    "records",
    [
        pytest.param(probed("kvm_page_fault", 0xC000, 4, 6, 20), id="another address"),
        pytest.param({READ: [], WRITE: [], FETCH: []}, id="no records"),
        pytest.param(probed("kvm_page_fault", GPA, 4, 6, 20) | {FETCH: []}, id="not for fetches"),
        pytest.param(
            probed("kvm_page_fault", GPA, 4, 6, 20)
            | {WRITE: [FaultRecord("kvm_page_fault", GVA, 6)]},
            id="now this address, now that",
        ),
    ],
)
def test_what_is_not_understood_is_not_used(records: dict[AccessKind, list[FaultRecord]]) -> None:
    with pytest.raises(Unavailable, match="none names the access"):
        learn(records)


def test_this_host(system: KvmSystem, traced: Tracefs) -> None:
    found = meanings(system, traced)
    assert found
    for meaning in found.values():
        assert meaning.write_mask
    assert meanings(system, traced) is found


def test_each_record_of_the_probe_is_of_its_access(system: KvmSystem, traced: Tracefs) -> None:
    found = meanings(system, traced)
    for kind, records in run_probe_guest(system, traced).items():
        assert records[0].number in (GPA, GVA)
        assert found[records[0].event].kind(records[0].code) is kind


def test_a_kvm_that_passes_no_tracepoint_is_not_traced(traced: Tracefs) -> None:
    with (
        closing(SoftSystem("linux-6.8")) as system,
        pytest.raises(Unavailable, match="use another locator"),
    ):
        meanings(system, traced)

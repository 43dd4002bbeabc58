"""Which sequences of records name an access, and which must not."""

from __future__ import annotations

import struct
from mmap import PAGESIZE
from pathlib import Path

import pytest

from guestfault.errors import Unavailable
from guestfault.fault.locate.run_trace import FaultRecord, RunTrace, Sentence
from guestfault.linux.perf_ring import OverwriteRing
from guestfault.linux.tracefs import EventFormat, Tracefs
from guestfault.uapi import perf as uapi


def event(name: str, number: int, *fields: tuple[str, int, int, int]) -> EventFormat:
    lines = [
        f"\tfield:int {field};\toffset:{offset};\tsize:{size};\tsigned:{signed};"
        for field, offset, size, signed in (("common_type", 0, 2, 0), *fields)
    ]
    return EventFormat.parse("\n".join([f"name: {name}", f"ID: {number}", "format:", *lines]))


FORMATS = {
    e.name: e
    for e in (
        event("kvm_userspace_exit", 1, ("reason", 8, 4, 0), ("errno", 12, 4, 1)),
        event("kvm_fpu", 2, ("load", 8, 4, 0)),
        event("kvm_entry", 3),
        event("kvm_mmu_spte_requested", 4),
        event("kvm_page_fault", 5, ("fault_address", 24, 8, 0), ("error_code", 32, 8, 0)),
        event("kvm_mmu_pagetable_walk", 6, ("addr", 8, 8, 0), ("pferr", 16, 4, 0)),
    )
}


def raw(name: str, **values: int) -> bytes:
    record = bytearray(40)
    struct.pack_into("<H", record, 0, FORMATS[name].id)
    for field, value in values.items():
        at = FORMATS[name].fields[field]
        struct.pack_into(at.code, record, at.offset, value)
    return struct.pack("<IHHI", uapi.PERF_RECORD_SAMPLE, 0, 56, 44) + record + bytes(4)


BEGIN, ENTRY, MAPPED = raw("kvm_fpu", load=1), raw("kvm_entry"), raw("kvm_mmu_spte_requested")
FAILED, POISONED = (raw("kvm_userspace_exit", errno=-number) for number in (14, 133))
PORT, KICKED = raw("kvm_userspace_exit", reason=2), raw("kvm_userspace_exit", errno=-4)


def walk(gva: int) -> bytes:
    return raw("kvm_mmu_pagetable_walk", addr=gva, pferr=4)


def fault(address: int) -> bytes:
    return raw("kvm_page_fault", fault_address=address, error_code=1 << 32)


def ring(*records: bytes, size: int = 4096) -> OverwriteRing:
    memory = bytearray(PAGESIZE + size)
    head = 0
    for record in records:
        head -= len(record)
        for i, byte in enumerate(record):
            memory[PAGESIZE + (head + i) % size] = byte
    struct.pack_into("<Q", memory, 1024, head % (1 << 64))
    return OverwriteRing(memoryview(memory))


def read(*records: bytes, size: int = 4096) -> list[tuple[str, int]]:
    found = Sentence.of(FORMATS).read(ring(*records, size=size))
    return [(record.event, record.number) for record in found]


A, B = ("kvm_mmu_pagetable_walk", 0xA123), ("kvm_mmu_pagetable_walk", 0xB123)
WALK_A, WALK_B = walk(0xA123), walk(0xB123)


@pytest.mark.parametrize("end", [FAILED, POISONED])
@pytest.mark.parametrize("begin", [BEGIN, ENTRY, MAPPED])
def test_the_last_fault_before_a_failure_is_the_access(begin: bytes, end: bytes) -> None:
    assert read(begin, WALK_A, end) == [A]


def test_two_events_of_one_access_and_retries_come_newest_first() -> None:
    assert read(ENTRY, fault(0xB123), WALK_B, FAILED) == [B, ("kvm_page_fault", 0xB123)]
    assert read(BEGIN, ENTRY, WALK_A, ENTRY, WALK_A, FAILED) == [A]


def test_asked_again_it_says_the_same_whatever_translations_were_made_meanwhile() -> None:
    assert read(BEGIN, WALK_A, FAILED, WALK_B, WALK_B) == [A]


NO_ANSWER = [
    pytest.param((), id="nothing at all"),
    pytest.param((BEGIN, WALK_A, PORT), id="the run did not fail"),
    pytest.param((BEGIN, WALK_A, KICKED), id="the run was kicked"),
    pytest.param((BEGIN, WALK_A, FAILED, BEGIN, PORT), id="an earlier run failed"),
    pytest.param((BEGIN, WALK_A, MAPPED, FAILED), id="the last fault was resolved"),
    pytest.param((BEGIN, WALK_A, ENTRY, FAILED), id="the guest ran on after the last fault"),
    pytest.param((BEGIN, PORT, WALK_A, BEGIN, FAILED), id="a translation before the run"),
    pytest.param((BEGIN, FAILED, WALK_A), id="a translation after the run"),
    pytest.param((BEGIN, PORT, WALK_A, FAILED), id="the run's beginning is not recorded"),
    pytest.param((WALK_A, FAILED), id="the beginning is lost"),
]


@pytest.mark.parametrize("records", NO_ANSWER)
def test_nothing_else_is_an_answer(records: tuple[bytes, ...]) -> None:
    assert read(*records) == []


SENTENCES = [
    (BEGIN, WALK_A, FAILED),
    (BEGIN, WALK_A, POISONED),
    (ENTRY, fault(0xA123), FAILED),
    (MAPPED, fault(0xA123), WALK_A, FAILED),
    (BEGIN, fault(0xA123), WALK_A, fault(0xA123), FAILED),
]


@pytest.mark.parametrize("usual", SENTENCES)
def test_a_shape_finds_the_sentences_that_have_it_and_no_other(usual: tuple[bytes, ...]) -> None:
    shape = Sentence.of(FORMATS).shape(ring(*usual))
    assert shape is not None
    others = [*SENTENCES, *(param.values[0] for param in NO_ANSWER)]
    for records in others:
        for before in range(20):  # some of them wrap in the ring
            memory = ring(*[PORT] * before, *records, size=512)
            found, known = shape.read(memory), Sentence.of(FORMATS).read(memory)
            assert found is None or [found] == known[:1]
    found = shape.read(ring(*usual))
    assert found is not None
    assert found.number == 0xA123


def test_a_shape_finds_other_addresses() -> None:
    shape = Sentence.of(FORMATS).shape(ring(BEGIN, WALK_A, FAILED))
    assert shape is not None
    found = shape.read(ring(BEGIN, WALK_A, FAILED, BEGIN, WALK_B, FAILED))
    assert found == FaultRecord("kvm_mmu_pagetable_walk", 0xB123, 4)
    assert shape.read(ring(BEGIN, WALK_A, FAILED, BEGIN, walk(0), PORT)) is None


def test_there_is_no_shape_of_a_sentence_with_something_after_it() -> None:
    assert Sentence.of(FORMATS).shape(ring(BEGIN, WALK_A, FAILED, WALK_B)) is None


def test_a_sentence_that_wraps_is_whole_and_one_that_is_overwritten_is_not() -> None:
    for before in range(40):
        assert read(*[PORT] * before, BEGIN, WALK_A, FAILED, size=512) == [A]
    for after in range(12):
        found = read(BEGIN, WALK_A, FAILED, *[WALK_B] * after, size=512)
        assert found == ([A] if after + 3 <= 512 // len(WALK_B) else [])


def test_a_code_is_read_with_its_address() -> None:
    memory = bytearray(PAGESIZE + 512)
    sentence = FAILED + fault(0x123) + BEGIN
    memory[-len(sentence) :] = sentence
    struct.pack_into("<Q", memory, 1024, (1 << 64) - len(sentence))
    found = Sentence.of(FORMATS).read(OverwriteRing(memoryview(memory)))
    assert found == [FaultRecord("kvm_page_fault", 0x123, 1 << 32)]


def test_a_kernel_without_the_events(tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    with pytest.raises(Unavailable, match="kvm_userspace_exit"):
        RunTrace(Tracefs(tmp_path))
    directory = tmp_path / "events" / "kvm" / "kvm_userspace_exit"
    directory.mkdir(parents=True)
    (directory / "format").write_text(
        "name: kvm_userspace_exit\nID: 65534\n\tfield:int errno;\toffset:12;\tsize:4;\tsigned:1;\n"
    )
    with pytest.raises(Unavailable, match="no such event"):
        RunTrace(Tracefs(tmp_path))

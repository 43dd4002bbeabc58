from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestfault.errors import Unavailable
from guestfault.linux.tracefs import EventFormat, Field, Tracefs

COMMON = """\
	field:unsigned short common_type;	offset:0;	size:2;	signed:0;
	field:unsigned char common_flags;	offset:2;	size:1;	signed:0;
	field:unsigned char common_preempt_count;	offset:3;	size:1;	signed:0;
	field:int common_pid;	offset:4;	size:4;	signed:1;
"""
# One kernel's, and what an older one had: no vcpu_id, so the address lies elsewhere.
PAGE_FAULT = f"""\
name: kvm_page_fault
ID: 1537
format:
{COMMON}
	field:unsigned int vcpu_id;	offset:8;	size:4;	signed:0;
	field:unsigned long guest_rip;	offset:16;	size:8;	signed:0;
	field:u64 fault_address;	offset:24;	size:8;	signed:0;
	field:u64 error_code;	offset:32;	size:8;	signed:0;

print fmt: "vcpu %u rip 0x%lx address 0x%016llx error_code 0x%llx", REC->vcpu_id, REC->guest_rip
"""
OLD_PAGE_FAULT = f"""\
name: kvm_page_fault
ID: 811
format:
{COMMON}
	field:unsigned long fault_address;	offset:8;	size:8;	signed:0;
	field:unsigned int error_code;	offset:16;	size:4;	signed:0;

print fmt: "address %lx error_code %x", REC->fault_address, REC->error_code
"""
OTHER_KINDS = """\
name: made_up
ID: 7
format:
	field:u64 * sptep;	offset:8;	size:8;	signed:0;
	field:char comm[16];	offset:16;	size:16;	signed:0;
	field:__data_loc char[] text;	offset:32;	size:4;	signed:1;
	field:int errno;	offset:36;	size:4;	signed:1;
"""


def test_fields_are_found_by_name_wherever_they_lie() -> None:
    new, old = EventFormat.parse(PAGE_FAULT), EventFormat.parse(OLD_PAGE_FAULT)
    assert (new.name, new.id, old.id) == ("kvm_page_fault", 1537, 811)
    assert new.fields["fault_address"] == Field("fault_address", "u64", 24, 8, False)
    assert old.fields["fault_address"].offset == 8
    raw = bytes(8) + (0x80123).to_bytes(8, "little") + (4).to_bytes(4, "little")
    assert old.fields["fault_address"].read(raw) == 0x80123
    assert old.fields["error_code"].read(raw) == 4


def test_pointers_arrays_and_signs() -> None:
    fields = EventFormat.parse(OTHER_KINDS).fields
    assert [(f.name, f.type) for f in fields.values()] == [
        ("sptep", "u64 *"),
        ("comm", "char[16]"),
        ("text", "__data_loc char[]"),
        ("errno", "int"),
    ]
    assert fields["errno"].read(bytes(36) + b"\xf2\xff\xff\xff") == -14
    with pytest.raises(ValueError, match="comm"):
        _ = fields["comm"].code


@given(
    st.lists(
        st.tuples(
            st.text("abcdefgh_0123", min_size=1, max_size=8).map("f".__add__),
            st.sampled_from([("u64", 8), ("int", 4), ("unsigned long", 8), ("bool", 1)]),
            st.integers(0, 500),
            st.booleans(),
        ),
        min_size=1,
        max_size=8,
        unique_by=lambda field: field[0],
    )
)
def test_what_the_kernel_prints_is_what_is_read(
    wanted: list[tuple[str, tuple[str, int], int, bool]],
) -> None:
    lines = [
        f"\tfield:{type_} {name};\toffset:{offset};\tsize:{size};\tsigned:{signed:d};"
        for name, (type_, size), offset, signed in wanted
    ]
    event = EventFormat.parse("\n".join(["name: x", "ID: 3", "format:", *lines]))
    assert list(event.fields.values()) == [
        Field(name, type_, offset, size, signed) for name, (type_, size), offset, signed in wanted
    ]


@pytest.mark.parametrize("line", ["name: kvm_page_fault\n", "ID: 1537\n", "field:"])
def test_half_a_description_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match="lacks"):
        EventFormat.parse(PAGE_FAULT.replace(line, "\n"))


def test_errors_say_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"not mounted.*mount -t tracefs"):
        Tracefs.find([])
    with pytest.raises(Unavailable, match="closed to this user"):
        Tracefs.find([tmp_path])
    with pytest.raises(Unavailable, match="not mounted at"):
        Tracefs(tmp_path).event("kvm", "kvm_page_fault")
    (tmp_path / "events" / "kvm" / "kvm_page_fault").mkdir(parents=True)
    (tmp_path / "events" / "kvm" / "kvm_page_fault" / "format").write_text("?")
    tracefs = Tracefs.find([tmp_path])
    with pytest.raises(Unavailable, match="cannot be understood"):
        tracefs.event("kvm", "kvm_page_fault")
    with pytest.raises(Unavailable, match="no such event"):
        tracefs.event("kvm", "kvm_moonshine")
    with pytest.raises(Unavailable, match="load the module"):
        tracefs.event("kvmmmu", "kvm_mmu_pagetable_walk")


def test_every_event_of_this_kernel_can_be_parsed(tracefs: Tracefs) -> None:
    names = [
        (group, name)
        for group in ("signal", "sched", "kvm", "kvmmmu")
        if (tracefs.path / "events" / group).is_dir()
        for name in os.listdir(tracefs.path / "events" / group)
        if name not in ("enable", "filter")
    ]
    for group, name in names:
        event = tracefs.event(group, name)
        number = (tracefs.path / "events" / group / name / "id").read_text()
        assert (event.name, event.id) == (name, int(number))
        assert event.fields["common_type"] == Field("common_type", "unsigned short", 0, 2, False)
    assert names

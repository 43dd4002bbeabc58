import ctypes
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestfault.guest.vcpu_state import VcpuState
from guestfault.uapi import kvm as uapi


def without_padding(sregs):
    for segment in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt"):
        getattr(sregs, segment).padding = 0
    for table in (sregs.gdt, sregs.idt):
        table.padding[:] = [0] * 3
    return bytes(sregs)


@given(
    st.binary(min_size=ctypes.sizeof(uapi.kvm_regs), max_size=ctypes.sizeof(uapi.kvm_regs)),
    st.binary(min_size=ctypes.sizeof(uapi.kvm_sregs), max_size=ctypes.sizeof(uapi.kvm_sregs)),
)
def test_any_registers_survive(regs, sregs):
    state = VcpuState(uapi.kvm_regs.from_buffer_copy(regs), uapi.kvm_sregs.from_buffer_copy(sregs))
    again = VcpuState.from_json(json.loads(json.dumps(state.to_json())), "vcpu 0")
    assert bytes(again.regs) == regs
    assert bytes(again.sregs) == without_padding(state.sregs)


def test_form():
    regs = uapi.kvm_regs(rip=0x1_0000_0000)
    content = VcpuState(regs, uapi.kvm_sregs()).to_json()
    assert content["regs"]["rip"] == "0x100000000"
    assert content["sregs"]["cs"]["limit"] == "0x0"
    assert content["sregs"]["interrupt_bitmap"] == ["0x0"] * 4
    assert "padding" not in content["sregs"]["cs"]


def remove(content):
    del content["sregs"]["cs"]["limit"]


def add(content):
    content["regs"]["r16"] = "0x0"


def too_large(content):
    content["sregs"]["cs"]["selector"] = "0x10000"


def negative(content):
    content["regs"]["rax"] = "-0x1"


def number(content):
    content["regs"]["rax"] = 1


def word(content):
    content["regs"]["rax"] = "zero"


def short_list(content):
    content["sregs"]["interrupt_bitmap"].pop()


def no_object(content):
    content["sregs"]["gdt"] = []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (remove, r"vcpu 3\.sregs\.cs\.limit is missing"),
        (add, r"vcpu 3\.regs\.r16 is not known"),
        (too_large, r"vcpu 3\.sregs\.cs\.selector must be .* at most 16 bits"),
        (negative, r"vcpu 3\.regs\.rax must be"),
        (number, r"vcpu 3\.regs\.rax must be"),
        (word, r"vcpu 3\.regs\.rax must be"),
        (short_list, r"vcpu 3\.sregs\.interrupt_bitmap must be a list of 4 numbers"),
        (no_object, r"vcpu 3\.sregs\.gdt must be an object"),
    ],
)
def test_refuses_and_names_the_field(damage, message):
    content = VcpuState(uapi.kvm_regs(), uapi.kvm_sregs()).to_json()
    damage(content)
    with pytest.raises(ValueError, match=message):
        VcpuState.from_json(content, "vcpu 3")

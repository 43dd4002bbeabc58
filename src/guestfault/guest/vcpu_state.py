"""The registers of a vCPU as they are kept in a snapshot: structures of KVM's, written as JSON.

A structure becomes an object with the kernel's own field names, a nested one an object within it,
an array a list, and every number a string such as ``"0x100000000"``: JSON's own numbers lose their
low bits above 2^53 in most readers but Python's.  Padding is left out.  Reading is strict, for a
register that is silently 0 makes a guest that fails far from the cause: no field may be missing,
unknown, or too large for its place.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from guestfault.uapi import kvm as uapi

__all__ = ["VcpuState"]


@dataclass(frozen=True)
class VcpuState:
    """All that a vCPU needs to start or go on: ``KVM_SET_REGS`` and ``KVM_SET_SREGS``."""

    regs: uapi.kvm_regs
    sregs: uapi.kvm_sregs

    def to_json(self) -> dict[str, Any]:
        """The two structures as nested objects."""
        return {"regs": _dump(self.regs), "sregs": _dump(self.sregs)}

    @classmethod
    def from_json(cls, value: object, where: str) -> VcpuState:
        """The reverse; raises :class:`ValueError` that names the field, ``where`` first."""
        parts = _members(value, {"regs", "sregs"}, where)
        state = cls(uapi.kvm_regs(), uapi.kvm_sregs())
        _fill(state.regs, parts["regs"], f"{where}.regs")
        _fill(state.sregs, parts["sregs"], f"{where}.sregs")
        return state


def _names(structure: ctypes.Structure) -> list[str]:
    return [name for name, *_ in structure._fields_ if name != "padding"]


def _dump(value: Any) -> Any:
    if isinstance(value, ctypes.Structure):
        return {name: _dump(getattr(value, name)) for name in _names(value)}
    if isinstance(value, ctypes.Array):
        return [_dump(item) for item in value]
    return hex(value)


def _fill(structure: ctypes.Structure, value: object, where: str) -> None:
    names = _names(structure)
    members = _members(value, set(names), where)
    for name in names:
        place = f"{where}.{name}"
        field = getattr(structure, name)
        if isinstance(field, ctypes.Structure):
            _fill(field, members[name], place)
        elif isinstance(field, ctypes.Array):
            items = members[name]
            if not isinstance(items, list) or len(items) != len(field):
                raise ValueError(f"{place} must be a list of {len(field)} numbers")
            bits = 8 * ctypes.sizeof(field) // len(field)
            field[:] = [_number(item, bits, place) for item in items]
        else:
            bits = 8 * getattr(type(structure), name).size
            setattr(structure, name, _number(members[name], bits, place))


def _members(value: object, names: set[str], where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{where} must be an object")
    for name in sorted(names ^ value.keys()):
        raise ValueError(f"{where}.{name} is {'missing' if name in names else 'not known'}")
    return value


def _number(value: object, bits: int, where: str) -> int:
    try:
        number = int(value, 16) if isinstance(value, str) else -1
    except ValueError:
        number = -1
    if not 0 <= number < 1 << bits:
        raise ValueError(f"{where} must be a hexadecimal string of at most {bits} bits")
    return number

"""Segments: what a selector stands for, in the three layouts that the field uses for it.

Why it exists: KVM takes the hidden part of a segment register field by field (``kvm_segment``), a
descriptor table packs it into 8 bytes, and SVM's VMCB (and with it most debugging output) into a
12-bit attribute word and two numbers.  A guest that starts anywhere but at the reset vector needs a
full set of eight registers that agree with each other; :class:`Segments` has the usual ones.

:class:`Segment` has exactly the fields of ``kvm_segment`` under the same names, as plain integers.
``limit`` is in bytes, the last one that may be accessed, with ``g`` already worked in, as in
``kvm_segment`` and in the VMCB: 4 GiB is 0xffffffff.

Sources: Intel SDM vol. 3 sections 3.4.5 (descriptors), 3.5 (system types) and 21.1 (real mode); AMD
APM vol. 2 sections 4.7 and 4.8, and 15.5 (the VMCB's attribute word).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from guestfault.errors import GuestfaultError

if TYPE_CHECKING:
    from guestfault.uapi import kvm as uapi

__all__ = [
    "FLAT_GDT",
    "SEG_TYPE_ACCESSED",
    "SEG_TYPE_CODE",
    "SEG_TYPE_EXPAND_DOWN",
    "SEG_TYPE_READABLE",
    "SEG_TYPE_WRITABLE",
    "SYS_TYPE_BUSY_TSS",
    "SYS_TYPE_BUSY_TSS16",
    "SYS_TYPE_LDT",
    "UNUSABLE",
    "Segment",
    "SegmentError",
    "Segments",
    "flat_code32",
    "flat_code64",
    "flat_data",
    "real_mode_segment",
]

SEG_TYPE_ACCESSED: Final = 1
SEG_TYPE_WRITABLE: Final = 2  # in a data segment
SEG_TYPE_READABLE: Final = 2  # in a code segment
SEG_TYPE_EXPAND_DOWN: Final = 4  # in a data segment
SEG_TYPE_CODE: Final = 8

SYS_TYPE_LDT: Final = 2
SYS_TYPE_BUSY_TSS16: Final = 3
SYS_TYPE_BUSY_TSS: Final = 11

_CODE: Final = SEG_TYPE_CODE | SEG_TYPE_READABLE | SEG_TYPE_ACCESSED
_DATA: Final = SEG_TYPE_WRITABLE | SEG_TYPE_ACCESSED
_FLAT_LIMIT: Final = 0xFFFF_FFFF


class SegmentError(GuestfaultError):
    """A segment that an 8-byte descriptor cannot hold: ``segment``, and ``why``."""

    def __init__(self, segment: Segment, why: str) -> None:
        self.segment = segment
        self.why = why
        super().__init__(f"no 8-byte descriptor for {segment}: {why}")


@dataclass(frozen=True)
class Segment:
    """One segment register, visible part and hidden part (``struct kvm_segment``)."""

    selector: int = 0
    base: int = 0
    limit: int = 0
    type: int = 0
    s: int = 0
    dpl: int = 0
    present: int = 0
    avl: int = 0
    l: int = 0  # noqa: E741 - the architecture's name
    db: int = 0
    g: int = 0
    unusable: int = 0

    def holds(self, offset: int, size: int) -> bool:
        """Whether ``size`` bytes at ``offset`` lie within the limit; expand-down data included."""
        if self.s and self.type & (SEG_TYPE_CODE | SEG_TYPE_EXPAND_DOWN) == SEG_TYPE_EXPAND_DOWN:
            top = 0xFFFF_FFFF if self.db else 0xFFFF
            return offset > self.limit and offset + size - 1 <= top
        return offset + size - 1 <= self.limit

    @classmethod
    def from_kvm(cls, segment: uapi.kvm_segment) -> Segment:
        """From ``struct kvm_segment``."""
        return cls(
            segment.selector,
            segment.base,
            segment.limit,
            segment.type,
            segment.s,
            segment.dpl,
            segment.present,
            segment.avl,
            segment.l,
            segment.db,
            segment.g,
            segment.unusable,
        )

    @classmethod
    def from_flags(cls, selector: int, base: int, limit: int, flags: int) -> Segment:
        """From the second dword of a descriptor, ``limit`` in bytes: what QEMU prints of one."""
        attributes = flags >> 8 & 0xFF | flags >> 12 & 0xF00
        return cls.from_attributes(selector, base, limit, attributes)

    def to_attributes(self) -> int:
        """The VMCB's attribute word: type 3:0, S 4, DPL 6:5, P 7, AVL 8, L 9, D/B 10, G 11.

        An unusable segment has P clear there, whatever ``present`` says.

        >>> hex(flat_code64().to_attributes())
        '0xa9b'
        """
        present = self.present and not self.unusable
        return (
            self.type
            | self.s << 4
            | self.dpl << 5
            | present << 7
            | self.avl << 8
            | self.l << 9
            | self.db << 10
            | self.g << 11
        )

    @classmethod
    def from_attributes(cls, selector: int, base: int, limit: int, attributes: int) -> Segment:
        """The segment in a VMCB; ``limit`` in bytes, as it is there.  Not present is unusable."""
        present = attributes >> 7 & 1
        return cls(
            selector=selector,
            base=base,
            limit=limit,
            type=attributes & 15,
            s=attributes >> 4 & 1,
            dpl=attributes >> 5 & 3,
            present=present,
            avl=attributes >> 8 & 1,
            l=attributes >> 9 & 1,
            db=attributes >> 10 & 1,
            g=attributes >> 11 & 1,
            unusable=1 - present,
        )

    def to_descriptor(self) -> bytes:
        """The 8 bytes of a descriptor table entry; raises :class:`SegmentError` if it takes more.

        In long mode a TSS or LDT has 16: these 8, then the base's upper half, then zeros.
        """
        limit = self.limit
        if self.base >> 32:
            raise SegmentError(self, "its base has more than 32 bits")
        if self.g:
            if limit & 0xFFF != 0xFFF:
                raise SegmentError(self, "with g set its limit must end in 0xfff")
            limit >>= 12
        if limit >> 20:
            raise SegmentError(self, "its limit has more than 20 bits")
        attributes = self.to_attributes()
        value = (
            (limit & 0xFFFF)
            | (self.base & 0xFF_FFFF) << 16
            | (attributes & 0xFF) << 40
            | (limit >> 16) << 48
            | (attributes >> 8) << 52
            | (self.base >> 24) << 56
        )
        return value.to_bytes(8, "little")

    @classmethod
    def from_descriptor(cls, selector: int, descriptor: bytes) -> Segment:
        """The segment that a selector loads from the first 8 bytes of ``descriptor``."""
        value = int.from_bytes(descriptor[:8], "little")
        limit = value & 0xFFFF | (value >> 48 & 0xF) << 16
        if value >> 55 & 1:
            limit = limit << 12 | 0xFFF
        base = value >> 16 & 0xFF_FFFF | (value >> 56) << 24
        attributes = value >> 40 & 0xFF | (value >> 52 & 0xF) << 8
        return cls.from_attributes(selector, base, limit, attributes)


UNUSABLE: Final = Segment(unusable=1)
"""What a null selector loads."""


# The flat descriptor table, in the order that SYSCALL and SYSRET want: user data, then user 64-bit
# code, directly after user 32-bit code.  Selectors carry the DPL as their RPL.
_CODE64 = {0: 0x08, 3: 0x2B}
_DATA_SELECTOR = {0: 0x10, 3: 0x23}
_CODE32 = {0: 0x30, 3: 0x1B}


def flat_code64(dpl: int = 0) -> Segment:
    """The 64-bit code segment of ring 0 or 3."""
    return Segment(_CODE64[dpl], limit=_FLAT_LIMIT, type=_CODE, s=1, dpl=dpl, present=1, l=1, g=1)


def flat_code32(dpl: int = 0) -> Segment:
    """The 32-bit code segment of ring 0 or 3, all of 4 GiB."""
    return Segment(_CODE32[dpl], limit=_FLAT_LIMIT, type=_CODE, s=1, dpl=dpl, present=1, db=1, g=1)


def flat_data(dpl: int = 0) -> Segment:
    """The data and stack segment of ring 0 or 3, in 32-bit and in 64-bit mode."""
    return Segment(
        _DATA_SELECTOR[dpl], limit=_FLAT_LIMIT, type=_DATA, s=1, dpl=dpl, present=1, db=1, g=1
    )


def real_mode_segment(selector: int, *, code: bool = False, limit: int = 0xFFFF) -> Segment:
    """A segment as real mode loads it: its base is 16 times the selector, its limit 64 KiB."""
    kind = _CODE if code else _DATA
    return Segment(selector, base=selector << 4, limit=limit, type=kind, s=1, present=1)


FLAT_GDT: Final = b"".join(
    (
        bytes(8),
        flat_code64(0).to_descriptor(),
        flat_data(0).to_descriptor(),
        flat_code32(3).to_descriptor(),
        flat_data(3).to_descriptor(),
        flat_code64(3).to_descriptor(),
        flat_code32(0).to_descriptor(),
    )
)
"""A descriptor table that holds every flat segment at its selector.

A guest needs one as soon as it loads a segment register, or takes an interrupt and returns.
"""


@dataclass(frozen=True)
class Segments:
    """All eight segment registers, under the names they have in ``kvm_sregs``."""

    cs: Segment
    ds: Segment
    es: Segment
    fs: Segment
    gs: Segment
    ss: Segment
    tr: Segment
    ldt: Segment

    @classmethod
    def long_mode(cls, cpl: int = 0) -> Segments:
        """Flat 64-bit segments at CPL 0 or 3."""
        return cls._flat(flat_code64(cpl), flat_data(cpl))

    @classmethod
    def protected_mode(cls, cpl: int = 0) -> Segments:
        """Flat 32-bit segments at CPL 0 or 3."""
        return cls._flat(flat_code32(cpl), flat_data(cpl))

    @classmethod
    def real_mode(cls, cs: int = 0, data: int = 0) -> Segments:
        """Real mode; ``data`` is the selector in every register but CS."""
        return cls._real(cs, data, 0xFFFF)

    @classmethod
    def big_real_mode(cls, cs: int = 0, data: int = 0) -> Segments:
        """Real mode with the 4 GiB data limits left over from a visit to protected mode.

        CS keeps its 64 KiB, as IP has 16 bits.  Also known as unreal mode.
        """
        return cls._real(cs, data, _FLAT_LIMIT)

    @classmethod
    def _flat(cls, code: Segment, data: Segment) -> Segments:
        # Entry into a guest wants a busy TSS in TR even if nothing uses it.
        task = Segment(limit=0x67, type=SYS_TYPE_BUSY_TSS, present=1)
        return cls(code, data, data, data, data, data, task, UNUSABLE)

    @classmethod
    def _real(cls, cs: int, data: int, limit: int) -> Segments:
        code = real_mode_segment(cs, code=True)
        rest = replace(real_mode_segment(data, limit=limit), g=int(limit > 0xF_FFFF))
        task = Segment(limit=0xFFFF, type=SYS_TYPE_BUSY_TSS, present=1)
        table = Segment(limit=0xFFFF, type=SYS_TYPE_LDT, present=1)
        return cls(code, rest, rest, rest, rest, rest, task, table)

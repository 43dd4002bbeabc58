"""A local APIC: the part of ``arch/x86/kvm/lapic.c`` that asynchronous page faults need.

A vCPU of a VM with ``KVM_CREATE_IRQCHIP`` has one, and with it HLT ends in the kernel: the vCPU
sleeps until an interrupt is there.  Interrupts of the *fixed* kind are accepted into IRR, taken
from there by priority into ISR when the processor can have one, and done when the guest writes EOI.

The guest reaches it by the x2APIC MSRs 0x800 to 0x83f, once it has switched to that mode in
IA32_APIC_BASE.  What there is not: the page of the xAPIC mode at 0xfee00000, the timer and the
other local vectors, interrupts to other vCPUs (ICR), NMI, INIT and SIPI, an I/O APIC and a PIC.
What would use one of those is refused with #GP, never ignored.
(Intel SDM volume 3, chapter 10; for x2APIC section 10.12.)
"""

from __future__ import annotations

import threading

__all__ = [
    "APIC_BASE_BSP",
    "APIC_BASE_ENABLE",
    "APIC_BASE_EXTD",
    "X2APIC_MSRS",
    "KvmLapic",
]

X2APIC_MSRS = range(0x800, 0x840)
_BASE = X2APIC_MSRS.start
_ID, _VERSION, _TPR, _PPR, _EOI, _LDR, _SVR = 0x2, 0x3, 0x8, 0xA, 0xB, 0xD, 0xF
_ISR, _TMR, _IRR = range(0x10, 0x18), range(0x18, 0x20), range(0x20, 0x28)
_ESR, _SELF_IPI = 0x28, 0x3F
_LVTS = (0x2F, *range(0x32, 0x38))  # CMCI, timer, thermal, performance, LINT0, LINT1, error
_LVT_MASKED = 1 << 16
_LAST_VECTOR = 255
_FIRST_VECTOR = 16  # those below are illegal

APIC_BASE_ENABLE, APIC_BASE_EXTD, APIC_BASE_BSP = 1 << 11, 1 << 10, 1 << 8
_SW_ENABLED = 1 << 8
_VERSION_VALUE = 0x50014  # as KVM's: version 0x14, six local vectors


class KvmLapic:
    """``struct kvm_lapic``.  ``irr`` and ``isr`` are 256 bits, one for each vector."""

    def __init__(self, apic_id: int) -> None:
        self.id = apic_id
        self._lock = threading.Lock()  # of irr, into which any thread puts interrupts
        self.irr = 0
        self.isr = 0
        self.tpr = 0
        self.svr = 0xFF
        self.apic_base = 0  # as in the system registers

    @property
    def cr8(self) -> int:
        """The upper half of the task priority."""
        return self.tpr >> 4

    @cr8.setter
    def cr8(self, value: int) -> None:
        if value != self.cr8:
            self.tpr = value << 4

    # -- is it on? ------------------------------------------------------------------------------

    @property
    def hw_enabled(self) -> bool:
        """IA32_APIC_BASE says so."""
        return bool(self.apic_base & APIC_BASE_ENABLE)

    @property
    def sw_enabled(self) -> bool:
        """The spurious vector register says so, which reset does not."""
        return bool(self.svr & _SW_ENABLED)

    @property
    def enabled(self) -> bool:
        """``kvm_lapic_enabled``."""
        return self.hw_enabled and self.sw_enabled

    @property
    def x2apic_mode(self) -> bool:
        """``apic_x2apic_mode``: whether the guest reaches it by MSRs."""
        both = APIC_BASE_ENABLE | APIC_BASE_EXTD
        return self.apic_base & both == both

    # -- interrupts -----------------------------------------------------------------------------

    def accept_irq(self, vector: int) -> bool:
        """``__apic_accept_irq``, APIC_DM_FIXED: make it pending; ``False`` if the APIC is off."""
        if not self.enabled:
            return False
        with self._lock:
            self.irr |= 1 << vector
        return True

    @property
    def ppr(self) -> int:
        """The priority that an interrupt must exceed."""
        in_service = self.isr.bit_length() - 1
        isrv = in_service & 0xF0 if in_service >= 0 else 0
        return self.tpr if self.tpr & 0xF0 >= isrv else isrv

    def has_interrupt(self) -> int | None:
        """``kvm_apic_has_interrupt``: the vector that the processor is to have next."""
        vector = self.irr.bit_length() - 1
        if not self.hw_enabled or vector < 0 or vector & 0xF0 <= self.ppr & 0xF0:
            return None
        return vector

    def get_interrupt(self) -> int | None:
        """``kvm_get_apic_interrupt``: take it, as the processor's acknowledge cycle does."""
        vector = self.has_interrupt()
        if vector is not None:
            with self._lock:
                self.irr &= ~(1 << vector)
            self.isr |= 1 << vector
        return vector

    def set_eoi(self) -> None:
        """``apic_set_eoi``: the interrupt of the highest priority in service is done."""
        if self.isr:
            self.isr &= ~(1 << self.isr.bit_length() - 1)

    # -- registers ------------------------------------------------------------------------------

    def read(self, index: int) -> int | None:
        """``kvm_x2apic_msr_read``; ``None``: #GP."""
        if not self.x2apic_mode:
            return None
        register = index - _BASE
        for bits, registers in ((self.isr, _ISR), (0, _TMR), (self.irr, _IRR)):
            if register in registers:
                return bits >> 32 * (register - registers.start) & 0xFFFFFFFF
        if register in _LVTS:
            return _LVT_MASKED
        return {
            _ID: self.id,
            _VERSION: _VERSION_VALUE,
            _TPR: self.tpr,
            _PPR: self.ppr,
            _LDR: (self.id >> 4) << 16 | 1 << (self.id & 15),
            _SVR: self.svr,
            _ESR: 0,
        }.get(register)

    def write(self, index: int, value: int) -> bool:
        """``kvm_x2apic_msr_write`` of all but the interrupt to itself; ``False``: #GP."""
        if not self.x2apic_mode:
            return False
        match index - _BASE:
            case 0x8 if value <= 0xFF:
                self.tpr = value
            case 0xB if value == 0:
                self.set_eoi()
            case 0xF if value <= 0x3FF:
                self.svr = value
            case 0x28 if value == 0:
                pass
            case register if register in _LVTS:
                return bool(value & _LVT_MASKED)
            case _:
                return False
        return True

    def self_ipi(self, index: int, value: int) -> int | None:
        """The vector that a write of this register sends to the vCPU itself, if it is one."""
        is_vector = _FIRST_VECTOR <= value <= _LAST_VECTOR
        return value if index - _BASE == _SELF_IPI and self.x2apic_mode and is_vector else None

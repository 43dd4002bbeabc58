"""Where a PC's physical addresses are usually not RAM: hints, from the layout of QEMU's machines.

``pc`` and ``q35`` agree on these.  A hint says where an address would lie, never why it failed.
"""

from __future__ import annotations

__all__ = ["window_at"]

_WINDOWS = (
    (0x000A_0000, 0x000B_FFFF, "the VGA window"),
    (0x000C_0000, 0x000F_FFFF, "the option ROM and BIOS area"),
    (0xFEC0_0000, 0xFEC0_0FFF, "the I/O APIC"),
    (0xFED0_0000, 0xFED0_03FF, "the HPET"),
    (0xFED4_0000, 0xFED4_4FFF, "the TPM"),
    (0xFEE0_0000, 0xFEEF_FFFF, "the local APIC"),
    (0xFF00_0000, 0xFFFF_FFFF, "the firmware flash below 4 GiB, usually a read-only slot"),
    (0xC000_0000, 0xFFFF_FFFF, "the PCI hole below 4 GiB, where device memory is mapped"),
)


def window_at(gpa: int) -> str:
    """The narrowest window that holds ``gpa``, or an empty string.

    >>> window_at(0xFFDCE028)
    'the firmware flash below 4 GiB, usually a read-only slot'
    """
    return next((name for low, high, name in _WINDOWS if low <= gpa <= high), "")

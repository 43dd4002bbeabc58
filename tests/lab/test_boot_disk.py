"""The boot sector runs, in an emulated processor that has a disk's ports and nothing else."""

from __future__ import annotations

import struct
from typing import Any

import pytest
import unicorn
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.lab.conftest import bzimage
from unicorn import x86_const as x86

from guestfault.lab.boot_disk import CYLINDER, SECTOR, boot_disk

MEMORY, TABLES = 4 << 20, 0x10000
LINE = "console=ttyS0 -- -S"


class Disk:
    """What answers at ports 0x1f2 to 0x1f7: READ SECTORS, by number, and busy at first."""

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.registers = dict.fromkeys(range(0x1F2, 0x1F7), 0)
        self.read, self.end, self.polls = 0, 0, 0

    def write(self, _uc: Any, port: int, size: int, value: int, _data: Any) -> None:
        """A command begins with the last of its ports."""
        if port == 0x92:
            return
        assert size == 1
        if port != 0x1F7:
            self.registers[port] = value
            return
        assert value == 0x20
        assert self.read == self.end, "the last command's data was not all read"
        count, low, middle, high, device = (self.registers[p] for p in range(0x1F2, 0x1F7))
        assert device & 0xF0 == 0xE0
        start = low | middle << 8 | high << 16 | (device & 0xF) << 24
        self.read, self.end = start * SECTOR, (start + (count or 256)) * SECTOR
        self.polls = 0

    def answer(self, _uc: Any, port: int, size: int, _data: Any) -> int:
        """Its status, or the next of its data."""
        if port == 0x92:
            return 0
        if port == 0x1F7:
            self.polls += 1
            return 0x80 if self.polls < 3 else 0x58
        assert (port, size) == (0x1F0, 4)
        assert self.read < self.end, "more was read than asked for"
        self.read += 4
        return int(struct.unpack_from("<I", self.data, self.read - 4)[0])


def started(disk: bytes) -> unicorn.Uc:
    """The processor at the kernel's entry, with everything in its memory."""
    uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_16)
    uc.mem_map(0, MEMORY)
    uc.mem_write(0x7C00, disk[:SECTOR])
    device = Disk(disk)
    uc.hook_add(unicorn.UC_HOOK_INSN, device.answer, None, 1, 0, x86.UC_X86_INS_IN)
    uc.hook_add(unicorn.UC_HOOK_INSN, device.write, None, 1, 0, x86.UC_X86_INS_OUT)
    uc.emu_start(0x7C00, 0x100000, timeout=20_000_000)
    assert uc.reg_read(x86.UC_X86_REG_EIP) == 0x100000
    return uc


@pytest.mark.timeout(120)
@settings(max_examples=20, deadline=None)
@given(
    kernel=st.integers(1, 200_000),
    layers=st.lists(st.integers(0, 90_000), min_size=1, max_size=3),
    seed=st.binary(min_size=16, max_size=16),
)
def test_everything_is_where_the_kernel_is_told(
    kernel: int, layers: list[int], seed: bytes
) -> None:
    image = bzimage(size=0) + (seed * (kernel // 16 + 1))[:kernel]
    parts = [(bytes([n]) + seed) * (size // 17) for n, size in enumerate(layers)]
    disk = b"".join(boot_disk(image, parts, LINE, memory=MEMORY, tables=TABLES))
    assert len(disk) % CYLINDER == 0
    uc = started(disk)
    setup = (image[0x1F1] + 1) * SECTOR
    assert uc.mem_read(0x100000, len(image) - setup) == image[setup:]
    at = uc.reg_read(x86.UC_X86_REG_ESI)
    page = bytes(uc.mem_read(at, 4096))
    initramfs_at, size = struct.unpack_from("<II", page, 0x218)
    assert initramfs_at % 4096 == 0
    assert initramfs_at + size <= MEMORY - TABLES
    assert uc.mem_read(initramfs_at, size) == b"".join(parts)
    (line_at,) = struct.unpack_from("<I", page, 0x228)
    assert bytes(uc.mem_read(line_at, len(LINE) + 1)) == LINE.encode() + b"\0"


def test_the_state_is_what_the_boot_protocol_wants() -> None:
    """Documentation/arch/x86/boot.rst, "32-bit Boot Protocol"."""
    image = bzimage()
    uc = started(b"".join(boot_disk(image, [b"x"], LINE, memory=MEMORY, tables=TABLES)))
    zero = (x86.UC_X86_REG_EBX, x86.UC_X86_REG_EBP, x86.UC_X86_REG_EDI)
    assert [uc.reg_read(register) for register in zero] == [0, 0, 0]
    assert uc.reg_read(x86.UC_X86_REG_CR0) & 0x8000_0001 == 1  # protected, not paged
    assert uc.reg_read(x86.UC_X86_REG_EFLAGS) & 1 << 9 == 0  # no interrupts
    assert uc.reg_read(x86.UC_X86_REG_CS) == 0x10
    data = (x86.UC_X86_REG_DS, x86.UC_X86_REG_ES, x86.UC_X86_REG_SS)
    assert {uc.reg_read(register) for register in data} == {0x18}


def test_the_header_is_the_images_and_the_memory_the_machines() -> None:
    image = bytearray(bzimage())
    image[0x201] = 0x6A  # the header ends so far behind 0x202
    disk = b"".join(boot_disk(bytes(image), [b"x"], LINE, memory=MEMORY, tables=TABLES))
    page = disk[SECTOR : SECTOR + 4096]
    assert page[0x1F1] == image[0x1F1]
    assert page[0x202:0x206] == b"HdrS"
    assert page[0x210] == 0xFF
    areas = [struct.unpack_from("<QQI", page, 0x2D0 + 20 * n) for n in range(page[0x1E8])]
    assert (0x100000, MEMORY - TABLES - 0x100000, 1) in areas
    assert areas[-1] == (MEMORY - TABLES, TABLES, 3)
    ends = [start + length for start, length, _ in areas]
    assert all(end <= start for end, (start, _, _) in zip(ends, areas[1:], strict=False))

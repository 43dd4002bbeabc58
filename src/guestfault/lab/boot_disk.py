"""A disk that boots a kernel: for an emulator that has no ``-kernel``.

A firmware's part is to read the disk's first sector to 0x7c00 and to jump there.  What is in that
sector here does a boot loader's part for one kernel alone, and everything that can be worked out
beforehand is: behind it on the disk lie the kernel, its initramfs, and what a loader has to tell a
kernel (``boot_params``, ``Documentation/arch/x86/boot.rst``), each as it is to be in memory.  So it
asks the firmware nothing, goes into protected mode, reads piece after piece to its place, and jumps
to the kernel's 32-bit entry.

It reads the disk by the ATA command that every one has since the PC/AT, READ SECTORS on ports 0x1f0
to 0x1f7, with no interrupts and no driver.  In an emulator that is no slower than memory.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

__all__ = ["CYLINDER", "SECTOR", "boot_disk"]

SECTOR = 512
CYLINDER = 16 * 63 * SECTOR
"""Bytes of a cylinder of 16 heads with 63 sectors: a disk has a whole number of them."""

_PARAMETERS_AT = 0x10000
_KERNEL_AT = 0x100000
_PAGE = 4096

_LOADER = """
fa              ; cli
31 c0           ; xor   ax, ax
8e d8           ; mov   ds, ax
e4 92           ; in    al, 0x92            address line 20, by the fast gate
0c 02           ; or    al, 2
e6 92           ; out   0x92, al
0f 01 16 1d 7c  ; lgdt  [gdtr]
0f 20 c0        ; mov   eax, cr0
0c 01           ; or    al, 1
0f 22 c0        ; mov   cr0, eax
ea 43 7c 10 00  ; jmp   0x10:protected
1f 00 23 7c 00 00           ; gdtr: four descriptors, at gdt
00 00 00 00 00 00 00 00     ; gdt: the selectors are those of the 32-bit boot protocol,
00 00 00 00 00 00 00 00     ;   __BOOT_CS and __BOOT_DS: all of memory, from 0 on
ff ff 00 00 00 9a cf 00
ff ff 00 00 00 92 cf 00
b0 18           ; protected: mov al, 0x18   of eax only ax counts, and ah is 0, as CR0 is there
8e d8           ; mov   ds, eax
8e c0           ; mov   es, eax
8e d0           ; mov   ss, eax
fc              ; cld
bb 01 00 00 00  ; mov   ebx, 1              the next sector
be bb 7c 00 00  ; mov   esi, pieces
ad              ; piece: lodsd
89 c7           ; mov   edi, eax            to here
ad              ; lodsd
89 c5           ; mov   ebp, eax            so many sectors
85 c0           ; test  eax, eax
74 49           ; jz    start
b8 80 00 00 00  ; read: mov eax, 128        one command reads 128, or what is left
39 e8           ; cmp   eax, ebp
0f 47 c5        ; cmova eax, ebp
89 c4           ; mov   esp, eax            there is no stack
29 c5           ; sub   ebp, eax
ba f2 01 00 00  ; mov   edx, 0x1f2
ee              ; out   dx, al              how many
89 d8           ; mov   eax, ebx
01 e3           ; add   ebx, esp
42              ; inc   edx
ee              ; out   dx, al              from where: bits 0 to 7
c1 e8 08        ; shr   eax, 8
42              ; inc   edx
ee              ; out   dx, al              8 to 15
c1 e8 08        ; shr   eax, 8
42              ; inc   edx
ee              ; out   dx, al              16 to 23
b0 e0           ; mov   al, 0xe0            by number, of the first disk
08 e0           ; or    al, ah
42              ; inc   edx
ee              ; out   dx, al              24 to 27
b0 20           ; mov   al, 0x20            READ SECTORS
42              ; inc   edx
ee              ; out   dx, al
b2 f7           ; sector: mov dl, 0xf7
ec              ; wait: in al, dx
24 88           ; and   al, 0x88            busy? data?
3c 08           ; cmp   al, 8
75 f9           ; jne   wait
b2 f0           ; mov   dl, 0xf0
b9 80 00 00 00  ; mov   ecx, 128
f3 6d           ; rep   insd
4c              ; dec   esp
75 eb           ; jnz   sector
85 ed           ; test  ebp, ebp
75 b9           ; jnz   read
eb ad           ; jmp   piece
be 00 00 01 00  ; start: mov esi, boot_params
31 db           ; xor   ebx, ebx            zero, says the protocol
31 ed           ; xor   ebp, ebp
31 ff           ; xor   edi, edi
b9 00 00 10 00  ; mov   ecx, kernel
ff e1           ; jmp   ecx
"""
_SIGNATURE = b"\x55\xaa"

# In boot_params, which begins with a header that is the image's own.
_HEADER_AT, _HEADER_LENGTH_AT = 0x1F1, 0x201
_E820_ENTRIES, _VIDEO_MODE, _LOADER_TYPE = 0x1E8, 0x1FA, 0x210
_RAMDISK, _COMMAND_LINE, _E820_TABLE = 0x218, 0x228, 0x2D0
_UNREGISTERED_LOADER, _NORMAL_VIDEO = 0xFF, 0xFFFF

# A PC's memory: the kinds are the BIOS's (INT 15h, AX=E820h).
_RAM, _RESERVED, _ACPI = 1, 2, 3
_LOW_END, _BIOS_AT, _HIGH_AT = 0x9FC00, 0xE8000, 0x100000


def boot_disk(
    image: bytes, layers: Sequence[bytes], line: str, *, memory: int, tables: int
) -> list[bytes]:
    """The parts of a disk that starts the bzImage ``image`` with ``line`` as its command line.

    ``layers`` are its initramfs, ``memory`` is in bytes, and in its last ``tables`` bytes are the
    firmware's ACPI tables.
    """
    setup = ((image[_HEADER_AT] or 4) + 1) * SECTOR
    size = sum(map(len, layers))
    initramfs_at = (memory - tables - size) // _PAGE * _PAGE
    parameters = _parameters(image, (initramfs_at, size), memory, tables)
    pieces: list[tuple[int, Sequence[bytes]]] = [
        (_PARAMETERS_AT, [parameters, line.encode() + b"\0"]),
        (_KERNEL_AT, [image[setup:]]),
        (initramfs_at, layers),
    ]
    table = b""
    parts: list[bytes] = []
    for at, data in pieces:
        length = sum(map(len, data))
        table += struct.pack("<II", at, -(-length // SECTOR))
        parts += [*data, bytes(-length % SECTOR)]
    disk = [_boot_sector(table + bytes(8)), *parts]
    return [*disk, bytes(-sum(map(len, disk)) % CYLINDER)]


def _boot_sector(pieces: bytes) -> bytes:
    code = bytes.fromhex("".join(line.partition(";")[0] for line in _LOADER.splitlines()))
    return (code + pieces).ljust(SECTOR - len(_SIGNATURE), b"\0") + _SIGNATURE


def _parameters(image: bytes, initramfs: tuple[int, int], memory: int, tables: int) -> bytes:
    page = bytearray(_PAGE)
    header = slice(_HEADER_AT, _HEADER_LENGTH_AT + 1 + image[_HEADER_LENGTH_AT])
    page[header] = image[header]
    page[_LOADER_TYPE] = _UNREGISTERED_LOADER
    struct.pack_into("<H", page, _VIDEO_MODE, _NORMAL_VIDEO)
    struct.pack_into("<II", page, _RAMDISK, *initramfs)
    struct.pack_into("<I", page, _COMMAND_LINE, _PARAMETERS_AT + _PAGE)
    areas = [
        (0, _LOW_END, _RAM),
        (_LOW_END, 0xA0000, _RESERVED),
        (_BIOS_AT, _HIGH_AT, _RESERVED),
        (_HIGH_AT, memory - tables, _RAM),
        (memory - tables, memory, _ACPI),
    ]
    page[_E820_ENTRIES] = len(areas)
    for number, (start, end, kind) in enumerate(areas):
        struct.pack_into("<QQI", page, _E820_TABLE + 20 * number, start, end - start, kind)
    return bytes(page)

"""Gathers, scatters and masked moves against this machine's own processor.

Unicorn has no AVX, so the bytes run natively, on a buffer whose changes (or whose contents, for a
load) show which addresses were used.
"""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from pathlib import Path

import pytest

from guestfault.x86.accesses import AccessKind, MemoryAccess, Role, accesses
from guestfault.x86.state import CpuState

SIZE = 1 << 16
MIDDLE = SIZE // 2

LOAD_YMM1 = "c5 fe 6f 0e"  # vmovdqu ymm1, [rsi]
LOAD_ZMM1 = "62 f1 7e 48 6f 0e"  # vmovdqu64 zmm1, [rsi]
LOAD_YMM2 = "c5 fe 6f 12"  # vmovdqu ymm2, [rdx]
CLEAR_YMM0 = "c5 fd ef c0"
ONES_YMM2 = "c5 ed 76 d2"  # vpcmpeqd ymm2, ymm2, ymm2
ONES_ZMM2 = "62 f3 6d 48 25 d2 ff"  # vpternlogd
KMOV_K1 = "c4 e1 fb 92 ca"  # kmovq k1, rdx
STORE_YMM0 = "c5 fe 7f 01"  # vmovdqu [rcx], ymm0
LEAVE = "c5 f8 77 c3"  # vzeroupper; ret


def need(*features: str) -> None:
    flags = set(Path("/proc/cpuinfo").read_text().split())
    missing = [feature for feature in features if feature not in flags]
    if missing:
        pytest.skip(f"this processor has no {', '.join(missing)}")


def native(*parts: str) -> Callable[..., None]:
    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(bytes.fromhex("".join(parts)))
    address = ctypes.addressof(ctypes.c_char.from_buffer(code))
    function = ctypes.CFUNCTYPE(None, *[ctypes.c_uint64] * 4)(address)
    function.code = code  # type: ignore[attr-defined]  # lives as long as the function
    return function


def state(base: int, **more: object) -> CpuState:
    gprs = [0] * 16
    gprs[7] = base
    return CpuState(gprs=tuple(gprs), **more)  # type: ignore[arg-type]


def touched(listed: tuple[MemoryAccess, ...], base: int) -> set[int]:
    assert all(access.certain for access in listed)
    return {
        access.address - base + n
        for access in listed[1:]
        if access.address is not None
        for n in range(access.size)
    }


INDICES = [5, -7, 1000, 0, -2000, 31, 32, 33]


@pytest.mark.parametrize("mask", [0, 0b1, 0b1010_0101, 0xFF])
def test_avx2_gather(mask: int) -> None:
    need("avx2")
    gather = "c4 e2 6d 90 04 8f"  # vpgatherdd ymm0, [rdi + ymm1*4], ymm2
    run = native(LOAD_YMM1, LOAD_YMM2, CLEAR_YMM0, gather, STORE_YMM0, LEAVE)
    buffer = (ctypes.c_uint32 * (SIZE // 4))(*range(SIZE // 4))
    base = ctypes.addressof(buffer) + MIDDLE
    indices = (ctypes.c_int32 * 8)(*INDICES)
    chosen = (ctypes.c_uint32 * 8)(*(0x8000_0000 * (mask >> n & 1) for n in range(8)))
    result = (ctypes.c_uint32 * 8)()
    run(base, *map(ctypes.addressof, (indices, chosen, result)))

    listed = accesses(
        bytes.fromhex(gather), state(base, vectors={1: bytes(indices), 2: bytes(chosen)})
    )
    gathered = [4 * value - MIDDLE for value in result if value]
    assert [access.address - base for access in listed[1:] if access.address] == gathered
    assert {access.size for access in listed[1:]} <= {4}
    assert len(gathered) == mask.bit_count()


WRITES = [
    ("vpmaskmovd", "c4 e2 75 8e 17", ("avx2",)),
    ("vmaskmovpd", "c4 e2 75 2f 17", ("avx2",)),
    ("maskmovdqu", "66 0f f7 d1", ("avx2",)),
    ("vpscatterdd", "62 f2 7d 49 a0 14 8f", ("avx512f",)),
    ("vpscatterdq", "62 f2 fd 49 a0 54 cf 10", ("avx512f",)),
    ("vscatterqps", "62 f2 7d 49 a3 14 8f", ("avx512f",)),
    ("vmovdqu8", "62 f1 7f 49 7f 57 01", ("avx512bw",)),
    ("vmovups", "62 f1 7c 49 11 17", ("avx512f",)),
    ("vmovss", "62 f1 7e 09 11 17", ("avx512f",)),
    ("vpmovdb", "62 f2 7e 49 31 17", ("avx512f",)),
    ("vpcompressd", "62 f2 7d 49 8b 17", ("avx512f",)),
    ("vpcompressb", "62 f2 7d 49 63 17", ("avx512_vbmi2",)),
    ("vmovupd", "62 f1 fd 49 11 57 7f", ("avx512f",)),
]


@pytest.mark.parametrize("mask", [0, 1, 0x8421_0FF0_1234_A5A5, (1 << 64) - 1])
@pytest.mark.parametrize(("name", "code", "features"), WRITES, ids=[row[0] for row in WRITES])
def test_masked_writes(name: str, code: str, features: tuple[str, ...], mask: int) -> None:
    need(*features)
    wide = features != ("avx2",)
    run = native(
        *((LOAD_ZMM1, ONES_ZMM2, KMOV_K1) if wide else (LOAD_YMM1, ONES_YMM2)), code, LEAVE
    )
    buffer = (ctypes.c_uint8 * SIZE)()
    base = ctypes.addressof(buffer) + MIDDLE
    if name.startswith("vscatterq"):
        vector = bytes((ctypes.c_int64 * 8)(*INDICES))
    elif "scatter" in name:
        vector = bytes((ctypes.c_int32 * 16)(*INDICES, *(500 + 2 * n for n in range(8))))
    else:  # the mask register of the AVX2 forms: top bits as in ``mask``
        vector = bytes(0x80 * (mask >> n & 1) for n in range(64))
    holder = (ctypes.c_uint8 * 64)(*vector)
    run(base, ctypes.addressof(holder), mask, 0)

    listed = accesses(bytes.fromhex(code), state(base, vectors={1: vector}, masks={1: mask}))
    assert all(access.kind is AccessKind.WRITE for access in listed[1:])
    changed = {n - MIDDLE for n, value in enumerate(buffer) if value}
    assert touched(listed, base) == changed


def test_gather_without_registers_names_no_address() -> None:
    (_, access) = accesses(bytes.fromhex("c4 e2 6d 90 04 8f"), CpuState())
    assert access.address is None
    assert not access.certain
    assert access.note == "ymm1 (the indices) and ymm2 (the mask) are not known"


def test_gather_with_indices_but_no_mask_is_uncertain() -> None:
    code = bytes.fromhex("62 f2 7d 49 90 14 8f")  # vpgatherdd zmm2{k1}, [rdi + zmm1*4]
    listed = accesses(code, state(0x1000, vectors={1: bytes(64)}))
    assert [access.address for access in listed[1:]] == [0x1000] * 16
    assert not any(access.certain for access in listed[1:])


def test_masked_load_without_its_mask_is_its_whole_operand() -> None:
    code = bytes.fromhex("62 f1 7c 49 10 27")  # vmovups zmm4{k1}, [rdi]
    (_, access) = accesses(code, state(0x1FF0))
    assert (access.size, access.certain, access.crosses_page) == (64, False, True)
    assert access.note == "elements are chosen by k1, which is not known"


def test_masked_load_touches_only_the_page_of_its_elements() -> None:
    code = bytes.fromhex("62 f1 7c 49 10 27")
    (_, access) = accesses(code, state(0x1FF0, masks={1: 0b0110}))
    assert (access.address, access.size, access.role) == (0x1FF4, 8, Role.ELEMENT)


def test_prefetching_gather_accesses_nothing() -> None:
    assert len(accesses(bytes.fromhex("62 f2 7d 49 c6 0c 8f"), CpuState())) == 1

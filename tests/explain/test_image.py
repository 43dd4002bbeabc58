"""With an image of the guest's memory: walks, code from memory, broken images."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestfault.explain.account import Account, Likelihood, account_for
from guestfault.explain.dump import parse_dumps
from guestfault.explain.errors import ExplainError
from guestfault.explain.image import MemoryImage
from guestfault.x86.paging import PagingMode
from guestfault.x86.tables import Mapping, TableBuilder

SIZE = 0x20_0000
CODE_GPA, CODE_GVA = 0x1_0000, 0xFFFF_8000_0000_0000
DATA_GPA, DATA_GVA = 0x1_8000, 0xFFFF_8000_1000_0000
DEVICE_GVA, DEVICE_GPA = 0xFFFF_8000_2000_0000, 0xFED0_0000


def memory() -> bytes:
    """Tables at 0x1000, code, two pages of data, and a device that is not RAM."""
    tables = TableBuilder(PagingMode.FOUR_LEVEL, 0x1000)
    tables.map(Mapping(CODE_GVA, CODE_GPA, 0x1000))
    tables.map(Mapping(DATA_GVA, DATA_GPA, 0x1000))
    tables.map(Mapping(DATA_GVA + 0x1000, DATA_GPA + 0x4000, 0x1000))
    tables.map(Mapping(DEVICE_GVA, DEVICE_GPA, 0x1000))
    image = bytearray(SIZE)
    image[0x1000 : 0x1000 + len(tables.image())] = tables.image()
    image[CODE_GPA : CODE_GPA + 3] = bytes.fromhex("488b03")
    return bytes(image)


def elf_core(pieces: list[tuple[int, bytes]], *, wide: bool = True) -> bytes:
    """An ELF core with a note and one PT_LOAD for each (gpa, bytes)."""
    header_size, entry_size = (64, 56) if wide else (52, 32)
    offset = header_size + entry_size * (len(pieces) + 1)
    ident = b"\x7fELF" + bytes([2 if wide else 1, 1, 1]) + bytes(9)
    count = len(pieces) + 1
    if wide:
        header = struct.pack(
            "<HHIQQQIHHHHHH", 4, 62, 1, 0, header_size, 0, 0, 64, entry_size, count, 0, 0, 0
        )
        table = struct.pack("<IIQQQQQQ", 4, 0, offset, 0, 0, 0, 0, 0)
    else:
        header = struct.pack(
            "<HHIIIIIHHHHHH", 4, 3, 1, 0, header_size, 0, 0, 52, entry_size, count, 0, 0, 0
        )
        table = struct.pack("<IIIIIIII", 4, offset, 0, 0, 0, 0, 0, 0)
    body = b""
    for gpa, data in pieces:
        at = offset + len(body)
        if wide:
            table += struct.pack("<IIQQQQQQ", 1, 0, at, 0, gpa, len(data), len(data), 0)
        else:
            table += struct.pack("<IIIIIIII", 1, at, 0, gpa, len(data), len(data), 0, 0)
        body += data
    return ident + header + table + body


def explain(
    dumps: SimpleNamespace, path: Path, data: bytes, gva: int, code: str | None = "48 8b 03"
) -> Account:
    path.write_bytes(data)
    (dump,) = parse_dumps(dumps.qemu64(code, {"RIP": CODE_GVA, "RBX": gva, "CR3": 0x1000}))
    with MemoryImage.open(str(path)) as image:
        return account_for(dump, image)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "memory"


@pytest.mark.parametrize("form", ["raw", "elf64", "elf32"])
def test_every_page_is_walked_to_its_gpa(dumps: SimpleNamespace, path: Path, form: str) -> None:
    data = memory()
    if form != "raw":
        halves = [(0x1_4000, data[0x1_4000:]), (0, data[:0x1_4000])]
        data = elf_core(halves, wide=form == "elf64")
    load, fetch = explain(dumps, path, data, DATA_GVA + 0xFFC).candidates
    assert [(part.gpa, part.size) for part in load.parts] == [
        (DATA_GPA + 0xFFC, 4),
        (DATA_GPA + 0x4000, 4),
    ]
    assert [part.gpa for part in fetch.parts] == [CODE_GPA]
    assert load.likelihood is Likelihood.LIKELY


def test_an_address_outside_ram_is_suspect(dumps: SimpleNamespace, path: Path) -> None:
    account = explain(dumps, path, memory(), DEVICE_GVA + 0xF0)
    load = account.candidates[0]
    assert load.parts[0].gpa == DEVICE_GPA + 0xF0
    assert load.why == "gpa 0xfed000f0 is not in the image: the HPET"
    assert load.likelihood is Likelihood.LIKELY


def test_a_page_the_guest_has_not_mapped_is_unlikely(dumps: SimpleNamespace, path: Path) -> None:
    account = explain(dumps, path, memory(), 0x1234)
    load = account.candidates[0]
    assert load.likelihood is Likelihood.UNLIKELY
    assert load.parts[0].stop.startswith("the guest's level-4 entry refuses it (#PF")


def test_a_walk_stops_at_a_table_that_is_not_there(dumps: SimpleNamespace, path: Path) -> None:
    data = bytearray(memory())
    slot = 0x1000 + 8 * 256
    data[slot : slot + 8] = struct.pack("<Q", 0x7F_F000_0000 | 3)
    account = explain(dumps, path, bytes(data), DATA_GVA)
    load = account.candidates[0]
    assert load.parts[0].gpa is None
    assert "level-3 page-table entry at gpa 0x7ff0000000" in load.why


def test_the_image_supplies_code_that_the_dump_lacks(dumps: SimpleNamespace, path: Path) -> None:
    account = explain(dumps, path, memory(), DATA_GVA, code=None)
    assert account.instruction == "mov rax, [rbx]"
    assert any("come from the memory image" in note for note in account.notes)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "an empty memory image"),
        (b"KDUMP   " + bytes(100), "kdump-compressed"),
        (b"\x7fELF\x02\x01", "cut off"),
        (b"\x7fELF\x02\x02" + bytes(100), "not a little-endian ELF"),
        (elf_core([]), "without PT_LOAD"),
    ],
)
def test_images_that_cannot_serve(path: Path, data: bytes, why: str) -> None:
    path.write_bytes(data)
    with pytest.raises(ExplainError, match=why):
        MemoryImage.open(str(path))


def test_an_image_that_is_not_there() -> None:
    with pytest.raises(ExplainError, match="No such file"):
        MemoryImage.open("/nonexistent/image")
    with pytest.raises(ExplainError):
        MemoryImage.open("/")


def test_a_segment_past_the_end_of_the_file_is_not_there(tmp_path: Path) -> None:
    core = bytearray(elf_core([(0, b"here" * 16), (0x1000, b"gone" * 16)]))
    phoff = int.from_bytes(core[32:40], "little")
    where = phoff + 2 * 56 + 8  # p_offset of the second, after the note and the first
    core[where : where + 8] = (1 << 63).to_bytes(8, "little")
    path = tmp_path / "core"
    path.write_bytes(core)
    with MemoryImage.open(str(path)) as image:
        assert image.read(0, 4) == b"here"
        assert image.read(0x1000, 4) is None


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_elf_header_raises_anything_else(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    core = bytearray(elf_core([(0, bytes(64))]))
    for _ in range(data.draw(st.integers(1, 4))):
        core[data.draw(st.integers(4, 170))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "core"
    path.write_bytes(core[: data.draw(st.integers(0, len(core)))])
    try:
        image = MemoryImage.open(str(path))
    except ExplainError:
        return
    with image:
        image.read(0, 8)
        image.read(1 << 63, 8)

import pytest
from iced_x86 import Decoder, Formatter, FormatterSyntax

from guestfault.guest.assembler import Assembler


def disassemble(asm, address=0):
    formatter = Formatter(FormatterSyntax.INTEL)
    return [formatter.format(i) for i in Decoder(asm.bitness, asm.encode(address), ip=address)]


@pytest.mark.parametrize(("bitness", "a", "b"), [(64, "rax", "rbx"), (16, "eax", "ebx")])
def test_words_follow_the_mode(bitness, a, b):
    asm = Assembler(bitness)
    asm.add(asm.word("AX"), asm.word("BX"))
    asm.add_memory(asm.word("AX"), asm.word("BX"), 0x78)
    asm.xor_memory(asm.word("BX"), 0, asm.word("AX"))
    asm.store(asm.word("BX"), asm.word("AX"))
    asm.lea(asm.word("AX"), asm.word("BX"), 4096)
    asm.add(asm.dword("AX"), asm.dword("BX"))
    assert disassemble(asm) == [
        f"add {a},{b}",
        f"add {a},[{b}+78h]",
        f"xor [{b}],{a}",
        f"mov [{b}],{a}",
        f"lea {a},[{b}+1000h]",
        "add eax,ebx",
    ]


@pytest.mark.parametrize("bitness", [16, 64])
def test_dword_operations_take_all_constants(bitness):
    asm = Assembler(bitness)
    a, c = asm.dword("AX"), asm.dword("CX")
    asm.mov(a, 0xFFFF_FFFF)
    asm.mov(a, c)
    asm.or_(a, 0x8000_0000)
    asm.and_(a, 0xFFFF)
    asm.imul(a, c, 0x19660D)
    asm.shl(a, 12)
    asm.shr(a, 31)
    asm.shr(a)
    asm.dec(a)
    asm.out(0x11, bits=32)
    asm.out(0x12, bits=8)
    assert disassemble(asm) == [
        "mov eax,0FFFFFFFFh",
        "mov eax,ecx",
        "or eax,80000000h",
        "and eax,0FFFFh",
        "imul eax,ecx,19660Dh",
        "shl eax,0Ch",
        "shr eax,1Fh",
        "shr eax,cl",
        "dec eax",
        "out 11h,eax",
        "out 12h,al",
    ]


def test_a_long_mode_address_is_a_word_constant():
    asm = Assembler(64)
    asm.mov(asm.word("DI"), 0x1_0000_0000)
    assert disassemble(asm) == ["mov rdi,100000000h"]


@pytest.mark.parametrize(("bitness", "address"), [(16, 0), (64, 0x1_0000_0000)])
@pytest.mark.parametrize("distance", [1, 200])
def test_branches_reach_their_labels_however_far(bitness, address, distance):
    asm = Assembler(bitness)
    asm.dec(asm.dword("CX"))
    again = asm.label()
    assert asm.label() == again  # two names of one place
    for _ in range(distance):
        asm.dec(asm.dword("AX"))
    asm.branch("JNE", again)
    asm.branch("JMP", again)
    code = list(Decoder(bitness, asm.encode(address), ip=address))
    assert [i.near_branch_target for i in code[-2:]] == [code[1].ip] * 2

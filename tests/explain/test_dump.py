"""Dumps are found and read through everything that logs and mail do to them."""

from __future__ import annotations

import html
import quopri
import random
import textwrap
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from guestfault.explain.account import account_for
from guestfault.explain.dump import Dump, parse_dumps
from guestfault.explain.errors import ExplainError
from guestfault.explain.report import as_json, as_text

CODE = "90 90 41 81 7e 28 5f 46 56 48 75 e1"


def plain(dumps: SimpleNamespace) -> str:
    text: str = dumps.qemu64(CODE, {"R14": 0xFFDCE000, "RIP": 0xFFFD1CB5}, rip_offset=2)
    return text


def wrapped(text: str) -> str:
    return "\n".join(textwrap.fill(line, 72) for line in text.splitlines())


def quoted(text: str) -> str:
    return "\n".join("> > " + line for line in wrapped(text).splitlines())


def journald(text: str) -> str:
    return "\n".join(f"Nov 02 10:11:12 host7 qemu-kvm[4711]: {line}" for line in text.splitlines())


def libvirt(text: str) -> str:
    return "\n".join(f"2026-11-02T10:11:12.123456Z qemu: {line}" for line in text.splitlines())


def between_other_lines(text: str) -> str:
    noise = ["vhost: 3 queues", "[ 12.5] CPU usage=12 RA=7", "", "PC=12 is not a dump"]
    chosen = random.Random(1)
    return "\n".join(f"{line}\n{chosen.choice(noise)}" for line in text.splitlines())


MANGLERS = [
    str,
    wrapped,
    quoted,
    journald,
    libvirt,
    between_other_lines,
    lambda text: textwrap.indent(text, "\t    "),
    lambda text: textwrap.indent(wrapped(text), "| "),
    lambda text: text.replace("\n", "\r\n"),
    lambda text: html.escape(text),
    lambda text: quopri.encodestring(text.encode()).decode(),
    lambda text: text.replace(" ", "\u00a0"),
    lambda text: "```\n" + text + "```\n",
]


@pytest.mark.parametrize("mangle", MANGLERS)
def test_the_same_dump_however_it_arrives(
    dumps: SimpleNamespace, mangle: Callable[[str], str]
) -> None:
    (expected,) = parse_dumps(plain(dumps))
    (dump,) = parse_dumps(mangle(plain(dumps)))
    assert dump.registers == expected.registers
    assert (dump.segments, dump.tables) == (expected.segments, expected.tables)
    assert (dump.code_before, dump.code) == (b"\x90\x90", bytes.fromhex("41817e285f46564875e1"))
    assert dump.failure is not None
    assert dump.failure.errno == 14
    assert not dump.missing()
    assert not dump.problems


def test_several_vcpus_are_several_dumps(dumps: SimpleNamespace) -> None:
    first = dumps.qemu64("8b 03", {"RBX": 0x1000})
    second = "a line between\nCPU#3\n" + dumps.qemu64("89 03", {"RBX": 0x2000}, error=None)
    found = parse_dumps(first + second + first)
    assert [dump.registers["RBX"] for dump in found] == [0x1000, 0x2000, 0x1000]
    assert [dump.cpu for dump in found] == [None, 3, None]
    assert [dump.failure is None for dump in found] == [False, True, False]
    assert found[1].line == len(first.splitlines()) + 2


def test_dumps_mixed_line_by_line_are_not_believed_silently(dumps: SimpleNamespace) -> None:
    one = dumps.qemu64("8b 03", {"RBX": 1}, error=None).splitlines()
    two = dumps.qemu64("8b 03", {"RBX": 2}, error=None).splitlines()
    mixed = "\n".join(line for pair in zip(one, two, strict=True) for line in pair)
    for dump in parse_dumps(mixed):
        assert any("mixed line by line" in problem for problem in dump.problems)
        assert dump.missing()


def test_32_bit_form(dumps: SimpleNamespace) -> None:
    (dump,) = parse_dumps(dumps.qemu32("8b 03", {"EBX": 0xC000_0000, "EIP": 0x1234}))
    state = dump.state()
    assert (state.code_size, state.gprs[3], state.rip) == (32, 0xC000_0000, 0x1234)
    assert not dump.missing()


def test_code_that_qemu_could_not_read() -> None:
    (dump,) = parse_dumps("RIP=0000000000001000\nCode=90 <??> ?? 90")
    assert dump.code_unreadable
    assert dump.code == b""
    (dump,) = parse_dumps("RIP=0000000000001000\nCode=90 <8b> ?? 90")
    assert (dump.code_unreadable, dump.code) == (False, b"\x8b")


def test_vector_registers_of_info_registers() -> None:
    text = "RIP=0000000000001000\nOpmask01=00000000000000ff\nYMM02=" + " ".join(
        f"{n:016x}" for n in (4, 3, 2, 1)
    )
    (dump,) = parse_dumps(text)
    assert dump.vectors[2] == b"".join(n.to_bytes(8, "little") for n in (1, 2, 3, 4))
    assert dump.state().masks == {1: 0xFF}


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no register dump found"),
        ("all is well\n" * 100, "no register dump found"),
        ("RAX=0000000000000001 RBX=0000000000000002", "it is cut off"),
        ("[ 1.0] RIP: 0010:foo+0x1/0x2\n[ 1.0] Call Trace:", "no register dump of a VMM"),
        ("PC=1234 errors today", "no register dump"),
    ],
)
def test_no_dump_is_one_clear_line(text: str, why: str) -> None:
    with pytest.raises(ExplainError, match=why) as caught:
        parse_dumps(text, "my.log")
    assert "\n" not in str(caught.value)
    assert caught.value.what == "my.log"


def explain_everything(text: str) -> list[Dump]:
    """Everything the command does, but for ExplainError."""
    try:
        found = parse_dumps(text)
    except ExplainError as error:
        if "\n" in str(error):
            raise AssertionError("more than one line") from error
        return []
    for dump in found:
        account = account_for(dump)
        assert as_text(account, number=1, total=1)
        assert as_json(account)
    return found


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_cut_anywhere(dumps: SimpleNamespace, data: st.DataObject) -> None:
    text = quoted(plain(dumps)) if data.draw(st.booleans()) else plain(dumps)
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    explain_everything(text[start:end])


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.data())
def test_garbage_anywhere(dumps: SimpleNamespace, data: st.DataObject) -> None:
    text = plain(dumps)
    for _ in range(data.draw(st.integers(1, 6))):
        at = data.draw(st.integers(0, len(text)))
        absurd = st.sampled_from(
            ["f" * 17, "RIP=", "Code=<", "CPU#99", "0" * 5000, "RAX=zz", "=3D"]
        )
        text = text[:at] + data.draw(st.text(max_size=5) | absurd) + text[at:]
    explain_everything(text)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.binary(min_size=1, max_size=20),
    st.dictionaries(
        st.sampled_from(["RAX", "RCX", "RSP", "RBX", "RIP", "CR0", "CR4", "EFER", "RFL", "FS"]),
        st.integers(0, (1 << 64) - 1),
    ),
)
def test_absurd_values(dumps: SimpleNamespace, code: bytes, registers: dict[str, int]) -> None:
    explain_everything(dumps.qemu64(code.hex(" "), registers))


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="RAXIPCodeS=<>? 0f1\n", max_size=200))
def test_noise_from_the_dumps_own_alphabet(text: str) -> None:
    explain_everything(text)

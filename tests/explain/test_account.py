"""What is said about a dump, and how sure it is made to sound."""

from __future__ import annotations

import os
from types import SimpleNamespace

from guestfault.dialect.interface import EHWPOISON
from guestfault.explain.account import Likelihood, account_for
from guestfault.explain.dump import parse_dumps
from guestfault.x86.accesses import AccessKind

KEY_CODE = "77 12 41 81 7e 28 5f 46 56 48 75 e1"


def test_the_reference_case(dumps: SimpleNamespace) -> None:
    text = dumps.qemu64(KEY_CODE, {"R14": 0xFFDCE000, "RIP": 0xFFFD1CB5}, rip_offset=2)
    account = account_for(*parse_dumps(text))
    assert account.instruction == "cmp dword ptr [r14 + 0x28], 0x4856465f"
    assert (account.mode, account.cpl) == ("64-bit mode", 0)
    likely, fetch = account.candidates
    access = likely.access
    assert (access.address, access.size, access.kind) == (0xFFDCE028, 4, AccessKind.READ)
    assert likely.likelihood is Likelihood.LIKELY
    assert "firmware flash" in likely.hints[0]
    assert fetch.likelihood is Likelihood.UNLIKELY
    assert account.conclusion.startswith("Most likely: read of 4 bytes at 0xffdce028")


def test_two_certain_accesses_are_not_told_apart(dumps: SimpleNamespace) -> None:
    text = dumps.qemu64("f3 48 a5", {"RSI": 0x5000, "RDI": 0x8FFC, "RCX": 16})
    account = account_for(*parse_dumps(text))
    source, destination, _ = account.candidates
    assert source.access.kind is AccessKind.READ
    assert {source.likelihood, destination.likelihood} == {Likelihood.POSSIBLE}
    assert destination.access.crosses_page
    assert "0x8ffc to 0x907b" in destination.hints[0]
    assert account.conclusion == "One of 2 accesses; nothing in the dump tells them apart"


def test_unreadable_code_points_at_the_fetch() -> None:
    account = account_for(
        *parse_dumps("kvm run failed Bad address\nRIP=0000000000001000\nCode=90 <??> ??")
    )
    assert account.candidates[0].access.kind is AccessKind.FETCH
    assert account.candidates[0].likelihood is Likelihood.LIKELY
    assert account.instruction is None


def test_registers_that_are_missing_make_addresses_unknown(dumps: SimpleNamespace) -> None:
    lines = dumps.qemu64("48 8b 04 cb", {"RBX": 0x5000}).splitlines()
    without_rcx = "\n".join(line for line in lines if not line.startswith("RAX"))
    account = account_for(*parse_dumps(without_rcx))
    load = next(c for c in account.candidates if c.access.kind is AccessKind.READ)
    assert (load.access.address, load.access.certain) == (None, False)
    assert "RCX" in load.access.note
    assert "not in the dump: RAX, RCX, RDX, RBX" in " ".join(account.notes)
    # The same gap does not matter to an instruction that does not use them.
    text = "\n".join(
        line if not line.startswith("Code") else "Code=<48> 8b 06"
        for line in lines
        if "RAX" not in line
    )
    (load, _) = account_for(*parse_dumps(text)).candidates
    assert load.access.certain
    assert load.access.address == 0


def test_the_fetch_alone_of_an_instruction_without_operands(dumps: SimpleNamespace) -> None:
    account = account_for(*parse_dumps(dumps.qemu64("90")))
    (fetch,) = account.candidates
    assert fetch.likelihood is Likelihood.POSSIBLE
    assert account.conclusion.startswith("Perhaps: fetch of 1 byte at")


def test_another_error_is_said_to_be_another(dumps: SimpleNamespace) -> None:
    text = dumps.qemu64("8b 03", error="KVM internal error. Suberror: 1\nemulation failure")
    account = account_for(*parse_dumps(text))
    assert account.conclusion.startswith("KVM internal error, suberror 1: not the error")
    text = dumps.qemu64("8b 03", error="error: kvm run failed Invalid argument")
    (dump,) = parse_dumps(text)
    assert dump.failure is not None
    assert dump.failure.errno == 22


def test_real_and_32_bit_mode(dumps: SimpleNamespace) -> None:
    real = dumps.qemu32("8b 07", {"EBX": 0x10, "DS": 0xF_0000, "EIP": 0x7C00}, real=True)
    account = account_for(*parse_dumps(real))
    assert (account.mode, account.instruction) == ("real mode", "mov ax, [bx]")
    assert account.candidates[0].access.address == 0xF_0010
    assert "without paging, this is in the option ROM" in account.candidates[0].hints[0]
    protected = dumps.qemu32("ff 33", {"EBX": 0x4000, "ESP": 0x8000})
    account = account_for(*parse_dumps(protected))
    assert account.mode == "32-bit protected mode"
    assert [c.access.address for c in account.candidates] == [0x4000, 0x7FFC, 0]


def test_cr2_and_a_halted_vcpu_are_explained(dumps: SimpleNamespace) -> None:
    notes = " ".join(
        account_for(*parse_dumps(dumps.qemu64("f4", {"CR2": 0xDEAD000, "HLT": 1}))).notes
    )
    assert "CR2 (0xdead000) is the guest's own last page fault" in notes
    assert "HLT=1" in notes


def test_aarch64_says_what_it_cannot_say(dumps: SimpleNamespace) -> None:
    account = account_for(*parse_dumps(dumps.aarch64))
    assert account.mode == "aarch64 at EL1"
    assert account.candidates == ()
    assert "its access cannot be named" in account.conclusion
    assert "neither code bytes nor the fault registers" in account.notes[0]


def test_a_poisoned_page_is_an_access_that_failed(dumps: SimpleNamespace) -> None:
    poisoned = f"error: kvm run failed {os.strerror(EHWPOISON)}"
    account = account_for(*parse_dumps(dumps.qemu64("8b 03", {"RBX": 0x5000}, error=poisoned)))
    assert account.conclusion.startswith("Most likely: read of 4 bytes at 0x5000")
    assert "poisoned" in account.notes[0]

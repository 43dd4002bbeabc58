"""The account of one dump: which accesses the stopped instruction makes, and which one failed.

A bare -EFAULT names nothing.  The dump holds the instruction and its registers, so its accesses are
known (:mod:`guestfault.x86.accesses`); the failed one is among them, or is a page-table read on the
way to one.  Which, is ranked and not asserted, by evidence that a dump does hold:

* QEMU prints the code by reading it from its own mapping.  Bytes that it could print were there,
  so the fetch is the least likely; ``??`` at RIP makes it the most likely.
* An access that the instruction may not make at all is less likely than one it must make.
* Of certain accesses, an instruction stops at the first that fails, but the pages before it may
  all be there: order alone decides little, and says so.
* With an image of guest memory, a walk that meets a page-table entry outside of RAM, and an
  address outside of RAM, are the more likely; an address for which the guest's own tables hold no
  page is the less, because the guest would have got #PF.

What the dump lacks is found by asking twice: accesses are computed with two different values in
every missing register, and what changes is reported as unknown.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

from guestfault.dialect.interface import EHWPOISON
from guestfault.explain.dump import Dump
from guestfault.explain.image import MemoryImage
from guestfault.explain.translate import Translated, Translator, linear_reader
from guestfault.explain.windows import window_at
from guestfault.x86.accesses import AccessKind, MemoryAccess, accesses
from guestfault.x86.addressing import ReadMemory
from guestfault.x86.instruction import MAX_LENGTH, decode, instruction_text
from guestfault.x86.registers import CR0_PG
from guestfault.x86.state import CpuState

__all__ = ["Account", "Candidate", "Likelihood", "account_for"]


class Likelihood(StrEnum):
    """How the evidence speaks for an access.  None of them means proof."""

    LIKELY = "likely"
    POSSIBLE = "possible"
    UNLIKELY = "unlikely"


@dataclass(frozen=True, slots=True)
class Candidate:
    """An access that may be the one that failed, with the reasons for its rank."""

    access: MemoryAccess
    likelihood: Likelihood
    why: str
    hints: tuple[str, ...] = ()
    parts: tuple[Translated, ...] = ()


@dataclass(frozen=True, slots=True)
class Account:
    """Everything that is said about one dump.  ``candidates`` are ranked, likeliest first."""

    dump: Dump
    mode: str
    cpl: int | None
    instruction: str | None
    instruction_bytes: bytes
    candidates: tuple[Candidate, ...]
    conclusion: str
    notes: tuple[str, ...]


def account_for(dump: Dump, image: MemoryImage | None = None) -> Account:
    """Explain one dump, with the guest's memory if there is an image of it."""
    if dump.architecture == "aarch64":
        return _aarch64(dump)
    state = dump.state()
    reader = linear_reader(state, image) if image else None
    code, notes = dump.code, list(dump.problems)
    if not code and reader is not None:
        code = _code_from_image(state, reader)
        if code:
            notes.append("the code bytes come from the memory image, not from the dump")
    listed = _known_accesses(dump, code, reader) if code else (_bare_fetch(state),)
    instruction, whole = decode(code, state.rip, state.code_size)
    text = None
    if code and not instruction.is_invalid:
        text = instruction_text(instruction)
    elif code and whole:
        notes.append("the bytes at the instruction pointer are no instruction")
    candidates = _rank(dump, listed, Translator(state, image), code)
    notes += _notes(dump, state, code, whole)
    return Account(
        dump,
        _mode(state),
        dump.registers.get("CPL", state.cpl),
        text,
        code[: instruction.len] if text else code[:MAX_LENGTH],
        candidates,
        _conclusion(dump, candidates, text),
        tuple(notes),
    )


def _mode(state: CpuState) -> str:
    size = state.code_size
    if not state.protected:
        return "real mode" if size == 16 else f"real mode with a {size}-bit code segment"
    if state.virtual8086:
        return "virtual-8086 mode"
    if not state.long_mode:
        return f"{size}-bit protected mode"
    return "64-bit mode" if size == 64 else f"compatibility mode, {size}-bit code"


def _known_accesses(dump: Dump, code: bytes, reader: ReadMemory | None) -> tuple[MemoryAccess, ...]:
    """The accesses, without the addresses that come from registers which the dump lacks."""
    listed = accesses(code, dump.state(), memory=reader)
    missing = dump.missing()
    if not missing:
        return listed
    # An odd value, so that it also differs where only alignment or a count would.
    other = accesses(code, dump.state(fill=0x5A5B_5A5B), memory=reader)
    if len(other) > len(listed):
        listed, other = other, listed
    names = ", ".join(missing[:4]) + (", ..." if len(missing) > 4 else "")
    why = f"the dump lacks what decides its address ({names})"
    return tuple(
        access
        if number < len(other) and (access.address, access.span) == _place(other[number])
        else access._replace(address=None, span=None, certain=False, note=why)
        for number, access in enumerate(listed)
    )


def _place(access: MemoryAccess) -> tuple[int | None, tuple[int, int] | None]:
    return access.address, access.span


def _bare_fetch(state: CpuState) -> MemoryAccess:
    """The one access that is certain without the code: the fetch of its first byte."""
    return accesses(b"", state)[0]._replace(note="its bytes are not known")


def _rank(
    dump: Dump,
    listed: tuple[MemoryAccess, ...],
    translate: Translator,
    code: bytes,
) -> tuple[Candidate, ...]:
    data = [access for access in listed if access.kind is not AccessKind.FETCH]
    certain = [access for access in data if access.certain]
    candidates = []
    for access in listed:
        parts = tuple(translate(access))
        if access.kind is AccessKind.FETCH:
            likelihood, why = _judge_fetch(dump, data, code)
        elif not access.certain:
            likelihood, why = Likelihood.POSSIBLE, "the instruction may not make it"
        elif len(certain) == 1:
            likelihood, why = Likelihood.LIKELY, "the only data access it must make"
        else:
            likelihood = Likelihood.POSSIBLE
            why = f"one of the {len(certain)} data accesses it must make"
        if parts and access.kind is not AccessKind.FETCH:
            likelihood, why = _judge_parts(parts, likelihood, why)
        hints = tuple(_hints(access, translate.identity))
        candidates.append(Candidate(access, likelihood, why, hints, parts))
    # Stable: equally likely ones stay in the order in which the instruction makes them.
    candidates.sort(key=lambda candidate: (-_ORDER.index(candidate.likelihood), _last(candidate)))
    return tuple(candidates)


_ORDER = (Likelihood.UNLIKELY, Likelihood.POSSIBLE, Likelihood.LIKELY)


def _last(candidate: Candidate) -> tuple[bool, bool]:
    fetch = candidate.access.kind is AccessKind.FETCH
    return fetch, not candidate.access.certain


def _judge_fetch(dump: Dump, data: list[MemoryAccess], code: bytes) -> tuple[Likelihood, str]:
    if dump.code_unreadable:
        return Likelihood.LIKELY, "QEMU could not read the byte there either (??)"
    if not code:
        return Likelihood.POSSIBLE, "nothing is known about the code"
    if not dump.code:
        return Likelihood.POSSIBLE, "the dump does not show whether its bytes could be read"
    if not data:
        return Likelihood.POSSIBLE, "the instruction accesses no memory besides"
    return Likelihood.UNLIKELY, "its bytes could be read when the dump was printed"


def _judge_parts(
    parts: tuple[Translated, ...], likelihood: Likelihood, why: str
) -> tuple[Likelihood, str]:
    """What the guest's page tables add to a data access's rank."""
    suspect = next((part for part in parts if part.suspect), None)
    if suspect is not None:
        return Likelihood.LIKELY, suspect.stop
    if all(part.suspect is False for part in parts):
        return Likelihood.UNLIKELY, parts[0].stop
    return likelihood, why


def _hints(access: MemoryAccess, identity: bool) -> Iterator[str]:
    if access.address is None:
        return
    window = window_at(access.address)
    if window:
        given = "without paging" if identity or access.physical else "if mapped one to one"
        yield f"{given}, this is in {window}"
    if access.span and access.span[1] > access.size:
        low, length = access.span
        yield f"the rest of the repetition covers {low:#x} to {low + length - 1:#x}"


def _conclusion(dump: Dump, candidates: tuple[Candidate, ...], text: str | None) -> str:
    best = [c for c in candidates if c.likelihood is Likelihood.LIKELY]
    if dump.failure is not None and not dump.failure.is_access:
        known = f"{dump.failure.text}: not the error of an access that failed on the host"
        return f"{known}; the accesses are listed all the same"
    if text is None and not best:
        return "The instruction is not known, so its data accesses are not either"
    if len(best) == 1:
        return f"Most likely: {best[0].access}, {best[0].why}"
    pool = best or [c for c in candidates if c.likelihood is Likelihood.POSSIBLE]
    if not pool:
        return "Nothing stands out; the failure may not be the instruction's own"
    if len(pool) == 1:
        return f"Perhaps: {pool[0].access}, {pool[0].why}"
    return f"One of {len(pool)} accesses; nothing in the dump tells them apart"


def _notes(dump: Dump, state: CpuState, code: bytes, whole: bool) -> Iterator[str]:
    if dump.failure is not None and dump.failure.errno == EHWPOISON:
        yield "the host's memory behind the access is poisoned; its kernel log names the page"
    if dump.failure is None:
        yield "the text does not say which error ended the run; a failed access is assumed"
    if dump.code_unreadable:
        yield "QEMU could not read the code at the instruction pointer"
    elif not code:
        yield "there are no code bytes; --memory with an image of the guest can supply them"
    elif not whole:
        yield "the code bytes end within the instruction"
    missing = dump.missing()
    if missing:
        yield f"not in the dump: {', '.join(missing)}"
    if dump.registers.get("CR2"):
        yield f"CR2 ({dump.registers['CR2']:#x}) is the guest's own last page fault, not this one"
    if dump.registers.get("HLT"):
        yield "HLT=1: the vCPU was halted, so the access may be KVM's own and not the instruction's"
    if dump.registers.get("SMM"):
        yield "SMM=1: addresses are those of system management mode"
    if state.cr0 & CR0_PG:
        yield (
            "each access also reads the guest's page tables, and delivery of an interrupt here "
            "would read the IDT and push; either can fail in place of what is listed"
        )


def _code_from_image(state: CpuState, reader: ReadMemory) -> bytes:
    """The longest run of bytes at RIP, up to an instruction's limit, that the image has."""
    start = accesses(b"", state)[0].address or 0
    for size in range(MAX_LENGTH, 0, -1):
        data = reader(start, size)
        if data is not None:
            return data
    return b""


def _aarch64(dump: Dump) -> Account:
    pc = dump.registers["PC"]
    level = dump.registers.get("PSTATE", 0) >> 2 & 3
    in_mode = f" at EL{level}" if "PSTATE" in dump.registers else ""
    return Account(
        dump,
        f"aarch64{in_mode}",
        None,
        None,
        b"",
        (),
        f"An aarch64 dump: stopped at PC {pc:#x}{in_mode}; its access cannot be named",
        (
            "QEMU prints neither code bytes nor the fault registers (ESR, FAR) for aarch64, so "
            "neither the instruction nor its address is in the text; any X register may hold it",
            "the tracepoint kvm:kvm_guest_fault on the host records address and syndrome when it "
            "happens again; or disassemble the guest's kernel at PC",
            *dump.problems,
        ),
    )

"""Register dumps as QEMU prints them when KVM_RUN fails, from any text that contains some.

:func:`parse_dumps` finds every vCPU's dump in a log.  A register that appears again begins another
dump; so does an error line.  What is missing stays missing: :meth:`Dump.state` fills it with a
value of the caller's choice, so that it can find out what depends on it.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from guestfault.dialect.interface import EHWPOISON
from guestfault.explain.errors import ExplainError
from guestfault.explain.text import Token, clean, tokens
from guestfault.x86.segments import Segment
from guestfault.x86.state import GPR_NAMES, CpuState, DescriptorTable

__all__ = ["Dump", "Failure", "parse_dumps"]

#: What strerror(3) prints for every errno that KVM_RUN may return.
_ERRNOS = {os.strerror(number): number for number in (*errno.errorcode, EHWPOISON)}
_SEGMENT_NAMES = ("ES", "CS", "SS", "DS", "FS", "GS", "TR", "LDT")


@dataclass(frozen=True, slots=True)
class Failure:
    """The line before a dump that says why it was printed."""

    text: str
    errno: int | None = None

    @property
    def is_access(self) -> bool:
        """EFAULT, or EHWPOISON: a guest access that the host could not serve."""
        return self.errno in (errno.EFAULT, EHWPOISON)


@dataclass(frozen=True)
class Dump:
    """One vCPU's registers, as far as the text has them.

    ``registers`` are under QEMU's names (``RAX``, ``EIP``, ``CR3``, ``X00``).  ``code`` are the
    bytes from RIP on, up to the first that QEMU could not read; ``code_unreadable`` says that there
    was one at RIP itself.  ``line`` is where it begins, from 1.
    """

    line: int
    failure: Failure | None = None
    cpu: int | None = None
    registers: Mapping[str, int] = field(default_factory=dict)
    segments: Mapping[str, Segment] = field(default_factory=dict)
    tables: Mapping[str, DescriptorTable] = field(default_factory=dict)
    vectors: Mapping[int, bytes] = field(default_factory=dict)
    code_before: bytes = b""
    code: bytes = b""
    code_unreadable: bool = False
    problems: tuple[str, ...] = ()

    @property
    def architecture(self) -> str:
        """``x86`` or ``aarch64``."""
        return "x86" if self.rip is not None else "aarch64"

    @property
    def rip(self) -> int | None:
        """RIP or EIP."""
        return self.registers.get("RIP", self.registers.get("EIP"))

    @property
    def wide(self) -> bool:
        """Printed in the form for 64-bit code (RAX=, not EAX=)."""
        return "RIP" in self.registers or ("EIP" not in self.registers and "RAX" in self.registers)

    def missing(self) -> tuple[str, ...]:
        """Names of the registers that decide addresses and that the text does not have."""
        wanted = [
            _printed_name(name, self.wide) for name in (GPR_NAMES if self.wide else GPR_NAMES[:8])
        ]
        return (
            *(name for name in wanted if name not in self.registers),
            *(name for name in _SEGMENT_NAMES if name not in self.segments),
            *(name for name in ("GDT", "IDT") if name not in self.tables),
            *(name for name in ("CR0", "CR3", "CR4") if name not in self.registers),
        )

    def state(self, fill: int = 0) -> CpuState:
        """The registers as a :class:`CpuState`; each missing one holds ``fill``.

        What decides how the code is read (mode, privilege) is not filled but inferred from the
        form of the dump.
        """
        long = self.wide
        read = self.registers.get
        protected = long or bool(read("CR0", 1) & 1)
        cpl = read("CPL", 0) & 3

        def segment(name: str) -> Segment:
            if name in self.segments:
                return self.segments[name]
            return Segment(
                base=fill,
                limit=0xFFFF_FFFF if protected else 0xFFFF,
                dpl=cpl,
                type={"CS": 11, "TR": 11, "LDT": 2}.get(name, 3),
                s=int(name not in ("TR", "LDT")),
                present=1,
                l=int(long and name == "CS"),
                db=int(protected and not (long and name == "CS")),
            )

        def flag_register(short: str) -> int:
            return read(f"R{short}", read(f"E{short}", fill if short != "FL" else 2))

        fallback = 0x8000_0011 if long else 0x11
        return CpuState(
            gprs=tuple(
                read(_printed_name(name, long), 0 if not long and number > 7 else fill)
                for number, name in enumerate(GPR_NAMES)
            ),
            rip=flag_register("IP"),
            rflags=flag_register("FL"),
            es=segment("ES"),
            cs=segment("CS"),
            ss=segment("SS"),
            ds=segment("DS"),
            fs=segment("FS"),
            gs=segment("GS"),
            tr=segment("TR"),
            ldt=segment("LDT"),
            gdt=self.tables.get("GDT", DescriptorTable(fill)),
            idt=self.tables.get("IDT", DescriptorTable(fill)),
            cr0=read("CR0", fallback),
            cr3=read("CR3", fill),
            cr4=read("CR4", 0x20 if long else 0),
            efer=read("EFER", 0x500 if long else 0),
            xcr0=read("XCR0"),
            vectors=self.vectors,
            masks={n: read(f"Opmask0{n}", 0) for n in range(8) if f"Opmask0{n}" in self.registers},
        )


def parse_dumps(text: str, source: str = "input") -> list[Dump]:
    """Every dump in ``text`` that tells where its vCPU was, in order.

    Raises :class:`ExplainError` if there is none; ``source`` names the text in it.
    """
    found = _Builder.split(tokens(clean(text)))
    dumps = [dump for dump in found if dump.rip is not None or "PC" in dump.registers]
    # A stray PC= of some other log line is no dump.
    dumps = [d for d in dumps if d.rip is not None or {"PSTATE", "X00"} & d.registers.keys()]
    if dumps:
        lost = [dump.line for dump in found if dump not in dumps and len(dump.registers) > 2]
        if lost:
            where = ", ".join(map(str, lost[:5]))
            note = (
                f"registers without an instruction pointer at line {where}: a dump cut off, or two "
                "vCPUs' dumps mixed line by line, whose values cannot be told apart"
            )
            dumps = [_with_problem(dump, note) for dump in dumps]
        return dumps
    if found and any(dump.registers for dump in found):
        raise ExplainError(source, "a register dump without RIP: it is cut off", "give all of it")
    if "RIP: 00" in text or "Call Trace:" in text:
        raise ExplainError(
            source,
            "no register dump of a VMM",
            "this looks like a Linux oops, which the guest prints about itself",
        )
    raise ExplainError(
        source, "no register dump found", "give the lines that QEMU printed, from RAX= or EAX= on"
    )


def _printed_name(name: str, wide: bool) -> str:
    return name.upper() if wide else f"E{name[1:].upper()}"


def _with_problem(dump: Dump, problem: str) -> Dump:
    return replace(dump, problems=(*dump.problems, problem))


class _Builder:
    """Collects tokens into one dump."""

    def __init__(self, line: int) -> None:
        self.line = line
        self.failure: Failure | None = None
        self.cpu: int | None = None
        self.registers: dict[str, int] = {}
        self.segments: dict[str, Segment] = {}
        self.tables: dict[str, DescriptorTable] = {}
        self.vectors: dict[int, bytes] = {}
        self.code: tuple[list[int | None], list[int | None] | None] | None = None
        self.problems: list[str] = []
        self.seen: set[str] = set()

    @classmethod
    def split(cls, stream: Iterable[Token]) -> list[Dump]:
        """One dump for each time that a name appears again or an error is announced."""
        built: list[_Builder] = []
        for token in stream:
            announces = token.kind in ("failed", "internal", "entry", "cpu")
            full = bool(built) and (
                bool(built[-1].seen) if announces else token.name in built[-1].seen
            )
            if not built or full:
                built.append(cls(token.line))
            built[-1].add(token)
        return [builder.dump() for builder in built if builder.seen]

    def add(self, token: Token) -> None:
        """Take one token; of the kinds that announce a dump the first counts."""
        match token.kind:
            case "failed":
                text = str(token.value)
                number = next((n for known, n in _ERRNOS.items() if text.startswith(known)), None)
                self.failure = self.failure or Failure(f"kvm run failed {text}"[:120], number)
            case "internal":
                self.failure = self.failure or Failure(
                    f"KVM internal error, suberror {token.value!s}"
                )
            case "entry":
                self.failure = self.failure or Failure(
                    f"KVM entry failed, hardware error {token.value!s}"
                )
            case "cpu":
                self.cpu = int(str(token.value))
            case _:
                self.seen.add(token.name if token.kind != "vector" else f"V{token.name}")
                self._add_state(token)

    def _add_state(self, token: Token) -> None:
        match token.value:
            case int(value):
                self.registers[token.name] = value
            case int(selector), int(base), int(limit), int(flags):
                self.segments[token.name] = Segment.from_flags(selector, base, limit, flags)
            case int(base), int(limit):
                self.tables[token.name] = DescriptorTable(base, limit)
            case bytes(data):
                self.vectors[int(token.name)] = data
            case list(before), after:
                self.code = (before, after if isinstance(after, list) else None)
            case _:
                self.problems.append(f"the value of {token.name} is too wide for a register")

    def dump(self) -> Dump:
        """What was collected."""
        before, after = self.code or ([], [])
        problems = list(self.problems)
        if self.code is not None and after is None:
            problems.append("no byte of the code is marked as the one at the instruction pointer")
        if any(value >> 32 for name, value in self.registers.items() if name in ("EIP", "EAX")):
            problems.append("a 32-bit register holds a wider value")
        return Dump(
            self.line,
            self.failure,
            self.cpu,
            self.registers,
            self.segments,
            self.tables,
            self.vectors,
            bytes(value for value in before if value is not None) if after is not None else b"",
            _readable(after or []),
            bool(after) and after is not None and after[0] is None,
            tuple(problems),
        )


def _readable(values: list[int | None]) -> bytes:
    """The bytes up to the first that could not be read."""
    data = bytearray()
    for value in values:
        if value is None:
            break
        data.append(value)
    return bytes(data)

"""A case: a condition, an access and a mode, by the name ``condition/access/mode``.

Which of all combinations are cases is data, here.  A new one is a word in a row of
:data:`_ROWS`; a new condition or access is an entry in one of the modules beside
:mod:`~guestfault.conform.condition`, or in :mod:`~guestfault.conform.guests`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from guestfault.conform.condition import Condition
from guestfault.conform.guest_memfd import GUEST_MEMFD
from guestfault.conform.guests import ACCESSES, Access
from guestfault.conform.plain import PLAIN
from guestfault.conform.private import PRIVATE
from guestfault.conform.record import Result
from guestfault.conform.scripts import conversion, one_vcpu, prefault, two_vcpus
from guestfault.conform.userfault import USERFAULT
from guestfault.errors import GuestfaultError
from guestfault.guest.layout import Mode
from guestfault.kvm.protocols import System

__all__ = ["CASES", "Case", "matching"]

Script = Callable[[System, Condition, Access, Mode], Result]

MODES = {"cpl3": Mode.LONG_CPL3, "cpl0": Mode.LONG_CPL0, "real": Mode.REAL}


@dataclass(frozen=True)
class Case:
    """``condition`` x ``access`` x ``mode``; ``script`` is how it is asked."""

    name: str
    condition: Condition
    access: Access
    mode: Mode
    script: Script

    @property
    def title(self) -> str:
        """For people."""
        what = self.access.title
        if self.script is two_vcpus:
            what = f"{what}, by two vCPUs"
        elif self.script is prefault:
            what = "KVM_PRE_FAULT_MEMORY of three pages, x in the second"
        return f"{what}; x is {self.condition.title}"

    @property
    def in_child(self) -> bool:
        """Whether it may cost the process its life, or take a thread of it for ever."""
        return self.condition.in_child or self.script is prefault

    def run(self, system: System) -> Result:
        """Run it."""
        result = self.script(system, self.condition, self.access, self.mode)
        result.case = self.name
        return result


CONDITIONS = PLAIN | USERFAULT | GUEST_MEMFD | PRIVATE

_BASIC = "read write rmw exec"
_ACROSS = "read-into read-out write-into write-out"
_STRINGS = "movs-from movs-to movs-from-device movs-to-device outs ins"
_WALKS = "walk-read walk-write walk-read-alias walk-write-alias"
_EVERY = f"{_BASIC} push {_ACROSS} {_STRINGS} {_WALKS} event"

# condition: (accesses, modes)
_ROWS: dict[str, tuple[str, str]] = {
    "normal": (_EVERY, "cpl3 cpl0 real"),
    "prot-none": (_EVERY, "cpl3 cpl0 real"),
    "prot-none-later": (f"{_BASIC}", "cpl3 cpl0"),
    "unmapped": (_BASIC, "cpl3 cpl0 real"),
    "read-only": (f"{_BASIC} push {_WALKS}", "cpl3 cpl0"),
    "read-only-slot": (f"{_BASIC} push write-into movs-to ins {_WALKS} event", "cpl3 cpl0 real"),
    "past-eof": (_BASIC, "cpl3 cpl0"),
    "no-slot": (f"{_BASIC} push write-into read-into {_WALKS} event", "cpl3 cpl0 real"),
    "missing": (f"{_BASIC} push {_ACROSS} outs ins {_WALKS} event", "cpl3 cpl0 real"),
    "missing-sigbus": (_EVERY, "cpl3 cpl0 real"),
    "missing-user": (_BASIC, "cpl3 cpl0"),
    "missing-closed": ("read write rmw", "cpl3 cpl0"),
    "minor": (_BASIC, "cpl3 cpl0"),
    "minor-sigbus": (_BASIC, "cpl3 cpl0"),
    "discarded-later": ("read write", "cpl3 cpl0"),
    "wp": ("read write rmw exec write-into", "cpl3 cpl0"),
    "wp-sigbus": ("read write rmw write-into", "cpl3 cpl0"),
    "uffd-poison": ("read write exec", "cpl3 cpl0"),
    "hwpoison": ("read write exec", "cpl3 cpl0"),
    "gmem": (f"{_BASIC} push walk-read movs-to", "cpl3 cpl0 real"),
    "gmem-elsewhere": ("read write outs walk-read", "cpl3 cpl0"),
    "gmem-closed": (_BASIC, "cpl3 cpl0"),
    "gmem-punched": ("read write", "cpl3 cpl0"),
    "gmem-hwpoison": ("read write exec", "cpl3 cpl0"),
    "private": (f"{_BASIC} push movs-to outs ins walk-read event", "cpl3 cpl0"),
    "private-no-gmem": (f"{_BASIC} push movs-to outs ins walk-read event", "cpl3 cpl0"),
    "private-closed": (f"{_BASIC} walk-read", "cpl3 cpl0"),
    "private-no-slot": (f"{_BASIC} walk-read", "cpl3 cpl0"),
    "shared-prot-none": (_BASIC, "cpl3 cpl0"),
    "converted": ("read write rmw", "cpl3 cpl0"),
}

_PREFAULTED = (
    "normal prot-none unmapped read-only read-only-slot past-eof no-slot missing-sigbus"
    " minor-sigbus wp-sigbus gmem gmem-closed private private-no-gmem"
    " private-closed private-no-slot"
)
_SHARED = "normal prot-none missing missing-sigbus minor"


def _all() -> Iterator[Case]:
    for condition, (accesses, modes) in _ROWS.items():
        for access in map(ACCESSES.__getitem__, accesses.split()):
            for mode in modes.split():
                if MODES[mode] in access.modes:
                    script = conversion if condition == "converted" else one_vcpu
                    yield _case(condition, access.name, mode, script)
    for condition in _SHARED.split():
        for access_name in ("read", "write"):
            yield _case(condition, access_name, "cpl3", two_vcpus, "two-vcpus")
    for condition in _PREFAULTED.split():
        yield _case(condition, "read", "cpl3", prefault, "prefault")


def _case(condition: str, access: str, mode: str, script: Script, called: str = "") -> Case:
    name = f"{condition}/{access}/{mode}"
    if called == "two-vcpus":
        name = f"{condition}/{access}/two-vcpus"
    elif called:
        name = f"{condition}/{called}"
    return Case(name, CONDITIONS[condition], ACCESSES[access], MODES[mode], script)


CASES: dict[str, Case] = {case.name: case for case in _all()}
"""All of them, by their names."""


def matching(patterns: Iterable[str]) -> list[Case]:
    """The cases whose name one of the patterns matches, in the table's order; all for none.

    A pattern is a name with ``*`` and ``?`` in it, or the beginning of one up to a slash.  Raises
    :class:`~guestfault.errors.GuestfaultError` for one that matches nothing.
    """
    wanted = list(patterns)
    if not wanted:
        return list(CASES.values())
    chosen: set[str] = set()
    for pattern in wanted:
        found = {n for n in CASES if fnmatchcase(n, pattern) or fnmatchcase(n, f"{pattern}/*")}
        if not found:
            raise GuestfaultError(
                f"no case is called {pattern!r}; guestfault conform --list has their names"
            )
        chosen |= found
    return [case for case in CASES.values() if case.name in chosen]

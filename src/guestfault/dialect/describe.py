"""The records for people: a table of all, and everything about one.

Nothing here knows a dialect by name: what is printed is what the record says, and so what the
software KVM does and :mod:`guestfault.fault` decodes.
"""

from __future__ import annotations

import errno
import textwrap
from collections.abc import Iterable, Iterator
from typing import Any

from guestfault.dialect.interface import EHWPOISON, Payload
from guestfault.dialect.record import (
    NO_COUNTERPART,
    Ask,
    Capability,
    Dialect,
    Enabling,
    Guard,
    Reset,
    Site,
)

__all__ = ["as_json", "details", "refused", "table", "where"]

_WIDTH = 100
_HEADINGS = (
    "dialect",
    "capability",
    "missing page",
    "exit",
    "KVM_RUN fails",
    "flags",
    "guards",
    "reset",
)
_ENABLED = {
    Enabling.INFORMATIONAL: "",
    Enabling.OPT_IN: " opt-in",
    Enabling.OPT_IN_PER_REASON: " per reason",
}
_GUARDS = {
    Guard.LOADED_VCPU: "loaded",
    Guard.EXIT_REASON_UNKNOWN: "reason",
    Guard.CANARY: "canary",
}
_RESETS = {Reset.NEVER: "never", Reset.AT_ENTRY: "entry", Reset.BEFORE_LOOP: "loop"}
_LETTERS = {"READ": "R", "WRITE": "W", "EXEC": "X"}

_LEGEND = """\
capability: that announces the exit; "opt-in" and "per reason" are enabled with KVM_ENABLE_CAP.
missing page: what makes a fault on one fail rather than wait: a VM ioctl, a slot flag, or a slot's
    bitmap; in brackets the capability that announces it.
exit: exit_reason, or the bit of kvm_run.flags that stands for it.  flags: of memory_fault.
guards: what keeps kvm_run from being filled: the vCPU is not the loaded one, another exit_reason is
    prepared, it is filled already (in brackets: complains, and fills).
reset: when KVM_RUN overwrites the last exit_reason: never, at its entry, or as its loop begins.
"""


def table(dialects: Iterable[Dialect]) -> str:
    """One line for each dialect, at most 120 columns wide, and what the columns mean."""
    rows = [_HEADINGS, *map(_row, dialects)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADINGS))]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines) + "\n\n" + _LEGEND.rstrip()


def _row(d: Dialect) -> tuple[str, ...]:
    info = "-" if d.info is None else f"{d.info.number}{_ENABLED[d.info.enabling]}"
    guards = (
        f"({_GUARDS[g]})" if g in d.warns_only else _GUARDS[g] for g in d.guards if g in _GUARDS
    )
    return (
        d.name,
        info,
        _missing(d),
        _bit(d.interface.filled_flag, "flags ") or str(d.interface.exit_reason),
        " ".join(name.removeprefix("-") for name in _errnos(d)),
        _flags(d),
        " ".join(guards) or "-",
        _RESETS[d.reset],
    )


def _missing(d: Dialect) -> str:
    if d.missing is None:
        return "-"
    how = {
        Ask.VM_SWITCH: "ioctl",
        Ask.SLOT_FLAG: _bit(d.missing.value),
        Ask.BITMAP: "bitmap",
    }[d.missing.ask]
    return f"{how} ({d.missing.cap.number})"


def _bit(value: int, prefix: str = "") -> str:
    return f"{prefix}1<<{value.bit_length() - 1}" if value else ""


def _errnos(d: Dialect) -> list[str]:
    names = {EHWPOISON: "EHWPOISON", **errno.errorcode}
    return [f"-{names[number]}" for number in sorted(d.interface.errnos)]


def _flags(d: Dialect) -> str:
    names = list(d.interface.flags)
    letters = "".join(_LETTERS[name] for name in names if name in _LETTERS)
    rest = [name for name in names if name not in _LETTERS]
    return " ".join(filter(None, [letters, *rest])) or "-"


def where(source: str) -> str:
    """Where a source can be read: a Message-ID as its address, anything else as it is."""
    return f"https://lore.kernel.org/kvm/{source.replace('/', '%2F')}/" if "@" in source else source


def details(d: Dialect) -> str:
    """Everything about one dialect, at most 100 columns wide."""
    parts = [f"{d.name}: {d.title}", d.published, where(d.source), ""]
    parts += textwrap.wrap(" ".join(d.changed.split()), _WIDTH)
    parts.append("")
    for name, text in _facts(d):
        parts += textwrap.wrap(
            f"{name:19}{text}", _WIDTH, subsequent_indent=" " * 19, break_on_hyphens=False
        )
    if d.flaws:
        parts += ["", "What is wrong with it:"]
    for flaw in d.flaws:
        parts += textwrap.wrap(
            flaw.what, _WIDTH, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False
        )
        parts.append(f"  {where(flaw.source)}")
    return "\n".join(parts)


def _facts(d: Dialect) -> Iterator[tuple[str, str]]:
    i = d.interface
    yield "announced by", _capability(d.info) if d.info else "nothing of its own"
    if d.missing is None:
        yield "missing page", "waits for it: a failed access must be made by other means"
    else:
        value = f"{d.missing.value:#x}"
        by = _capability(d.missing.cap)
        yield "missing page", f"{d.missing.ask} {d.missing.name} ({value}), announced by {by}"
    if i.exit_reason is None:
        yield "exit", f"bit {i.filled_flag:#x} of kvm_run.flags; exit_reason is not written"
    else:
        yield "exit", f"exit_reason {i.exit_reason}"
    third = i.length_name
    yield "payload", f"flags, gpa, {third} in {i.payload.value}"
    yield "KVM_RUN fails with", ", ".join(_errnos(d))
    bits = ", ".join(f"{name} {bit:#x}" for name, bit in i.flags.items())
    yield "flags", bits or ("always 0" if i.flags_written else "not written: stale")
    guards = (f"{g} (complains only)" if g in d.warns_only else str(g) for g in d.guards)
    yield "guards", ", ".join(guards) or "none"
    yield "exit_reason", f"is reset: {d.reset}"
    here = sorted(d.annotated - NO_COUNTERPART)
    yield "annotated", _sites(here) + ("; where asked for only" if d.annotates_only_missing else "")
    if Site.HANDLE_ERROR_PFN not in d.annotated and Site.FAULTIN_PFN not in d.annotated:
        yield "", "a page of an ordinary slot that cannot be had is a bare -EFAULT"
    if elsewhere := sorted(d.annotated & NO_COUNTERPART):
        yield "", f"and, which the software KVM has nothing of: {_sites(elsewhere)}"
    yield "refused", "; ".join(refused(d)) or "nothing"
    yield "fast GUP", "for reads too" if d.fast_gup_reads else "for what may be written only"
    if d.async_when_fast:
        yield "async page faults", f"are off where a lookup is fast-only: {d.async_when_fast}"
    if d.sizes_in_pages:
        yield "lengths in pages", f"from {_sites(sorted(d.sizes_in_pages))}"
    if d.arm64:
        yield "arm64", d.arm64


def _sites(sites: Iterable[Site]) -> str:
    return ", ".join(sites) or "nothing"


def _capability(cap: Capability) -> str:
    return f"{cap.name} ({cap.number}), {cap.enabling}"


def refused(d: Dialect) -> list[str]:
    """What the dialect answers with EINVAL, of what it adds to KVM's interface."""
    found = []
    if d.info is not None:
        match d.info.enabling:
            case Enabling.INFORMATIONAL:
                found.append(f"enabling {d.info.name}")
            case Enabling.OPT_IN:
                found.append(f"enabling {d.info.name} with anything but 0 and 1")
            case Enabling.OPT_IN_PER_REASON if d.checks_reasons:
                found.append(f"enabling {d.info.name} for unknown reasons")
    if d.missing is not None:
        found.append(f"enabling {d.missing.cap.name}")
        if d.missing.ask is Ask.BITMAP:
            found.append(f"{d.missing.name} with a bitmap outside userspace")
            found.append(f"{d.missing.name} by KVM_SET_USER_MEMORY_REGION")
    if d.readonly_excluded and d.missing is not None:
        found.append(f"KVM_MEM_READONLY with {d.missing.name}")
    return found


def as_json(d: Dialect) -> dict[str, Any]:
    """The record as plain data."""
    i = d.interface
    return {
        "name": d.name,
        "published": d.published,
        "title": d.title,
        "source": d.source,
        "changed": " ".join(d.changed.split()),
        "info": _capability_json(d.info),
        "missing": None
        if d.missing is None
        else {
            "ask": d.missing.ask.value,
            "name": d.missing.name,
            "value": d.missing.value,
            "capability": _capability_json(d.missing.cap),
        },
        "exit_reason": i.exit_reason,
        "filled_flag": i.filled_flag,
        "payload": "union" if i.payload is Payload.UNION else "second union",
        "length_name": i.length_name,
        "errnos": sorted(i.errnos),
        "flags": dict(i.flags),
        "flags_written": i.flags_written,
        "guards": [{"guard": g.value, "fills": g in d.warns_only} for g in d.guards],
        "reset": d.reset.value,
        "annotated": sorted(d.annotated),
        "annotates_only_missing": d.annotates_only_missing,
        "not_in_softkvm": sorted(d.annotated & NO_COUNTERPART),
        "refused": refused(d),
        "fast_gup_reads": d.fast_gup_reads,
        "async_when_fast": d.async_when_fast,
        "sizes_in_pages": sorted(d.sizes_in_pages),
        "arm64": d.arm64,
        "flaws": [{"what": f.what, "source": f.source} for f in d.flaws],
    }


def _capability_json(cap: Capability | None) -> dict[str, Any] | None:
    if cap is None:
        return None
    return {"name": cap.name, "number": cap.number, "enabling": cap.enabling.value}

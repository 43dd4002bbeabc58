"""From what people paste to plain lines, and from those to tokens.

A dump reaches us through journald, libvirt's log, a mail client, a bug tracker and a copy buffer,
and each leaves its mark: prefixes with a time stamp, ``> `` in front, lines broken at 72 columns,
``=3D`` for ``=``, ``&lt;41&gt;`` for ``<41>``.  Nothing here relies on where a line begins or ends,
except that a line of code bytes that was broken continues on lines of nothing but code bytes.

Tokens are ``NAME=VALUE`` with the names that QEMU prints, and as many digits as it prints (other
lines of a log say PC=12); everything between them is other text.
"""

from __future__ import annotations

import html
import quopri
import re
from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["CODE_BYTES_MAX", "Token", "clean", "tokens"]

CodeBytes = tuple[list[int | None], list[int | None] | None]
TokenValue = int | str | bytes | tuple[int, ...] | CodeBytes | None

#: QEMU prints 50 bytes of code; a little more is taken, an unbounded tail is not.
CODE_BYTES_MAX = 64

_QUOTE = re.compile(r"^[\s>|]+", re.MULTILINE)
_QUOTED_PRINTABLE = re.compile(r"\b(?:[RE]AX|[RE]IP|PC|PSTATE)=3D")
_PREFIX = re.compile(r"^.*?(?:\]:|\w:)\s+")

_HEX = "[0-9a-fA-F]"
_BYTE = re.compile(rf"<({_HEX}{{2}}|\?\?)>|({_HEX}{{2}}|\?\?)")
_LEGACY = ("AX", "BX", "CX", "DX", "SI", "DI", "BP", "SP", "IP", "FL")
_SCALARS = (
    *(f"{width}{name}" for width in "RE" for name in _LEGACY),
    *(f"R{n}" for n in range(8, 16)),
    *("CR0", "CR2", "CR3", "CR4", "EFER", "XCR0", "PSTATE"),
    *(f"Opmask0{n}" for n in range(8)),
)
_FLAGS = ("CPL", "II", "A20", "SMM", "HLT")
_AARCH64 = (*(f"X{n:02d}" for n in range(31)), "PC", "SP")
_TOKEN = re.compile(
    rf"""
      (?<![\w])(?P<segment>ES|CS|SS|DS|FS|GS|LDT|TR)[ ]?[ ]?=\s*
        (?P<selector>{_HEX}{{4}})\s+(?P<base>{_HEX}{{8,16}})\s+
        (?P<limit>{_HEX}{{8}})\s+(?P<flags>{_HEX}{{8}})\b
    | (?<![\w])(?P<table>GDT|IDT)[ ]?=\s*
        (?P<tbase>{_HEX}{{8,16}})\s+(?P<tlimit>{_HEX}{{8}})\b
    | (?<![\w])(?P<bank>[XYZ]MM)(?P<number>\d\d)=
        (?P<quads>{_HEX}{{16}}(?:\s+{_HEX}{{16}}){{1,7}})\b
    | (?<![\w])(?:
          (?P<scalar>{"|".join(_SCALARS)})[ ]?=\s?(?P<value>{_HEX}{{8,}})
        | (?P<aarch64>{"|".join(_AARCH64)})=(?P<wide>{_HEX}{{16,}})
        | (?P<flag>{"|".join(_FLAGS)})=(?P<digit>[0-3])
      )\b
    | (?<![\w])(?P<code>Code)=
    | (?<![\w])CPU[ ]?\#(?P<cpu>\d{{1,6}})\b
    | kvm[ ]run[ ]failed:?[ ]+(?P<failed>[^\r\n]+)
    | KVM[ ]internal[ ]error\.\s+Suberror:\s+(?P<internal>\d{{1,9}})
    | KVM:[ ]entry[ ]failed,[ ]hardware[ ]error[ ](?P<entry>0x{_HEX}+)
    """,
    re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Token:
    """A recognised piece of a dump.

    ``kind`` is ``register``, ``segment`` (selector, base, limit, flags), ``table`` (base, limit),
    ``vector`` (bytes), ``code`` (bytes before RIP, bytes from RIP on; an unreadable byte is None),
    ``cpu`` (its number), ``failed`` (the error's text), ``internal`` or ``entry`` (a code).
    ``line`` counts from 1.
    """

    kind: str
    name: str
    value: TokenValue
    line: int


def clean(text: str) -> str:
    """Undo quoting, quoted-printable and HTML escapes; lines keep their number."""
    if _QUOTED_PRINTABLE.search(text):
        # Soft line breaks are joined by hand, so that the line count stays right enough.
        raw = text.encode("utf-8", "replace")
        text = quopri.decodestring(raw).decode("utf-8", "replace")
    text = html.unescape(text).replace("\u00a0", " ").replace("\r\n", "\n").replace("\r", "\n")
    return "\n".join(_QUOTE.sub("", line) for line in text.split("\n"))


def tokens(text: str) -> Iterator[Token]:
    """The tokens of cleaned text, in order."""
    line, counted = 1, 0
    for match in _TOKEN.finditer(text):
        line += text.count("\n", counted, match.start())
        counted = match.start()
        kind = match.lastgroup
        if match["segment"]:
            fields = (match["selector"], match["base"], match["limit"], match["flags"])
            yield Token("segment", match["segment"], tuple(int(f, 16) for f in fields), line)
        elif match["table"]:
            yield Token(
                "table", match["table"], (int(match["tbase"], 16), int(match["tlimit"], 16)), line
            )
        elif match["bank"]:
            quads = [int(quad, 16) for quad in reversed(match["quads"].split())]
            data = b"".join(quad.to_bytes(8, "little") for quad in quads)
            yield Token("vector", match["number"], data, line)
        elif name := match["scalar"] or match["aarch64"] or match["flag"]:
            digits = match["value"] or match["wide"] or match["digit"]
            # More than 16 digits are no register; int() is spared an absurd number of them.
            value = int(digits, 16) if len(digits) <= 16 else None
            yield Token("register", name, value, line)
        elif match["code"]:
            yield Token("code", "Code", _code(text, match.end()), line)
        elif kind in ("failed", "internal", "entry", "cpu"):
            yield Token(kind, kind, match[kind].strip(), line)


def _code(text: str, start: int) -> CodeBytes:
    """The bytes before the marked one, and from it on (None if no byte is marked)."""
    before: list[int | None] = []
    after: list[int | None] | None = None
    # Wrapping adds a few lines; the bytes of a dump never need more than this many characters.
    for number, line in enumerate(text[start : start + 8 * CODE_BYTES_MAX].split("\n")):
        words = line.split()
        if number and not _all_bytes(words):
            words = _PREFIX.sub("", line).split()
            if not _all_bytes(words):
                break
        for word in words:
            match = _BYTE.fullmatch(word)
            if match is None or len(before) + len(after or ()) >= CODE_BYTES_MAX:
                return before, after
            digits = match[1] or match[2]
            value = None if digits == "??" else int(digits, 16)
            if match[1] and after is None:
                after = []
            (before if after is None else after).append(value)
    return before, after


def _all_bytes(words: list[str]) -> bool:
    return bool(words) and all(_BYTE.fullmatch(word) for word in words)

"""The kernel's trace events as tracefs describes them: an event's number, and where its fields lie.

A raw trace record is a C structure that no header declares and that changes from one kernel to the
next; ``events/GROUP/NAME/format`` says what this kernel's looks like (``Documentation/trace/
events.rst``).  So offsets are read there, by the fields' names, and never assumed.

Tracefs is looked for and never mounted: that is for the machine's administrator to do, and where it
has not been done the error says how.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from guestfault.errors import Unavailable
from guestfault.linux.mounts import mount_points

__all__ = ["PLACES", "EventFormat", "Field", "Tracefs"]

PLACES = (Path("/sys/kernel/tracing"), Path("/sys/kernel/debug/tracing"))
"""Where tracefs is mounted by convention; the second appears with debugfs."""

_MOUNT = f"mount -t tracefs tracefs {PLACES[0]} (as root)"

# field:unsigned int vcpu_id;	offset:8;	size:4;	signed:0;
_FIELD = re.compile(
    r"\s*field:(?P<type>.*?)\s*\b(?P<name>\w+)(?P<array>\[[^]]*\])?;"
    r"\s*offset:(?P<offset>\d+);\s*size:(?P<size>\d+);\s*signed:(?P<signed>[01]);"
)
_CODES = {1: "B", 2: "H", 4: "I", 8: "Q"}


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a record: ``size`` bytes at ``offset``, in bytes from the record's start.

    ``type`` is the C type as the kernel prints it, with ``[N]`` for an array.
    """

    name: str
    type: str
    offset: int
    size: int
    signed: bool

    @property
    def code(self) -> str:
        """The :mod:`struct` format of an integer field; :class:`ValueError` for an array."""
        if self.size not in _CODES or self.type.endswith("]"):
            raise ValueError(f"{self.type} {self.name} is no integer")
        return "<" + (_CODES[self.size].lower() if self.signed else _CODES[self.size])

    def read(self, raw: bytes) -> int:
        """The value in a raw record; :class:`struct.error` if the record ends before it."""
        value: int = struct.unpack_from(self.code, raw, self.offset)[0]
        return value


@dataclass(frozen=True, slots=True)
class EventFormat:
    """What a ``format`` file says: the event's name, its number for perf, its fields by name.

    The first 2 bytes of each raw record are the number again (``common_type``).
    """

    name: str
    id: int
    fields: dict[str, Field]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the text of a ``format`` file; :class:`ValueError` for what is none.

        Lines that are neither name, number nor field are passed over, as ``print fmt`` is.
        """
        name, number, fields = "", None, {}
        for line in text.splitlines():
            if match := _FIELD.match(line):
                field = Field(
                    match["name"],
                    match["type"] + (match["array"] or ""),
                    int(match["offset"]),
                    int(match["size"]),
                    match["signed"] == "1",
                )
                fields[field.name] = field
            elif line.startswith("name: "):
                name = line.removeprefix("name: ").strip()
            elif line.startswith("ID: "):
                number = int(line.removeprefix("ID: "))
        if not name or number is None or not fields:
            raise ValueError("it lacks its name, its ID or its fields")
        return cls(name, number, fields)


class Tracefs:
    """A mounted tracefs, at ``path``.

    >>> Tracefs.find().event("kvm", "kvm_userspace_exit").fields["errno"]  # doctest: +SKIP
    Field(name='errno', type='int', offset=12, size=4, signed=True)
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    @classmethod
    def find(cls, mounted: Iterable[Path] | None = None) -> Self:
        """The first tracefs that is open to this user: where it is mounted, or by convention.

        ``mounted`` are the mount points to look at, and no other place.

        Raises :class:`~guestfault.errors.Unavailable`: not mounted, or closed to this user.
        """
        # By convention too, for debugfs mounts its own only when somebody looks there.
        mounts = list(mount_points("tracefs") if mounted is None else mounted)
        for place in mounts + (list(PLACES) if mounted is None else []):
            if os.access(place / "events", os.R_OK | os.X_OK):
                return cls(place)
        if mounts:
            raise Unavailable("tracefs", f"{mounts[0]} is closed to this user", open_up(mounts[0]))
        raise Unavailable("tracefs", "not mounted", _MOUNT)

    def event(self, group: str, name: str) -> EventFormat:
        """The format of one event.

        Raises :class:`~guestfault.errors.Unavailable`: this kernel has no such event, the module
        that would register it is not loaded, or its description is closed to this user.
        """
        what = f"{group}:{name}"
        path = self.path / "events" / group / name / "format"
        try:
            return EventFormat.parse(path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            if not (self.path / "events").is_dir():
                raise Unavailable("tracefs", f"not mounted at {self.path}", _MOUNT) from None
            if path.parent.parent.is_dir():
                why, mend = "this kernel has no such event", "use a kernel that has it"
            else:
                why, mend = f"no events of {group!r} are registered", "load the module they are of"
            raise Unavailable(what, why, mend) from None
        except OSError as error:
            why = f"{path}: {error.strerror}"
            raise Unavailable(what, why, open_up(self.path)) from None
        except ValueError as error:
            raise Unavailable(what, f"{path} cannot be understood", str(error)) from None


def open_up(tracefs: Path) -> str:
    """The step that lets another user read a tracefs."""
    return f"mount -o remount,mode=750,gid=GROUP {tracefs} (as root), with a group of yours"

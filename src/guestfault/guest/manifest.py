"""``manifest.json``: what a snapshot says about itself.

::

    {"format": "guestfault snapshot", "version": 1,
     "memory": {"size": 67108864, "page_size": 4096, "sha256": "..."},
     "slots": [{"slot": 0, "guest_phys_addr": 0, "memory_size": 67108864, "offset": 0}],
     "vcpus": {"count": 1, "sha256": "..."},
     "guest": {"mode": "long-cpl3", "walk": "zipf", "seed": 7,
               "checksums": ["0x..."], "final_sha256": "..."}}

``offset`` is where a slot's bytes begin in the file ``memory``.  ``guest`` is ``null`` for a guest
that is not one of the built-in ones.  A reader must refuse a version that it does not know, and
may rely on the rest of what is checked here: types, sizes, and slots that lie in the file and apart
from each other.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final, TypeVar

from guestfault.guest.layout import PAGE_SIZE, Mode
from guestfault.guest.walk import Walk

__all__ = ["FORMAT", "VERSION", "BuiltinGuest", "Manifest", "Slot"]

FORMAT: Final = "guestfault snapshot"
VERSION: Final = 1

_T = TypeVar("_T")


@dataclass(frozen=True)
class Slot:
    """One memory slot: ``memory_size`` bytes at ``offset`` of the memory file, in bytes."""

    slot: int
    guest_phys_addr: int
    memory_size: int
    offset: int


@dataclass(frozen=True)
class BuiltinGuest:
    """Which built-in guest it is, and what must come out of running it.

    ``checksums`` is one per vCPU; ``final_sha256`` the digest of all the memory afterwards.
    """

    mode: Mode
    walk: Walk
    seed: int
    checksums: tuple[int, ...]
    final_sha256: str


@dataclass(frozen=True)
class Manifest:
    """The manifest's content.  Sizes in bytes; digests in hexadecimal."""

    memory_size: int
    memory_sha256: str
    slots: tuple[Slot, ...]
    vcpus: int
    vcpus_sha256: str
    guest: BuiltinGuest | None = None

    def to_json(self) -> str:
        """The file's text."""
        guest = self.guest and {
            "mode": self.guest.mode.value,
            "walk": self.guest.walk.value,
            "seed": self.guest.seed,
            "checksums": [hex(checksum) for checksum in self.guest.checksums],
            "final_sha256": self.guest.final_sha256,
        }
        content = {
            "format": FORMAT,
            "version": VERSION,
            "memory": {
                "size": self.memory_size,
                "page_size": PAGE_SIZE,
                "sha256": self.memory_sha256,
            },
            "slots": [vars(slot) for slot in self.slots],
            "vcpus": {"count": self.vcpus, "sha256": self.vcpus_sha256},
            "guest": guest,
        }
        return json.dumps(content, indent=2) + "\n"

    @staticmethod
    def claims(text: bytes) -> bool:
        """Whether the text is a manifest of this format, of any version and content."""
        try:
            _parse_object(text)
        except ValueError:
            return False
        return True

    @classmethod
    def from_json(cls, text: bytes) -> Manifest:
        """Read the file's text; raises :class:`ValueError` that says what is wrong with it."""
        content = _parse_object(text)
        if content.get("version") != VERSION:
            raise ValueError(
                f"its version is {content.get('version')!r}; this program reads {VERSION}"
            )
        memory = _get(content, "memory", dict)
        if _get(memory, "page_size", int) != PAGE_SIZE:
            raise ValueError(f"its page size is not {PAGE_SIZE}")
        vcpus = _get(content, "vcpus", dict)
        manifest = cls(
            memory_size=_get(memory, "size", int),
            memory_sha256=_get(memory, "sha256", str),
            slots=tuple(_slot(item) for item in _get(content, "slots", list)),
            vcpus=_get(vcpus, "count", int),
            vcpus_sha256=_get(vcpus, "sha256", str),
            guest=_guest(content),
        )
        _check_slots(manifest.slots, manifest.memory_size)
        if manifest.vcpus < 1:
            raise ValueError("it has no vCPUs")
        if manifest.guest and len(manifest.guest.checksums) != manifest.vcpus:
            raise ValueError(f"it needs one checksum for each of its {manifest.vcpus} vCPUs")
        return manifest


def _parse_object(text: bytes) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is not JSON ({error})") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f'its format is not "{FORMAT}"')
    return content


def _get(container: object, name: str, kind: type[_T]) -> _T:
    value = container.get(name) if isinstance(container, dict) else None
    # JSON's true is an int to Python.
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{name!r} is missing or not of type {kind.__name__}")
    return value


def _slot(item: object) -> Slot:
    return Slot(*(_get(item, name, int) for name in Slot.__dataclass_fields__))


def _check_slots(slots: Sequence[Slot], memory_size: int) -> None:
    if not slots:
        raise ValueError("it has no memory slots")
    for slot in slots:
        numbers = (slot.guest_phys_addr, slot.memory_size, slot.offset)
        if slot.slot < 0 or any(number < 0 or number % PAGE_SIZE for number in numbers):
            raise ValueError(f"slot {slot.slot} is not made of whole pages of {PAGE_SIZE} bytes")
        if not slot.memory_size or slot.offset + slot.memory_size > memory_size:
            raise ValueError(f"slot {slot.slot} is empty or not all in the memory file")
    if len({slot.slot for slot in slots}) < len(slots):
        raise ValueError("two slots have the same number")
    for below, above in pairwise(sorted(slots, key=lambda slot: slot.guest_phys_addr)):
        if below.guest_phys_addr + below.memory_size > above.guest_phys_addr:
            raise ValueError(f"slots {below.slot} and {above.slot} overlap")


def _guest(content: dict[str, Any]) -> BuiltinGuest | None:
    if content.get("guest") is None:
        return None
    guest = _get(content, "guest", dict)
    return BuiltinGuest(
        mode=_parse(Mode, _get(guest, "mode", str), "mode"),
        walk=_parse(Walk, _get(guest, "walk", str), "walk"),
        seed=_get(guest, "seed", int),
        checksums=tuple(
            _parse(lambda text: int(text, 16), item, "checksum")
            for item in _get(guest, "checksums", list)
        ),
        final_sha256=_get(guest, "final_sha256", str),
    )


def _parse(parse: Callable[[str], _T], value: str, what: str) -> _T:
    try:
        return parse(value)
    except (TypeError, ValueError):
        raise ValueError(f"{value!r} is not a {what}") from None

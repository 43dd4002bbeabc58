"""Puts a world back to what it was when it was built, instead of building another.

A search needs the same world for each of its schedules, and building one takes as long as twenty of
its steps.  Most of what is built is never touched; what a run can change at all is some sixty
objects.  A :class:`Snapshot` finds them once, by following every reference that leads out of the
world, and keeps what each of them holds; :meth:`Snapshot.restore` writes it back, in place.  The
objects stay who they are, so whatever refers to them, from inside a closure or from another object,
is right again too, and whatever a run has made itself is forgotten with the last reference to it.

What is followed and kept is known type by type:

- attributes of objects, in ``__dict__`` or in slots; not those of a frozen dataclass, of an
  enumeration, of a class or of a module, which a run does not change;
- lists, dictionaries, sets, deques, bytearrays and ctypes structures;
- the variables of closures;
- whether a lock is held: a sleeper's is, until somebody calls.

A world that refers to anything else, a file, a thread or a generator, cannot be put back, and
:class:`CannotRewind` says by which way it does.  Two things are not seen: an attribute that a run
adds to an object (classes here declare theirs, and the tests compare), and what is reached by a
module's name only, like a cache, which a world built anew would find as it is, too.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from types import (
    BuiltinFunctionType,
    CellType,
    FunctionType,
    MappingProxyType,
    MethodType,
    ModuleType,
    SimpleNamespace,
)
from typing import Any

from guestfault.dialect.record import Dialect
from guestfault.explore.scenario import Scenario, World

__all__ = ["CannotRewind", "Snapshot", "Worlds"]

_Lock = type(threading.Lock())
_RLock = type(threading.RLock())

_UNCHANGING = (
    type(None),
    int,
    float,
    str,
    bytes,
    range,
    enum.Enum,
    type,
    ModuleType,
    ContextVar,
    BuiltinFunctionType,
    functools._lru_cache_wrapper,
    _RLock,  # free whenever no actor runs: whoever took it is unwound
)

_PLAIN = frozenset((type(None), bool, int, str, bytes))  # most things are

_Restore = Callable[[Any, Any], None]
_Reference = tuple[str, object]
"""How one gets there from the thing before, and what is there."""
_Path = tuple["_Path | None", str]
"""The way that leads to a thing: the one before, and its last step."""

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: a class made by a class statement, as a rule


class CannotRewind(TypeError):
    """The world refers to something that cannot be put back.

    ``path`` leads to it.  Have the scenario do without, or do not declare its world rewindable.
    """

    def __init__(self, path: str, thing: object) -> None:
        super().__init__(f"{path} is of type {type(thing).__qualname__}, which cannot be rewound")
        self.path = path


class Snapshot:
    """What can be reached from ``root``, as it is now."""

    def __init__(self, root: object) -> None:
        self._kept: list[tuple[_Restore, Any, Any]] = []
        seen: dict[int, object] = {}  # the object too, lest its id become another's
        todo: list[tuple[_Path, object]] = [((None, type(root).__name__), root)]
        while todo:
            path, thing = todo.pop()
            if id(thing) in seen or isinstance(thing, _UNCHANGING):
                continue
            seen[id(thing)] = thing
            found = self._look_at(thing)
            if found is None:
                raise CannotRewind(_written(path), thing)
            for step, referred in found:
                if type(referred) not in _PLAIN:
                    todo.append(((path, step), referred))

    def restore(self) -> None:
        """Put everything back.  Nobody may be in the midst of using it."""
        for restore, thing, held in self._kept:
            restore(thing, held)

    def _keep(self, restore: _Restore, thing: object, held: object) -> None:
        self._kept.append((restore, thing, held))

    def _look_at(self, thing: Any) -> list[_Reference] | None:
        """Keep what a thing holds, and return what it refers to; ``None`` if it is unknown."""
        match thing:
            case dict():
                self._keep(_restore_dict, thing, thing.copy())
                return [*_items(thing), *_items(thing.values())]
            case list():
                self._keep(_restore_list, thing, thing.copy())
                return _items(thing)
            case set():
                self._keep(_restore_set, thing, thing.copy())
                return _items(thing)
            case deque():
                self._keep(_restore_deque, thing, thing.copy())
                return _items(thing)
            case tuple() | frozenset():
                return _items(thing)
            case MappingProxyType():
                return _items(thing.values())
            case bytearray():
                self._keep(_restore_whole, thing, thing.copy())
                return []
            case ctypes.Structure():
                self._keep(_restore_whole, memoryview(thing).cast("B"), bytes(thing))
                return []
            case memoryview():
                return [(".obj", thing.obj)]
            case CellType():
                self._keep(_restore_cell, thing, thing.cell_contents)
                return [("", thing.cell_contents)]
            case FunctionType():
                names = (f" of which {name}" for name in thing.__code__.co_freevars)
                variables = zip(names, thing.__closure__ or (), strict=True)
                return [*variables, *_items(thing.__defaults__ or ())]
            case MethodType():
                return [(".__self__", thing.__self__)]
            case _Lock():
                self._keep(_restore_lock, thing, thing.locked())
                return []
        return self._look_at_attributes(thing)

    def _look_at_attributes(self, thing: Any) -> list[_Reference] | None:
        kind: Any = type(thing)
        if not _is_plain(kind):
            return None
        slots = (name for name in _slots(kind) if hasattr(thing, name))
        names = *slots, *getattr(thing, "__dict__", ())
        values = tuple([getattr(thing, name) for name in names])
        if names and not _is_frozen(kind):
            self._keep(_attribute_setter(names), thing, values)
        return [(f".{name}", value) for name, value in zip(names, values, strict=True)]


class Worlds:
    """The worlds of a search: one that is put back each time, or if it cannot be, one each time."""

    def __init__(self, scenario: Scenario, dialect: Dialect) -> None:
        self.scenario = scenario
        self.dialect = dialect
        self._kept: tuple[World, Snapshot] | None = None

    def fresh(self) -> World:
        """A world as it is when it has just been built; the last one is not used any more."""
        if self._kept is not None:
            world, snapshot = self._kept
            snapshot.restore()
            return world
        world = self.scenario.build(self.dialect)
        if _is_rewindable(type(world)):
            self._kept = world, Snapshot(world)
        return world

    def done_with(self, world: World) -> None:
        """It is over with this one."""
        if self._kept is None:
            world.close()

    def close(self) -> None:
        """It is over with all."""
        if self._kept is not None:
            self._kept[0].close()
            self._kept = None


@functools.cache
def _is_rewindable(kind: type) -> bool:
    return bool(getattr(kind, "rewindable", False))


def _written(path: _Path | None) -> str:
    steps = []
    while path is not None:
        path, step = path
        steps.append(step)
    return "".join(reversed(steps))


def _items(things: Iterable[object]) -> list[_Reference]:
    return [(f"[{i}]", thing) for i, thing in enumerate(things) if type(thing) not in _PLAIN]


@functools.cache
def _slots(kind: type) -> tuple[str, ...]:
    return tuple(name for base in kind.__mro__ for name in vars(base).get("__slots__", ()))


@functools.cache
def _is_plain(kind: type) -> bool:
    """Whether it is written in Python from the bottom up: others may hold what nobody can see."""
    return all(
        base.__flags__ & _HEAP_TYPE and (base.__dictoffset__ or "__slots__" in vars(base))
        for base in kind.__mro__
        if base is not object and base is not SimpleNamespace
    )


@functools.cache
def _is_frozen(kind: type) -> bool:
    """Whether it is a frozen dataclass."""
    parameters = getattr(kind, "__dataclass_params__", None)
    return parameters is not None and parameters.frozen


@functools.cache
def _attribute_setter(names: tuple[str, ...]) -> _Restore:
    """A function that sets these attributes, compiled: a few nanoseconds for each.

    Writing to ``__dict__``, or ``setattr``, takes ten times as long, and there are hundreds.
    """
    text = "def restore(thing, held):\n    "
    text += "".join(f"thing.{name}, " for name in names) + "= held"
    made: dict[str, _Restore] = {}
    exec(text, made)
    return made["restore"]


def _restore_dict(thing: dict[Any, Any], held: dict[Any, Any]) -> None:
    thing.clear()
    thing.update(held)


def _restore_set(thing: set[Any], held: set[Any]) -> None:
    thing.clear()
    thing.update(held)


def _restore_list(thing: list[Any], held: list[Any]) -> None:
    thing.clear()
    thing += held


def _restore_deque(thing: deque[Any], held: deque[Any]) -> None:
    thing.clear()
    thing.extend(held)


def _restore_whole(thing: Any, held: Any) -> None:
    thing[:] = held


def _restore_cell(thing: CellType, held: Any) -> None:
    thing.cell_contents = held


def _restore_lock(thing: threading.Lock, held: bool) -> None:
    if thing.locked() is not held:
        if held:
            thing.acquire()
        else:
            thing.release()

"""What compiled Python needs of the machine: libc by name, memory by address, and one atomic.

Functions of libc are bound by their *names*, which the compiled code on disk can keep; an address
taken through ctypes is another one in every process, and numba would compile anew each time.

numba has no atomics for bytes, so they are told to LLVM here: a load that nothing after it may
overtake, a store that nothing before it may, and compare-and-exchange.  They are what lets vCPUs
and Python agree, without a lock, on who fills a page.

numba looks at a function's own file only to tell whether its code on disk is still good.  But that
code has other files' functions and constants in it: words of another layout would be read and
written, and nobody would be told.  So all files that it may have them from count here.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, TypeVar, cast

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

__all__ = [
    "clock_gettime",
    "compare_exchange",
    "compiled",
    "errno_location",
    "ioctl",
    "load8",
    "load16",
    "load32",
    "load64",
    "madvise",
    "memcpy",
    "poll",
    "pread",
    "read",
    "store8",
]

_F = TypeVar("_F", bound=Callable[..., Any])
_i32, _i64 = types.int32, types.int64


def _sources() -> tuple[tuple[str, int, int], ...]:
    """Name, time of the last change and size of each file that compiled code may depend on."""
    paging = Path(__file__).parent
    files = sorted([*paging.glob("*.py"), *(paging.parent / "uapi").glob("*.py")])
    stats = [(str(file), file.stat()) for file in files]
    return tuple((name, stat.st_mtime_ns, stat.st_size) for name, stat in stats)


SOURCES: Final = _sources()


def compiled(function: _F) -> _F:
    """Compile a function at its first call, or take it from disk; it runs without the GIL."""
    made: Any = njit(nogil=True, cache=True)(function)
    try:
        file = made._cache._cache_file
        file._source_stamp = (file._source_stamp, SOURCES)
    except AttributeError:  # a numba that does it otherwise: better compiled each time than wrong
        made = njit(nogil=True)(function)
    return cast(_F, made)


# Addresses are integers: as arguments they are passed as pointers are.
ioctl: Any = types.ExternalFunction("ioctl", _i32(_i32, _i64, _i64))
errno_location: Any = types.ExternalFunction("__errno_location", _i64())
clock_gettime: Any = types.ExternalFunction("clock_gettime", _i32(_i32, _i64))
memcpy: Any = types.ExternalFunction("memcpy", _i64(_i64, _i64, _i64))
pread: Any = types.ExternalFunction("pread64", _i64(_i32, _i64, _i64, _i64))
read: Any = types.ExternalFunction("read", _i64(_i32, _i64, _i64))
poll: Any = types.ExternalFunction("poll", _i32(_i64, _i64, _i32))
madvise: Any = types.ExternalFunction("madvise", _i32(_i64, _i64, _i32))


def _load(bits: int, signed: bool, ordering: str = "") -> Any:
    """A load from an address, as an int64."""

    def typed(_context: Any, _address: Any) -> Any:
        def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
            kind = ir.IntType(bits)
            pointer = builder.inttoptr(args[0], kind.as_pointer())
            if ordering:
                value = builder.load_atomic(pointer, ordering, align=bits // 8)
            else:
                value = builder.load(pointer)
            if bits == 64:
                return value
            extend = builder.sext if signed else builder.zext
            return extend(value, ir.IntType(64))

        return _i64(_i64), generate

    return intrinsic(typed)


load8: Any = _load(8, signed=False, ordering="acquire")
load16: Any = _load(16, signed=False)
load32: Any = _load(32, signed=True)
load64: Any = _load(64, signed=True)


def _store8(_context: Any, _address: Any, _value: Any) -> Any:
    """Store a byte, after everything before it."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        byte = ir.IntType(8)
        pointer = builder.inttoptr(args[0], byte.as_pointer())
        builder.store_atomic(builder.trunc(args[1], byte), pointer, "release", align=1)
        return ir.Constant(ir.IntType(64), 0)

    return _i64(_i64, _i64), generate


def _compare_exchange(_context: Any, _address: Any, _expected: Any, _new: Any) -> Any:
    """Make the byte at an address ``new`` if it is ``expected``; whether it was."""

    def generate(_context: Any, builder: Any, _signature: Any, args: Any) -> Any:
        byte = ir.IntType(8)
        pointer = builder.inttoptr(args[0], byte.as_pointer())
        expected, new = (builder.trunc(arg, byte) for arg in args[1:])
        pair = builder.cmpxchg(pointer, expected, new, "acq_rel", "acquire")
        return builder.extract_value(pair, 1)

    return types.boolean(_i64, _i64, _i64), generate


store8: Any = intrinsic(_store8)
compare_exchange: Any = intrinsic(_compare_exchange)

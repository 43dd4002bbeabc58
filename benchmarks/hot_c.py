"""``hot_loop.c``, compiled and loaded: the loops of both ways in C, and the parts of a fault."""

from __future__ import annotations

import ctypes
import subprocess
import zlib
from collections.abc import Callable
from pathlib import Path

from guestfault.bench.compiled import Functions
from guestfault.errors import Unavailable
from guestfault.paging import hot, hot_words
from guestfault.paging.histogram import SUB_BITS
from guestfault.uapi import kvm, userfaultfd

_SOURCE = Path(__file__).with_name("hot_loop.c")


def build(library: Path) -> None:
    """Compile it for the words as they are now."""
    defines = [f"-D{name}={value}L" for name, value in _defines().items()]
    command = ["cc", "-O2", "-Wall", "-shared", "-fPIC", *defines, f"-DBUILT_FOR={_digest()}"]
    subprocess.run([*command, str(_SOURCE), "-o", str(library)], check=True)


def _defines() -> dict[str, int]:
    names = {n: v for n, v in vars(hot_words).items() if n.isupper() and isinstance(v, int)}
    return names | {
        "SUB_BITS": SUB_BITS,
        "SREGS_OFFSET": kvm.kvm_run.s.offset + kvm.kvm_sync_regs.sregs.offset,
        "UFFDIO_CONTINUE_": userfaultfd.UFFDIO_CONTINUE,  # older headers have none
    }


def _digest() -> int:
    return zlib.crc32(repr(sorted(_defines().items())).encode() + _SOURCE.read_bytes()) >> 1


class CLoops:
    """The functions of a library that :func:`build` has made, here or elsewhere.

    Raises :class:`~guestfault.errors.Unavailable` if it was made from other sources.
    """

    def __init__(self, library: Path) -> None:
        self._loaded = ctypes.CDLL(str(library))  # lets go of the GIL for a call
        built_for = ctypes.c_int.in_dll(self._loaded, "hot_built_for").value
        if built_for != _digest():
            raise Unavailable(str(library), "it is of other sources", "build it again")
        self.functions = Functions("C", self._loop("hot_run"), self._loop("hot_serve"))
        self.round_trips: Callable[[int, int, int], int] = self._function("hot_round_trips")
        """(vCPU's descriptor, times, errno): nanoseconds of so many KVM_RUNs that all end so."""
        self._let_in = self._function("hot_let_in")
        self._walk = self._function("hot_walk")

    def let_in(self, words: hot.Words, first: int, pages: int) -> int:
        """Nanoseconds in which userfaultfd lets so many pages in, one by one."""
        return self._let_in(words.ctypes.data, first, pages)

    def walk(self, words: hot.Words, first: int, pages: int) -> int:
        """Nanoseconds of KVM_RUN alone, while a guest fails at each of these pages in turn."""
        return self._walk(words.ctypes.data, first, pages)

    def _function(self, name: str) -> Callable[[int, int, int], int]:
        function = getattr(self._loaded, name)
        function.restype = ctypes.c_int64
        function.argtypes = [ctypes.c_int64] * 3
        return function  # type: ignore[no-any-return]

    def _loop(self, name: str) -> Callable[[hot.Words, hot.Words], int]:
        function = getattr(self._loaded, name)
        function.restype = ctypes.c_int64
        function.argtypes = [ctypes.c_int64, ctypes.c_int64]
        return lambda words, histogram: function(words.ctypes.data, histogram.ctypes.data)

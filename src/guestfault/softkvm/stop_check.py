"""How another thread stops the engine: a flag that every block of guest code looks at.

``uc_emu_stop`` from another thread is not sound.  Translated code checks for it after each memory
access, in the middle of an instruction, and leaves with RIP where it was: a read-modify-write that
has stored its result is executed once more when the guest goes on (Unicorn 2.1.4).  Called from a
hook at the beginning of a block it is exact.

So there is a hook on every block, and it must cost next to nothing: five instructions of machine
code that look at a 32-bit flag and, if it is set, tail-call ``uc_emu_stop``.  On a guest that loops
over memory that is some five percent; the loop of three instructions, the worst there is, takes
three times as long (``benchmarks/softkvm.py``).  On a host that is no x86-64 the hook is Python.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import platform
from typing import Any

from unicorn.unicorn_py3.unicorn import uclib

__all__ = ["StopFlag"]

_HOOK = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32, ctypes.c_void_p)
_emu_stop = ctypes.PyDLL(None, handle=uclib._handle)["uc_emu_stop"]
_emu_stop.argtypes = [ctypes.c_void_p]


class StopFlag:
    """One engine's flag.  ``callback`` and ``data`` are what ``uc_hook_add`` takes."""

    def __init__(self) -> None:
        self._flag = ctypes.c_uint32(0)
        self.data = ctypes.addressof(self._flag)
        if platform.machine() == "x86_64":
            self.callback: Any = ctypes.c_void_p(ctypes.addressof(_native_check()))
        else:
            self.callback = _HOOK(self._check)

    def set(self) -> None:
        """From any thread: the next block stops the engine before it runs."""
        self._flag.value = 1

    def clear(self) -> None:
        """The engine has stopped, or nobody needs it to."""
        self._flag.value = 0

    def _check(self, engine: Any, _address: int, _size: int, _data: Any) -> None:
        if self._flag.value:
            _emu_stop(engine)


@functools.cache
def _native_check() -> ctypes.Array[ctypes.c_char]:
    """``void (uc_engine *rdi, uint64_t rsi, uint32_t edx, uint32_t *rcx)``, once per process."""
    emu_stop = ctypes.cast(_emu_stop, ctypes.c_void_p).value or 0
    code = (
        bytes.fromhex("83 39 00")  # cmp dword [rcx], 0
        + bytes.fromhex("75 01")  # jne +1
        + bytes.fromhex("c3")  # ret
        + bytes.fromhex("48 b8")  # mov rax, uc_emu_stop
        + emu_stop.to_bytes(8, "little")
        + bytes.fromhex("ff e0")  # jmp rax
    )
    page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page[: len(code)] = code
    return (ctypes.c_char * len(code)).from_buffer(page)

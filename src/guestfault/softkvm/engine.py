"""Unicorn's C interface, as much of it as a processor needs.

Why not its Python binding: that looks every register up in lists (4 us where the call takes 0.2),
drops what a hook raises if the engine has an error of its own to report, as a refused access does,
and ties the engine and its hooks into a cycle that keeps guest memory mapped until the garbage
collector comes by.  Here a hook's exception comes out of :meth:`Engine.start`, and
:meth:`Engine.close` frees everything at once.

Calls that return at once keep the GIL: giving it up and waiting for it again costs more than they
do.  Only :meth:`Engine.start` runs without it, and takes it for the hooks.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import unicorn
from unicorn import unicorn_const as uc_const
from unicorn import x86_const as ux
from unicorn.unicorn_py3.unicorn import uclib

from guestfault.errors import GuestfaultError
from guestfault.softkvm.stop_check import StopFlag

__all__ = ["Engine", "EngineError", "Registers", "State"]

_MEM_WRITE = int(unicorn.UC_MEM_WRITE)

_quick = ctypes.PyDLL(None, handle=uclib._handle)
_slow = ctypes.CDLL(None, handle=uclib._handle)


def _function(library: ctypes.CDLL, name: str, *argtypes: Any) -> Any:
    function = library[name]  # by item: a function object of our own, not the binding's
    function.argtypes = argtypes
    return function


_u64, _ptr, _int = ctypes.c_uint64, ctypes.c_void_p, ctypes.c_int
_open = _function(_quick, "uc_open", _int, _int, _ptr)
_close = _function(_quick, "uc_close", _ptr)
_ctl = _function(_quick, "uc_ctl", _ptr, ctypes.c_uint)
_hook_add = _function(_quick, "uc_hook_add", _ptr, _ptr, _int, _ptr, _ptr, _u64, _u64)
_hook_del = _function(_quick, "uc_hook_del", _ptr, ctypes.c_size_t)
_mem_map_ptr = _function(_quick, "uc_mem_map_ptr", _ptr, _u64, _u64, ctypes.c_uint32, _ptr)
_mem_unmap = _function(_quick, "uc_mem_unmap", _ptr, _u64, _u64)
_mmio_map = _function(_quick, "uc_mmio_map", _ptr, _u64, _u64, _ptr, _ptr, _ptr, _ptr)
_reg_read = _function(_quick, "uc_reg_read", _ptr, _int, _ptr)
_reg_write = _function(_quick, "uc_reg_write", _ptr, _int, _ptr)
_reg_read_batch = _function(_quick, "uc_reg_read_batch", _ptr, _ptr, _ptr, _int)
_reg_write_batch = _function(_quick, "uc_reg_write_batch", _ptr, _ptr, _ptr, _int)
_context_size = _function(_quick, "uc_context_size", _ptr)
_context_size.restype = ctypes.c_size_t
_context_alloc = _function(_quick, "uc_context_alloc", _ptr, _ptr)
_context_free = _function(_quick, "uc_context_free", _ptr)
_context_save = _function(_quick, "uc_context_save", _ptr, _ptr)
_context_restore = _function(_quick, "uc_context_restore", _ptr, _ptr)
_emu_start = _function(_slow, "uc_emu_start", _ptr, _u64, _u64, _u64, ctypes.c_size_t)
_emu_stop = _function(_quick, "uc_emu_stop", _ptr)
_strerror = _function(_quick, "uc_strerror", _int)
_strerror.restype = ctypes.c_char_p


class _TlbEntry(ctypes.Structure):
    _fields_ = [("paddr", ctypes.c_uint64), ("perms", ctypes.c_uint32)]


class _Block(ctypes.Structure):
    _fields_ = [("pc", ctypes.c_uint64), ("icount", ctypes.c_uint16), ("size", ctypes.c_uint16)]


_TLB_FILL = ctypes.CFUNCTYPE(
    ctypes.c_bool, _ptr, _u64, _int, ctypes.POINTER(_TlbEntry), ctypes.c_void_p
)
_INTERRUPT = ctypes.CFUNCTYPE(None, _ptr, ctypes.c_uint32, _ptr)
_CODE = ctypes.CFUNCTYPE(None, _ptr, _u64, ctypes.c_uint32, _ptr)
_EDGE = ctypes.CFUNCTYPE(None, _ptr, ctypes.POINTER(_Block), _ptr, _ptr)
_ACCESS = ctypes.CFUNCTYPE(None, _ptr, _int, _u64, _int, ctypes.c_int64, _ptr)
_MMIO_READ = ctypes.CFUNCTYPE(_u64, _ptr, _u64, ctypes.c_uint, _ptr)
_MMIO_WRITE = ctypes.CFUNCTYPE(None, _ptr, _u64, ctypes.c_uint, _u64, _ptr)


class EngineError(GuestfaultError):
    """Unicorn refused a call: ``call`` names it, ``status`` is its ``UC_ERR_*``."""

    def __init__(self, call: str, status: int) -> None:
        self.call = call
        self.status = status
        super().__init__(f"{call}: {error_text(status)}")


def error_text(status: int) -> str:
    """What Unicorn says of a status."""
    return str(_strerror(status).decode())


def _check(call: str, status: int) -> None:
    if status:
        raise EngineError(call, status)


class Registers:
    """A fixed choice of registers, read and written in one call, ``width`` bytes each."""

    def __init__(self, engine: Engine, ids: list[int], width: int = 8) -> None:
        self._engine = engine
        self._count = len(ids)
        self._ids = (ctypes.c_int * len(ids))(*ids)
        self._bytes = (ctypes.c_ubyte * (width * len(ids)))()
        self.values = memoryview(self._bytes).cast("B").cast("Q")
        """As 64-bit words; what :meth:`read` read, and what :meth:`write` writes."""
        at = ctypes.addressof(self._bytes)
        self._places = (_ptr * len(ids))(*range(at, at + len(self._bytes), width))

    def read(self) -> None:
        """Fill :attr:`values`."""
        _reg_read_batch(self._engine.handle, self._ids, self._places, self._count)

    def write(self) -> None:
        """Write :attr:`values`."""
        _reg_write_batch(self._engine.handle, self._ids, self._places, self._count)


class State:
    """Room for a copy of the processor's whole state.  Lives as long as its engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._context = _ptr()
        _check("uc_context_alloc", _context_alloc(engine.handle, ctypes.byref(self._context)))
        self.size = int(_context_size(engine.handle))
        weakref.finalize(self, _context_free, self._context)

    def save(self) -> None:
        """Copy the state in."""
        _context_save(self._engine.handle, self._context)

    def restore(self) -> None:
        """Put the processor back to it."""
        _context_restore(self._engine.handle, self._context)

    def bytes_at(self, offset: int, size: int) -> bytes:
        """A part of the copy, as Unicorn lays it out."""
        return ctypes.string_at((self._context.value or 0) + offset, size)


class Engine:
    """One emulated x86 processor with no memory.  ``model`` is a ``UC_CPU_X86_*``.

    Nothing ends a run but a hook, :meth:`stop` and errors.
    """

    def __init__(self, model: int) -> None:
        handle = _ptr()
        _check(
            "uc_open",
            _open(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64, ctypes.byref(handle)),
        )
        self.handle = handle
        self._finalizer = weakref.finalize(self, _close, handle)
        self._hooks: dict[int, Any] = {}
        self._raised: BaseException | None = None
        self._word = _u64()
        self._word_at = ctypes.byref(self._word)
        self._control(uc_const.UC_CTL_CPU_MODEL, model)
        self._control(uc_const.UC_CTL_TLB_TYPE, unicorn.UC_TLB_VIRTUAL)
        # Otherwise a block that halts is planted at the address that ends a run.
        self._control(uc_const.UC_CTL_UC_USE_EXITS, 1)
        self._stop_flag = StopFlag()
        self._hook(unicorn.UC_HOOK_BLOCK, self._stop_flag.callback, data=self._stop_flag.data)

    def close(self) -> None:
        """Free it, with what its hooks refer to.  May be called again."""
        self._finalizer()
        self._hooks.clear()

    # -- memory ---------------------------------------------------------------------------------

    def map(self, address: int, size: int, hva: int) -> None:
        """Put host memory at a physical address; access rights are the TLB's business."""
        status = _mem_map_ptr(self.handle, address, size, unicorn.UC_PROT_ALL, hva)
        _check("uc_mem_map_ptr", status)

    def unmap(self, address: int, size: int) -> None:
        """Take it away again."""
        _check("uc_mem_unmap", _mem_unmap(self.handle, address, size))

    def map_devices(
        self,
        address: int,
        size: int,
        read: Callable[[int, int], int],
        write: Callable[[int, int, int], None],
    ) -> None:
        """``read(offset, size)`` and ``write(offset, size, value)`` for a range of addresses."""

        # Here too without the guard, for the same reason as in hook_tlb_fill().
        def on_read(_uc: Any, offset: int, size: int, _data: Any) -> int:
            try:
                return read(offset, size)
            except BaseException as e:
                self._raise_later(e)
                return 0

        def on_write(_uc: Any, offset: int, size: int, value: int, _data: Any) -> None:
            try:
                write(offset, size, value)
            except BaseException as e:
                self._raise_later(e)

        callbacks = _MMIO_READ(on_read), _MMIO_WRITE(on_write)
        self._hooks[-1] = callbacks
        status = _mmio_map(self.handle, address, size, callbacks[0], None, callbacks[1], None)
        _check("uc_mmio_map", status)

    def flush_tlb(self) -> None:
        """Forget every translation of an address."""
        self._control(uc_const.UC_CTL_TLB_FLUSH)

    def flush_code(self) -> None:
        """Forget every translation of code."""
        self._control(uc_const.UC_CTL_TB_FLUSH)

    # -- registers --------------------------------------------------------------------------------

    def read(self, register: int) -> int:
        """A register of up to 64 bits."""
        self._word.value = 0
        _reg_read(self.handle, register, self._word_at)
        return self._word.value

    def reader(self, register: int) -> Callable[[], int]:
        """:meth:`read` of one register that is read all the time, at half its cost."""
        read, handle, word = _reg_read, self.handle, _u64()
        at = ctypes.byref(word)

        def read_register() -> int:
            read(handle, register, at)
            return word.value

        return read_register

    def write(self, register: int, value: int) -> None:
        """Write a register of up to 64 bits."""
        self._word.value = value
        _reg_write(self.handle, register, self._word_at)

    def read_table_register(self, register: int) -> tuple[int, int]:
        """Base and limit of GDTR or IDTR."""
        buffer = (ctypes.c_uint64 * 3)()
        _reg_read(self.handle, register, buffer)
        return buffer[1], buffer[2] & 0xFFFFFFFF

    def write_msr(self, index: int, value: int) -> None:
        """WRMSR, as outside a guest."""
        buffer = (ctypes.c_uint64 * 2)(index, value)
        _check("WRMSR", _reg_write(self.handle, ux.UC_X86_REG_MSR, buffer))

    def read_msr(self, index: int) -> int:
        """RDMSR, as outside a guest."""
        buffer = (ctypes.c_uint64 * 2)(index, 0)
        _check("RDMSR", _reg_read(self.handle, ux.UC_X86_REG_MSR, buffer))
        return buffer[1]

    # -- running ----------------------------------------------------------------------------------

    def start(self, rip: int) -> int:
        """Run from RIP on until something ends it: a ``UC_ERR_*``, 0 for a stop.

        Raises what a hook raised.  The GIL is free meanwhile.
        """
        status = int(_emu_start(self.handle, rip, 0, 0, 0))
        self._stop_flag.clear()
        if self._raised is not None:
            raised, self._raised = self._raised, None
            raise raised
        return status

    def stop(self) -> None:
        """From any thread: end the run in progress, or else the next, at the end of a block."""
        self._stop_flag.set()

    def forget_stop(self) -> None:
        """Take back a :meth:`stop` that has ended no run."""
        self._stop_flag.clear()

    def stop_here(self) -> None:
        """From a hook: end the run before, or after, the instruction that the hook is about."""
        _emu_stop(self.handle)

    # -- hooks: called on the running thread -------------------------------------------------------

    def hook_tlb_fill(self, fill: Callable[[int, int], tuple[int, int] | None]) -> None:
        """``fill(address, access)`` gives (physical page, rights), or ``None``: the run fails."""

        def on_miss(_uc: Any, address: int, access: int, entry: Any, _data: Any) -> bool:
            # Without the guard, which would cost a third of what the hook does.
            try:
                answer = fill(address, access)
            except BaseException as e:
                self._raise_later(e)
                return False
            if answer is None:
                return False
            found = entry[0]
            found.paddr, found.perms = answer
            return True

        self._hook(unicorn.UC_HOOK_TLB_FILL, _TLB_FILL(on_miss))

    def hook_interrupt(self, function: Callable[[int], None]) -> None:
        """``function(number)`` on an interrupt or a #VMEXIT."""

        def on_interrupt(_uc: Any, number: int, _data: Any) -> None:
            with self._guard():
                function(number)

        self._hook(unicorn.UC_HOOK_INTR, _INTERRUPT(on_interrupt))

    def hook_new_block(self, function: Callable[[int, int], None]) -> None:
        """``function(address, size)`` on code that has been translated and has not run."""

        def on_edge(_uc: Any, block: Any, _previous: Any, _data: Any) -> None:
            with self._guard():
                function(block[0].pc, block[0].size)

        self._hook(unicorn.UC_HOOK_EDGE_GENERATED, _EDGE(on_edge))

    def hook_instruction(self, address: int, function: Callable[[], None]) -> int:
        """``function()`` before the instruction there, once its block is translated anew."""

        def on_code(_uc: Any, _address: int, _size: int, _data: Any) -> None:
            with self._guard():
                function()

        return self._hook(unicorn.UC_HOOK_CODE, _CODE(on_code), address, address)

    def accesses_callback(self, function: Callable[[bool, int, int], None]) -> Any:
        """What :meth:`hook_accesses` takes: ``function(is_write, physical address, size)``."""

        def on_access(
            _uc: Any, kind: int, address: int, size: int, _value: int, _data: Any
        ) -> None:
            try:
                function(kind == _MEM_WRITE, address, size)
            except BaseException as e:
                self._raise_later(e)

        return _ACCESS(on_access)

    def hook_accesses(self, callback: Any) -> int:
        """Call back before each access to data.

        Not before each one to RAM: some of those are made without asking anybody.
        """
        return self._hook(unicorn.UC_HOOK_MEM_READ | unicorn.UC_HOOK_MEM_WRITE, callback)

    def unhook(self, hook: int) -> None:
        """Remove it."""
        _check("uc_hook_del", _hook_del(self.handle, hook))
        del self._hooks[hook]

    def _hook(
        self, kind: int, callback: Any, begin: int = 1, end: int = 0, data: int | None = None
    ) -> int:
        hook = ctypes.c_size_t()
        status = _hook_add(self.handle, ctypes.byref(hook), kind, callback, data, begin, end)
        _check("uc_hook_add", status)
        self._hooks[hook.value] = callback
        return hook.value

    @contextlib.contextmanager
    def _guard(self) -> Iterator[None]:
        """What is raised inside comes out of :meth:`start`; C code cannot pass it on."""
        try:
            yield
        except BaseException as e:
            self._raise_later(e)

    def _raise_later(self, error: BaseException) -> None:
        if self._raised is None:
            self._raised = error
        self.stop_here()

    def _control(self, what: int, *values: int) -> None:
        code = what | len(values) << 26 | uc_const.UC_CTL_IO_WRITE << 30
        _check("uc_ctl", _ctl(self.handle, code, *map(ctypes.c_uint64, values)))

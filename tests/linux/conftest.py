"""What the tests of this room share: guest memory mapped twice, threads that may block, children.

No test touches a registered page from Python code itself: an access is made by the kernel for us
(``process_memory``, ``populate_*``), in a thread, without the GIL.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from mmap import PAGESIZE
from typing import Any

import pytest

from guestfault.errors import Unavailable
from guestfault.linux.mapping import Mapping
from guestfault.linux.memfd import Memfd
from guestfault.linux.userfaultfd import Userfaultfd

PAGES = 8


@dataclass
class Ram:
    """A memfd of 8 pages and its two views; only ``guest`` is ever registered."""

    file: Memfd
    host: Mapping
    guest: Mapping

    def fill(self, page: int, byte: int) -> None:
        """Put a page into the page cache."""
        self.host.view()[page * PAGESIZE : (page + 1) * PAGESIZE] = bytes([byte]) * PAGESIZE

    def page(self, page: int) -> int:
        """Its address in the guest view."""
        return self.guest.address + page * PAGESIZE


@pytest.fixture
def ram() -> Iterator[Ram]:
    with (
        Memfd("test-ram", PAGES * PAGESIZE) as file,
        Mapping.from_memfd(file) as host,
        Mapping.from_memfd(file) as guest,
    ):
        guest.no_hugepage()
        yield Ram(file, host, guest)


@pytest.fixture
def open_uffd() -> Iterator[Callable[..., Userfaultfd]]:
    """``Userfaultfd.open``, closed at the end, which wakes whoever still sleeps."""
    opened: list[Userfaultfd] = []

    def open_(*args: Any, **kwargs: Any) -> Userfaultfd:
        try:
            uffd = Userfaultfd.open(*args, **kwargs)
        except Unavailable as e:
            pytest.skip(f"needs userfaultfd: {e}")
        opened.append(uffd)
        return uffd

    yield open_
    for uffd in opened:
        uffd.close()


class Running:
    """A call in another thread; :meth:`result` waits for it."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._result: Any = None
        self._thread = threading.Thread(target=self._run, args=(function, args), daemon=True)
        self._thread.start()

    def _run(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        self._result = function(*args)

    @property
    def thread_id(self) -> int | None:
        return self._thread.native_id

    @property
    def ident(self) -> int:
        assert self._thread.ident is not None
        return self._thread.ident

    def sleeps(self, seconds: float = 0.05) -> bool:
        """Whether it has not come back within that time."""
        self._thread.join(seconds)
        return self._thread.is_alive()

    def result(self) -> Any:
        self._thread.join(10)
        assert not self._thread.is_alive(), "the thread never came back"
        return self._result


@pytest.fixture
def start() -> Callable[..., Running]:
    return Running


# Installs a seccomp filter: each rule (system call, argument 2 or None, errno) refuses that call.
_SECCOMP = """
import ctypes, struct
def refuse(rules):
    code = b""
    op = lambda c, jt, jf, k: struct.pack("<HBBI", c, jt, jf, k)
    for nr, advice, errno in rules:
        code += op(0x20, 0, 0, 0) + op(0x15, 0, 3 if advice is not None else 1, nr)
        if advice is not None:
            code += op(0x20, 0, 0, 16 + 2 * 8) + op(0x15, 0, 1, advice)
        code += op(0x06, 0, 0, 0x00050000 | errno)
    code += op(0x06, 0, 0, 0x7fff0000)
    libc = ctypes.CDLL(None, use_errno=True)
    program = ctypes.create_string_buffer(code)
    fprog = struct.pack("<HxxxxxxQ", len(code) // 8, ctypes.addressof(program))
    assert libc.prctl(38, 1, 0, 0, 0) == 0
    assert libc.prctl(22, 2, fprog, 0, 0) == 0
"""


@pytest.fixture
def child() -> Callable[..., str]:
    """Run Python code in a child, unprivileged or under a seccomp filter; what it printed.

    ``ready`` runs first, with all rights; ``code`` after they are gone.
    """

    def run(
        ready: str,
        code: str,
        *,
        unprivileged: bool = False,
        refuse: tuple[tuple[int, int | None, int], ...] = (),
    ) -> str:
        lines = [_SECCOMP, ready]
        if unprivileged:
            if os.geteuid() == 0:
                lines.append("import os; os.setgroups([]); os.setresgid(*[65534] * 3)")
                lines.append("os.setresuid(*[65534] * 3)")
            else:
                pytest.skip("needs root, to give up its rights in a child")
        if refuse:
            lines.append(f"refuse({refuse!r})")
        source = "\n".join([*lines, code])
        done = subprocess.run(
            [sys.executable, "-c", source],
            capture_output=True,
            text=True,
            timeout=30,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run

"""Snapshots of built-in guests, made once; the KVMs of this machine; a source that can break."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from guestfault.errors import Unavailable
from guestfault.fault.locate.run_trace import RunTrace
from guestfault.guest.layout import Layout
from guestfault.guest.layout import Mode as GuestMode
from guestfault.guest.snapshot import Snapshot, build
from guestfault.guest.walk import Walk
from guestfault.kvm.protocols import System
from guestfault.kvm.system import KvmSystem
from guestfault.linux.tracefs import Tracefs
from guestfault.linux.userfaultfd import Userfaultfd
from guestfault.memory.ram import PAGE_SIZE
from guestfault.paging.source.file import FileSource
from guestfault.paging.source.function import FunctionSource
from guestfault.softkvm.system import SoftSystem
from guestfault.vmm.session import Mode, Session

Make = Callable[..., Snapshot]


@pytest.fixture(scope="session")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """``snapshot(size, mode, walk, vcpus)``: a built-in guest, made at the first demand."""
    made: dict[tuple[object, ...], Snapshot] = {}
    directory = tmp_path_factory.mktemp("snapshots")

    def make(
        size: int = 1 << 20,
        mode: GuestMode = GuestMode.LONG_CPL3,
        walk: Walk = Walk.SEQUENTIAL,
        vcpus: int = 1,
    ) -> Snapshot:
        key = (size, mode, walk, vcpus)
        if key not in made:
            made[key] = build(directory / str(len(made)), size, mode, walk, vcpus)
        return made[key]

    return make


@pytest.fixture
def open_system() -> Iterator[Callable[..., System]]:
    """``open_system("seed" | "linux-6.8" | "kvm", mode)``; skips what this machine has not got."""
    opened: list[System] = []

    def open_(name: str, mode: Mode = Mode.EXIT) -> System:
        try:
            if mode is Mode.UFFD:
                Userfaultfd.open().close()
            system: System = KvmSystem() if name == "kvm" else SoftSystem(name)
        except Unavailable as error:
            pytest.skip(str(error))
        opened.append(system)
        return system

    yield open_
    for system in opened:
        system.close()


@pytest.fixture(scope="session")
def session_of() -> Callable[..., object]:
    """``with session_of(system, snapshot, mode) as session``, with pages from the snapshot."""

    @contextmanager
    def open_(
        system: System, snapshot: Snapshot, mode: Mode = Mode.EXIT, *, locate: bool = True
    ) -> Iterator[Session]:
        source = FileSource(snapshot.open_memory())
        try:
            with Session(system, snapshot, source, mode, locate=locate) as session:
                yield session
        finally:
            source.close()

    return open_


class BreakableSource(FunctionSource):
    """A snapshot's memory, with pages in ``broken`` that cannot be had.  Counts what it gave."""

    def __init__(self, snapshot: Snapshot, broken: set[int]) -> None:
        self.memory = Path(snapshot.memory_path).read_bytes()
        self.broken = broken
        self.given: Counter[int] = Counter()
        super().__init__(len(self.memory), self._read_page)

    def _read_page(self, offset: int, length: int) -> bytes:
        pages = range(offset // PAGE_SIZE, (offset + length) // PAGE_SIZE)
        if not self.broken.isdisjoint(pages):
            raise OSError(5, "Input/output error")
        self.given.update(pages)
        return self.memory[offset : offset + length]


@pytest.fixture(scope="session")
def breakable() -> type[BreakableSource]:
    return BreakableSource


@pytest.fixture(scope="session")
def layout_of() -> Callable[[Snapshot], Layout]:
    def layout(snapshot: Snapshot) -> Layout:
        assert snapshot.guest is not None
        return Layout(snapshot.memory_size, snapshot.guest.mode, len(snapshot.vcpus))

    return layout


@pytest.fixture
def traced(tracefs: Tracefs, monkeypatch: pytest.MonkeyPatch) -> Tracefs:
    """This machine's tracefs is found, and this process may listen to KVM's events."""
    try:
        RunTrace(tracefs).close()
    except Unavailable as error:
        pytest.skip(str(error))
    monkeypatch.setattr(Tracefs, "find", lambda: tracefs)
    return tracefs


@pytest.fixture
def stopped_at_once() -> Callable[[Session, float], None]:
    """``stopped_at_once(session, seconds)``: run it, and stop it after so long; it ends then."""

    def look(session: Session, seconds: float) -> None:
        timer = threading.Timer(seconds, session.stop)
        timer.start()
        began = time.monotonic()
        assert not session.run()
        assert time.monotonic() - began < 1.5
        timer.join()
        assert session.failure is None

    return look

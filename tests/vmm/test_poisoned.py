"""A guest that meets a page of broken memory: the run says which, keeps its count, and can go on.

The pages are poisoned with ``UFFDIO_POISON``, which is to KVM what failed memory is.  (Only in a
KVM that does not exit for a missing page: there the pager would be asked first, whose
``UFFDIO_CONTINUE`` puts a page in the marker's place.)
"""

from __future__ import annotations

import ctypes
import errno
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from guestfault.errors import KernelError, Unavailable
from guestfault.fault.access import AccessKind, FoundBy
from guestfault.fault.cause.record import Kind, Remedy
from guestfault.guest.layout import Mode as GuestMode
from guestfault.guest.snapshot import Snapshot
from guestfault.guest.walk import Walk
from guestfault.kvm.system import KvmSystem
from guestfault.linux.ioctl import call, libc
from guestfault.linux.sigbus import send_sigbus
from guestfault.linux.userfaultfd import Feature, Userfaultfd
from guestfault.memory.ram import PAGE_SIZE
from guestfault.paging.source.file import FileSource
from guestfault.paging.source.function import FunctionSource
from guestfault.uapi import mman
from guestfault.vmm.compiled import Loop
from guestfault.vmm.errors import PoisonedPageError
from guestfault.vmm.report import LostPage, report
from guestfault.vmm.session import Mode, Session
from guestfault.vmm.text import as_text

SIZE = 1 << 20
pytestmark = pytest.mark.timeout(120)
every_kvm = pytest.mark.parametrize("kvm", ["linux-6.8", "kvm"])


@pytest.fixture(autouse=True)
def poison() -> None:
    try:
        Userfaultfd.open(required=Feature.POISON, user_mode_only=True).close()
    except Unavailable as error:
        pytest.skip(f"needs UFFDIO_POISON: {error}")


@pytest.fixture(autouse=True)
def nobody_else_is_told() -> Iterator[None]:
    """No SIGBUS gets to the process, whose end it would be."""
    delivered: list[int] = []
    before = signal.signal(signal.SIGBUS, lambda number, _: delivered.append(number))
    yield
    signal.signal(signal.SIGBUS, before)
    assert delivered == []


def poisoned(session: Session, page: int) -> int:
    """Poison a page that is not in yet; its host address."""
    hva = session.ram.guest.address + page * PAGE_SIZE
    assert session.view.uffd.poison(hva, PAGE_SIZE).done == PAGE_SIZE
    return hva


def mend(hva: int) -> None:
    """Take the marker away; the page is absent then, and comes in from the source."""
    page = ctypes.c_void_p(hva), ctypes.c_size_t(PAGE_SIZE)
    assert call(libc.madvise, *page, mman.MADV_DONTNEED) == 0


@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("mode", Mode)
@every_kvm
def test_the_run_says_which_page_and_why_and_goes_on_with_another(
    open_system, session_of, snapshot, layout_of, kvm, mode, vcpus
) -> None:
    """Invariant: no vCPU runs past the access, and the run afterwards is as if it had not been."""
    taken = snapshot(SIZE, GuestMode.LONG_CPL3, Walk.SEQUENTIAL, vcpus)
    with session_of(open_system(kvm, mode), taken, mode) as session:
        page = layout_of(taken).data.start + 3
        hva, gpa = poisoned(session, page), page * PAGE_SIZE
        for _ in range(2):  # it is met again
            assert not session.run()
            error = session.failure
            assert isinstance(error, PoisonedPageError)
            loop = session.vcpus[error.vcpu_id]
            assert (session.failed_vcpu, error.rip) == (loop, loop.rip)
            access, cause = error.access, error.cause
            assert access.gpa is not None
            assert access.gpa // PAGE_SIZE == page
            assert access.hva == hva + access.gpa % PAGE_SIZE
            assert (access.found_by, access.certain) == (FoundBy.SIGNAL, True)
            assert access.slot is not None
            assert access.slot.slot == 0
            assert (cause.kind, cause.by, cause.certain) == (Kind.HWPOISON, Remedy.NONE, True)
            if mode is Mode.EXIT:
                assert (access.size, access.kind) == (8, AccessKind.READ)
                assert access.instruction
            result = report(session, 0)
            assert result.verdict == "not done"
            assert result.failure == str(error)
            for words in (f"vCPU {error.vcpu_id} at rip {error.rip:#x}", "SIGBUS", f"gpa {gpa:#x}"):
                assert words in str(error)
            assert LostPage(error.vcpu_id, gpa, hva, accessed=True) in result.lost_pages
            assert f"lost pages         gpa {gpa:#x} (accessed by vCPU" in as_text(result)
            assert result.as_json()["lost_pages"][0] == asdict(result.lost_pages[0])
            assert not session.pager.is_in(page * PAGE_SIZE)
        mend(hva)
        assert session.run(), session.failure
        result = report(session, 0)
    assert (result.verdict, result.lost_pages, result.failure) == ("right", (), None)
    assert result.pages_in == result.pages


@every_kvm
def test_each_of_two_vcpus_keeps_its_own(open_system, session_of, snapshot, layout_of, kvm) -> None:
    """Invariant: what one vCPU's thread is told is in the report, whatever stopped the other."""
    taken = snapshot(SIZE, GuestMode.LONG_CPL3, Walk.SEQUENTIAL, 2)
    with session_of(open_system(kvm), taken) as session:
        hvas = {poisoned(session, page) for page in layout_of(taken).data}
        # By themselves: of a session that runs, one may have stopped the other.
        threads = [threading.Thread(target=loop.run) for loop in session.vcpus]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        result = report(session, 0)
        assert [page.vcpu for page in result.lost_pages] == [0, 1]
        for loop, page in zip(session.vcpus, result.lost_pages, strict=True):
            assert isinstance(loop.error, PoisonedPageError)
            assert loop.error.vcpu_id == page.vcpu
            assert page.accessed
            assert page.hva in hvas
        assert len({page.hva for page in result.lost_pages}) == 2


def test_the_compiled_loop_hands_it_back(open_system, snapshot, layout_of, traced) -> None:
    pytest.importorskip("numba", reason="numba is not installed: pip install 'guestfault[fast]'")
    taken = snapshot(SIZE)
    source = FileSource(taken.open_memory())
    with Session(open_system("kvm"), taken, source, loop=Loop.COMPILED) as session:
        hva = poisoned(session, layout_of(taken).data.start + 40)
        assert not session.run()
        assert isinstance(session.failure, PoisonedPageError)
        assert session.failure.access.hva is not None
        assert session.failure.access.hva & -PAGE_SIZE == hva
        mend(hva)
        assert session.run(), session.failure
        assert report(session, 0).verdict == "right"
    source.close()


def told_meanwhile(snapshot: Snapshot, tell: Callable[[], None]) -> FunctionSource:
    """The snapshot's memory; ``tell`` is called once, on the vCPU's thread that reads of it."""
    memory = Path(snapshot.memory_path).read_bytes()
    pending = [tell]

    def read(offset: int, length: int) -> bytes:
        if offset >= SIZE // 2 and pending:
            pending.pop()()
        return memory[offset : offset + length]

    return FunctionSource(len(memory), read)


@pytest.mark.parametrize("view", ["guest", "host"])
def test_of_memory_that_nobody_has_accessed_the_run_says_so_and_goes_on(
    open_system, snapshot, view
) -> None:
    """BUS_MCEERR_AO, which the kernel sends to who has asked for it (PR_MCE_KILL_EARLY).

    It is sent by hand: nothing is wrong with the page, so the guest comes to its end.  A kernel
    names the first place where it finds the page mapped.
    """
    taken = snapshot(SIZE)
    told: list[int] = []

    def tell() -> None:
        told.append(getattr(session.ram, view).address + SIZE - PAGE_SIZE)
        send_sigbus(told[0], 12, action_required=False)

    with Session(open_system("kvm"), taken, told_meanwhile(taken, tell)) as session:
        assert session.run(), session.failure
        result = report(session, 0)
        hva = session.ram.guest.address + SIZE - PAGE_SIZE
        assert len(told) == 1
        assert result.lost_pages == (LostPage(0, SIZE - PAGE_SIZE, hva, accessed=False),)
        assert result.verdict == "right"
        assert f"gpa {SIZE - PAGE_SIZE:#x} (told to vCPU 0)" in as_text(result)


def test_a_signal_that_somebody_sent_does_what_it_would_have_done(open_system, snapshot) -> None:
    """Here it runs a handler.  Without one it ends the process, as tests/linux shows."""
    seen: list[int] = []
    before = signal.signal(signal.SIGBUS, lambda number, _: seen.append(number))
    taken = snapshot(SIZE)

    def tell() -> None:
        signal.pthread_kill(threading.get_ident(), signal.SIGBUS)

    try:
        with Session(open_system("kvm"), taken, told_meanwhile(taken, tell)) as session:
            assert session.run(), session.failure
            result = report(session, 0)
    finally:
        signal.signal(signal.SIGBUS, before)
    assert seen == [signal.SIGBUS]
    assert (result.verdict, result.lost_pages) == ("right", ())


# -- broken for real -------------------------------------------------------------------------------


def _on_broken_memory(taken: Snapshot, page: int, mode: Mode) -> tuple[int, dict[str, Any]]:
    """In a process of its own, which MADV_HWPOISON sends the first SIGBUS to."""
    signal.signal(signal.SIGBUS, lambda *_: None)
    source = FileSource(taken.open_memory())
    with Session(KvmSystem(), taken, source, mode) as session:
        session.pager.bring_in(page * PAGE_SIZE)
        try:
            session.ram.guest.hwpoison(page * PAGE_SIZE, PAGE_SIZE)
        except KernelError as error:
            if error.errno not in (errno.EPERM, errno.EINVAL):
                raise
            return 1, {"why": f"{error}: needs CAP_SYS_ADMIN and CONFIG_MEMORY_FAILURE"}
        assert not session.run()
        result = report(session, 0).as_json()
        return 0, result | {"hva": session.ram.guest.address + page * PAGE_SIZE}


@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("mode", Mode)
def test_hwpoison(in_child, open_system, snapshot, layout_of, mode, vcpus) -> None:
    """It costs the machine a page until it boots again, if it can be done at all."""
    open_system("kvm", mode)
    taken = snapshot(SIZE, GuestMode.LONG_CPL3, Walk.SEQUENTIAL, vcpus)
    page = layout_of(taken).data.start + 3
    skipped, result = in_child(lambda: _on_broken_memory(taken, page, mode))
    if skipped:
        pytest.skip(result["why"])
    assert result["verdict"] == "not done"
    gpa, hva = page * PAGE_SIZE, result["hva"]
    assert [(p["gpa"], p["hva"], p["accessed"]) for p in result["lost_pages"]] == [(gpa, hva, True)]
    assert f"gpa {gpa:#x}" in result["failure"]
    assert f"the page at {hva:#x}" in result["failure"]
    assert "is poisoned: broken memory" in result["failure"]

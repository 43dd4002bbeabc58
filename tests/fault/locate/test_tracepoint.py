"""The tracepoint locator against accesses that are known, on the real KVM."""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from guestfault.errors import Unavailable
from guestfault.fault.access import Access, AccessKind, FoundBy
from guestfault.fault.locate.tracepoint import TracepointLocator, gpa_from
from guestfault.kvm import KvmSystem
from guestfault.linux.tracefs import Tracefs
from guestfault.memory.ram import PAGE_SIZE
from guestfault.memory.view import Registered
from guestfault.uapi.mman import PROT_NONE, PROT_READ, PROT_WRITE

RW = PROT_READ | PROT_WRITE
LOAD, STORE, ADD = b"\x8a\x03", b"\x88\x03", b"\x00\x03"  # mov al, [rbx]; mov [rbx], al; add
OUT = b"\xe6\x10"
FIRST = 16  # the first page that is neither tables nor code

Locate = Callable[..., TracepointLocator]


@pytest.fixture
def locator(system: KvmSystem, traced: Tracefs) -> Iterator[Locate]:
    opened: list[TracepointLocator] = []

    def make(guest: Any, **options: Any) -> TracepointLocator:
        options = {"translate": gpa_from(guest.vcpu), "slots": guest.slots} | options
        opened.append(TracepointLocator(system, tracefs=traced, **options))
        return opened[-1]

    yield make
    for one in opened:
        one.close()


def check(access: Access | None, guest: Any, offset: int, kind: AccessKind) -> None:
    """That it is this access: an offset into the RAM, and everything that follows from it."""
    assert access is not None
    assert access.gva in (None, guest.gva(offset))  # None where the host tells the gpa
    assert access.gpa == guest.gpa + offset
    assert access.hva == guest.ram.guest.address + offset
    assert access.slot is not None
    assert (access.kind, access.size) == (kind, 1)
    assert access.found_by is FoundBy.TRACEPOINT
    assert access.certain


@pytest.mark.parametrize("gpa", [0, 1 << 30])
def test_every_kind_of_access_to_a_protected_page(
    make_guest: Callable[..., Any], locator: Locate, gpa: int
) -> None:
    guest, offset = make_guest(gpa), FIRST * PAGE_SIZE + 0x123
    guest.protect(FIRST, PROT_NONE)
    found = locator(guest)
    assert found.locate() is None
    for code, kind in (
        (LOAD, AccessKind.READ),
        (STORE, AccessKind.WRITE),
        (ADD, AccessKind.WRITE),
        (offset, AccessKind.FETCH),
    ):
        guest.stand_at(code, rbx=offset)
        for _ in range(3):
            assert guest.vcpu.run() == -errno.EFAULT
            check(found.locate(), guest, offset, kind)
            check(found.locate(), guest, offset, kind)


def test_pages_missing_under_userfaultfd(make_guest: Callable[..., Any], locator: Locate) -> None:
    guest = make_guest()
    try:
        view = Registered(guest.ram, sigbus=True)
    except Unavailable as error:
        pytest.skip(str(error))
    view.bring_in(0, FIRST * PAGE_SIZE)
    found = locator(guest)
    for page, code, kind in (
        (FIRST, LOAD, AccessKind.READ),
        (FIRST + 1, STORE, AccessKind.WRITE),
        (FIRST + 9, LOAD, AccessKind.READ),
    ):
        offset = page * PAGE_SIZE + 0xFFF
        guest.stand_at(code + OUT, rbx=offset)
        for _ in range(2):  # the same access again before it is resolved
            assert guest.vcpu.run() == -errno.EFAULT
            check(found.locate(), guest, offset, kind)
        view.bring_in(page * PAGE_SIZE, PAGE_SIZE)
        assert guest.goes_on()
        assert found.locate() is None
    guest.vm.close()
    view.close()


def test_500_random_pages_in_a_row(make_guest: Callable[..., Any], locator: Locate) -> None:
    guest = make_guest()
    found = locator(guest)
    rng = random.Random(500)
    pages = rng.sample(range(FIRST, FIRST + 510), 500)
    for page in pages:
        guest.protect(page, PROT_NONE)
    for page in pages:
        offset = page * PAGE_SIZE + rng.randrange(PAGE_SIZE)
        code, kind = rng.choice([(LOAD, AccessKind.READ), (STORE, AccessKind.WRITE)])
        guest.stand_at(code + OUT, rbx=offset)
        assert guest.vcpu.run() == -errno.EFAULT
        check(found.locate(), guest, offset, kind)
        guest.protect(page, RW)
        assert guest.goes_on()
        assert found.locate() is None


def test_the_last_of_more_faults_in_one_run_than_the_ring_holds(
    make_guest: Callable[..., Any], locator: Locate
) -> None:
    guest = make_guest()
    last = FIRST + 400
    guest.protect(last, PROT_NONE)
    found = locator(guest, pages=1)
    # again: mov al, [rbx]; add rbx, 4096; jmp again
    guest.stand_at(LOAD + b"\x48\x81\xc3\x00\x10\x00\x00" + b"\xeb\xf5", rbx=FIRST * PAGE_SIZE + 8)
    assert guest.vcpu.run() == -errno.EFAULT
    check(found.locate(), guest, last * PAGE_SIZE + 8, AccessKind.READ)


def test_an_access_that_crosses_into_an_absent_page(
    make_guest: Callable[..., Any], locator: Locate
) -> None:
    guest, page = make_guest(), FIRST + 3
    guest.protect(page, PROT_NONE)
    found = locator(guest)
    guest.stand_at(b"\x48\x8b\x03", rbx=page * PAGE_SIZE - 3)  # mov rax, [rbx]
    assert guest.vcpu.run() == -errno.EFAULT
    check(found.locate(), guest, page * PAGE_SIZE, AccessKind.READ)


def test_overwritten_records_are_no_answer(make_guest: Callable[..., Any], locator: Locate) -> None:
    guest, offset = make_guest(), FIRST * PAGE_SIZE
    guest.protect(FIRST, PROT_NONE)
    found = locator(guest)
    guest.stand_at(LOAD, rbx=offset)
    assert guest.vcpu.run() == -errno.EFAULT
    check(found.locate(), guest, offset, AccessKind.READ)
    for _ in range(200):
        guest.vcpu.translate(guest.gva(17 * PAGE_SIZE))
    # A host that walks in hardware records no translation, and there is nothing to overwrite.
    access = found.locate()
    if access is not None:
        check(access, guest, offset, AccessKind.READ)
    else:
        assert guest.vcpu.run() == -errno.EFAULT
        check(found.locate(), guest, offset, AccessKind.READ)


def test_translations_before_and_after_a_run_are_not_taken_for_it(
    make_guest: Callable[..., Any], locator: Locate
) -> None:
    guest, offset = make_guest(), FIRST * PAGE_SIZE + 1
    guest.protect(FIRST, PROT_NONE)
    found = locator(guest)
    guest.stand_at(LOAD, rbx=offset)
    other = guest.gva(20 * PAGE_SIZE)
    guest.vcpu.translate(other)
    assert found.locate() is None
    assert guest.vcpu.run() == -errno.EFAULT
    guest.vcpu.translate(other)
    check(found.locate(), guest, offset, AccessKind.READ)
    guest.vcpu.translate(other)
    guest.vcpu.kvm_run.immediate_exit = 1
    assert guest.vcpu.run() == -errno.EINTR
    guest.vcpu.kvm_run.immediate_exit = 0
    assert found.locate() is None


def test_without_a_translation_the_gpa_is_unknown_or_told_by_the_host(
    make_guest: Callable[..., Any], locator: Locate
) -> None:
    guest, offset = make_guest(), FIRST * PAGE_SIZE
    guest.protect(FIRST, PROT_NONE)
    found = locator(guest, translate=None)
    guest.stand_at(LOAD, rbx=offset)
    assert guest.vcpu.run() == -errno.EFAULT
    access = found.locate()
    assert access is not None
    assert (access.gva, access.gpa) in ((guest.gva(offset), None), (None, offset))


def test_a_thread_sees_its_own_vcpu_and_no_other(
    make_guest: Callable[..., Any], system: KvmSystem, traced: Tracefs
) -> None:
    """Invariant: an event of one thread records what that thread does and nothing else."""
    guests = [make_guest(), make_guest()]
    together = threading.Barrier(2, timeout=20)
    wrong: list[str] = []

    def run(guest: Any, number: int) -> None:
        rng = random.Random(number)
        options = {"translate": gpa_from(guest.vcpu), "tracefs": traced}
        with TracepointLocator(system, **options) as found:
            together.wait()
            for _ in range(150):
                # Even pages are the one's, odd pages the other's.
                page = FIRST + 2 * rng.randrange(200) + number
                offset = page * PAGE_SIZE + rng.randrange(PAGE_SIZE)
                guest.protect(page, PROT_NONE)
                guest.stand_at(LOAD + OUT, rbx=offset)
                result = guest.vcpu.run()
                access = found.locate()
                if result != -errno.EFAULT or access is None or access.gpa != offset:
                    wrong.append(f"vCPU {number}: {result}, {access}, not {offset:#x}")
                guest.protect(page, RW)
                if not guest.goes_on() or found.locate() is not None:
                    wrong.append(f"vCPU {number}: the page is back and {found.locate()}")

    threads = [threading.Thread(target=run, args=(g, n)) for n, g in enumerate(guests)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert wrong == []
    assert not any(thread.is_alive() for thread in threads)


def test_another_thread_gets_no_answer_but_an_error(
    make_guest: Callable[..., Any], locator: Locate
) -> None:
    found, raised = locator(make_guest()), []

    def ask() -> None:
        try:
            found.locate()
        except RuntimeError as error:
            raised.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    assert len(raised) == 1


def test_without_tracefs_the_mend_is_named(system: KvmSystem, tmp_path: Any) -> None:
    with pytest.raises(Unavailable, match="mount -t tracefs"):
        TracepointLocator(system, tracefs=Tracefs(tmp_path))

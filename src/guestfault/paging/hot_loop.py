"""The compiled loop of one vCPU, seen from Python: a KVM_RUN that comes back less often.

:meth:`CompiledLoop.run` is called where ``vcpu.run()`` would be, and its result is treated as that
one's.  It differs in what has happened meanwhile: any number of failed accesses may have been
resolved, and then they are in the vCPU's account as if Python had done it.
"""

from __future__ import annotations

import ctypes
from random import getrandbits

import numpy as np

from guestfault.dialect.interface import MemoryFaultInterface, Payload
from guestfault.errors import Unavailable
from guestfault.fault.locate.run_trace import FAULT_EVENTS
from guestfault.fault.locate.tracepoint import TracepointLocator
from guestfault.kvm.vcpu import KvmVcpu
from guestfault.linux.mapping import Mapping
from guestfault.linux.perf_event import RAW_OFFSET
from guestfault.linux.perf_ring import HEAD_OFFSET
from guestfault.memory.ram import PAGE_SIZE, GuestRam
from guestfault.memory.slots import SlotMap
from guestfault.memory.view import GuestView, Registered, Unpopulated
from guestfault.paging import hot
from guestfault.paging import hot_words as at
from guestfault.paging.account import FaultAccount
from guestfault.paging.ahead import AheadCount
from guestfault.paging.claims import SharedClaims
from guestfault.paging.guard import RepeatGuard
from guestfault.paging.histogram import BUCKETS
from guestfault.paging.resolver import FaultResolver
from guestfault.paging.source.base import PageSource
from guestfault.paging.source.file import FileSource
from guestfault.paging.source.memory import MemorySource
from guestfault.uapi import kvm as uapi

__all__ = ["BUDGET", "CompiledLoop", "blank_words", "describe_memory", "describe_trace"]

BUDGET = 1024
BUDGET_NS = 50_000_000
"""Faults, or nanoseconds, after which the loop returns, so that somebody sees how far it is."""

_CACHE_LINE = 8  # words


def blank_words(slots: int) -> hot.Words:
    """A row of words with room for so many slots, and nothing in it that could be mistaken."""
    size = at.SLOT_TABLE + at.SLOT_WORDS * slots
    # A cache line of nothing at either end: two vCPUs write their rows all the time.
    words = np.zeros(size + 2 * _CACHE_LINE, np.int64)[_CACHE_LINE:-_CACHE_LINE]
    for place in (at.FAULT_EXIT, at.EXIT_ID, at.LAST_PAGE, *range(at.BEGINS, at.BEGINS + 3)):
        words[place] = -1
    words[at.FAULT_EVENTS] = words[at.FAULT_EVENTS + 3] = -1
    words[at.WINDOW], words[at.LOT] = 1, getrandbits(63)
    words[at.BUDGET], words[at.BUDGET_NS] = BUDGET, BUDGET_NS
    return words


def describe_memory(words: hot.Words, ram: GuestRam, slots: SlotMap) -> None:
    """Where the RAM is, and which of it the guest sees where."""
    words[at.GUEST_AT], words[at.HOST_AT] = ram.guest.address, ram.host.address
    words[at.PAGES] = ram.pages
    ours = [slot for slot in slots if 0 <= slot.hva - ram.guest.address < ram.size]
    words[at.SLOTS] = len(ours)
    for row, slot in enumerate(ours):
        first = at.SLOT_TABLE + row * at.SLOT_WORDS
        words[first : first + 2] = slot.gpa, slot.end
        words[first + 2] = slot.hva - ram.guest.address - slot.gpa


def describe_trace(words: hot.Words, locator: TracepointLocator) -> bool:
    """Where the trace is and how it is read; whether gvas will have to be translated."""
    trace = locator.trace
    ring = trace.ring
    # The address of read-only memory, which ctypes does not give.
    address = np.frombuffer(ring.memory, np.uint8).ctypes.data
    words[at.RING_HEAD_AT] = address + HEAD_OFFSET
    words[at.RING_AT] = address + PAGE_SIZE
    words[at.RING_SIZE] = len(ring.memory) - PAGE_SIZE
    exit_ = trace.formats["kvm_userspace_exit"]
    words[at.EXIT_ID], words[at.EXIT_ERRNO] = exit_.id, _place(exit_.fields["errno"].offset)
    for n, event in enumerate(sorted(trace.sentence.begins)):
        words[at.BEGINS + n] = event
    gvas = False
    for n, (name, (_, address_field, _)) in enumerate(FAULT_EVENTS.items()):
        row = at.FAULT_EVENTS + 3 * n
        if name in trace.formats:
            meaning = locator.meanings.get(name)
            words[row] = trace.formats[name].id
            words[row + 1] = _place(trace.formats[name].fields[address_field].offset)
            words[row + 2] = -1 if meaning is None else meaning.is_gva
            gvas |= meaning is not None and meaning.is_gva
    return gvas


def _place(offset: int) -> int:
    """Where a field of a raw record is in its sample, if the loop can read it there."""
    if offset % 4:
        raise Unavailable("the compiled loop", f"a trace field at offset {offset}", "--loop plain")
    return RAW_OFFSET + offset


class CompiledLoop:
    """The compiled loop of the vCPU that ``resolver`` is of; belongs to the thread that runs it.

    ``locator`` is the thread's own, or ``None`` if every fault will be annotated.  Raises
    :class:`~guestfault.errors.Unavailable` where the loop cannot do its work: on a view that lets
    pages in otherwise, for a way of annotating that it does not read, on a KVM that does not leave
    the registers at an exit where they are needed.
    """

    def __init__(
        self,
        vcpu: KvmVcpu,
        interface: MemoryFaultInterface | None,
        slots: SlotMap,
        resolver: FaultResolver,
        locator: TracepointLocator | None,
        sync_regs: int,
    ) -> None:
        pager = resolver.pager
        self._vcpu = vcpu
        self._pager = pager
        self._account: FaultAccount = resolver.account
        self._guard: RepeatGuard = resolver.guard
        self._words = words = blank_words(len(list(slots)))
        words[at.WINDOW] = resolver.fault_around
        self._histogram = np.zeros(BUCKETS, np.int64)
        self._staging = Mapping.anonymous(PAGE_SIZE * int(words[at.WINDOW]))
        self._claims = pager.share(SharedClaims)
        assert isinstance(self._claims, SharedClaims)
        words[at.KVM_RUN_AT] = ctypes.addressof(vcpu.kvm_run)
        words[at.FAULT_EXIT] = _fault_exit(interface)
        describe_memory(words, pager.ram, slots)
        words[at.FILLED_AT], words[at.CLAIMS_AT] = self._claims.filled_at, self._claims.at
        words[at.LET_IN], words[at.UFFD] = _let_in(pager.view)
        words[at.SOURCE], words[at.SOURCE_AT] = _source(pager.source)
        words[at.STAGING_AT] = self._staging.address
        if locator is not None and describe_trace(words, locator):
            if not sync_regs & uapi.KVM_SYNC_X86_SREGS:
                why = "this KVM's traces name linear addresses, and it does not leave the registers"
                raise Unavailable("the compiled loop", why, "use --loop plain")
            vcpu.kvm_run.kvm_valid_regs |= uapi.KVM_SYNC_X86_SREGS

    def run(self) -> int | None:
        """Run the vCPU: the result of a KVM_RUN that Python must see to, or ``None``: go on."""
        words, page = self._words, self._guard.page
        words[at.LAST_PAGE] = -1 if page is None else page
        result = self._vcpu.run_by(self._issue)
        resolved = int(words[at.ANNOTATED] + words[at.BARE])
        if resolved:
            self._guard.was_at(int(words[at.LAST_PAGE]))
        if resolved or words[at.PAGES_IN]:
            self._settle()
        return None if result == at.NOTHING else result

    def _issue(self, fd: int) -> int:
        self._words[at.VCPU_FD] = fd
        return hot.run(self._words, self._histogram)

    def _settle(self) -> None:
        words, account = self._words, self._account
        account.annotated += int(words[at.ANNOTATED])
        account.bare += int(words[at.BARE])
        account.by_tracepoint += int(words[at.BARE])
        account.again += int(words[at.AGAIN])
        ahead = AheadCount(*map(int, words[at.AHEAD : at.WANTED + 1]))
        self._pager.credit(int(words[at.PAGES_IN]), ahead)
        words[at.ANNOTATED : at.PAGES_IN + 1] = 0
        words[at.AHEAD : at.WANTED + 1] = 0

    def close(self) -> None:
        """The thread ends, or its trace does: the latencies go to the account."""
        words = self._words
        self._account.latency.add(
            self._histogram.tolist(), int(words[at.LATENCY_TOTAL]), int(words[at.LATENCY_MAX])
        )
        self._vcpu.kvm_run.kvm_valid_regs &= ~uapi.KVM_SYNC_X86_SREGS
        self._staging.close()


def _fault_exit(interface: MemoryFaultInterface | None) -> int:
    if interface is None:
        return -1
    if interface.payload is not Payload.UNION or interface.exit_reason is None:
        why = "this version of the interface annotates elsewhere than in the union"
        raise Unavailable("the compiled loop", why, "use --loop plain")
    return interface.exit_reason


def _let_in(view: GuestView) -> tuple[int, int]:
    if isinstance(view, Registered):
        return at.LET_IN_BY_USERFAULTFD, view.uffd.fileno()
    if isinstance(view, Unpopulated):
        return at.LET_IN_BY_POPULATING, -1
    why = f"pages are absent another way here ({view.name})"
    raise Unavailable("the compiled loop", why, "use --loop plain")


def _source(source: PageSource) -> tuple[int, int]:
    if isinstance(source, MemorySource):
        return at.SOURCE_MEMORY, source.address
    if isinstance(source, FileSource):
        return at.SOURCE_FILE, source.fileno()
    return at.SOURCE_PYTHON, 0

"""KVM_RUN, a failed access, its page, KVM_RUN again: the part of it that needs no thought.

Written in Python and compiled by numba, so that it runs without the GIL and costs less than a
microsecond a fault besides what the kernel takes.  It does what
:class:`~guestfault.vmm.vcpu_loop.VcpuLoop` does with a failed access, and only where there is
nothing to decide:

- the access is named: by the kernel's annotation, or by the tracepoints, read as
  :mod:`~guestfault.fault.locate.run_trace` says (a linear address is translated by the guest's own
  tables, with the registers of this very exit);
- it lies in a slot, and is not in the page of the fault before (which could be a loop);
- the page's bytes are there, or nobody else is getting them and they can be had by a copy.

Everything else it *hands back*: it returns KVM_RUN's result, has changed nothing, and Python sees
exactly what it would have seen had it called KVM_RUN itself.  So a case that is missing here costs
time and nothing else.

**A page is written once, before anybody can see it.**  Who wants to fill a page claims it, by an
atomic compare-and-exchange; who has claimed it fills it, marks it filled, and does not unclaim it
unless nothing was written.  Only a page that is marked is ever let in by another than its claimer.
So no fill can come after a guest's own write, however many vCPUs fault on the page together.  In
Python the same claims are made through :mod:`~guestfault.paging.claims`.
"""

from __future__ import annotations

import errno
import time
from typing import Final

from guestfault.paging import hot_words as at
from guestfault.paging.ahead import IN, Ahead
from guestfault.paging.histogram import SUB_BITS
from guestfault.paging.hot_around import came_in, draw, widest
from guestfault.paging.hot_native import (
    clock_gettime,
    compare_exchange,
    compiled,
    errno_location,
    ioctl,
    load8,
    load16,
    load32,
    load64,
    madvise,
    memcpy,
    pread,
    store8,
)
from guestfault.paging.hot_words import Words
from guestfault.uapi import kvm, mman, perf, userfaultfd
from guestfault.x86 import entries, registers

__all__ = ["Words", "failed_gpa", "run", "translate"]

# numba takes an object's attributes for unknown, and a module's for constants.
_PAGE: Final = 4096
_SHIFT: Final = 12
_EFAULT: Final = errno.EFAULT
_EEXIST: Final = errno.EEXIST
_KVM_RUN: Final = kvm.KVM_RUN
_COPY: Final = userfaultfd.UFFDIO_COPY
_CONTINUE: Final = userfaultfd.UFFDIO_CONTINUE
_POPULATE_WRITE: Final = mman.MADV_POPULATE_WRITE
_SAMPLE: Final = perf.PERF_RECORD_SAMPLE
_RAW: Final = 12  # where the raw record begins in a sample; its first two bytes are its event
_MONOTONIC: Final = time.CLOCK_MONOTONIC
_PRESENT: Final = entries.PT_PRESENT_MASK
_LARGE: Final = entries.PT_PAGE_SIZE_MASK
_ADDRESS: Final = entries.ADDRESS_MASK
_PG: Final = registers.CR0_PG
_PAE: Final = registers.CR4_PAE
_LA57: Final = registers.CR4_LA57
_LMA: Final = registers.EFER_LMA
_UNKNOWN: Final = -1
_IN: Final = IN
_AROUND: Final = int(Ahead.AROUND)


@compiled
def run(w: Words, histogram: Words) -> int:
    """Run the vCPU of a row of words; KVM_RUN's result, or :data:`~at.NOTHING`.

    ``histogram`` are the buckets of :class:`~guestfault.paging.histogram.LatencyHistogram`.
    """
    began = _now(w)
    result = _run(w, histogram, began)
    w[at.NS_ALL] += _now(w) - began
    return result


@compiled
def _run(w: Words, histogram: Words, began: int) -> int:
    entered = began
    faults = 0
    while True:
        if w[at.TIMED]:
            entered = _now(w)
        result = ioctl(w[at.VCPU_FD], _KVM_RUN, 0)
        failed = 0
        if result < 0:
            failed = load32(errno_location())
        exited = _now(w)
        if w[at.TIMED]:
            w[at.NS_RUN] += exited - entered
        if result >= 0:
            return result
        if failed != _EFAULT:
            return -failed
        gpa = failed_gpa(w)
        offset = _offset_of(w, gpa)
        if offset < 0 or gpa >> _SHIFT == w[at.LAST_PAGE] or not _bring_in(w, offset >> _SHIFT):
            return -failed
        w[at.LAST_PAGE] = gpa >> _SHIFT
        resolved = _now(w)
        _record(w, histogram, resolved - exited)
        faults += 1
        if faults >= w[at.BUDGET] or resolved - began > w[at.BUDGET_NS]:
            return at.NOTHING


@compiled
def _now(w: Words) -> int:
    place = w.ctypes.data + 8 * at.SCRATCH
    clock_gettime(_MONOTONIC, place)
    return w[at.SCRATCH] * 1_000_000_000 + w[at.SCRATCH + 1]


@compiled
def _record(w: Words, histogram: Words, ns: int) -> None:
    shift = 0
    while ns >> shift >= 2 << SUB_BITS:
        shift += 1
    histogram[(shift << SUB_BITS) + (ns >> shift)] += 1
    w[at.LATENCY_TOTAL] += ns
    w[at.LATENCY_MAX] = max(w[at.LATENCY_MAX], ns)


# -- which access --------------------------------------------------------------------------------


@compiled
def failed_gpa(w: Words) -> int:
    """The gpa with which KVM_RUN has just failed, or -1; counts how it came to be known.

    What is not resolved after all will be counted by Python, so :func:`_bring_in` takes it back.
    """
    kvm_run = w[at.KVM_RUN_AT]
    if load32(kvm_run + at.RUN_EXIT_REASON) == w[at.FAULT_EXIT]:
        w[at.FOUND_GVA] = 0
        gpa = load64(kvm_run + at.RUN_FAULT_GPA)
        size = load64(kvm_run + at.RUN_FAULT_SIZE)
        if size <= 0 or size > _PAGE or (gpa & _PAGE - 1) + size > _PAGE:
            return _UNKNOWN
        return gpa
    if not w[at.RING_HEAD_AT]:
        return _UNKNOWN
    address = _traced(w)
    if w[at.FOUND_GVA] == 0:
        return address
    if w[at.FOUND_GVA] == 1:
        return translate(w, address)
    return _UNKNOWN


@compiled
def _traced(w: Words) -> int:
    """The address in the newest sentence of the ring; ``FOUND_GVA`` says what it is, or -1.

    The grammar is that of :mod:`guestfault.fault.locate.run_trace`, with one thing less: nothing
    may have been recorded after the exit.
    """
    w[at.FOUND_GVA] = _UNKNOWN
    ring, mask = w[at.RING_AT], w[at.RING_SIZE] - 1
    head = load64(w[at.RING_HEAD_AT])
    left = min(-head, w[at.RING_SIZE])  # it counts down from 0
    said = 0  # nothing, the exit, a fault
    address = 0
    is_gva = _UNKNOWN
    while left >= 8:
        header = load64(ring + (head & mask))
        size = header >> 48 & 0xFFFF
        if size <= _RAW or size > left or header & 0xFFFFFFFF != _SAMPLE:
            break
        event = load16(ring + (head + _RAW & mask))
        if said == 0:
            if event != w[at.EXIT_ID] or _u32(w, head + w[at.EXIT_ERRNO]) != -_EFAULT:
                break
            said = 1
        elif event == w[at.FAULT_EVENTS] or event == w[at.FAULT_EVENTS + 3]:
            if said == 1:
                row = at.FAULT_EVENTS
                if event != w[row]:
                    row += 3
                place = head + w[row + 1]
                address = _u32(w, place) & 0xFFFFFFFF | _u32(w, place + 4) << 32
                is_gva = w[row + 2]
                said = 2
        elif event == w[at.BEGINS] or event == w[at.BEGINS + 1] or event == w[at.BEGINS + 2]:
            if said == 2:
                w[at.FOUND_GVA] = is_gva
            break
        else:
            break
        head += size
        left -= size
    return address


@compiled
def _u32(w: Words, place: int) -> int:
    """Four bytes of the ring, which are never parted: places are multiples of four."""
    return load32(w[at.RING_AT] + (place & w[at.RING_SIZE] - 1))


@compiled
def translate(w: Words, gva: int) -> int:
    """The gpa of a gva in long mode, by the guest's tables as they are; -1 if they do not say.

    The registers are those that KVM left in ``kvm_run`` at this exit.  The access was one that the
    guest's tables allow, or it would have become a fault of the guest's own.
    """
    kvm_run = w[at.KVM_RUN_AT]
    cr4 = load64(kvm_run + at.RUN_CR4)
    if not (
        load64(kvm_run + at.RUN_CR0) & _PG and cr4 & _PAE and load64(kvm_run + at.RUN_EFER) & _LMA
    ):
        return _UNKNOWN
    table = load64(kvm_run + at.RUN_CR3) & _ADDRESS
    shift = 48 if cr4 & _LA57 else 39
    while True:
        offset = _offset_of(w, table + (gva >> shift & 511) * 8)
        # Of a page that is not there the host view shows zeros, or the half of it.
        if offset < 0 or not load8(w[at.FILLED_AT] + (offset >> _SHIFT)):
            return _UNKNOWN
        entry = load64(w[at.HOST_AT] + offset)
        if not entry & _PRESENT:
            return _UNKNOWN
        low = (1 << shift) - 1
        if shift == _SHIFT or (shift <= 30 and entry & _LARGE):
            return entry & _ADDRESS & ~low | gva & low
        if entry & _LARGE:
            return _UNKNOWN
        table = entry & _ADDRESS
        shift -= 9


@compiled
def _offset_of(w: Words, gpa: int) -> int:
    """The offset in the RAM of a gpa; -1 if it is in no slot of the RAM's."""
    row = at.SLOT_TABLE
    for _ in range(w[at.SLOTS]):
        if w[row] <= gpa < w[row + 1]:
            return gpa + w[row + 2]
        row += at.SLOT_WORDS
    return _UNKNOWN


# -- its page ------------------------------------------------------------------------------------


@compiled
def _bring_in(w: Words, page: int) -> bool:
    """Bring the page in, and around it what nobody else has claimed."""
    filled, claims = w[at.FILLED_AT], w[at.CLAIMS_AT]
    mark = load8(filled + page)
    if mark != 0:
        # One that was withheld for another reason than ours is for Python to count.
        if mark != _IN and not (mark == _AROUND and compare_exchange(filled + page, mark, _IN)):
            return False
        if not _let_in(w, page, page + 1):
            return False
        w[at.WANTED] += mark != _IN
        w[at.AGAIN] += mark == _IN
    else:
        if w[at.SOURCE] == at.SOURCE_PYTHON or not compare_exchange(claims + page, 0, 1):
            return False  # somebody else is at it: Python waits for him
        first, end = page, page + 1
        least, most = widest(w, page)
        while end < most and compare_exchange(claims + end, 0, 1):
            end += 1
        while first > least and compare_exchange(claims + first - 1, 0, 1):
            first -= 1
        filled_end = _fill(w, first, end, draw(w, first, end, page))
        for p in range(filled_end, end):
            store8(claims + p, 0)
        w[at.PAGES_IN] += filled_end - first
        if page >= filled_end:
            w[at.AHEAD] += filled_end - first
            return False
        w[at.AHEAD] += filled_end - first - 1
        came_in(w, first, filled_end)
    if load32(w[at.KVM_RUN_AT] + at.RUN_EXIT_REASON) == w[at.FAULT_EXIT]:
        w[at.ANNOTATED] += 1
    else:
        w[at.BARE] += 1
    return True


@compiled
def _fill(w: Words, first: int, end: int, withheld: int) -> int:
    """Fill claimed pages, mark them, let them in but for one; the end of those that are filled.

    Of the others nothing was written.  One that is filled but could not be let in will fail again.
    """
    source = w[at.SOURCE_AT] + first * _PAGE
    if w[at.SOURCE] == at.SOURCE_FILE:
        source = w[at.STAGING_AT]
        size = (end - first) * _PAGE
        if pread(w[at.SOURCE_AT], source, size, first * _PAGE) != size:
            return first
    if withheld < 0:
        return _fill_part(w, first, end, source)
    reached = _fill_part(w, first, withheld, source)
    if reached < withheld:
        return reached
    source += (withheld - first) * _PAGE
    if w[at.SOURCE] != at.SOURCE_NONE:
        memcpy(w[at.HOST_AT] + withheld * _PAGE, source, _PAGE)
    store8(w[at.FILLED_AT] + withheld, _AROUND)
    w[at.WITHHELD] += 1
    return _fill_part(w, withheld + 1, end, source + _PAGE)


@compiled
def _fill_part(w: Words, first: int, end: int, source: int) -> int:
    """The same, without exception, from the memory at ``source``."""
    if w[at.SOURCE] != at.SOURCE_NONE and w[at.LET_IN] == at.LET_IN_BY_USERFAULTFD:
        return _copy(w, first, end, source)
    if w[at.SOURCE] != at.SOURCE_NONE:
        memcpy(w[at.HOST_AT] + first * _PAGE, source, (end - first) * _PAGE)
    _mark(w, first, end)
    _let_in(w, first, end)
    return end


@compiled
def _copy(w: Words, first: int, end: int, source: int) -> int:
    """Fill them and let them in with one call; the end of those that are filled.

    It is quicker than to write through the host view, where a page is made of zeros first.
    """
    while first < end:
        w[at.SCRATCH] = w[at.GUEST_AT] + first * _PAGE
        w[at.SCRATCH + 1] = source
        w[at.SCRATCH + 2] = (end - first) * _PAGE
        w[at.SCRATCH + 3] = 0
        w[at.SCRATCH + 4] = 0
        if _let_in_call(w, _COPY) == 0:
            _mark(w, first, end)
            return end
        done = max(w[at.SCRATCH + 4], 0) >> _SHIFT
        if done > 0:
            _mark(w, first, first + done)
        elif load32(errno_location()) == _EEXIST:
            # It is in the page cache, as zeros: somebody has looked at it through the host view.
            memcpy(w[at.HOST_AT] + first * _PAGE, source, _PAGE)
            done = 1
            _mark(w, first, first + 1)
            _let_in(w, first, first + 1)
        else:
            return first
        first += done
        source += done * _PAGE
    return end


@compiled
def _mark(w: Words, first: int, end: int) -> None:
    for page in range(first, end):
        store8(w[at.FILLED_AT] + page, 1)


@compiled
def _let_in(w: Words, first: int, end: int) -> bool:
    """Let pages that are filled into the guest view; those that are in already stay in."""
    while first < end:
        address, size = w[at.GUEST_AT] + first * _PAGE, (end - first) * _PAGE
        if w[at.LET_IN] == at.LET_IN_BY_POPULATING:
            return madvise(address, size, _POPULATE_WRITE) == 0
        w[at.SCRATCH] = address
        w[at.SCRATCH + 1] = size
        w[at.SCRATCH + 2] = 0
        w[at.SCRATCH + 3] = 0
        if _let_in_call(w, _CONTINUE) == 0:
            return True
        done = max(w[at.SCRATCH + 3], 0) >> _SHIFT
        if done == 0:
            if load32(errno_location()) != _EEXIST:
                return False
            done = 1  # in already, and nobody sleeps: in this mode an access fails instead
        first += done
    return True


@compiled
def _let_in_call(w: Words, request: int) -> int:
    """An ioctl of userfaultfd's, with the scratch words as its argument."""
    place = w.ctypes.data + 8 * at.SCRATCH
    if not w[at.TIMED]:
        return ioctl(w[at.UFFD], request, place)
    clock_gettime(_MONOTONIC, place + 48)
    began = w[at.SCRATCH + 6] * 1_000_000_000 + w[at.SCRATCH + 7]
    result = ioctl(w[at.UFFD], request, place)
    clock_gettime(_MONOTONIC, place + 48)  # which leaves errno alone, unless it fails
    w[at.NS_LET_IN] += w[at.SCRATCH + 6] * 1_000_000_000 + w[at.SCRATCH + 7] - began
    return result

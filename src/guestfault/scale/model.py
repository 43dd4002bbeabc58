"""N vCPUs that touch one absent page after the other, under either way of bringing pages in.

*Exits*: a vCPU's fault comes back to its own thread, which brings the page in and runs on.  All
that the vCPUs have in common is the address space: its ``mmap_lock`` is only read, but its count,
and the page cache's and the page tables' own, are cache lines that all of them write.

*Userfaultfd*: the vCPU joins the waiters and sleeps, a reader takes the message, resolves it, and
wakes the vCPU.  Three times the descriptor's wait-queue lock is taken, and to wake one waiter all
of them are looked at under it: with all vCPUs at one userfaultfd that is the part that grows.
"""

from __future__ import annotations

from collections import deque
from enum import Enum

from guestfault.scale.costs import Costs
from guestfault.scale.events import Callback, Clock, Serial
from guestfault.scale.published import Layout

__all__ = ["Way", "pages_per_second"]

_FAULTS_PER_VCPU, _LEAST_FAULTS = 60, 6000
_WARM_UP = 4  # the first quarter is not counted


class Way(Enum):
    """Who brings an absent page in."""

    UFFD = "userfaultfd's handler"
    EXITS = "the vCPU's own thread"


def pages_per_second(
    costs: Costs, vcpus: int, way: Way, layout: Layout = Layout.SHARED, *, effort: float = 1.0
) -> float:
    """The whole VM's rate.  ``effort`` scales how many faults are simulated."""
    if vcpus < 1:
        raise ValueError(f"{vcpus} vCPUs: at least one is needed")
    clock = Clock()
    done = _Count()
    if way is Way.EXITS:
        _exits(clock, costs, vcpus, done)
    else:
        _userfaults(clock, costs, vcpus, layout, done)
    target = int(effort * max(_LEAST_FAULTS, _FAULTS_PER_VCPU * vcpus))
    clock.run(lambda: done.faults >= target // _WARM_UP)
    began, warm = clock.now, done.faults
    clock.run(lambda: done.faults >= target)
    return (done.faults - warm) / (clock.now - began) * 1e6


class _Count:
    faults = 0


def _exits(clock: Clock, costs: Costs, vcpus: int, done: _Count) -> None:
    space = Serial(clock)
    shared = vcpus > 1
    own = costs.exit_alone - costs.space_each + (costs.exit_shared if shared else 0)

    def turn(waiting: int) -> float:
        if not shared:
            return costs.space_each
        return costs.space_each + costs.space_handoff / (1 + waiting / costs.space_batch)

    def fault() -> None:
        clock.about(own, lambda: space.request(turn, resolved))

    def resolved() -> None:
        done.faults += 1
        fault()

    for _ in range(vcpus):
        clock.about(own, fault)


class _Userfaultfd:
    """One descriptor: its lock, its waiters, and its readers."""

    def __init__(self, clock: Clock, costs: Costs, space: Serial, readers: int) -> None:
        self._clock = clock
        self._costs = costs
        self._space = space
        self._lock = Serial(clock)
        self._idle_readers = readers
        self._waiters = 0
        self._messages: deque[Callback] = deque()
        self.space_turn = 0.0

    def sleep(self, woken: Callback) -> None:
        """``handle_userfault``: join the waiters, and call a reader."""
        self._lock.request(
            lambda n: self._costs.enqueue + self._handoff(n), lambda: self._join(woken)
        )

    def _join(self, woken: Callback) -> None:
        self._waiters += 1
        self._messages.append(woken)
        if self._idle_readers:
            self._idle_readers -= 1
            self._clock.about(self._costs.reader_wake, self._read)

    def _read(self) -> None:
        if self._messages:
            self._lock.request(lambda n: self._costs.read + self._handoff(n), self._take)
        else:
            self._idle_readers += 1

    def _take(self) -> None:
        if not self._messages:  # another reader was faster
            self._idle_readers += 1
            return
        woken = self._messages.popleft()
        self._clock.about(
            self._costs.handler,
            lambda: self._space.request(lambda _: self.space_turn, lambda: self._wake(woken)),
        )

    def _wake(self, woken: Callback) -> None:
        def hold(waiting: int) -> float:
            return self._costs.wake + self._costs.walk * self._waiters + self._handoff(waiting)

        def over() -> None:
            self._waiters -= 1
            self._clock.about(self._costs.vcpu_wake, woken)
            self._read()

        self._lock.request(hold, over)

    def _handoff(self, waiting: int) -> float:
        return self._costs.lock_handoff * min(1.0, waiting / self._costs.lock_queue)


def _userfaults(clock: Clock, costs: Costs, vcpus: int, layout: Layout, done: _Count) -> None:
    space = Serial(clock)
    if layout is Layout.SHARED:
        shared = _Userfaultfd(clock, costs, space, readers=vcpus)
        descriptors = [shared] * vcpus
    else:
        descriptors = [_Userfaultfd(clock, costs, space, readers=1) for _ in range(vcpus)]
    for uffd in descriptors:
        uffd.space_turn = _space_turn(costs, vcpus)

    def start(uffd: _Userfaultfd) -> None:
        def fault() -> None:
            clock.about(costs.vcpu, lambda: uffd.sleep(resolved))

        def resolved() -> None:
            done.faults += 1
            fault()

        clock.about(costs.vcpu, fault)

    for uffd in descriptors:
        start(uffd)


def _space_turn(costs: Costs, vcpus: int) -> float:
    if vcpus == 1:
        return costs.space_alone
    threads = 2 * vcpus  # a reader each
    sockets = min(costs.sockets, -(-threads // costs.cores_per_socket))
    # Of the threads that could be next, these are on another socket.
    return costs.space_near + costs.space_far * (1 - 1 / sockets)

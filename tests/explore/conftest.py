"""Worlds small enough to be explored to the end: a few threads over a few cells."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import pytest

from guestfault.dialect.published import DIALECTS
from guestfault.dialect.record import Dialect
from guestfault.explore.scenario import Kind, Scenario, Verdict
from guestfault.explore.scheduler import annotate, choose, spawn
from guestfault.softkvm.preempt import preemption_point, wait

Op = tuple[str, int, int]
"""What a thread of a :class:`Program` does next.

``read`` a cell into the thread's register, ``write`` register + n to a cell, ``wait`` until a cell
is above n, ``choose`` among n + 1 and add it, ``spawn`` a thread that writes n to a cell.
"""


class Program:
    """Threads that each do a list of operations.  Its verdict's text is the state it ended in."""

    def __init__(self, threads: Sequence[Sequence[Op]], judge: Callable[[Program], Kind]) -> None:
        self.cells = [0] * 4
        self.registers = [0] * len(threads)
        self._judge = judge
        self.actors: Mapping[str, Callable[[], None]] = {
            f"thread {i}": self._thread(i, ops) for i, ops in enumerate(threads)
        }
        self.closed = False

    def _thread(self, i: int, ops: Sequence[Op]) -> Callable[[], None]:
        def run() -> None:
            for op, x, n in ops:
                self._do(i, op, x, n)

        return run

    def _do(self, i: int, op: str, x: int, n: int) -> None:
        match op:
            case "read":
                preemption_point(f"read {x}", ("cell", x))
                self.registers[i] = self.registers[i] * 3 + self.cells[x]
            case "write":
                preemption_point(f"write {x}", ("cell", x), True)
                self.cells[x] = self.registers[i] + n
                annotate(f"cell {x} <- {self.cells[x]}")
            case "wait":
                wait(f"wait for {x}", ("cell", x), lambda: self.cells[x] > n)
            case "choose":
                self.registers[i] += choose("how much", n + 1)
            case "spawn":
                spawn("worker", self._worker(x, n))

    def _worker(self, x: int, n: int) -> Callable[[], None]:
        def run() -> None:
            preemption_point(f"worker: write {x}", ("cell", x), True)
            self.cells[x] = 10 * self.cells[x] + n

        return run

    def verdict(self, *, stuck: str | None) -> Verdict:
        if stuck is not None:
            return Verdict(Kind.STUCK, f"{self.cells} {self.registers}")
        return Verdict(self._judge(self), f"{self.cells} {self.registers}")

    def close(self) -> None:
        self.closed = True


def _fine(_program: Program) -> Kind:
    return Kind.CORRECT


MakeProgram = Callable[..., Scenario]


@pytest.fixture(scope="session")
def program() -> MakeProgram:
    """Make a scenario of threads' operations; ``ended`` collects the verdicts' texts."""

    def make(
        *threads: Sequence[Op],
        judge: Callable[[Program], Kind] = _fine,
        ended: set[str] | None = None,
        name: str = "program",
    ) -> Scenario:
        class Collecting(Program):
            def verdict(self, *, stuck: str | None) -> Verdict:
                verdict = super().verdict(stuck=stuck)
                if ended is not None:
                    ended.add(f"{verdict.kind.value} {verdict.text}")
                return verdict

        return Scenario(name, "a program", "a test", lambda _: Collecting(threads, judge))

    return make


@pytest.fixture(scope="session")
def dialect() -> Dialect:
    return DIALECTS["seed"]


def increment(x: int) -> list[Op]:
    return [("read", x, 0), ("write", x, 1)]


@pytest.fixture(scope="session")
def lost_update(program: MakeProgram) -> Scenario:
    """Two threads that add 1 to a cell, which comes to 2 unless one is preempted in between."""
    return program(
        increment(0),
        increment(0),
        judge=lambda p: Kind.CORRECT if p.cells[0] == 2 else Kind.LOST,
        name="lost-update",
    )

from __future__ import annotations

from collections.abc import Callable

from guestfault.dialect.record import Dialect
from guestfault.explore.replay import record
from guestfault.explore.scenario import Kind, Scenario, Verdict
from guestfault.explore.schedule import Step
from guestfault.explore.trace import Trace, as_columns


def test_each_actor_has_a_column_and_each_step_a_row(
    lost_update: Scenario, dialect: Dialect
) -> None:
    trace = record(lost_update, dialect, ((2, 1),))
    assert as_columns(trace, 60) == (
        "step  thread 0                    thread 1\n"
        "   0  begin\n"
        "   1  read 0\n"
        "  *2                              begin\n"
        "   3                              read 0\n"
        "   4                              write 0\n"
        "                                  | cell 0 <- 1\n"
        "   5  write 0\n"
        "      | cell 0 <- 1\n"
    )


def test_long_names_and_notes_stay_in_their_column() -> None:
    words = "kvm_mmu_do_page_fault: " + "look again and again " * 5
    steps = (Step(0, words, None, False, [words]), Step(1, words, None, False, [words]))
    verdict = Verdict(Kind.CORRECT)
    trace = Trace("s", "d", (), ("vcpu 0", "vcpu 1"), steps, 0, None, verdict)
    lines = as_columns(trace, 80).splitlines()
    assert max(map(len, lines)) <= 80
    second = lines[0].index("vcpu 1")
    cut = next(i for i, line in enumerate(lines) if line.startswith("   1"))
    assert all(len(line) < second for line in lines[1:cut])
    assert all(not line[6:second].strip() for line in lines[cut:])
    assert any("| kvm_mmu_do_page_fault" in line for line in lines)


def test_workers_have_columns_too(program: Callable[..., Scenario], dialect: Dialect) -> None:
    trace = record(program([("spawn", 0, 1), ("write", 0, 1)]), dialect, ())
    assert trace.actors == ("thread 0", "worker")
    assert as_columns(trace).splitlines()[0].split("  ")[-1] == "worker"

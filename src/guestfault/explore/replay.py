"""A schedule as a short string that can be mailed, and run again.

::

    clobbered/v4/12b.30a.41=1/8c1f2a3b

is a scenario, a dialect, the schedule, and a checksum.  The schedule is where it deviates from the
policy that whoever runs goes on as long as it can, and after it the next in turn: at step 12 actor
b (the second) goes on, at step 30 actor a, and what is chosen at step 41 turns out as 1.  ``-`` is
the schedule that does not deviate.

The checksum is one of the steps: who took each, and under what name.  If the code has changed so
that the same deviations make other steps, the string is refused rather than replayed as something
else.
"""

from __future__ import annotations

import re
import warnings
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from guestfault.dialect.record import Dialect
from guestfault.errors import GuestfaultError
from guestfault.explore.scenario import Scenario
from guestfault.explore.schedule import DEFAULT_LIMITS, Deviation, Impossible, Limits, Step
from guestfault.explore.scheduler import Scheduler
from guestfault.explore.trace import Trace

__all__ = ["BadReplay", "Schedule", "digest", "parse", "record", "replay", "replay_string"]

_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_STRING = re.compile(r"([^/\s]+)/([^/\s]+)/(-|[0-9a-z=.]+)/([0-9a-f]{8})")
_DEVIATION = re.compile(r"(0|[1-9][0-9]{0,5})(?:([a-z]{1,2})|=(0|[1-9][0-9]{0,3}))")


class BadReplay(GuestfaultError):
    """A replay string that cannot be replayed.

    It is malformed, names what is not there, or was made by code that took other steps.  Have
    ``guestfault explore`` find the schedule again.
    """

    def __init__(self, text: str, why: str) -> None:
        super().__init__(f"replay string {text!r}: {why}")
        self.text = text
        self.why = why


@dataclass(frozen=True, slots=True)
class Schedule:
    """A replay string, taken apart."""

    scenario: str
    dialect: str
    deviations: tuple[Deviation, ...]
    choices: frozenset[int]
    """The steps at which a value is chosen, and not an actor."""
    digest: int

    def __str__(self) -> str:
        parts = [
            f"{step}={value}" if step in self.choices else f"{step}{_actor(value)}"
            for step, value in self.deviations
        ]
        schedule = ".".join(parts) or "-"
        return f"{self.scenario}/{self.dialect}/{schedule}/{self.digest:08x}"


def parse(text: str) -> Schedule:
    """Take a replay string apart.  Raises :class:`BadReplay`."""
    match = _STRING.fullmatch(text)
    if match is None:
        raise BadReplay(text, "not of the form SCENARIO/DIALECT/SCHEDULE/CHECKSUM")
    scenario, dialect, schedule, checksum = match.groups()
    deviations: list[Deviation] = []
    choices = set()
    for part in [] if schedule == "-" else schedule.split("."):
        found = _DEVIATION.fullmatch(part)
        if found is None or (deviations and int(found[1]) <= deviations[-1][0]):
            raise BadReplay(text, f"{part!r} is no step and what is done there")
        step = int(found[1])
        if found[2] is None:
            choices.add(step)
            deviations.append((step, int(found[3])))
        else:
            deviations.append((step, _index(found[2])))
    return Schedule(scenario, dialect, tuple(deviations), frozenset(choices), int(checksum, 16))


def record(
    scenario: Scenario,
    dialect: Dialect,
    deviations: tuple[Deviation, ...],
    limits: Limits = DEFAULT_LIMITS,
) -> Trace:
    """Run one schedule and keep its steps.

    Raises :class:`~guestfault.explore.schedule.Impossible` if there is no such schedule.
    """
    scheduler = Scheduler(limits)
    steps: list[Step] = []
    world = scenario.build(dialect)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a kernel's WARN_ON_ONCE is the world's to judge
            run = scheduler.run(world, deviations, record=steps)
            verdict = world.verdict(stuck=run.stuck)
        actors = tuple(scheduler.names())
    finally:
        scheduler.abandon()
        world.close()
    return Trace(
        scenario.name,
        dialect.name,
        deviations,
        actors,
        tuple(steps),
        run.preemptions,
        run.stuck,
        verdict,
    )


def replay_string(trace: Trace) -> str:
    """The string that :func:`replay` makes this trace from."""
    choices = frozenset(i for i, step in enumerate(trace.steps) if step.is_choice)
    return str(
        Schedule(trace.scenario, trace.dialect, trace.deviations, choices, digest(trace.steps))
    )


def digest(steps: Iterable[Step]) -> int:
    """The checksum of a schedule: 32 bits of who took which steps, by name."""
    checksum = 0
    for step in steps:
        checksum = zlib.crc32(f"{step.actor}:{step.name}\n".encode(), checksum)
    return checksum


def replay(
    text: str,
    scenarios: Mapping[str, Scenario],
    dialects: Mapping[str, Dialect],
    limits: Limits = DEFAULT_LIMITS,
) -> Trace:
    """Run the schedule that a replay string stands for.  Raises :class:`BadReplay`."""
    schedule = parse(text)
    scenario, dialect = scenarios.get(schedule.scenario), dialects.get(schedule.dialect)
    if scenario is None:
        raise BadReplay(text, f"there is no scenario {schedule.scenario!r}")
    if dialect is None:
        raise BadReplay(text, f"there is no dialect {schedule.dialect!r}")
    why = scenario.applies(dialect)
    if why is not None:
        raise BadReplay(text, f"{scenario.name} is no question for {dialect.name}: {why}")
    try:
        trace = record(scenario, dialect, schedule.deviations, limits)
    except Impossible as error:
        raise BadReplay(text, f"made by another version of the code: {error}") from error
    if replay_string(trace) != text:
        raise BadReplay(text, "made by another version of the code: the steps are not the same")
    return trace


def _actor(index: int) -> str:
    high, low = divmod(index, len(_LETTERS))
    return (_LETTERS[high - 1] if high else "") + _LETTERS[low]


def _index(letters: str) -> int:
    index = 0
    for letter in letters:
        index = index * len(_LETTERS) + _LETTERS.index(letter) + 1
    return index - 1

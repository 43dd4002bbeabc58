"""Real perf events, on the tracepoint that a thread passes when it sends itself a signal.

The signals are two that a process ignores unless it says otherwise.
"""

from __future__ import annotations

import random
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from guestfault.errors import KernelError, Unavailable
from guestfault.linux.perf_event import RAW_OFFSET, PerfEvent
from guestfault.linux.perf_ring import OverwriteRing
from guestfault.linux.tracefs import EventFormat, Tracefs

SIGNALS = (signal.SIGURG, signal.SIGWINCH)


@pytest.fixture
def generate(tracefs: Tracefs) -> EventFormat:
    event = tracefs.event("signal", "signal_generate")
    try:
        PerfEvent(event).close()
    except Unavailable as error:
        pytest.skip(str(error))
    return event


@pytest.fixture
def open_event(generate: EventFormat) -> Iterator[Callable[..., PerfEvent]]:
    opened: list[PerfEvent] = []

    def open_(**options: Any) -> PerfEvent:
        opened.append(PerfEvent(generate, **options))
        return opened[-1]

    yield open_
    for event in reversed(opened):
        event.close()


def send(signals: list[int]) -> None:
    for number in signals:
        signal.pthread_kill(threading.get_ident(), number)


def sent(event: PerfEvent, records: list[bytes]) -> list[int]:
    return [event.event.fields["sig"].read(record[RAW_OFFSET:]) for record in records]


def newest(event: PerfEvent, ring: OverwriteRing) -> list[int]:
    """Oldest first."""
    field = event.event.fields["sig"]
    found = [field.read(bytes(memory[at + RAW_OFFSET :])) for memory, at in ring.newest_first()]
    return found[::-1]


def test_queue_has_each_once_and_in_order_however_often_it_wraps(
    open_event: Callable[..., PerfEvent],
) -> None:
    event = open_event()
    ring = event.map_queue()
    event.enable()
    for round_ in range(30):
        signals = random.Random(round_).choices(SIGNALS, k=50)
        send(signals)
        assert sent(event, ring.drain()) == signals
    assert ring.lost == 0
    assert event.count() == 30 * 50


def test_what_the_queue_has_no_room_for_is_counted(open_event: Callable[..., PerfEvent]) -> None:
    event = open_event()
    ring = event.map_queue()
    event.enable()
    send([signal.SIGURG] * 300)
    kept = len(ring.drain())
    assert 0 < kept < 300
    assert ring.lost == 0  # it is told with the next record only
    send([signal.SIGWINCH])
    assert sent(event, ring.drain()) == [signal.SIGWINCH]
    assert ring.lost == 300 - kept
    assert event.count() == 301


def test_overwrite_has_the_last_ones(open_event: Callable[..., PerfEvent]) -> None:
    event = open_event(overwrite=True)
    ring = event.map_overwrite()
    event.enable()
    signals = random.Random(1).choices(SIGNALS, k=1000)
    for end in range(100, 1001, 100):
        send(signals[end - 100 : end])
        found = newest(event, ring)
        assert len(found) > 20
        assert found == signals[end - len(found) : end]


def test_events_share_a_ring_in_the_order_of_happening(
    open_event: Callable[..., PerfEvent],
) -> None:
    first, second = open_event(overwrite=True), open_event(overwrite=True)
    ring = first.map_overwrite()
    second.write_to(first)
    first.filter(f"sig == {int(signal.SIGURG)}")
    second.filter(f"sig == {int(signal.SIGWINCH)}")
    first.enable()
    second.enable()
    signals = random.Random(2).choices(SIGNALS, k=30)
    send(signals)
    assert newest(first, ring) == signals
    assert first.count() == signals.count(signal.SIGURG)


def test_a_thread_records_its_own_doing_only(open_event: Callable[..., PerfEvent]) -> None:
    event = open_event()
    ring = event.map_queue()
    event.enable()
    other = threading.Thread(target=send, args=([signal.SIGURG] * 20,))
    other.start()
    other.join()
    send([signal.SIGWINCH])
    assert sent(event, ring.drain()) == [signal.SIGWINCH]


def test_records_only_between_enable_and_disable(open_event: Callable[..., PerfEvent]) -> None:
    event = open_event()
    ring = event.map_queue()
    send([signal.SIGURG])
    event.enable()
    send([signal.SIGWINCH])
    event.disable()
    send([signal.SIGURG])
    assert sent(event, ring.drain()) == [signal.SIGWINCH]


def test_close_may_be_called_again(generate: EventFormat) -> None:
    event = PerfEvent(generate, overwrite=True)
    event.map_overwrite()
    event.close()
    event.close()


def test_the_ring_must_be_of_the_events_direction(open_event: Callable[..., PerfEvent]) -> None:
    with pytest.raises(ValueError, match="newest"):
        open_event(overwrite=True).map_queue()
    with pytest.raises(ValueError, match="oldest"):
        open_event().map_overwrite()


def test_errors(open_event: Callable[..., PerfEvent], generate: EventFormat) -> None:
    with pytest.raises(KernelError, match="perf_event_open: EINVAL"):
        PerfEvent(EventFormat("none", 65534, {}))
    with pytest.raises(KernelError, match="PERF_EVENT_IOC_SET_FILTER: EINVAL"):
        open_event().filter("moon == 1")


# Without rights, and behind a filter as containers have it: perf_event_open is call 298.
_OPEN = """
try:
    PerfEvent(event)
except Unavailable as error:
    print(error)
"""


def _ready(event: EventFormat) -> str:
    return (
        "from guestfault.errors import Unavailable\n"
        "from guestfault.linux.perf_event import PerfEvent\n"
        "from guestfault.linux.tracefs import EventFormat\n"
        f"event = EventFormat({event.name!r}, {event.id}, {{}})"
    )


def test_a_refusal_names_the_grant(child: Callable[..., str], generate: EventFormat) -> None:
    said = child(_ready(generate), _OPEN, unprivileged=True)
    if not said:
        pytest.skip("perf is open to everyone here")
    assert "no CAP_PERFMON" in said
    assert "perf_event_paranoid=-1" in said


@pytest.mark.parametrize("errno", [1, 38])
def test_a_seccomp_filter_is_named(
    child: Callable[..., str], generate: EventFormat, errno: int
) -> None:
    said = child(_ready(generate), _OPEN, refuse=((298, None, errno),))
    assert "seccomp" in said

from hypothesis import given
from hypothesis import strategies as st

from guestfault.scale.events import Clock, Serial


def test_what_is_due_comes_in_its_order():
    clock, seen = Clock(), []
    for delay in (3.0, 1.0, 2.0, 1.0):
        clock.after(delay, lambda delay=delay: seen.append((clock.now, delay)))
    clock.run(lambda: False)
    assert seen == [(1.0, 1.0), (1.0, 1.0), (2.0, 2.0), (3.0, 3.0)]


def test_run_stops_when_told_and_goes_on():
    clock, seen = Clock(), []
    for delay in (1.0, 2.0, 3.0):
        clock.after(delay, lambda delay=delay: seen.append(delay))
    clock.run(lambda: len(seen) == 2)
    assert seen == [1.0, 2.0]
    clock.run(lambda: False)
    assert seen == [1.0, 2.0, 3.0]


def test_the_same_seed_gives_the_same_run():
    def times(seed):
        clock, seen = Clock(seed), []
        for _ in range(5):
            clock.about(10.0, lambda: seen.append(clock.now))
        clock.run(lambda: False)
        return seen

    assert times(1) == times(1) != times(2)
    assert all(5.0 <= t <= 15.0 for t in times(1))


@given(st.lists(st.tuples(st.floats(0, 100), st.floats(0.01, 10)), min_size=1, max_size=30))
def test_a_serial_resource_holds_one_at_a_time_and_keeps_their_order(requests):
    """Invariant: no two holds overlap, and nobody overtakes."""
    clock = Clock()
    resource = Serial(clock)
    ends = []

    def come(number, hold):
        came = clock.now
        resource.request(lambda _: hold, lambda: ends.append((number, came, clock.now, hold)))

    for number, (at, hold) in enumerate(requests):
        clock.after(at, lambda number=number, hold=hold: come(number, hold))
    clock.run(lambda: False)
    assert len(ends) == len(requests)
    free = 0.0
    for _, came, ended, hold in ends:
        assert ended - hold >= max(came, free) - 1e-9
        free = ended
    assert [came for _, came, _, _ in ends] == sorted(came for _, came, _, _ in ends)


def test_the_hold_is_told_how_many_wait():
    clock, told = Clock(), []
    resource = Serial(clock)
    for _ in range(3):
        resource.request(lambda n: told.append(n) or 1.0, lambda: None)
    clock.run(lambda: False)
    assert told == [0, 1, 0]  # the first was alone when it came

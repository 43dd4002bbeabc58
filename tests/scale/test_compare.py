from guestfault.scale.compare import FITTED_AT, compare, median_error, worst_error
from guestfault.scale.costs import PUBLISHED_MACHINE
from guestfault.scale.fit import fit, loss
from guestfault.scale.published import TABLES, VCPUS


def test_the_simulation_reproduces_the_published_tables():
    points = list(compare(PUBLISHED_MACHINE))
    assert len(points) == 2 * 2 * len(VCPUS)
    assert median_error(points) <= 0.15
    assert abs(worst_error(points).error) <= 0.40
    judged = [p for p in points if not p.fitted]
    assert {p.vcpus for p in judged} == set(VCPUS) - set(FITTED_AT) != set()
    assert median_error(judged) <= 0.15
    assert abs(worst_error(judged).error) <= 0.40


def test_the_published_exits_are_up_to_111_times_faster():
    shared = TABLES[0]
    assert round(max(e / u for e, u in zip(shared.exits, shared.uffd, strict=True)), 1) == 111.4


def test_a_fit_is_no_worse_than_where_it_began():
    least = loss(compare(PUBLISHED_MACHINE, FITTED_AT, effort=0.3))
    costs, found = fit(PUBLISHED_MACHINE, seconds=0.5)
    assert found <= least
    assert loss(compare(costs, FITTED_AT, effort=0.3)) == found

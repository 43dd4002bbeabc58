from __future__ import annotations

from dataclasses import replace

import pytest

from guestfault.explore.mutation import MUTATIONS, Mutation, OutOfDate, worse

FOUND_WITHIN = 30.0  # seconds


@pytest.mark.timeout(3 * FOUND_WITHIN)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_the_search_finds_each_precaution_that_is_missing(mutation: Mutation) -> None:
    """Defends the checker: a table of good cells means that bad ones would have been seen.

    Each scenario that a mutation names must show it.
    """
    found = worse(mutation, timeout=FOUND_WITHIN)
    assert {cell.scenario for cell in found} == set(mutation.scenarios)


def test_a_mutation_has_a_name_of_its_own() -> None:
    assert len({mutation.name for mutation in MUTATIONS}) == len(MUTATIONS)


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    ("old", "count"), [("a sentence that is not in there", 0), ("self.uffd", "[0-9]+")]
)
def test_a_mutation_whose_text_has_changed_is_out_of_date(old: str, count: object) -> None:
    eexist = MUTATIONS[-1]
    with pytest.raises(OutOfDate, match=f"{old!r} occurs {count} times in .*memory/view.py"):
        worse(replace(eexist, old=old))


@pytest.mark.timeout(60)
def test_a_mutation_that_changes_nothing_is_not_found() -> None:
    eexist = MUTATIONS[-1]
    assert worse(replace(eexist, new=eexist.old)) == []


@pytest.mark.timeout(60)
def test_code_that_does_not_run_is_no_finding() -> None:
    eexist = MUTATIONS[-1]
    with pytest.raises(RuntimeError, match="IndentationError"):
        worse(replace(eexist, new="\n"))

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from guestfault.check.finding import Finding, Status, Use, readiness

FINDINGS = st.lists(
    st.builds(
        Finding,
        name=st.text(max_size=4),
        status=st.sampled_from(Status),
        detail=st.just(""),
        needed_for=st.lists(st.sampled_from(Use), max_size=3).map(tuple),
    )
)


def test_a_use_that_needs_nothing_is_ready() -> None:
    assert readiness([]) == dict.fromkeys(Use, Status.OK)


@given(FINDINGS)
def test_a_use_is_as_ready_as_the_worst_of_what_it_needs(findings: list[Finding]) -> None:
    ready = readiness(findings)
    for use in Use:
        needed = {f.status for f in findings if use in f.needed_for}
        if Status.MISSING in needed:
            assert ready[use] is Status.MISSING
        elif Status.LIMITED in needed:
            assert ready[use] is Status.LIMITED
        else:
            assert ready[use] is Status.OK

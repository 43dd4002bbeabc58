from __future__ import annotations

import json
import re

from hypothesis import given
from hypothesis import strategies as st

from guestfault.check.finding import Finding, Status, Use
from guestfault.check.report import as_json, as_table
from guestfault.check.survey import Subject, Survey

TEXT = st.text("abc -/:", max_size=120).map(lambda text: " ".join(w[:20] for w in text.split()))

FINDINGS = st.lists(
    st.builds(
        Finding,
        name=st.text("abc", min_size=1, max_size=29),
        status=st.sampled_from(Status),
        detail=TEXT,
        mend=TEXT,
        needed_for=st.lists(st.sampled_from(Use), max_size=2).map(tuple),
    ),
    min_size=1,
    max_size=4,
).map(tuple)


def survey_of(*findings: Finding) -> Survey:
    return Survey("1.0", "6.18.0", "x86_64", 0, (Subject("Subject", findings),))


@given(FINDINGS)
def test_the_table_fits_80_columns_and_loses_no_word(findings: tuple[Finding, ...]) -> None:
    table = as_table(survey_of(*findings), width=80)
    # The lists of names at the end hold names as long as these.
    assert max(map(len, table.splitlines())) <= 80
    words = set(table.split())
    for finding in findings:
        assert words >= {finding.name, *finding.detail.split(), *finding.mend.split()}


@given(FINDINGS)
def test_colour_adds_nothing_but_colour(findings: tuple[Finding, ...]) -> None:
    survey = survey_of(*findings)
    coloured = as_table(survey, colour=True)
    assert "\x1b[" in coloured
    assert re.sub(r"\x1b\[\d+m", "", coloured) == as_table(survey)


def test_a_finding_reads_in_columns() -> None:
    missing = Finding("/dev/kvm", Status.MISSING, "no", "modprobe kvm", (Use.KERNEL_KVM,))
    lines = as_table(survey_of(missing)).splitlines()
    assert lines[0] == "guestfault 1.0, Linux 6.18.0, x86_64, uid 0"
    assert lines[2:5] == [
        "Subject",
        "  missing  /dev/kvm  no",
        "                     > modprobe kvm",
    ]
    assert "  missing  kernel KVM          see /dev/kvm" in lines


@given(FINDINGS)
def test_the_json_holds_every_finding_whole(findings: tuple[Finding, ...]) -> None:
    document = json.loads(as_json(survey_of(*findings)))
    assert document["schema"] == 1
    assert document["ready"].keys() == set(Use)
    (subject,) = document["subjects"]
    assert [tuple(f.values()) for f in subject["findings"]] == [
        (f.name, f.status, f.detail, f.mend, list(f.needed_for)) for f in findings
    ]

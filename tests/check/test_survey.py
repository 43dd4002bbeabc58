from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from guestfault.check.finding import Status, Use
from guestfault.check.survey import Survey, survey


def test_whatever_is_not_whole_comes_with_its_mend(
    as_nobody: Callable[[Callable[[], Any]], Any],
) -> None:
    for found in (survey(), as_nobody(survey)):
        for finding in found.findings:
            assert finding.detail
            assert bool(finding.mend) == (finding.status is not Status.OK), finding


def test_names_are_unique_so_that_a_program_can_look_them_up() -> None:
    names = [finding.name for finding in survey().findings]
    assert len(names) == len(set(names))


def test_the_software_kvm_is_ready_for_everyone(
    as_nobody: Callable[[Callable[[], Any]], Any],
) -> None:
    found: Survey = as_nobody(survey)
    assert found.uid != 0
    assert found.kernel == os.uname().release
    assert found.ready[Use.SOFTWARE_KVM] is Status.OK


def test_it_leaves_no_file_descriptor_open() -> None:
    before = os.listdir("/proc/self/fd")
    survey()
    survey()
    assert os.listdir("/proc/self/fd") == before

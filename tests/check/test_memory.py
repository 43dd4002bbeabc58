from __future__ import annotations

from collections.abc import Callable
from typing import Any

from guestfault.check.finding import Status, Use
from guestfault.check.memory import probe


def test_every_user_has_what_the_software_kvm_needs(
    as_nobody: Callable[[Callable[[], Any]], Any],
) -> None:
    for findings in (probe(), as_nobody(probe)):
        assert [(f.name, f.status) for f in findings] == [
            ("memfd", Status.OK),
            ("MADV_POPULATE", Status.OK),
            ("pagemap", Status.OK),
            ("kernel copies", Status.OK),
        ]


def test_a_pagemap_that_cannot_be_opened_is_missing() -> None:
    pagemap = probe(pagemap_pid="no-such-process")[2]
    assert pagemap.status is Status.MISSING
    assert "/proc/no-such-process/pagemap" in pagemap.detail
    assert Use.SOFTWARE_KVM in pagemap.needed_for

from __future__ import annotations

import sys

import pytest

from guestfault.check.finding import Status, Use
from guestfault.check.software import probe


def test_both_packages_work_here() -> None:
    assert [(f.name, f.status) for f in probe()] == [
        ("unicorn", Status.OK),
        ("iced-x86", Status.OK),
    ]


def test_a_package_that_cannot_be_imported_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "iced_x86", None)
    unicorn, iced = probe()
    assert unicorn.status is Status.OK
    assert iced.status is Status.MISSING
    assert "ModuleNotFoundError" in iced.detail
    assert "pip install" in iced.mend
    assert Use.SOFTWARE_KVM in iced.needed_for

"""What is printed is what the records say, and fits where it is printed."""

from __future__ import annotations

import dataclasses
import json

import pytest

from guestfault.dialect.describe import as_json, details, refused, table, where
from guestfault.dialect.published import DIALECTS
from guestfault.dialect.record import Guard

every = pytest.mark.parametrize("name", DIALECTS)


def row(name: str) -> str:
    [line] = [x for x in table(DIALECTS.values()).splitlines() if x.startswith(f"{name} ")]
    return line


def test_one_line_each_in_120_columns() -> None:
    text = table(DIALECTS.values())
    assert max(map(len, text.splitlines())) <= 120
    lines = text.splitlines()
    assert [line.split()[0] for line in lines[1 : len(DIALECTS) + 1]] == list(DIALECTS)
    assert lines[len(DIALECTS) + 1] == ""


def test_what_sets_them_apart_can_be_read_off_the_rows() -> None:
    assert "ioctl (226)" in row("v1")
    assert "never" in row("v1")
    assert "227 per reason" in row("wip-v2")
    assert " EPERM " in row("wip-v2")
    assert "227 opt-in" in row("v3")
    assert "loaded reason" in row("v3")
    assert "entry" in row("v3")
    assert "flags 1<<8" in row("v5")
    assert "loaded (canary)" in row("v5")
    assert "RWX PRIVATE" in row("v7")
    assert "1<<3 (236)" in row("v7")
    assert "bitmap (243)" in row("userfault-v3")
    assert "PRIVATE USERFAULT" in row("userfault-v3")
    assert "EFAULT EHWPOISON" in row("linux-6.8")
    assert len({row(name).removeprefix(name) for name in DIALECTS if name != "linux-7.3"}) == 9


@every
def test_details_are_in_100_columns_with_every_source(name: str) -> None:
    d = DIALECTS[name]
    text = details(d)
    assert all(len(line) <= 100 or "://" in line for line in text.splitlines())
    assert where(d.source) in text
    for flaw in d.flaws:
        assert where(flaw.source) in text
    joined = " ".join(text.split())
    for cap in d.capabilities:
        assert f"{cap.name} ({cap.number}), {cap.enabling}" in joined
    for site in d.annotated:
        assert site.value in joined
    for what in refused(d):
        assert what in joined


def test_the_record_decides_and_not_the_name() -> None:
    changed = dataclasses.replace(
        DIALECTS["v5"], guards=(Guard.LOADED_VCPU,), warns_only=frozenset()
    )
    assert "canary" not in table([changed]).splitlines()[1]
    assert "canary (" not in details(changed)


def test_what_each_refuses() -> None:
    assert refused(DIALECTS["v7"])[-1] == "KVM_MEM_READONLY with KVM_MEM_EXIT_ON_MISSING"
    assert refused(DIALECTS["wip-v2"]) == ["enabling KVM_CAP_MEMORY_FAULT_NOWAIT"]
    assert "with anything but 0 and 1" in refused(DIALECTS["v3"])[0]
    assert refused(DIALECTS["linux-6.8"]) == ["enabling KVM_CAP_MEMORY_FAULT_INFO"]


@every
def test_json_is_plain_and_complete(name: str) -> None:
    d = DIALECTS[name]
    document = json.loads(json.dumps(as_json(d)))
    assert document == as_json(d)
    assert document["name"] == name
    assert set(document["annotated"]) == set(d.annotated)
    assert [g["guard"] for g in document["guards"]] == [g.value for g in d.guards]
    assert len(document["flaws"]) == len(d.flaws)


def test_a_message_id_becomes_an_address() -> None:
    assert where("ZFFbwOXZ5uI/gdaf@google.com") == (
        "https://lore.kernel.org/kvm/ZFFbwOXZ5uI%2Fgdaf@google.com/"
    )
    assert where("Linux 6.8, commit 16f95f3b95ca") == "Linux 6.8, commit 16f95f3b95ca"

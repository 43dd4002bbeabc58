"""What no one header says of a structure that grows: ours has one of the published sizes."""

from __future__ import annotations

from ctypes import sizeof

from guestfault.uapi import perf as uapi


def test_attributes_have_a_published_size() -> None:
    assert sizeof(uapi.perf_event_attr) == uapi.PERF_ATTR_SIZE_VER7

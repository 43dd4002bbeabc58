from __future__ import annotations

import os

import pytest

from guestfault.linux.readable import readable

pytestmark = pytest.mark.timeout(10)


def test_it_goes_on_for_each_and_ends_when_told_to() -> None:
    fd, stop_fd = os.eventfd(1), os.eventfd(0)
    try:
        turns = 0
        for _ in readable(fd, stop_fd):
            turns += 1
            if turns == 2:
                os.eventfd_read(fd)
                os.eventfd_write(stop_fd, 1)
        assert turns == 2
        os.eventfd_write(fd, 1)
        assert not list(readable(fd, stop_fd))  # to stop comes first
    finally:
        os.close(fd)
        os.close(stop_fd)

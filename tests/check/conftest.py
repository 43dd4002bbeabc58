"""Another user's view of this machine, by becoming that user."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

import pytest

NOBODY = 65534
PR_SET_DUMPABLE = 4  # include/uapi/linux/prctl.h

InChild = Callable[[Callable[[], Any]], Any]


@pytest.fixture(scope="session")
def as_nobody(in_child: InChild) -> InChild:
    """Run a function in a child process of an unprivileged user, and return its result.

    A child by fork, for the interpreter itself may lie where that user cannot reach it.  If the
    tests do not run as root, the user is already unprivileged, and stays who it is.
    """

    def run(function: Callable[[], Any]) -> Any:
        def drop_and_call() -> Any:
            _become_nobody()
            return function()

        return in_child(drop_and_call)

    return run


def _become_nobody() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        # A process that changed its user hides its own /proc files from itself until execve.
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)

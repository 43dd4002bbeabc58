"""Another user's view of this machine, by becoming that user."""

from __future__ import annotations

import ctypes
import os
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import pytest

NOBODY = 65534
PR_SET_DUMPABLE = 4  # include/uapi/linux/prctl.h

InChild = Callable[[Callable[[], Any]], Any]


@pytest.fixture(scope="session")
def in_child() -> InChild:
    """Run a function in a child process, which it may spoil, and return its result."""
    return _in_child


@pytest.fixture(scope="session")
def as_nobody() -> InChild:
    """Run a function in a child process of an unprivileged user, and return its result.

    A child by fork, for the interpreter itself may lie where that user cannot reach it.  If the
    tests do not run as root, the user is already unprivileged, and stays who it is.
    """

    def run(function: Callable[[], Any]) -> Any:
        def drop_and_call() -> Any:
            _become_nobody()
            return function()

        return _in_child(drop_and_call)

    return run


def _become_nobody() -> None:
    if os.geteuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        # A process that changed its user hides its own /proc files from itself until execve.
        ctypes.CDLL(None).prctl(PR_SET_DUMPABLE, 1, 0, 0, 0)


def _in_child(function: Callable[[], Any]) -> Any:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            answer = ("result", function())
        except BaseException:
            answer = ("failure", traceback.format_exc())
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        pickled = pipe.read()
    os.waitpid(child, 0)
    kind, value = pickle.loads(pickled)
    assert kind == "result", value
    return value

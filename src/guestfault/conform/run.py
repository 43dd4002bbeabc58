"""Running cases on a KVM, and what keeps one case from harming another.

A case that may cost the process its life, or a thread of it, runs in a child; what comes of it is
the result, or the signal that the child died of.  A case that harms the machine (``hostile``) runs
only where the caller says that the machine is there for it.
"""

from __future__ import annotations

import gc
import os
import pickle
import signal
import traceback
from collections.abc import Callable, Iterable

from guestfault.conform.case import Case
from guestfault.conform.record import SKIPPED, Result
from guestfault.conform.watch import NeverReturnedError
from guestfault.errors import GuestfaultError, Unavailable
from guestfault.kvm.protocols import System
from guestfault.kvm.system import KvmSystem

__all__ = ["run_case", "run_cases"]

_CHILD_SECONDS = 60
_HANGS = "hangs"
Progress = Callable[[Case], None]


def run_cases(
    system: System,
    cases: Iterable[Case],
    *,
    hostile: bool = False,
    repeat: int = 1,
    progress: Progress | None = None,
) -> dict[str, list[Result]]:
    """Each case ``repeat`` times, by its name; ``progress`` is called before each.

    A case that *hangs* (nothing ends its call) is the last one that runs: the process holds a
    thread that is lost.
    """
    results: dict[str, list[Result]] = {}
    hung = ""
    for case in cases:
        if progress is not None:
            progress(case)
        if hung:
            results[case.name] = [_skipped(case, f"{hung} never came back; nothing ran after it")]
            continue
        try:
            results[case.name] = [run_case(system, case, hostile=hostile) for _ in range(repeat)]
        except NeverReturnedError as error:
            results[case.name] = [Result(case.name, _HANGS, why=str(error))]
            hung = case.name
    return results


def run_case(system: System, case: Case, *, hostile: bool = False) -> Result:
    """Run a case; one that this KVM or machine cannot run is *skipped*, and says why.

    Raises :class:`~guestfault.conform.watch.NeverReturnedError` when a call is not to be ended.
    """
    if case.condition.hostile and not hostile:
        return _skipped(case, "it costs the machine a page of memory: in the lab only")
    # The software KVM has threads, which a child would not, and breaks no memory.
    if case.in_child and isinstance(system, KvmSystem):
        return _in_child(system, case)
    return _here(system, case)


def _here(system: System, case: Case) -> Result:
    try:
        return case.run(system)
    except NeverReturnedError:
        raise
    except Unavailable as error:
        return _skipped(case, f"{error.what}: {error.why}")
    except GuestfaultError as error:
        return Result(case.name, "failed", why=str(error))


def _skipped(case: Case, why: str) -> Result:
    return Result(case.name, SKIPPED, why=why)


def _in_child(system: System, case: Case) -> Result:
    reader, writer = os.pipe()
    gc.collect()  # nothing that is closed twice, here and there
    child = os.fork()
    if child == 0:
        os.close(reader)
        status = 1
        try:
            try:
                answer = _with_sigbus(system, case)
            except NeverReturnedError as error:
                answer = Result(case.name, _HANGS, why=str(error))
            with os.fdopen(writer, "wb") as pipe:
                pickle.dump(answer, pipe)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        pickled = pipe.read()
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    if code < 0:
        name = signal.Signals(-code).name
        return Result(case.name, f"killed by {name}")
    if code:
        return Result(case.name, "failed", why=f"the child ended with status {code}")
    result = pickle.loads(pickled)
    assert isinstance(result, Result)
    return result


def _with_sigbus(system: System, case: Case) -> Result:
    """Run it with a handler for SIGBUS, which comes to who breaks memory before any vCPU does."""
    # Whoever touches broken memory in an instruction of his own does so for ever, handler or not.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(_CHILD_SECONDS)
    received: list[str] = []
    signal.signal(signal.SIGBUS, lambda number, _: received.append(signal.Signals(number).name))
    result = _here(system, case)
    signal.alarm(0)
    result.signals = received + result.signals
    return result

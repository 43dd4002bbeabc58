"""How a case is asked: what is done in which order.

:func:`one_vcpu` is how nearly all of them are: come to the access; make it; run again with nothing
mended; mend; run on.  Whatever happens on the way is recorded, and nothing is taken for granted,
not that a call comes back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from guestfault.conform import places
from guestfault.conform.bench import Bench
from guestfault.conform.condition import Arranged, Condition
from guestfault.conform.guests import Access
from guestfault.conform.observe import COMPLETES, Observer, errno_name
from guestfault.conform.private import set_private
from guestfault.conform.record import Exit, Phase, Result
from guestfault.conform.watch import PATIENCE, NeverReturnedError, Watched
from guestfault.errors import Unavailable
from guestfault.guest.layout import Mode
from guestfault.kvm.protocols import System
from guestfault.kvm.vcpu import KvmVcpu
from guestfault.uapi import kvm as uapi

__all__ = ["conversion", "one_vcpu", "prefault", "two_vcpus"]


@contextmanager
def _arranged(bench: Bench, arrange: Callable[[Bench], Arranged]) -> Iterator[Arranged]:
    """A condition, until the VM is gone."""
    arranged = arrange(bench)
    try:
        yield arranged
    finally:
        bench.close()
        arranged.to_close.close()


@contextmanager
def _bench(system: System, condition: Condition, access: Access, mode: Mode) -> Iterator[Bench]:
    bench = Bench(system, access, mode, condition.create_vm)
    try:
        yield bench
    finally:
        bench.close()


def one_vcpu(system: System, condition: Condition, access: Access, mode: Mode) -> Result:
    """The ordinary case."""
    with _bench(system, condition, access, mode) as bench:
        arrange = _sound if condition.later else condition.arrange
        with _arranged(bench, arrange) as arranged:
            observer = Observer(bench, bench.create_vcpu())
            observer.arranged = arranged
            observer.ready()
            phases: list[Phase] = []
            if not condition.later:
                return _from_the_access_on(observer, phases, bench, condition)
            phases.append(observer.phase("before"))
            with _arranged(bench, condition.arrange) as later:
                observer.arranged = later
                return _from_the_access_on(observer, phases, bench, condition)


def _sound(bench: Bench) -> Arranged:
    bench.target.write(0, 4)
    bench.target.guest.populate_write(0, places.TARGET_SIZE)
    bench.set_target()
    return Arranged(lambda: None)


def _from_the_access_on(
    observer: Observer, phases: list[Phase], bench: Bench, condition: Condition
) -> Result:
    access = observer.phase("access")
    word = _word(access)
    phases.append(access)
    last = access
    if last.blocked is not None:
        last = observer.kick()
        phases.append(last)
    if last.blocked is None and _goes_on(last):
        last = observer.phase("again")
        phases.append(last)
    if last.blocked is not None:
        phases.append(_settled(observer, observer.release("mended"), bench))
    else:
        observer.arranged.mend()
        if _goes_on(last):
            phases.append(_settled(observer, observer.phase("mended"), bench))
    return _judged(Result("", word, phases), observer, bench, condition)


def _settled(observer: Observer, phase: Phase, bench: Bench) -> Phase:
    """A last phase with nobody inside ``KVM_RUN``, and no kick on the way, when it ends."""
    if phase.blocked is None and phase.exits[-1].word == "interrupted":
        rest = observer.phase(phase.name)
        phase = Phase(phase.name, [*phase.exits, *rest.exits], rest.blocked)
    if phase.blocked is None:
        return phase
    kicked = observer.kick()
    if kicked.blocked is not None:
        bench.abandon()
        raise NeverReturnedError("KVM_RUN")
    return Phase(phase.name, [*phase.exits, *kicked.exits], phase.blocked)


def _goes_on(phase: Phase) -> bool:
    """Whether another ``KVM_RUN`` after it can tell anything."""
    return phase.exits[-1].word not in (COMPLETES, "shutdown")


def _word(phase: Phase) -> str:
    if phase.blocked is not None:
        return "loops" if phase.blocked.get("state") == "running" else "blocks"
    return phase.exits[-1].word


def _judged(result: Result, observer: Observer, bench: Bench, condition: Condition) -> Result:
    """Fill in how it ended."""
    result.signals = observer.signals
    access, value = bench.access, observer.value
    looked_at = access.memory[0] if access.memory else access.at
    memory = bench.word(looked_at)
    result.memory = f"{memory:#x}"
    if value is None:
        result.ending = "never"
        return result
    result.value = f"{value:#x}"
    sent = [_data(e) for phase in result.phases for e in phase.exits if "sent" in e.payload]
    wrong = (
        (access.value is not None and value != access.value)
        or (access.memory is not None and memory != access.memory[1])
        or (access.sent is not None and access.sent not in sent)
        or not (access.fetches or access.walked or bench.word(places.MARKED) == places.MARK)
    )
    result.ending = "wrong" if wrong else "right"
    if wrong and result.word == COMPLETES:
        result.word = "zeros"
    return result


def _data(exit_: Exit) -> int:
    return int.from_bytes(bytes.fromhex(exit_.payload["sent"]), "little")


def two_vcpus(system: System, condition: Condition, access: Access, mode: Mode) -> Result:
    """Two vCPUs make the same access while the other is at it.

    Both come to it.  The first is kicked, if it sleeps there; then the page is mended, and both run
    on.
    """
    with (
        _bench(system, condition, access, mode) as bench,
        _arranged(bench, condition.arrange) as arranged,
    ):
        both = [Observer(bench, bench.create_vcpu(n)) for n in range(2)]
        for observer in both:
            observer.arranged = arranged
            observer.ready()
        phases = [o.phase(f"vcpu {n}: access") for n, o in enumerate(both)]
        words = [_word(phase) for phase in phases]
        if phases[0].blocked is not None:
            kicked = both[0].kick()
            kicked.name = "vcpu 0: kick"
            phases.append(kicked)
        if phases[1].blocked is not None:
            phases.append(_settled(both[1], both[1].release("vcpu 1: mended"), bench))
        else:
            arranged.mend()
            if words[1] != COMPLETES:
                phases.append(_settled(both[1], both[1].phase("vcpu 1: mended"), bench))
        if words[0] != COMPLETES:
            phases.append(_settled(both[0], both[0].phase("vcpu 0: mended"), bench))
        word = words[0] if words[0] == words[1] else " + ".join(words)
        result = _judged(Result("", word, phases), both[0], bench, condition)
        result.signals = both[0].signals + both[1].signals
        return result


def conversion(system: System, condition: Condition, access: Access, mode: Mode) -> Result:
    """The page is shared, private, shared and private again, and each time the guest accesses it.

    Of each it is recorded what the guest reported and what is in shared memory then, which before
    it is as it was at the beginning.  It ends well if private memory reads as zeros, and what is
    done to it never shows in shared memory.
    """
    with _bench(system, condition, access, mode) as bench, _arranged(bench, condition.arrange):
        observer = Observer(bench, bench.create_vcpu())
        observer.ready()
        result, right = Result("", COMPLETES), True
        for private, name in enumerate(("shared", "private", "shared again", "private again")):
            is_private = bool(private % 2)
            bench.target.write(1)
            set_private(bench, is_private)
            phase = observer.phase(name)
            result.phases.append(phase)
            result.word = _word(phase)
            if result.word != COMPLETES:
                result.ending = "never"
                return result
            assert observer.value is not None
            memory = bench.word(access.at)
            phase.exits[-1].payload |= {"value": f"{observer.value:#x}", "memory": f"{memory:#x}"}
            value, (_, stored) = access.value, access.memory or (0, places.CONTENT)
            if is_private:
                value, stored = None if value is None else 0, places.CONTENT
            right &= memory == stored and value in (None, observer.value)
        result.ending = "right" if right else "wrong"
        return result


def prefault(system: System, condition: Condition, access: Access, mode: Mode) -> Result:
    """``KVM_PRE_FAULT_MEMORY`` of three pages, the second of which is the one."""
    with _bench(system, condition, access, mode) as bench:
        _need_prefault(bench)
        with _arranged(bench, condition.arrange) as arranged:
            vcpu = bench.create_vcpu()
            assert isinstance(vcpu, KvmVcpu)
            phases = [_prefault(bench, vcpu, "access"), _prefault(bench, vcpu, "again")]
            arranged.mend()
            phases.append(_prefault(bench, vcpu, "mended"))
            return Result("", phases[0].exits[-1].word, phases)


def _need_prefault(bench: Bench) -> None:
    cap = uapi.KVM_CAP_PRE_FAULT_MEMORY
    if not bench.is_real:
        raise Unavailable("KVM_PRE_FAULT_MEMORY", "the software KVM does not have it")
    if bench.vm.check_extension(cap) <= 0:
        raise Unavailable("KVM_PRE_FAULT_MEMORY", f"capability {cap} is 0")


def _prefault(bench: Bench, vcpu: KvmVcpu, name: str) -> Phase:
    request = uapi.kvm_pre_fault_memory(gpa=places.TARGET, size=3 * places.PAGE)
    watched = Watched(lambda: vcpu.pre_fault_once(request))
    blocked = watched.wait(PATIENCE)
    if blocked is not None:
        bench.abandon()
        raise NeverReturnedError(f"KVM_PRE_FAULT_MEMORY ({name})")
    ret = watched.result()
    left = {"gpa": f"{request.gpa:#x}", "size": int(request.size)}
    return Phase(name, [_prefaulted(ret, left)])


def _prefaulted(ret: int, left: dict[str, Any]) -> Exit:
    name = errno_name(-ret) if ret else ""
    done = (places.TARGET + 3 * places.PAGE - int(left["gpa"], 16)) == 0
    word = f"-{name}" if ret else "maps all" if done else "maps part"
    return Exit(ret, name, None, word, left, [], "")

"""One ``KVM_RUN`` after another, and all there is to see of each."""

from __future__ import annotations

import dataclasses
import errno
import signal
from typing import Any

from guestfault.conform import places
from guestfault.conform.bench import STALE, Bench, poison, union_of
from guestfault.conform.condition import Arranged
from guestfault.conform.record import Exit, Phase
from guestfault.conform.watch import PATIENCE, SOFT_KICK, SOFT_SLEEP, NeverReturnedError, Watched
from guestfault.dialect.interface import EHWPOISON
from guestfault.fault.outcome import (
    BareFault,
    Failed,
    Hlt,
    InternalError,
    Interrupted,
    Io,
    MemoryFault,
    Mmio,
    Outcome,
    RamMmio,
    Shutdown,
    outcome,
)
from guestfault.kvm.protocols import Vcpu
from guestfault.linux.sigbus import SigbusHeld, take_sigbus
from guestfault.uapi import kvm as uapi
from guestfault.x86.registers import EXCEPTION_NAMES

__all__ = ["COMPLETES", "Observer", "errno_name"]

COMPLETES = "completes"
_GOES_ON = "goes on"  # not the end of a phase: a device was accessed, and has answered
_MOST_EXITS = 8
_ANSWER = bytes([places.ANSWER])


class Observer:
    """Runs one vCPU of a bench, phase by phase."""

    def __init__(self, bench: Bench, vcpu: Vcpu) -> None:
        self._bench, self.vcpu = bench, vcpu
        self.signals: list[str] = []
        vcpu.set_interrupting_signals({signal.SIGBUS})
        self._answer: tuple[int, bytes] | None = None
        self._owed = False
        self.value: int | None = None
        self.arranged = Arranged(lambda: None)

    def ready(self) -> None:
        """Run the guest up to its access."""
        said = self._run()
        if not (isinstance(said, Io) and said.port == places.READY_PORT):
            raise AssertionError(f"the guest does not come to its access: {said}")

    def phase(self, name: str) -> Phase:
        """Run until the guest is done, or anything else happens than that a device answers.

        A sleep ends the phase: :meth:`kick` or :meth:`release` then ends the sleep.
        """
        phase = Phase(name)
        self.value = None
        for _ in range(_MOST_EXITS):
            self._begin()
            phase.blocked = self._await(SOFT_SLEEP)
            if phase.blocked is not None:
                break
            phase.exits.append(self._finish())
            if not self._goes_on(phase.exits[-1]):
                break
        return phase

    def kick(self) -> Phase:
        """Kick it out of its sleep; a phase without an exit if it sleeps on."""
        phase = Phase("kick")
        self.vcpu.kick()
        phase.blocked = self._await(SOFT_KICK)
        self._owed = phase.blocked is not None
        if phase.blocked is None:
            phase.exits.append(self._finish())
        return phase

    def release(self, name: str) -> Phase:
        """Mend what it sleeps on, and see how the guest goes on."""
        self.arranged.mend()
        self.arranged.slept = False
        # Events say nothing now: one may be left of a copy that went round and round.
        if self._watched.wait(PATIENCE) is not None:
            self.vcpu.kick()
            if self._watched.wait(PATIENCE) is not None:
                self._bench.abandon()
                raise NeverReturnedError("KVM_RUN")
        exit_ = self._finish()
        if not self._goes_on(exit_):
            return Phase(name, [exit_])
        rest = self.phase(name)
        return Phase(name, [exit_, *rest.exits], rest.blocked)

    def _goes_on(self, exit_: Exit) -> bool:
        """Whether a phase has more to see after it."""
        if self._owed and exit_.word == "interrupted":
            # The kick that did not end the sleep ends a later run, once.
            self._owed = False
            return True
        return exit_.word == _GOES_ON

    # -- one KVM_RUN -------------------------------------------------------------------------------

    def _begin(self) -> None:
        vcpu = self.vcpu
        poison(vcpu)
        if self._answer is not None:
            at, data = self._answer
            vcpu.run_area[at : at + len(data)] = data
            self._answer = None
        self._before = union_of(vcpu)
        self._watched = Watched(self._run_holding_sigbus)

    def _run_holding_sigbus(self) -> int:
        """On the thread that KVM tells of broken memory."""
        with SigbusHeld():
            ret = self.vcpu.run()
            while take_sigbus() is not None:
                self.signals.append(signal.SIGBUS.name)
        return ret

    def _await(self, soft_patience: float = PATIENCE) -> dict[str, Any] | None:
        """``None`` once it has come back, else where it sleeps."""
        arranged = self.arranged
        # The software KVM leaves somebody asleep in the page when it is kicked: who comes there
        # after him causes no other event.
        known = arranged.slept and not self._bench.is_real
        patience = soft_patience if known else PATIENCE
        base = self._bench.target.guest.address
        blocked = self._watched.wait(patience, arranged.uffd, base)
        if blocked is None:
            return None
        first, arranged.slept = not arranged.slept, True
        return blocked if first else {"again": True}

    def _finish(self) -> Exit:
        ret = self._watched.result()
        bench, vcpu = self._bench, self.vcpu
        run = vcpu.kvm_run
        if ret == 0 and run.exit_reason == uapi.KVM_EXIT_INTERNAL_ERROR:
            _forget_processor(run.internal)
        exit_reason = None if run.exit_reason == STALE else int(run.exit_reason)
        said = outcome(ret, run, bench.interface, bench.in_slot)
        union = _changed(self._before, union_of(vcpu))
        word, more = self._react(said)
        payload = _payload(said) | more
        name = "" if ret == 0 else errno_name(-ret)
        # A guest that shut down stands nowhere: the processor may have been reset.  And whether RIP
        # is past the instruction of a port exit already is not the question here.
        nowhere = isinstance(said, Shutdown) or word == COMPLETES
        place = "" if nowhere else bench.place_of(vcpu.get_regs().rip)
        return Exit(ret, name, exit_reason, word, payload, union, place)

    def _run(self) -> Outcome:
        self._begin()
        if self._await() is not None:
            self._bench.abandon()
            raise NeverReturnedError("the first KVM_RUN")
        ret = self._watched.result()
        return outcome(ret, self.vcpu.kvm_run, self._bench.interface, self._bench.in_slot)

    # -- what it means -----------------------------------------------------------------------------

    def _react(self, said: Outcome) -> tuple[str, dict[str, Any]]:
        """The word for an outcome, and what else there is to record; answers devices."""
        match said:
            case MemoryFault():
                return "annotated", {}
            case BareFault(number):
                return ("bare" if number == errno.EFAULT else "bare EHWPOISON"), {}
            case RamMmio(is_write=False, length=length):
                self._answer = uapi.kvm_run.mmio.offset + _MMIO_DATA, _ANSWER * length
                return "MMIO", {}
            case RamMmio():
                return "MMIO", {}
            case Mmio(is_write=False, length=length):
                self._answer = uapi.kvm_run.mmio.offset + _MMIO_DATA, _ANSWER * length
                return _GOES_ON, {}
            case Mmio(data=data):
                return _GOES_ON, {"sent": data.hex()}
            case Io(port=places.DONE_PORT) as io:
                self.value = int.from_bytes(self._data(io), "little")
                return COMPLETES, {}
            case Io(port=places.EXCEPTION_PORT) as io:
                return self._exception(self._data(io)[0])
            case Io(port=places.STRING_PORT, is_in=True) as io:
                size = io.size * io.count
                self.vcpu.run_area[io.data_offset : io.data_offset + size] = _ANSWER * size
                return _GOES_ON, {}
            case Io(port=places.STRING_PORT) as io:
                return _GOES_ON, {"sent": self._data(io).hex()}
            case Shutdown():
                return "shutdown", {}
            case InternalError():
                return "internal", {}
            case Interrupted():
                return "interrupted", {}
            case Hlt():
                return "halted", {}
            case Failed(number):
                return f"-{errno_name(number)}", {}
            case other:
                return type(other).__name__, {}

    def _data(self, io: Io) -> bytes:
        return bytes(self.vcpu.run_area[io.data_offset :][: io.size * io.count])

    def _exception(self, vector: int) -> tuple[str, dict[str, Any]]:
        more: dict[str, Any] = {"vector": vector}
        name = EXCEPTION_NAMES.get(vector, f"#{vector}")
        if name == "#PF":
            more["cr2"] = self._bench.place_of(self.vcpu.get_sregs().cr2)
            if self._bench.mode.is_long:
                stack = self.vcpu.get_regs().rsp - places.GVA_OFFSET
                if 0 <= stack < places.TABLES_END:
                    more["error_code"] = self._bench.word(stack)
        return name, more


def _forget_processor(internal: Any) -> None:
    """Take out of an internal error on which of the host's processors the vCPU was last."""
    # The last word (kvm_prepare_event_vectoring_exit, arch/x86/kvm/x86.c).
    told = (
        uapi.KVM_INTERNAL_ERROR_DELIVERY_EV,
        uapi.KVM_INTERNAL_ERROR_UNEXPECTED_EXIT_REASON,
    )
    if internal.suberror in told and 0 < internal.ndata <= len(internal.data):
        internal.data[internal.ndata - 1] = 0


_MMIO_DATA = type(uapi.kvm_run().mmio).data.offset


def _payload(said: Outcome) -> dict[str, Any]:
    payload: dict[str, Any] = {}
    for field in dataclasses.fields(said):
        value = getattr(said, field.name)
        match value:
            case bytes():
                value = value.hex()
            case tuple():
                value = [f"{word:#x}" for word in value]
            case int() if field.name == "gpa":
                value = f"{value:#x}"
        payload[field.name] = value
    payload.pop("data_offset", None)
    return payload


def _changed(before: bytes, after: bytes) -> list[list[Any]]:
    """The runs of bytes that are not as they were: (offset, what is there now)."""
    runs: list[list[Any]] = []
    start = None
    for i in range(len(before) + 1):
        differs = i < len(before) and before[i] != after[i]
        if differs and start is None:
            start = i
        elif not differs and start is not None:
            runs.append([start, after[start:i].hex()])
            start = None
    return runs


def errno_name(number: int) -> str:
    """``EFAULT`` for 14."""
    return "EHWPOISON" if number == EHWPOISON else errno.errorcode.get(number, str(number))

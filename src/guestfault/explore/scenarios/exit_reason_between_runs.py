"""Userspace completes an exit with a KVM_RUN that does not enter the guest, then looks at it again.

To have KVM finish an instruction before the vCPU's state is read, userspace sets ``immediate_exit``
and runs: KVM completes what the last exit began and returns -EINTR.  The selftests do so
(``vcpu_run_complete_io``), and go by the ``exit_reason`` that they find afterwards, which has
always been that of the exit just completed.
"""

from __future__ import annotations

from guestfault.dialect.record import Dialect
from guestfault.explore.scenario import Kind, Scenario
from guestfault.explore.scenarios.layout import DEVICE, A, plain
from guestfault.explore.scripted_cpu import outb, store
from guestfault.explore.userspace import Userspace
from guestfault.explore.world import END_PORT, Machine
from guestfault.fault.outcome import Interrupted, Mmio, Outcome

__all__ = ["SCENARIO"]

_WRITE = b"ctrl"
_SCRIPT = store(DEVICE, _WRITE), store(A, b"more"), outb(END_PORT)


class _Vmm(Userspace):
    """Completes each device access before it goes on."""

    def once(self) -> Outcome:
        """See :meth:`.Userspace.once`."""
        came_to = super().once()
        if isinstance(came_to, Mmio):
            run = self.vcpu.kvm_run
            before = run.exit_reason, bytes(run.padding)
            run.immediate_exit = 1
            ret = super().once()
            run.immediate_exit = 0
            if not isinstance(ret, Interrupted):
                self.machine.found(Kind.CORRUPTED, f"to complete an exit ended with {ret}")
            if (run.exit_reason, bytes(run.padding)) != before:
                text = f"exit {before[0]} has become {run.exit_reason} in a KVM_RUN that failed"
                self.machine.found(Kind.CORRUPTED, f"vCPU {self.number}: {text}")
        return came_to


def _build(dialect: Dialect) -> Machine:
    machine = plain(dialect, _SCRIPT)
    vcpu = _Vmm(machine, bring_in=machine.populate, expected_writes=((DEVICE, _WRITE),))
    machine.actors["vcpu0"] = vcpu
    return machine


SCENARIO = Scenario(
    name="exit-between-runs",
    title="userspace looks at an exit again after a KVM_RUN that only completes it",
    source="ZFFbwOXZ5uI/gdaf@google.com",
    build=_build,
)

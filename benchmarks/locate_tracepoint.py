"""What the tracepoint locator costs: ``python benchmarks/locate_tracepoint.py [TRACEFS]``.

A guest at CPL 3 reads an absent page over and over; each ``KVM_RUN`` ends in a bare -EFAULT.  Timed
are the exit without and with the events armed, in alternating rounds, and what it takes to name the
access after an exit: with the caches as KVM has left them, not in a loop of its own.  The gpa by
``KVM_TRANSLATE`` comes on top, on hosts whose records hold gvas.
"""

from __future__ import annotations

import errno
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict
from statistics import median, quantiles

from guestfault.errors import GuestfaultError
from guestfault.fault.locate.run_trace import RunTrace
from guestfault.fault.locate.tracepoint import TracepointLocator, gpa_from
from guestfault.kvm import KvmSystem, KvmVcpu
from guestfault.linux.tracefs import Tracefs
from guestfault.memory.ram import PAGE_SIZE, GuestRam
from guestfault.uapi import kvm as uapi
from guestfault.uapi.mman import PROT_NONE
from guestfault.x86.segments import Segments
from guestfault.x86.tables import Mapping, PagingMode, TableBuilder

GVA = 1 << 32
CODE, ABSENT = 8 * PAGE_SIZE, 12 * PAGE_SIZE
ROUNDS, RUNS = 9, 800


def stopped_vcpu(system: KvmSystem, stack: ExitStack) -> KvmVcpu:
    """A vCPU before ``mov al, [rbx]``, with RBX in an absent page."""
    ram = stack.enter_context(GuestRam(16 * PAGE_SIZE))
    vm = stack.enter_context(closing(system.create_vm()))
    tables = TableBuilder(PagingMode.FOUR_LEVEL, first_table=0)
    tables.map(Mapping(gva=GVA, gpa=0, length=ram.size, user=True))
    image, state = tables.image(), tables.state
    ram.bytes[: len(image)] = image
    ram.bytes[CODE : CODE + 2] = b"\x8a\x03"
    ram.guest.protect(ABSENT, PAGE_SIZE, PROT_NONE)
    vm.set_user_memory_region(0, 0, ram.size, ram.guest.address)
    vcpu = vm.create_vcpu(0)
    sregs = vcpu.get_sregs()
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = state.cr0, state.cr3, state.cr4, state.efer
    for name, fields in asdict(Segments.long_mode(cpl=3)).items():
        setattr(sregs, name, uapi.kvm_segment(**fields))
    vcpu.set_sregs(sregs)
    vcpu.set_regs(uapi.kvm_regs(rip=GVA + CODE, rbx=GVA + ABSENT + 0x123, rflags=2))
    return vcpu


def time_round(vcpu: KvmVcpu, after: Callable[[], object]) -> tuple[list[int], list[int]]:
    """Nanoseconds of each exit, and of ``after`` behind it."""
    exits, afters = [], []
    clock = time.perf_counter_ns
    for _ in range(RUNS):
        begun = clock()
        result = vcpu.run()
        exited = clock()
        after()
        afters.append(clock() - exited)
        exits.append(exited - begun)
        assert result == -errno.EFAULT
    return exits, afters


def line(what: str, times: list[int]) -> str:
    cuts = quantiles(times, n=20)
    low, middle, high = (ns / 1e3 for ns in (cuts[0], median(times), cuts[18]))
    return f"{what:44}{middle:8.2f}{low:10.2f} to {high:.2f}"


def main() -> int:
    with ExitStack() as stack:
        try:
            tracefs = Tracefs(sys.argv[1]) if len(sys.argv) > 1 else Tracefs.find()
            system = stack.enter_context(closing(KvmSystem()))
            vcpu = stopped_vcpu(system, stack)
            TracepointLocator(system, tracefs=tracefs).close()
        except GuestfaultError as error:
            print(f"locate_tracepoint: {error}", file=sys.stderr)
            return 2

        times: dict[str, list[int]] = {}

        def measure(name: str, after: Callable[[], object]) -> None:
            exits, afters = time_round(vcpu, after)
            times.setdefault(f"exit, {name}", []).extend(exits)
            times.setdefault(name, []).extend(afters)

        for _ in range(ROUNDS):
            measure("nothing armed", lambda: None)
            with RunTrace(tracefs) as trace:
                measure("reading the records", trace.faults)
                measure("the last record alone", trace.ring.latest)
            with TracepointLocator(system, tracefs=tracefs) as locator:
                measure("locate()", locator.locate)
            with TracepointLocator(system, translate=gpa_from(vcpu), tracefs=tracefs) as locator:
                measure("locate() and the gpa", locator.locate)

    print(f"{ROUNDS * RUNS} exits each; us       {'median':>27}   5 % to 95 %")
    print(line("KVM_RUN to -EFAULT, nothing armed", times["exit, nothing armed"]))
    print(line("KVM_RUN to -EFAULT, events armed", times["exit, locate()"]))
    print(line("(the measurement itself)", times["nothing armed"]))
    for name in (
        "the last record alone",
        "reading the records",
        "locate()",
        "locate() and the gpa",
    ):
        print(line(f"after it: {name}", times[name]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

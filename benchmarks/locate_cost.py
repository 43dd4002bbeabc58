"""What it costs to name an access, over the exit itself.

Run it from the repository, on a machine with nothing else to do::

    PYTHONPATH=src .venv/bin/python benchmarks/locate_cost.py [--rounds N] [--kvm soft|kvm]

Some instructions are stopped on an absent page, and each locator is asked again and again about the
same stop, in turns.  What is printed is the median with the quartiles, in microseconds:

- ``annotation``: from ``kvm_run.memory_fault`` to an access;
- ``decode``: from ``kvm_regs`` and ``kvm_sregs`` to an access, the host asked about every page;
- ``decode, met for the first time``: the same with what is kept between questions forgotten: the
  instruction decoded, the registers' meaning, the walk to its page;
- ``decode, registers included``: KVM_GET_REGS and KVM_GET_SREGS as well, which belong to the KVM.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

from guestfault.fault.locate import trail
from guestfault.fault.locate.annotation import from_annotation
from guestfault.fault.outcome import MemoryFault
from guestfault.x86 import accesses, instruction, state
from instruction_forms import FORMS
from locate_machine import Machine, open_machines

#: (form, ring, the page that is absent)
STOPS = (
    ("mov rax, [rbx]", 3, 0x230),
    ("cmp dword ptr [r14 + 0x28], imm32", 3, 0x2E0),
    ("push qword ptr [rbx]", 0, 0x240),
    ("movsq", 3, 0x270),
    ("rep movsb", 0, 0x260),
    ("fxsave [rbx]", 3, 0x230),
    ("mov ds, [rbx]", 3, 0x300),
    ("mov ax, [bx]", 0, 2),
)

FIRST = "decode, met for the first time"
#: What is kept between questions; a benchmark may look inside.
CACHES = (instruction.decode, accesses._shape, state._hidden, trail._paging)


def _time(call: Callable[[], object]) -> float:
    begin = time.perf_counter()
    call()
    return (time.perf_counter() - begin) * 1e6


def _line(name: str, times: list[float]) -> str:
    low, median, high = statistics.quantiles(times, n=4)
    return f"  {name:<36} {median:7.1f}  ({low:.1f} to {high:.1f})"


def measure(machine: Machine, rounds: int) -> dict[str, list[float]]:
    """Times in microseconds, by locator; and one entry for each stop under its name."""
    times: dict[str, list[float]] = {}
    forms = {form.name: form for form in reversed(FORMS)}
    for name, ring, page in STOPS:
        form = forms[name]
        if not machine.is_soft and (form.bits == 16 or ring == 0):
            continue
        machine.load(form, ring)
        machine.take_out(page)
        machine.rewind()
        seen = machine.run()
        if not machine.stands_on_form():
            raise RuntimeError(f"{form} was not stopped: {seen}")
        vcpu = machine.vcpu
        regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
        decode = machine.locators["content known to be absent"].locate
        contenders: dict[str, Callable[[], object]] = {
            "decode": lambda: decode(regs, sregs),  # noqa: B023 - called in this iteration
            FIRST: lambda: decode(regs, sregs),  # noqa: B023
            "decode, registers included": lambda: decode(vcpu.get_regs(), vcpu.get_sregs()),  # noqa: B023
        }
        if isinstance(seen, MemoryFault):
            contenders["annotation"] = lambda: from_annotation(seen, machine.slots)  # noqa: B023
        for _ in range(rounds):
            for contender, call in contenders.items():
                if contender == FIRST:
                    for cache in CACHES:
                        cache.cache_clear()
                took = _time(call)
                times.setdefault(contender, []).append(took)
                if contender == "decode":
                    times.setdefault(f"  {name}", []).append(took)
        machine.let_in(page)
    return times


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=2000)
    parser.add_argument("--kvm", choices=("soft", "kvm", "all"), default="soft")
    args = parser.parse_args()
    for make in open_machines(args.kvm):
        machine = make()
        times = measure(machine, args.rounds)
        print(f"{machine.system.name}, us, median (quartiles):")
        for name in sorted(times, key=lambda name: (name.startswith(" "), name)):
            print(_line(name, times[name]))
        machine.close()


if __name__ == "__main__":
    main()

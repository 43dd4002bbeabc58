"""What the software KVM costs over the bare engine it runs on.

Run it from the repository, on a machine with nothing else to do::

    PYTHONPATH=src .venv/bin/python benchmarks/softkvm.py [--rounds N]

Three comparisons, each between *bare*, the Unicorn engine driven as directly as Python can, and
*softkvm*, the whole software KVM, on the same guest code at CPL3 in long mode:

- ``loop``: a loop over registers;
- ``walk``: reads and writes over 2 MiB of present pages, again and again.  Both run for a good part
  of a second after a warm-up in which everything is translated and brought in;
- ``fault``: one absent page after another.  For bare it is a refusal in the TLB hook, the exit to
  Python, and the resumption; for softkvm the whole life of an exit fault: KVM_RUN returns, the
  result is read, the page is copied from a mapped file into the host view and let into the guest
  view, KVM_RUN again.

Contenders take turns, so that what disturbs the machine disturbs both; what is printed is the
median over the rounds with the quartiles, and the ratio of the medians.
"""

from __future__ import annotations

import argparse
import mmap
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing

import unicorn
from unicorn import x86_const as ux

from guestfault.dialect.interface import probe
from guestfault.fault.outcome import MemoryFault, outcome
from guestfault.memory.ram import PAGE_SIZE, GuestRam
from guestfault.memory.view import Unpopulated
from guestfault.softkvm.system import SoftSystem
from guestfault.uapi import kvm as uapi
from guestfault.x86.segments import Segments
from guestfault.x86.tables import Mapping, PagingMode, TableBuilder

RAM_SIZE = 8 << 20
TABLES, CODE, DATA = 0x1000, 0x10000, 4 << 20
WALK_SIZE = 2 << 20
FAULTS = (RAM_SIZE - DATA) // PAGE_SIZE
FLAG = 1 << 2  # KVM_MEM_ABSENT_MAPPING_FAULT

# Each ends with OUT to port 0x10, the sign for the end; RCX counts.
LOOP = bytes.fromhex(
    "48 83 c0 03"  # again: add rax, 3
    "48 31 c2"  # xor rdx, rax
    "48 d1 c2"  # rol rdx, 1
    "48 ff c9"  # dec rcx
    "75 f1"  # jnz again
    "e6 10"  # out 0x10, al
)
WALK = bytes.fromhex(
    "48 89 fe"  # pass: mov rsi, rdi
    "41 b8 00 00 04 00"  # mov r8d, 2 MiB / 8
    "48 03 06"  # word: add rax, [rsi]
    "48 31 06"  # xor [rsi], rax
    "48 83 c6 08"  # add rsi, 8
    "41 ff c8"  # dec r8d
    "75 f1"  # jnz word
    "48 ff c9"  # dec rcx
    "75 e3"  # jnz pass
    "e6 10"  # out 0x10, al
)
TOUCH = bytes.fromhex(
    "48 03 07"  # page: add rax, [rdi]
    "48 81 c7 00 10 00 00"  # add rdi, 4096
    "48 ff c9"  # dec rcx
    "75 f1"  # jnz page
    "e6 10"  # out 0x10, al
)
LOOPS, PASSES = 40_000_000, 60


class Bare:
    """Unicorn with plain memory; ``fault`` makes each page absent until it is refused once."""

    def __init__(self) -> None:
        self.uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        self.uc.mem_map(0, RAM_SIZE)

    def run(self, code: bytes, count: int) -> float:
        """Seconds that the code takes, with a count in RCX."""
        self.uc.mem_write(CODE, code)
        self.uc.ctl_flush_tb()
        self.uc.reg_write(ux.UC_X86_REG_RDI, DATA)
        self.uc.reg_write(ux.UC_X86_REG_RCX, count)
        begin = time.perf_counter()
        self.uc.emu_start(CODE, CODE + len(code) - 2)
        return time.perf_counter() - begin

    def fault(self) -> list[float]:
        """Seconds for each absent page."""
        uc = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
        uc.mem_map(0, RAM_SIZE)
        uc.mem_write(CODE, TOUCH)
        uc.ctl_set_tlb_mode(unicorn.UC_TLB_VIRTUAL)
        refused = -1

        def fill(_uc: object, gva: int, _access: int, entry: object, _data: object) -> bool:
            nonlocal refused
            if gva >= DATA and gva != refused:
                refused = gva
                return False
            entry.paddr, entry.perms = gva, unicorn.UC_PROT_ALL  # type: ignore[attr-defined]
            return True

        uc.hook_add(unicorn.UC_HOOK_TLB_FILL, fill)
        uc.reg_write(ux.UC_X86_REG_RDI, DATA)
        uc.reg_write(ux.UC_X86_REG_RCX, FAULTS)
        rip, times, begin = CODE, [], 0.0
        end = CODE + len(TOUCH) - 2
        while rip != end:
            try:
                uc.emu_start(rip, end)
            except unicorn.UcError:
                now = time.perf_counter()
                times.append(now - begin)
                begin = now
            rip = uc.reg_read(ux.UC_X86_REG_RIP)
        return times[1:]


class Soft:
    """The software KVM, with the RAM's guest view unpopulated."""

    def __init__(self) -> None:
        self.system = SoftSystem("seed")
        self.vm = self.system.create_vm()
        self.ram = GuestRam(RAM_SIZE)
        self.view = Unpopulated(self.ram)
        tables = TableBuilder(PagingMode.FOUR_LEVEL, TABLES)
        tables.map(Mapping(0, 0, RAM_SIZE, PAGE_SIZE, user=True))
        image = tables.image()
        self.ram.bytes[TABLES : TABLES + len(image)] = image
        self.vm.set_user_memory_region(0, 0, RAM_SIZE, self.ram.guest.address, FLAG)
        self.vcpu = self.vm.create_vcpu(0)
        sregs = self.vcpu.get_sregs()
        state = tables.state
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = state.cr0, state.cr3, state.cr4, state.efer
        for name, segment in vars(Segments.long_mode(3)).items():
            setattr(sregs, name, uapi.kvm_segment(**vars(segment)))
        self.vcpu.set_sregs(sregs)
        self.interface = probe(self.vm.check_extension)
        self.view.bring_in(0, DATA)

    def start(self, code: bytes, count: int) -> None:
        """Load the code, with a count in RCX."""
        self.ram.guest.discard(CODE, PAGE_SIZE)
        self.ram.bytes[CODE : CODE + len(code)] = code
        self.view.bring_in(CODE, PAGE_SIZE)
        self.vcpu.set_regs(uapi.kvm_regs(rip=CODE, rflags=0x3002, rdi=DATA, rcx=count))

    def run(self, code: bytes, count: int) -> float:
        """Seconds that the code takes."""
        self.view.bring_in(DATA, RAM_SIZE - DATA)
        self.start(code, count)
        begin = time.perf_counter()
        if self.vcpu.run() or self.vcpu.kvm_run.exit_reason != uapi.KVM_EXIT_IO:
            raise RuntimeError("the guest did not come to its end")
        return time.perf_counter() - begin

    def fault(self, source: mmap.mmap) -> list[float]:
        """Seconds for each absent page, filled from ``source``."""
        self.ram.guest.discard(DATA, RAM_SIZE - DATA)
        self.start(TOUCH, FAULTS)
        vcpu, host, bring_in = self.vcpu, self.ram.bytes, self.view.bring_in
        pages, times = memoryview(source), []
        result = vcpu.run()
        begin = time.perf_counter()
        while True:
            match outcome(result, vcpu.kvm_run, self.interface):
                case MemoryFault(gpa, size):
                    host[gpa : gpa + size] = pages[gpa : gpa + size]
                    bring_in(gpa, size)
                case _:
                    break
            result = vcpu.run()
            now = time.perf_counter()
            times.append(now - begin)
            begin = now
        if len(times) != FAULTS or vcpu.kvm_run.exit_reason != uapi.KVM_EXIT_IO:
            raise RuntimeError(f"{len(times)} faults, not {FAULTS}")
        return times

    def close(self) -> None:
        """Release all of it."""
        self.vm.close()
        self.system.close()
        self.ram.close()


def spread(times: list[float]) -> str:
    low, middle, high = statistics.quantiles(times, n=4)
    unit, scale = ("ms", 1e3) if middle > 1e-3 else ("us", 1e6)
    return f"{middle * scale:9.2f} {unit} ({low * scale:.2f} to {high * scale:.2f})"


def compare(
    name: str, rounds: int, bare: Callable[[], list[float]], soft: Callable[[], list[float]]
) -> None:
    bare_times, soft_times = [], []
    for _ in range(rounds):
        bare_times += bare()
        soft_times += soft()
    ratio = statistics.median(bare_times) / statistics.median(soft_times)
    print(f"{name:6} bare    {spread(bare_times)}")
    print(f"{'':6} softkvm {spread(soft_times)}   {ratio:.2f} of bare's speed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    bare = Bare()
    with closing(Soft()) as soft, tempfile.TemporaryFile() as file:
        file.truncate(RAM_SIZE)
        with mmap.mmap(file.fileno(), RAM_SIZE) as source:
            source[:] = bytes(range(256)) * (RAM_SIZE // 256)
            for name, code, count in (("loop", LOOP, LOOPS), ("walk", WALK, PASSES)):
                bare.run(code, count // 10)
                soft.run(code, count // 10)
                compare(
                    name,
                    rounds,
                    lambda code=code, count=count: [bare.run(code, count)],
                    lambda code=code, count=count: [soft.run(code, count)],
                )
            soft.fault(source)
            compare("fault", rounds, bare.fault, lambda: soft.fault(source))


if __name__ == "__main__":
    main()

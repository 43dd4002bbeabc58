"""A machine small enough to see through: 2 MiB of RAM, three pages of page tables, a vCPU.

Guests are a few bytes of machine code.  The vCPU runs them at CPL3 in long mode, with IOPL 3 so
that port I/O is allowed, or in real mode.  Linear addresses below 2 MiB are RAM; the 2 MiB above
them lead to :data:`HOLE`, where no slot is.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from guestfault.dialect.interface import probe
from guestfault.fault.outcome import Outcome, outcome
from guestfault.kvm import KvmSystem, KvmVcpu, KvmVm
from guestfault.linux.mapping import Mapping
from guestfault.linux.memfd import Memfd
from guestfault.uapi import kvm as uapi

PAGE = 4096
RAM_SIZE = 2 << 20
PML4, PDPT, PD = 0x1000, 0x2000, 0x3000
CODE = 0x10000
DATA = 0x80000  # a page of its own, and neither code nor tables beside it
HOLE = 0x4000_0000  # guest physical
HOLE_GVA = 0x20_0000

_PRESENT_WRITABLE_USER = 7
_PAGE_SIZE_2M = 1 << 7


class Machine:
    """A VM with RAM at guest physical 0, mapped twice: ``host`` for us, ``guest`` for KVM."""

    def __init__(self, vm: KvmVm) -> None:
        self.vm = vm
        self.memfd = Memfd("test-ram", RAM_SIZE)
        self.host = Mapping.from_memfd(self.memfd)
        self.guest = Mapping.from_memfd(self.memfd)
        self.interface = probe(vm.check_extension)
        large = _PRESENT_WRITABLE_USER | _PAGE_SIZE_2M
        self.write(PML4, struct.pack("<Q", PDPT | _PRESENT_WRITABLE_USER))
        self.write(PDPT, struct.pack("<Q", PD | _PRESENT_WRITABLE_USER))
        self.write(PD, struct.pack("<2Q", 0 | large, HOLE | large))
        vm.set_user_memory_region(0, 0, RAM_SIZE, self.guest.address)

    def write(self, gpa: int, data: bytes) -> None:
        self.host.view()[gpa : gpa + len(data)] = data

    def user_vcpu(self, code: bytes, vcpu_id: int = 0) -> KvmVcpu:
        """A vCPU at CPL3 in long mode, before ``code``."""
        self.write(CODE, code)
        vcpu = self.vm.create_vcpu(vcpu_id)
        sregs = vcpu.get_sregs()
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x8000_0033, PML4, 0x20, 0x500
        for name in ("cs", "ds", "es", "fs", "gs", "ss"):
            segment = getattr(sregs, name)
            is_code = name == "cs"
            segment.base, segment.limit, segment.selector = (
                0,
                0xFFFF_FFFF,
                0x1B if is_code else 0x23,
            )
            segment.type, segment.s, segment.present = 11 if is_code else 3, 1, 1
            segment.dpl, segment.g, segment.l, segment.db = 3, 1, is_code, not is_code
        sregs.tr.type, sregs.tr.present, sregs.tr.s, sregs.tr.selector = 11, 1, 0, 0x28
        vcpu.set_sregs(sregs)
        vcpu.set_regs(uapi.kvm_regs(rip=CODE, rflags=0x3002))
        return vcpu

    def real_vcpu(self, code: bytes) -> KvmVcpu:
        """A vCPU in real mode, before ``code``."""
        self.write(CODE, code)
        vcpu = self.vm.create_vcpu(0)
        sregs = vcpu.get_sregs()
        sregs.cs.base, sregs.cs.selector = CODE, CODE >> 4
        vcpu.set_sregs(sregs)
        vcpu.set_regs(uapi.kvm_regs(rip=0, rflags=2))
        return vcpu

    def run(self, vcpu: KvmVcpu) -> Outcome:
        """One ``KVM_RUN``, classified."""
        return outcome(vcpu.run(), vcpu.kvm_run, self.interface, lambda gpa: gpa < RAM_SIZE)

    def close(self) -> None:
        self.vm.close()
        for part in (self.guest, self.host, self.memfd):
            part.close()


@pytest.fixture(scope="session")
def layout() -> SimpleNamespace:
    """Where things are in a :class:`Machine`."""
    return SimpleNamespace(
        PAGE=PAGE, RAM_SIZE=RAM_SIZE, CODE=CODE, DATA=DATA, HOLE=HOLE, HOLE_GVA=HOLE_GVA
    )


@pytest.fixture
def system() -> Iterator[KvmSystem]:
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        pytest.skip("no usable /dev/kvm")
    system = KvmSystem()
    yield system
    system.close()


@pytest.fixture
def vm(system: KvmSystem) -> Iterator[KvmVm]:
    vm = system.create_vm()
    yield vm
    vm.close()


@pytest.fixture
def machine(vm: KvmVm) -> Iterator[Machine]:
    machine = Machine(vm)
    yield machine
    machine.close()

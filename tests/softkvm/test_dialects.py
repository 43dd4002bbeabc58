"""What each dialect does with a failed access: fills, guards, refuses, and resets.

The machine has one page of data that is missing, and a guest that reads or writes it.
"""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from guestfault.dialect.interface import EHWPOISON
from guestfault.dialect.published import DIALECTS
from guestfault.dialect.record import Ask, Guard, Reason, Site
from guestfault.errors import KvmError
from guestfault.fault.outcome import BareFault, Io, MemoryFault, outcome
from guestfault.linux.mapping import Mapping
from guestfault.softkvm.efault import (
    forget_annotation,
    kvm_handle_efault,
    kvm_run_begin,
    vcpu_run_begin,
)
from guestfault.softkvm.kvm_host import vcpu_load, vcpu_put
from guestfault.softkvm.system import SoftSystem
from guestfault.softkvm.vm import SoftVm
from guestfault.uapi import kvm as uapi
from guestfault.uapi.mman import PROT_NONE

EFAULT = errno.EFAULT
END = "e6f4"
DATA, PAGE = 0x4_0000, 4096
READ, WRITE = "488b07", "488907"  # mov rax, [rdi]; mov [rdi], rax

every = pytest.mark.parametrize("name", DIALECTS)
# Those in which a missing page of an ordinary slot can be asked for.
ASKED = [name for name, d in DIALECTS.items() if d.missing and d.missing.ask is not Ask.BITMAP]
SLOT_FLAG = [name for name in ASKED if DIALECTS[name].slot_flag]

# memory_fault.flags of a read and a write that are asked for, and of a write that is not.
FLAGS = {
    "v1": (0, 0, None),
    "wip-v2": (2, 2, 1),
    "seed": (2, 2, 1),
    "v3": (0, 0, 0),
    "v4": (0, 1, 1),
    "v5": (1, 2, 2),
    "v6": (1, 2, 2),
    "v7": (1, 2, 2),
}


def armed(machine, name):
    """Ask for all that can be asked for."""
    d = DIALECTS[name]
    if name == "v1":
        machine.vm.set_mem_fault_nowait(True)
    elif name == "wip-v2":
        machine.vm.enable_cap(227, (3,))
    elif name == "v3":
        machine.vm.enable_cap(227, (1,))
    assert d.must_be_enabled == (name in ("v1", "wip-v2", "v3"))
    return machine


def fault_of(soft, name, code):
    """What an access to the missing page comes to."""
    machine = soft("e642" + code + END, dialect=name, flags=DIALECTS[name].slot_flag, rdi=DATA)
    armed(machine, name)
    while isinstance(found := machine.run(), MemoryFault) and found.gpa != DATA:
        machine.bring_in(found.gpa)
    assert isinstance(found, Io)
    machine.poison_union()
    return machine, machine.run()


# -- filling ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ASKED)
@pytest.mark.parametrize("access", ["read", "write"])
def test_a_missing_page_is_described_as_the_version_does(soft, name, access):
    machine, found = fault_of(soft, name, READ if access == "read" else WRITE)
    flags = FLAGS[name][access == "write"]
    assert found == MemoryFault(DATA, PAGE, flags, DIALECTS[name].fill_errno)
    run = machine.vcpu.kvm_run
    if name == "v5":
        assert machine.union() == b"\xa5" * 256  # an exit prepared there would be as it was
        assert run.flags == 1 << 8
    else:
        assert run.exit_reason == DIALECTS[name].interface.exit_reason
        assert machine.union()[24:] == b"\xa5" * (256 - 24)
    machine.bring_in(DATA)
    assert machine.trace() == []


def test_v1_leaves_stale_flags_in_the_union(soft):
    machine, found = fault_of(soft, "v1", WRITE)
    assert machine.vcpu.kvm_run.memory_fault.flags == 0xA5A5_A5A5_A5A5_A5A5
    assert found.flags == 0


@pytest.mark.parametrize("name", ASKED)
def test_a_failure_that_nobody_asked_to_be_told_of(soft, name):
    """No slot flag, but a page that cannot be had: annotated by all but v1."""
    machine = soft("e642" + WRITE + END, dialect=name, rdi=DATA)
    if name != "v1":
        armed(machine, name)
    assert isinstance(machine.run(), Io)
    machine.ram.guest.protect(DATA, PAGE, PROT_NONE)
    flags = FLAGS[name][2]
    if flags is None:
        assert machine.run() == BareFault(EFAULT)
    else:
        assert machine.run() == MemoryFault(DATA, PAGE, flags, DIALECTS[name].fill_errno)


@pytest.mark.parametrize("name", ["linux-6.8", "linux-7.3", "userfault-v3"])
def test_an_ordinary_slot_is_bare_in_all_that_was_merged(soft, name):
    machine = soft("e642" + WRITE + END, dialect=name, rdi=DATA)
    assert isinstance(machine.run(), Io)
    machine.ram.guest.protect(DATA, PAGE, PROT_NONE)
    assert machine.run() == BareFault(EFAULT)
    assert machine.vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_UNKNOWN


@pytest.mark.parametrize("name", ["wip-v2", "v3"])
def test_nothing_is_annotated_for_who_has_not_opted_in(soft, name):
    machine = soft("e642" + WRITE + END, dialect=name, flags=4, rdi=DATA)
    machine.bring_in(0, machine.RAM_SIZE)
    assert isinstance(machine.run(), Io)
    machine.discard(DATA)
    machine.poison_union()
    assert machine.run() == BareFault(EFAULT)
    assert machine.union() == b"\xa5" * 256
    armed(machine, name)
    assert isinstance(machine.run(), MemoryFault)
    machine.vm.enable_cap(227, (0,))  # and back
    assert machine.vcpu.run() == -EFAULT


def test_wip_v2_opts_in_for_each_reason(soft):
    machine = soft(WRITE + END, dialect="wip-v2", flags=4, rdi=DATA)
    machine.bring_in(0, machine.RAM_SIZE)
    machine.discard(DATA)
    machine.vm.enable_cap(227, (1,))  # UNKNOWN, and the page is ABSENT_MAPPING
    assert machine.run() == BareFault(EFAULT)
    machine.vm.enable_cap(227, (2,))
    assert machine.run() == MemoryFault(DATA, PAGE, 2, errno.EPERM)


def test_the_switch_of_v1_goes_both_ways(soft):
    machine = soft("e642" + WRITE + END, dialect="v1", rdi=DATA)
    assert isinstance(machine.run(), Io)
    machine.discard(DATA)
    machine.vm.set_mem_fault_nowait(True)
    assert machine.run() == MemoryFault(DATA, PAGE, 0, EFAULT)
    machine.vm.set_mem_fault_nowait(False)
    assert machine.trace() == []  # resolved in slow GUP


# -- the helper ------------------------------------------------------------------------------------


@pytest.fixture
def vcpu():
    """``vcpu(dialect)``: the structure of a vCPU that this thread has loaded."""
    made = []

    def make(dialect, **changes):
        if isinstance(dialect, str):
            dialect = DIALECTS[dialect]
        system = SoftSystem(replace(dialect, **changes))
        vm = system.create_vm()
        made.extend((system, vm))
        one = vm.create_vcpu(0)
        one.arch.kvm.memfault_exit_reasons = 3
        one.arch.kvm.fill_efault_info = True
        vcpu_load(one.arch)
        return one.arch

    yield make
    vcpu_put()
    for one in reversed(made):
        one.close()


def fill(vcpu, site=Site.HANDLE_ERROR_PFN, **options):
    return kvm_handle_efault(vcpu, site, 0x5000, PAGE, **options)


def decoded(vcpu, r):
    return outcome(r, vcpu.run, vcpu.kvm.dialect.interface)


@every
def test_a_site_is_filled_iff_the_dialect_annotates_it(vcpu, name):
    d = DIALECTS[name]
    for site in Site:
        one = vcpu(name)
        r = fill(one, site, reason=Reason.MISSING)
        filled = isinstance(decoded(one, r), MemoryFault)
        assert filled == (site in d.annotated), site
        if not filled:
            assert r == -EFAULT
            assert bytes(one.run_area) == bytes(len(one.run_area))


@every
def test_an_errno_of_the_callers_own_is_kept(vcpu, name):
    """guest_memfd's failures keep their errno, -EHWPOISON among them."""
    one = vcpu(name)
    r = fill(one, Site.FAULTIN_PFN_GMEM, private=True, r=-EHWPOISON)
    assert r == -EHWPOISON
    if Site.FAULTIN_PFN_GMEM in DIALECTS[name].annotated:
        flags = 9 if DIALECTS[name].flag_read else 8
        assert decoded(one, r) == MemoryFault(0x5000, PAGE, flags, EHWPOISON)
    else:
        assert decoded(one, r) == BareFault(EHWPOISON)


def test_wip_v2_reports_pages_where_it_was_published_so(vcpu):
    for site, length in ((Site.DIRECT_MAP, 1), (Site.FETCH, 1), (Site.HANDLE_ERROR_PFN, PAGE)):
        one = vcpu("wip-v2")
        assert decoded(one, fill(one, site)) == MemoryFault(0x5000, length, 1, errno.EPERM)


def test_a_fetch_is_told_by_those_that_have_a_flag_for_it(vcpu):
    found = {}
    for name in ("v3", "v4", "v5", "v7", "seed"):
        one = vcpu(name)
        found[name] = decoded(one, fill(one, exec_=True)).flags
    assert found == {"v3": 0, "v4": 2, "v5": 4, "v7": 4, "seed": 1}


def test_userfault_says_that_the_bitmap_is_the_reason(vcpu):
    one = vcpu("userfault-v3")
    r = fill(one, Site.DO_USERFAULT, reason=Reason.USERFAULT)
    assert decoded(one, r) == MemoryFault(0x5000, PAGE, 16, EFAULT)


# -- guards ----------------------------------------------------------------------------------------

GUARDED = [name for name, d in DIALECTS.items() if Guard.LOADED_VCPU in d.guards]
UNGUARDED = ["v1", "wip-v2", "v6", "v7"]


@pytest.mark.parametrize("name", GUARDED)
def test_a_vcpu_that_is_not_loaded_is_not_written_to(vcpu, name):
    one = vcpu(name)
    vcpu_put()
    with pytest.warns(UserWarning, match="not the loaded one"):
        assert fill(one) == -EFAULT
    assert bytes(one.run_area) == bytes(len(one.run_area))
    assert fill(one) == -EFAULT  # WARN_ON_ONCE


@pytest.mark.parametrize("name", UNGUARDED)
def test_without_the_guard_it_is(vcpu, name):
    one = vcpu(name)
    vcpu_put()
    site = Site.FAULTIN_PFN if name == "v1" else Site.HANDLE_ERROR_PFN
    r = fill(one, site, reason=Reason.MISSING)
    assert isinstance(decoded(one, r), MemoryFault)


@pytest.mark.parametrize("name", ["v3", "v4"])
def test_an_exit_that_is_prepared_is_not_overwritten(vcpu, name):
    one = vcpu(name)
    one.run.exit_reason = uapi.KVM_EXIT_MMIO
    one.run.mmio.phys_addr = 0xFEE0_0000
    with pytest.warns(UserWarning, match="has exit 6 prepared"):
        assert fill(one) == -EFAULT
    assert (one.run.exit_reason, one.run.mmio.phys_addr) == (6, 0xFEE0_0000)


@pytest.mark.parametrize("name", ["seed", "wip-v2", "v7"])
def test_without_that_guard_it_is(vcpu, name):
    """The question that the seed message ends with."""
    one = vcpu(name)
    one.run.exit_reason = uapi.KVM_EXIT_MMIO
    one.run.mmio.phys_addr = 0xFEE0_0000
    fill(one)
    assert one.run.exit_reason in (38, 39)
    assert one.run.mmio.phys_addr != 0xFEE0_0000


@pytest.mark.parametrize("name", ["v3", "v4"])
def test_a_suppressed_annotation_keeps_the_next_out(vcpu, name):
    """Case C of the review of v4."""
    one = vcpu(name)
    fill(one)  # and the caller drops the result
    with pytest.warns(UserWarning, match="has exit 38 prepared"):
        r = kvm_handle_efault(one, Site.HANDLE_ERROR_PFN, 0x9000, PAGE)
    assert decoded(one, r).gpa == 0x5000  # of the wrong access


def test_the_canary_of_v5_complains_and_fills(vcpu):
    one = vcpu("v5")
    fill(one)
    with pytest.warns(UserWarning, match="is filled already"):
        r = kvm_handle_efault(one, Site.HANDLE_ERROR_PFN, 0x9000, PAGE)
    assert decoded(one, r) == MemoryFault(0x9000, PAGE, 1, EFAULT)


def test_a_canary_that_kept_its_word_would_not_fill(vcpu):
    one = vcpu("v5", warns_only=frozenset())
    fill(one)
    with pytest.warns(UserWarning, match="is filled already"):
        r = kvm_handle_efault(one, Site.HANDLE_ERROR_PFN, 0x9000, PAGE)
    assert decoded(one, r).gpa == 0x5000


def test_v5_leaves_a_prepared_exit_alone(vcpu):
    one = vcpu("v5")
    one.run.exit_reason = uapi.KVM_EXIT_MMIO
    one.run.mmio.phys_addr = 0xFEE0_0000
    assert decoded(one, fill(one)) == MemoryFault(0x5000, PAGE, 1, EFAULT)
    assert (one.run.exit_reason, one.run.mmio.phys_addr) == (6, 0xFEE0_0000)


# -- what a run begins with ------------------------------------------------------------------------


@every
def test_when_the_last_exit_reason_is_overwritten(vcpu, name):
    one = vcpu(name)
    one.run.exit_reason = 77
    kvm_run_begin(one)
    assert one.run.exit_reason == (0 if name == "v3" else 77)
    vcpu_run_begin(one)
    assert one.run.exit_reason == (77 if name in ("v1", "wip-v2", "v5") else 0)


@pytest.mark.parametrize(("name", "left"), [("v3", 0), ("v4", 2), ("v5", 2), ("v7", 2)])
def test_v3_loses_the_exit_reason_of_a_run_that_was_not_made(soft, name, left):
    """ZFFbwOXZ5uI/gdaf@google.com: userspace reads it between two runs, one of them -EINTR."""
    machine = soft("e642" + END, dialect=name)
    assert isinstance(machine.run(), Io)
    machine.vcpu.kvm_run.immediate_exit = 1
    assert machine.vcpu.run() == -errno.EINTR
    assert machine.vcpu.kvm_run.exit_reason == left


@pytest.mark.parametrize("name", ["v1", "wip-v2"])
def test_a_bare_fault_beside_a_stale_exit_reason_is_taken_for_annotated(soft, name):
    """What never resetting comes to.  WIP v2 at least has another errno for what it annotates."""
    machine = armed(soft("e642" + WRITE + END, dialect=name, flags=0, rdi=DATA), name)
    machine.bring_in(0, machine.RAM_SIZE)
    assert isinstance(machine.run(), Io)
    machine.vcpu.kvm_run.exit_reason = 38
    if name == "v1":
        machine.vm.set_mem_fault_nowait(False)
    else:
        machine.vm.enable_cap(227, (0,))
    machine.ram.guest.protect(DATA, PAGE, PROT_NONE)
    stale = machine.vcpu.kvm_run.memory_fault.gpa
    found = machine.run()
    if name == "v1":
        assert found == MemoryFault(stale, found.size, 0, EFAULT)
        assert found.gpa != DATA
    else:
        assert found == BareFault(EFAULT)


def test_v5_begins_unfilled(vcpu):
    one = vcpu("v5")
    one.run.flags = uapi.KVM_RUN_X86_SMM
    fill(one)
    kvm_run_begin(one)
    assert one.run.flags == uapi.KVM_RUN_X86_SMM
    assert decoded(one, -EFAULT) == BareFault(EFAULT)
    assert isinstance(decoded(one, fill(one)), MemoryFault)  # no complaint either


@every
def test_an_annotation_can_be_taken_back(vcpu, name):
    """Ours alone: code is translated before the guest has come to it."""
    one = vcpu(name)
    sites = sorted(DIALECTS[name].annotated)
    r = fill(one, sites[0], reason=Reason.MISSING)
    assert isinstance(decoded(one, r), MemoryFault)
    forget_annotation(one)
    assert not isinstance(decoded(one, r), MemoryFault)
    assert isinstance(decoded(one, fill(one, sites[0], reason=Reason.MISSING)), MemoryFault)


# -- what is refused -------------------------------------------------------------------------------


@pytest.fixture
def vm():
    made = []

    def make(name) -> SoftVm:
        system = SoftSystem(name)
        made.extend((system, system.create_vm()))
        return made[-1]

    yield make
    for one in reversed(made):
        one.close()


def refusal(call, *args, **options):
    with pytest.raises(KvmError) as caught:
        call(*args, **options)
    return caught.value.errno


@every
def test_capabilities_that_cannot_be_enabled(vm, name):
    opt_in = {"wip-v2": 227, "v3": 227}.get(name)
    for cap in range(224, 250):
        if cap != opt_in:
            assert refusal(vm(name).enable_cap, cap, (1,)) == errno.EINVAL
    assert refusal(vm(name).enable_cap, opt_in or 227, (1,), flags=1) == errno.EINVAL


def test_v3_takes_0_and_1(vm):
    for value in (0, 1):
        vm("v3").enable_cap(227, (value,))
    vm("v3").enable_cap(227)
    for value in (2, 3, 1 << 63):
        assert refusal(vm("v3").enable_cap, 227, (value,)) == errno.EINVAL


def test_wip_v2_accepts_reasons_that_do_not_exist(vm):
    one = vm("wip-v2")
    one.enable_cap(227, (0xDEAD_0000,))
    assert one.kvm.memfault_exit_reasons == 0xDEAD_0000
    fixed = SoftSystem(replace(DIALECTS["wip-v2"], checks_reasons=True)).create_vm()
    assert refusal(fixed.enable_cap, 227, (4,)) == errno.EINVAL
    fixed.enable_cap(227, (3,))
    fixed.close()


@every
def test_the_ioctl_is_v1s_only(vm, name):
    if name == "v1":
        vm(name).set_mem_fault_nowait(True)
    else:
        assert refusal(vm(name).set_mem_fault_nowait, True) == errno.ENOTTY


@pytest.fixture
def memory():
    with Mapping.anonymous(16 * PAGE) as mapping:
        yield mapping


@every
@pytest.mark.parametrize("flag", [1 << 2, 1 << 3, 1 << 4])
def test_slot_flags(vm, memory, name, flag):
    request = (0, 0, 16 * PAGE, memory.address, flag)
    if flag == DIALECTS[name].slot_flag:
        vm(name).set_user_memory_region(*request)
    else:
        assert refusal(vm(name).set_user_memory_region, *request) == errno.EINVAL


@pytest.mark.parametrize("name", SLOT_FLAG)
def test_read_only_and_exit_on_missing_exclude_each_other_in_v7(vm, memory, name):
    flags = DIALECTS[name].slot_flag | uapi.KVM_MEM_READONLY
    request = (0, 0, 16 * PAGE, memory.address, flags)
    if name == "v7":
        assert refusal(vm(name).set_user_memory_region, *request) == errno.EINVAL
    else:
        vm(name).set_user_memory_region(*request)
    vm(name).set_user_memory_region(*request[:4], uapi.KVM_MEM_READONLY)


# -- KVM Userfault's slots -------------------------------------------------------------------------

USERFAULT = 1 << 3


def test_a_bitmap_is_kept_with_the_slot(vm, memory):
    one = vm("userfault-v3")
    with Mapping.anonymous(PAGE) as bitmap:
        one.set_user_memory_region(
            0, 0, 16 * PAGE, memory.address, USERFAULT, userfault_bitmap=bitmap.address
        )
        assert one.kvm.memslots.slots[0].userfault_bitmap == bitmap.address
        # Another, with the flags as they are, changes nothing: as published.
        one.set_user_memory_region(
            0, 0, 16 * PAGE, memory.address, USERFAULT, userfault_bitmap=bitmap.address + 8
        )
        assert one.kvm.memslots.slots[0].userfault_bitmap == bitmap.address
        one.set_user_memory_region(0, 0, 16 * PAGE, memory.address)
        assert one.kvm.memslots.slots[0].userfault_bitmap == 0


@pytest.mark.parametrize("bitmap", [1 << 47, (1 << 47) - 8, 1 << 63])
def test_a_bitmap_outside_userspace_is_refused(vm, memory, bitmap):
    request = (0, 0, 16 * PAGE, memory.address, USERFAULT)
    one = vm("userfault-v3")
    assert refusal(one.set_user_memory_region, *request, userfault_bitmap=bitmap) == errno.EINVAL


def test_a_bitmap_that_is_not_mapped_is_found_out_at_the_fault(vm, memory):
    one = vm("userfault-v3")
    one.set_user_memory_region(0, 0, 16 * PAGE, memory.address, USERFAULT, userfault_bitmap=PAGE)
    assert one.kvm.memslots.slots[0].userfault_bitmap == PAGE


def test_the_old_ioctl_does_not_take_the_flag(vm, memory):
    request = (0, 0, 16 * PAGE, memory.address, USERFAULT)
    assert refusal(vm("userfault-v3").set_user_memory_region, *request) == errno.EINVAL


@pytest.mark.parametrize("name", [n for n in DIALECTS if n != "userfault-v3"])
def test_no_other_dialect_looks_at_a_bitmap(vm, memory, name):
    one = vm(name)
    one.set_user_memory_region(0, 0, 16 * PAGE, memory.address, userfault_bitmap=PAGE)
    assert one.kvm.memslots.slots[0].userfault_bitmap == 0

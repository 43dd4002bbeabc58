"""A VM while its vCPUs run: slots come and go, the host takes pages, the dirty log is read."""

import errno
import gc
import struct
import threading
import time

import pytest

from guestfault.errors import KvmError, Unavailable
from guestfault.fault.outcome import Interrupted, Io, MemoryFault, Mmio
from guestfault.linux.userfaultfd import Mode, Userfaultfd
from guestfault.softkvm.system import SoftSystem
from guestfault.uapi.mman import PROT_NONE, PROT_READ, PROT_WRITE

END = "e6f4"
DATA = 0x4_0000
PAGE = 4096
TABLES = {0x10, 0x11, 0x12, 0x13}  # frames that lead to all of memory: to NPT each walk writes them


def dirty_pages(log):
    return {8 * i + bit for i, byte in enumerate(log) for bit in range(8) if byte >> bit & 1}


# -- the dirty log ---------------------------------------------------------------------------------


def test_the_log_has_exactly_the_pages_written(start, is_soft):
    code = "488b87001000" + "00" + "488907 48898700300000" + END
    machine = start(code, "long-cpl3", rdi=DATA, flags=1)
    assert machine.trace() == []
    first = DATA >> 12
    logged = dirty_pages(machine.vm.get_dirty_log(0)) - TABLES
    # Shadow paging may make a page writable, and log it, on a read.
    assert logged == {first, first + 3} if is_soft else logged >= {first, first + 3}
    assert dirty_pages(machine.vm.get_dirty_log(0)) == set()


def test_a_page_is_logged_again_after_the_log_was_read(soft):
    machine = soft("488907" + END + "488907" + END + "488b07" + END, rdi=DATA, flags=1)
    for expected in ({DATA >> 12}, {DATA >> 12}, set()):
        assert machine.trace() == []
        assert dirty_pages(machine.vm.get_dirty_log(0)) - TABLES == expected


@pytest.mark.parametrize(("tdp_enabled", "tables"), [(True, TABLES), (False, set())])
def test_a_walk_by_the_processor_is_logged(soft, tdp_enabled, tables):
    """Under shadow paging KVM walks the guest's tables, whose flags are set already."""
    machine = soft("488b07" + END, rdi=DATA, flags=1)
    assert machine.trace() == []
    assert dirty_pages(machine.vm.get_dirty_log(0)) == tables


def test_a_slot_without_a_log(start):
    machine = start(END)
    with pytest.raises(KvmError) as caught:
        machine.vm.get_dirty_log(0)
    assert caught.value.errno == errno.ENOENT


def test_the_log_loses_no_write_of_vcpus_that_run_meanwhile(soft, background):
    """Each vCPU counts in its own pages; after each log, the pages that changed are in it."""
    pages = 4
    # again: inc [rdi]; inc [rdi+0x1000]; ... ; jmp again
    code = "".join(f"48ff87{struct.pack('<i', i * PAGE).hex()}" for i in range(pages))
    code += "eb" + struct.pack("<b", -(len(code) // 2 + 2)).hex()
    machine = soft(code, rdi=DATA, flags=1)
    second = machine.add_vcpu(1, rdi=DATA + pages * PAGE)
    runs = [background(machine.run), background(machine.run, second)]
    gpas = [DATA + i * PAGE for i in range(2 * pages)]
    seen = dict.fromkeys(gpas, 0)
    for _ in range(60):
        logged = dirty_pages(machine.vm.get_dirty_log(0))
        for gpa in gpas:
            # Read after the log: what it holds is in this log, or will be in the next.
            value = machine.word(gpa)
            assert value >= seen[gpa]
            seen[gpa] = value
        assert logged - TABLES <= {gpa >> 12 for gpa in gpas}
        time.sleep(0.001)
    machine.vm.get_dirty_log(0)
    before = {gpa: machine.word(gpa) for gpa in gpas}
    for vcpu in (machine.vcpu, second):
        vcpu.kick()
    for run in runs:
        assert isinstance(run.result(), Interrupted)
    after = {gpa: machine.word(gpa) for gpa in gpas}
    assert min(after.values()) > 0
    logged = dirty_pages(machine.vm.get_dirty_log(0))
    for gpa in gpas:
        assert after[gpa] == before[gpa] or gpa >> 12 in logged


# -- slots -----------------------------------------------------------------------------------------


def test_a_slot_that_is_deleted_is_a_device_afterwards(start):
    machine = start("488b07" + END + "488b07" + END, rdi=0x20_0000)
    machine.write(DATA, b"contents")
    machine.vm.set_user_memory_region(1, 0x20_0000, PAGE, machine.ram.guest.address + DATA)
    assert machine.trace() == []
    assert machine.regs.rax == int.from_bytes(b"contents", "little")
    machine.vm.set_user_memory_region(1, 0x20_0000, 0, 0)
    assert machine.trace(b"87654321") == [("read", 0x20_0000, b"87654321")]


def test_a_slot_that_moves(start):
    machine = start("488b07" + END + "488b07 488b9f00100000" + END, rdi=0x20_0000)
    machine.write(DATA, b"contents")
    machine.vm.set_user_memory_region(1, 0x20_0000, PAGE, machine.ram.guest.address + DATA)
    assert machine.trace() == []
    machine.vm.set_user_memory_region(1, 0x20_1000, PAGE, machine.ram.guest.address + DATA)
    assert machine.trace(bytes(8)) == [("read", 0x20_0000, bytes(8))]
    assert machine.regs.rbx == int.from_bytes(b"contents", "little")


def test_slots_come_and_go_under_a_running_vcpu(soft, background):
    """It reads one address for ever: the memory's value, or the device's; never anything else."""
    # again: mov rax, [rdi]; cmp rax, rbx; je again; cmp rax, rdx; je again; out 0x66, al
    code = "488b07 4839d8 74f8 4839d0 74f3 e666"
    memory, device = 0x1111111111111111, 0x2222222222222222
    machine = soft(code, rdi=0x20_0000, rbx=memory, rdx=device)
    machine.write(DATA, struct.pack("<Q", memory))
    exits = {"device": 0}

    def run():
        while True:
            match machine.run():
                case Mmio(0x20_0000, _, 8, False):
                    machine.vcpu.kvm_run.mmio.data[:] = struct.pack("<Q", device)
                    exits["device"] += 1
                case Interrupted():
                    return "kicked"
                case other:
                    return other

    runner = background(run)
    for turn in range(150):
        machine.vm.set_user_memory_region(1, 0x20_0000, PAGE, machine.ram.guest.address + DATA)
        if turn % 3 == 0:
            time.sleep(0.0005)
        machine.vm.set_user_memory_region(1, 0x20_0000, 0, 0)
        if turn % 3 == 1:
            time.sleep(0.0005)
    machine.vcpu.kick()
    assert runner.result() == "kicked"
    assert exits["device"] > 0


# -- the host takes pages --------------------------------------------------------------------------


def test_a_page_taken_away_faults_again(soft):
    machine = soft("488b07" + END + "488b07" + END, flags=4, rdi=DATA)
    machine.bring_in(0, machine.RAM_SIZE)
    assert machine.trace() == []
    machine.discard(DATA)
    assert machine.run() == MemoryFault(DATA, PAGE, 2, errno.EFAULT)


def test_no_stale_byte_is_ever_read(soft, background):
    """The host takes the page, changes it and lets it in again, while vCPUs read it.

    Two words count up.  While no vCPU may read it the second holds a value of 1000 or more: who
    sees that has read a page that was taken from it.  Who sees the count go back has read a stale
    one.
    """
    # again: mov rax, [rdi]; mov rbx, [rdi+0x800]; cmp rbx, rax; jb stale; cmp rax, rcx; jb stale;
    # cmp rbx, 1000; jae taken; mov rcx, rbx; jmp again; stale: out 0x67, al; taken: out 0x66, al
    code = "488b07 488b9f00080000 4839c3 7213 4839c8 720e 4881fbe8030000 7307 4889d9 ebde e667 e666"
    machine = soft(code, flags=4, rdi=DATA)
    machine.bring_in(0, machine.RAM_SIZE)
    vcpus = [machine.vcpu, machine.add_vcpu(1, rdi=DATA)]
    faults = [0, 0]
    allowed = threading.Event()
    allowed.set()

    def run(i):
        while True:
            match machine.run(vcpus[i]):
                case MemoryFault(gpa, _, _, _):
                    assert gpa == DATA
                    faults[i] += 1
                    allowed.wait()
                case Interrupted():
                    return "kicked"
                case other:
                    return other

    runners = [background(run, i) for i in range(2)]
    for value in range(1, 200):
        allowed.clear()
        if value % 2:
            machine.discard(DATA)
        else:
            machine.ram.guest.protect(DATA, PAGE, PROT_NONE)
        # Nobody may read it now.
        machine.write(DATA + 0x800, struct.pack("<Q", value + 1000))
        time.sleep(0.0002)
        machine.write(DATA, struct.pack("<Q", value))
        machine.write(DATA + 0x800, struct.pack("<Q", value))
        if value % 2 == 0:
            machine.ram.guest.protect(DATA, PAGE, PROT_READ | PROT_WRITE)
        machine.bring_in(DATA)
        allowed.set()
        time.sleep(0.0002)
    for vcpu in vcpus:
        vcpu.kick()
    assert [runner.result() for runner in runners] == ["kicked", "kicked"]
    assert sum(faults) > 50
    for vcpu in vcpus:
        assert vcpu.get_regs().rcx <= 199


def test_an_access_sleeps_in_userfaultfd_until_another_thread_resolves_it(soft, background):
    """Slow GUP, for a slot without the flag."""
    machine = soft("488b07" + END, rdi=DATA)
    try:
        uffd = Userfaultfd.open()
    except Unavailable as why:
        pytest.skip(f"needs userfaultfd: {why}")
    with uffd:
        machine.bring_in(0, DATA)
        machine.write(DATA, b"contents")
        uffd.register(machine.ram.guest.address + DATA, PAGE, Mode.MISSING | Mode.MINOR)
        run = background(machine.run)
        assert run.is_running()
        assert uffd.continue_(machine.ram.guest.address + DATA, PAGE).errno == 0
        assert run.result() == Io(machine.END_PORT, 1, 1, False, 4096)
        assert machine.regs.rax == int.from_bytes(b"contents", "little")


def test_two_vcpus_share_pages(soft, background):
    """They hand a counter back and forth."""
    # mine: cmp [rdi], rbx; jne mine; inc qword [rdi+8]; mov [rdi], rdx; dec rcx; jnz mine; out
    code = "48391f 75fb 48ff4708 488917 48ffc9 75ef" + END
    machine = soft(code, rdi=DATA, rbx=0, rdx=1, rcx=300)
    other = machine.add_vcpu(1, rdi=DATA, rbx=1, rdx=0, rcx=300)
    runs = [background(machine.run), background(machine.run, other)]
    for run in runs:
        assert isinstance(run.result(), Io)
    assert machine.word(DATA + 8) == 600


# -- closing ---------------------------------------------------------------------------------------


def test_closing_again_is_harmless_and_a_closed_vm_hears_nothing(soft):
    machine = soft()
    machine.vm.close()
    machine.vm.close()
    machine.discard(DATA)


def test_vcpu_ids(soft):
    vm = soft().vm
    for vcpu_id, number in ((0, errno.EEXIST), (4096, errno.EINVAL), (-1, errno.EINVAL)):
        with pytest.raises(KvmError) as caught:
            vm.create_vcpu(vcpu_id)
        assert caught.value.errno == number


def test_no_capability_can_be_enabled(soft):
    with pytest.raises(KvmError) as caught:
        soft().vm.enable_cap(227)
    assert caught.value.errno == errno.EINVAL


def test_machines_come_and_go_without_a_trace(resources, soft):
    system = SoftSystem()
    template = soft("488b07" + END, rdi=DATA)
    regs, sregs = template.regs, template.vcpu.get_sregs()

    def cycle():
        vm = system.create_vm()
        vm.set_user_memory_region(0, 0, template.RAM_SIZE, template.ram.guest.address)
        vcpu = vm.create_vcpu(0)
        vcpu.set_sregs(sregs)
        vcpu.set_regs(regs)
        assert vcpu.run() == 0
        vm.close()

    for _ in range(10):
        cycle()
    gc.collect()
    before, memory = resources(), resident()
    gc.disable()  # what is freed must not need the collector
    try:
        for _ in range(200):
            cycle()
        grown = resident() - memory
        after = resources()
    finally:
        gc.enable()
    assert after["descriptors"] == before["descriptors"]
    assert after["threads"] == before["threads"]
    assert after["mappings"] - before["mappings"] < 20  # the allocator's own
    assert grown < 40 << 20, f"{grown >> 20} MiB in 200 machines"
    system.close()


def resident():
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * 4096

"""Cached guest memory: found once, found again when the slots change, refused where it is not."""

import errno

import pytest

from guestfault.softkvm.guest_cache import (
    kvm_gfn_to_hva_cache_init,
    kvm_read_guest_offset_cached,
    kvm_write_guest_offset_cached,
)
from guestfault.uapi import kvm as uapi


@pytest.fixture
def memory(soft):
    """``read(cache, ...)`` and ``write(cache, ...)`` of a machine's memory."""

    class Memory:
        def __init__(self, **options):
            self.machine = soft(**options)
            self.kvm = self.machine.vm.kvm

        def cache(self, gpa, size=8):
            return kvm_gfn_to_hva_cache_init(self.kvm.memslots, gpa, size)

        def read(self, cache, offset, size):
            kvm = self.kvm
            return kvm_read_guest_offset_cached(cache, offset, size, kvm.memslots, kvm.mm)

        def write(self, cache, offset, data):
            kvm = self.kvm
            return kvm_write_guest_offset_cached(
                cache, data, offset, kvm.memslots, kvm.mm, kvm.second_stage
            )

    return Memory


def test_write_and_read(memory):
    memory = memory()
    cache = memory.cache(0x4_0040)
    assert memory.write(cache, 4, b"\x11\x22\x33\x44") == 0
    assert memory.machine.word(0x4_0044, 4) == 0x44332211
    assert memory.read(cache, 4, 4) == b"\x11\x22\x33\x44"
    assert not memory.kvm.second_stage.sptes


def test_the_write_is_in_the_dirty_log(memory):
    memory = memory(flags=uapi.KVM_MEM_LOG_DIRTY_PAGES)
    assert memory.write(memory.cache(0x4_0040), 0, b"x") == 0
    log = memory.machine.vm.get_dirty_log(0)
    assert log[0x40 // 8] == 1 << 0x40 % 8


def test_where_there_is_none(memory):
    memory = memory()
    assert memory.cache(memory.machine.DEVICE) is None
    assert memory.cache(0x4_0FFC) is None  # in two pages
    read_only = memory.__class__(flags=uapi.KVM_MEM_READONLY)
    assert read_only.cache(0x4_0040) is None


def test_a_slot_that_goes_and_comes_elsewhere(memory):
    memory = memory()
    machine, cache = memory.machine, memory.cache(0x4_0040)
    machine.vm.set_user_memory_region(0, 0, 0, 0)
    assert memory.write(cache, 0, b"x") == -errno.EFAULT
    assert memory.read(cache, 0, 1) is None
    address = machine.ram.guest.address
    machine.vm.set_user_memory_region(0, 0, machine.RAM_SIZE - 0x1000, address + 0x1000)
    assert memory.write(cache, 0, b"x") == 0
    assert machine.bytes[0x4_1040] == ord("x")


def test_memory_that_cannot_be_accessed(memory):
    memory = memory()
    cache = memory.cache(0x4_0040)
    memory.machine.ram.guest.protect(0x4_0000, 0x1000, 0)
    assert memory.write(cache, 0, b"x") == -errno.EFAULT
    assert memory.read(cache, 0, 1) is None

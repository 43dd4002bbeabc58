"""Code that is absent when KVM's instruction emulator wants it."""

from __future__ import annotations

from pathlib import Path

import pytest

from guestfault.guest.boot import entry_state
from guestfault.guest.layout import Layout
from guestfault.guest.layout import Mode as GuestMode
from guestfault.guest.program import DONE_PORT, READY_PORT
from guestfault.guest.snapshot import Snapshot, save
from guestfault.memory.ram import PAGE_SIZE
from guestfault.vmm.report import report

PAGES = (5, 9, 7, 11)


@pytest.fixture
def hopping(tmp_path: Path) -> Snapshot:
    """A real-mode guest that jumps from page to page before it says that it is done."""
    layout = Layout(16 * PAGE_SIZE, GuestMode.REAL)
    memory = bytearray(layout.memory_size)
    here = layout.code * PAGE_SIZE
    memory[here : here + 2] = bytes([0xE6, READY_PORT])  # out
    here += 2
    for page in PAGES:
        target = page * PAGE_SIZE
        # jmp rel16
        memory[here : here + 3] = b"\xe9" + (target - here - 3 & 0xFFFF).to_bytes(2, "little")
        here = target
    memory[here : here + 2] = bytes([0xE6, DONE_PORT])
    return save(tmp_path / "hopping", memoryview(memory), [entry_state(layout, 0)])


@pytest.mark.parametrize("kvm", ["kvm", "linux-6.8", "seed"])
def test_it_is_brought_in_and_the_guest_goes_on(open_system, session_of, hopping, kvm) -> None:
    with session_of(open_system(kvm), hopping) as session:
        assert session.run()
        result = report(session, 0)
    [vcpu] = result.vcpus
    assert result.pages_in == 1 + len(PAGES)
    faults = vcpu.annotated + vcpu.bare + vcpu.fetches
    assert faults == result.pages_in - result.eager_pages
    if kvm != "kvm":
        assert vcpu.fetches == 0  # the software processor runs real mode itself

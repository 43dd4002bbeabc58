"""Guests with none of their memory, run to the end on every KVM that this machine has."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from guestfault.errors import Unavailable
from guestfault.guest.layout import Mode as GuestMode
from guestfault.guest.manifest import Slot
from guestfault.guest.snapshot import save
from guestfault.guest.walk import Walk
from guestfault.linux import process_memory
from guestfault.linux.userfaultfd import Userfaultfd
from guestfault.memory.ram import PAGE_SIZE
from guestfault.paging.guard import FaultLoopError
from guestfault.paging.resolver import FaultResolver
from guestfault.vmm.errors import GuestStoppedError, UnlocatedFaultError
from guestfault.vmm.report import report
from guestfault.vmm.session import Mode, Session

MIB = 1 << 20


def finished(session: Session):
    """Run it to the end; the report, whose verdict is right."""
    assert session.run(), session.failure
    result = report(session, time.monotonic() - session.began)
    assert result.verdict == "right"
    assert result.pages_in == result.pages
    assert all(vcpu.checksum == vcpu.expected for vcpu in result.vcpus)
    return result


# -- the software KVM ------------------------------------------------------------------------------


@pytest.mark.parametrize("vcpus", [1, 2, 3])
@pytest.mark.parametrize("mode", GuestMode)
@pytest.mark.parametrize("walk", Walk)
def test_under_seed_every_fault_is_annotated_and_every_page_faults_once(
    open_system, session_of, snapshot, walk, mode, vcpus
) -> None:
    with session_of(open_system("seed"), snapshot(MIB // 2, mode, walk, vcpus)) as session:
        result = finished(session)
    annotated = sum(vcpu.annotated for vcpu in result.vcpus)
    again = sum(vcpu.again for vcpu in result.vcpus)
    # Two vCPUs may ask for a page of the header at once, and one of them finds it there.
    assert annotated - again == result.pages
    assert again == 0 or vcpus > 1
    assert not any(vcpu.bare or vcpu.ram_mmio for vcpu in result.vcpus)
    assert result.userfaults == result.eager_pages == 0


def test_64_mib_are_16384_annotated_faults_one_each(open_system, session_of, snapshot) -> None:
    with session_of(open_system("seed"), snapshot(64 * MIB)) as session:
        result = finished(session)
    [vcpu] = result.vcpus
    assert (vcpu.annotated, vcpu.bare, vcpu.ram_mmio, vcpu.again) == (16384, 0, 0, 0)
    assert session.vcpus[0].resolver.account.latency.count == 16384


@pytest.mark.parametrize("dialect", ["seed", "linux-6.8"])
@pytest.mark.parametrize("mode", GuestMode)
def test_uffd_completes_under_every_dialect(
    open_system, session_of, snapshot, dialect, mode
) -> None:
    system = open_system(dialect, Mode.UFFD)
    with session_of(system, snapshot(MIB, mode, Walk.RANDOM, 2), Mode.UFFD) as session:
        result = finished(session)
    again = session.handler.account.again
    assert result.userfaults - again == result.pages - result.eager_pages
    assert not any(vcpu.annotated or vcpu.bare or vcpu.ram_mmio for vcpu in result.vcpus)


@pytest.mark.parametrize("grant", ["userfaultfd", "none"])
def test_a_bare_fault_that_nobody_may_name_stops_the_run_and_says_so(
    open_system, session_of, snapshot, monkeypatch, grant, layout_of
) -> None:
    if grant == "none":  # as for one who may not have userfaultfd: absent is PROT_NONE

        def refuse(*_args, **_kwargs):
            raise Unavailable("userfaultfd", "refused by a test")

        monkeypatch.setattr(Userfaultfd, "open", refuse)
    taken = snapshot()
    with session_of(open_system("linux-6.8"), taken, locate=False) as session:
        assert not session.run()
        result = report(session, 0)
        failure = session.failure
        assert isinstance(failure, UnlocatedFaultError)
        assert (failure.vcpu_id, failure.errno) == (0, 14)
        assert failure.rip == session.vcpus[0].rip
        assert f"vCPU 0 at rip {failure.rip:#x}: KVM_RUN failed with a bare -EFAULT" in str(failure)
        assert result.verdict == "not done"
        assert result.failure == str(failure)
        # The page tables and the page of the first instruction, and not one more.
        assert result.pages_in == result.eager_pages == layout_of(taken).header_pages
        # It stops in the same place when asked again, having read nothing else.
        assert not session.run()
        assert session.vcpus[0].rip == failure.rip
        data = layout_of(taken).data.start * PAGE_SIZE
        assert process_memory.read(session.ram.guest.address + data, 8) is None


@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("walk", Walk)
@pytest.mark.parametrize("kvm", ["linux-6.8", "kvm"])
def test_a_guest_whose_every_fault_is_bare_runs_to_the_end(
    open_system, session_of, snapshot, kvm, walk, vcpus
) -> None:
    taken = snapshot(MIB // 2, GuestMode.LONG_CPL3, walk, vcpus)
    with session_of(open_system(kvm), taken) as session:
        result = finished(session)
    bare, again = (sum(getattr(v, name) for v in result.vcpus) for name in ("bare", "again"))
    assert bare - again == result.pages - result.eager_pages
    assert sum(v.by_tracepoint + v.by_decode for v in result.vcpus) == bare
    assert sum(v.unsure for v in result.vcpus) <= again  # a page that another vCPU was bringing in


def test_the_same_without_userfaultfd(open_system, session_of, snapshot, monkeypatch) -> None:
    def refuse(*_args, **_kwargs):
        raise Unavailable("userfaultfd", "refused by a test")

    monkeypatch.setattr(Userfaultfd, "open", refuse)
    with session_of(open_system("linux-6.8"), snapshot()) as session:
        result = finished(session)
    assert result.absent == "protected"
    assert result.vcpus[0].bare == result.pages - result.eager_pages


def test_slots_in_another_order_than_their_bytes(
    open_system, session_of, snapshot, tmp_path
) -> None:
    # The memory file has the upper half of guest physical memory first.
    whole = snapshot(MIB)
    memory, half = whole.memory_path.read_bytes(), MIB // 2
    slots = [Slot(7, 0, half, half), Slot(3, half, half, 0)]
    swapped = save(tmp_path / "swapped", memory[half:] + memory[:half], whole.vcpus, slots=slots)
    with session_of(open_system("seed"), swapped) as session:
        assert session.run(), session.failure
        result = report(session, 0)
        assert (result.verdict, result.right) == ("done", True)
        assert session.vcpus[0].console.checksum == whole.guest.checksums[0]
        assert session.pager.pages_in == 256


def test_a_done_session_is_done_when_run_again(open_system, session_of, snapshot) -> None:
    with session_of(open_system("seed"), snapshot()) as session:
        first = finished(session)
        assert finished(session).vcpus == first.vcpus


def test_more_vcpus_than_the_kvm_has_are_refused(open_system, session_of, snapshot) -> None:
    one = snapshot()
    many = replace(one, vcpus=one.vcpus * 5000)
    with (
        pytest.raises(Unavailable, match=r"5000 vCPUs: softkvm \(seed\) can have 4096 in a VM"),
        session_of(open_system("seed"), many),
    ):
        pass


def test_a_triple_fault_stops_the_guest_and_says_where(
    open_system, session_of, snapshot, tmp_path
) -> None:
    good = snapshot()
    [state] = good.vcpus
    state.regs.rip += 0x100000  # beyond what the page tables map, with no IDT to catch it
    try:
        bad = save(tmp_path / "bad", good.memory_path.read_bytes(), [state])
        with session_of(open_system("seed"), bad) as session:
            assert not session.run()
            assert isinstance(session.failure, GuestStoppedError)
            assert session.failure.rip == state.regs.rip
            assert "triple fault" in str(session.failure)
    finally:
        state.regs.rip -= 0x100000


def test_a_page_that_does_not_come_in_although_it_was_brought_is_a_loop(
    open_system, session_of, snapshot
) -> None:
    with session_of(open_system("seed"), snapshot()) as session:
        session.view.bring_in = lambda offset, size: None
        assert not session.run()
        failure = session.failure
        assert isinstance(failure, FaultLoopError)
        assert failure.access.gpa == 0x1000  # the PML4, which the first fetch is translated by
        assert session.pager.pages_in == 1


# -- the real one ----------------------------------------------------------------------------------


@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("mode", GuestMode)
def test_uffd_completes_on_the_real_kvm(open_system, session_of, snapshot, mode, vcpus) -> None:
    system = open_system("kvm", Mode.UFFD)
    with session_of(system, snapshot(MIB // 2, mode, Walk.RANDOM, vcpus), Mode.UFFD) as session:
        result = finished(session)
    assert result.userfaults - session.handler.account.again == result.pages - result.eager_pages


@pytest.mark.parametrize("mode", [GuestMode.LONG_CPL0, GuestMode.REAL])
@pytest.mark.parametrize("walk", Walk)
def test_absent_ram_that_comes_as_mmio_is_answered_with_its_bytes(
    open_system, session_of, snapshot, mode, walk
) -> None:
    with session_of(open_system("kvm"), snapshot(MIB // 4, mode, walk)) as session:
        result = finished(session)
        [vcpu] = result.vcpus
        if vcpu.bare:
            pytest.skip("this KVM runs the guest natively: absent RAM is a bare fault")
        assert vcpu.ram_mmio - vcpu.again == result.pages - result.eager_pages
        assert vcpu.annotated == vcpu.bare == 0


@pytest.mark.parametrize("mode", [GuestMode.LONG_CPL0, GuestMode.REAL])
def test_an_mmio_read_of_ram_answered_with_zeros_would_change_the_checksum(
    open_system, session_of, snapshot, mode, monkeypatch
) -> None:
    honest = FaultResolver.resolve_ram_mmio
    lies = []

    def lie_once(self, exit_) -> None:
        honest(self, exit_)
        if not exit_.is_write and not lies:
            lies.append(exit_.gpa)
            self._vcpu.kvm_run.mmio.data[:] = bytes(8)

    monkeypatch.setattr(FaultResolver, "resolve_ram_mmio", lie_once)
    with session_of(open_system("kvm"), snapshot(MIB // 4, mode)) as session:
        session.run()
        if session.vcpus[0].resolver.account.bare:
            pytest.skip("this KVM runs the guest natively: absent RAM is a bare fault")
        assert len(lies) == 1
        assert report(session, 0).verdict == "wrong checksum"

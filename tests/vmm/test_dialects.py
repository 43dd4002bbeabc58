"""A guest with none of its memory, run to the end in every dialect of the interface.

Every fault is annotated where the dialect annotates; through the locators where it does not.
"""

from __future__ import annotations

import time

import pytest

from guestfault.dialect.published import DIALECTS
from guestfault.errors import KvmError, Unavailable
from guestfault.guest.layout import Mode as GuestMode
from guestfault.guest.manifest import Slot
from guestfault.guest.snapshot import save
from guestfault.guest.walk import Walk
from guestfault.linux.userfaultfd import Userfaultfd
from guestfault.memory.userfault import Userfault
from guestfault.paging.source.file import FileSource
from guestfault.vmm.choice import choose
from guestfault.vmm.report import report
from guestfault.vmm.session import Mode, Session

MIB = 1 << 20
BARE = ("linux-6.8", "linux-7.3")
every = pytest.mark.parametrize("name", DIALECTS)


@pytest.fixture
def run(open_system):
    """``run(name, snapshot, mode)``: the session, over and closed, and its report."""

    def run_(name, snapshot, mode=Mode.EXIT, dialect="", **options):
        system = open_system(name, mode)
        spoken = DIALECTS[dialect or name] if dialect is not None else None
        source = FileSource(snapshot.open_memory())
        try:
            with Session(system, snapshot, source, mode, dialect=spoken, **options) as session:
                assert session.run(), session.failure
                result = report(session, time.monotonic() - session.began)
        finally:
            source.close()
        assert result.verdict == "right"
        assert result.pages_in == result.pages
        return session, result

    return run_


def total(result, *fields):
    return sum(getattr(vcpu, field) for vcpu in result.vcpus for field in fields)


@every
@pytest.mark.parametrize("mode", GuestMode)
@pytest.mark.timeout(120)
def test_exits_complete_in_every_dialect(run, snapshot, name, mode):
    session, result = run(name, snapshot(MIB, mode, Walk.RANDOM, 2))
    assert result.kvm == f"softkvm ({name})"
    assert session.dialect is DIALECTS[name]
    absent = result.pages - result.eager_pages
    assert total(result, "ram_mmio", "silent", "fetches") == 0
    if name in BARE:
        assert total(result, "annotated") == 0
        assert total(result, "bare") - total(result, "again") == absent
        assert total(result, "by_tracepoint", "by_decode") == total(result, "bare")
    else:
        assert total(result, "bare") == 0
        assert total(result, "annotated") - total(result, "again") == absent
    # What KVM would fail at without a word is brought in where nothing can be asked of it.
    assert (result.eager_pages > 0) == (name in BARE)


@every
@pytest.mark.timeout(120)
def test_uffd_completes_in_every_dialect(run, snapshot, name):
    session, result = run(name, snapshot(MIB, vcpus=2), Mode.UFFD)
    assert total(result, "annotated", "bare", "ram_mmio") == 0
    assert result.userfaults - session.handler.account.again == result.pages - result.eager_pages


@pytest.mark.parametrize("name", [n for n in DIALECTS if n not in (*BARE, "userfault-v3")])
def test_the_kernels_word_is_enough_where_it_is_given(run, snapshot, name):
    _, result = run(name, snapshot(), locate=False)
    assert total(result, "annotated") == result.pages


@pytest.mark.parametrize(
    ("name", "recognised"),
    [
        ("v1", None),
        ("wip-v2", "seed"),
        ("seed", "seed"),
        ("v3", "seed"),
        ("v4", "v4"),
        ("v5", "v5"),
        ("v6", "linux-6.8"),
        ("v7", "linux-6.8"),
        ("linux-7.3", "linux-6.8"),
        ("userfault-v3", "linux-6.8"),
    ],
)
def test_a_kvm_of_which_nothing_is_known_but_its_numbers(run, snapshot, name, recognised):
    """It completes in any case; annotated are the faults that the dialect tells who has not asked.

    v6 and v7 annotate a failure whether the slot has their flag or not.  Taken for the seed, WIP v2
    and v3 are given its slot flag, and are not asked to annotate.
    """
    session, result = run(name, snapshot(), dialect=None)
    assert session.dialect is (None if recognised is None else DIALECTS[recognised])
    faults = result.pages - result.eager_pages
    told = name in ("seed", "v4", "v5", "v6", "v7")
    assert total(result, "annotated") == (faults if told else 0)
    assert total(result, "bare") == (0 if told else faults)


def test_userfault_without_userfaultfd(run, snapshot, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise Unavailable("userfaultfd", "refused by a test")

    monkeypatch.setattr(Userfaultfd, "open", refuse)
    session, result = run("userfault-v3", snapshot())
    assert result.absent == "KVM Userfault, over protected"
    assert total(result, "annotated") == result.pages - result.eager_pages
    assert isinstance(session.view, Userfault)


def test_userfault_with_a_bitmap_for_each_slot(open_system, snapshot, tmp_path):
    whole = snapshot(MIB)
    memory, cut = whole.memory_path.read_bytes(), 97 * 4096  # in the midst of a word of bits
    slots = [Slot(7, 0, cut, MIB - cut), Slot(3, cut, MIB - cut, 0)]
    swapped = save(tmp_path / "swapped", memory[cut:] + memory[:cut], whole.vcpus, slots=slots)
    source = FileSource(swapped.open_memory())
    spoken = DIALECTS["userfault-v3"]
    with Session(open_system("userfault-v3"), swapped, source, dialect=spoken) as session:
        assert session.run(), session.failure
        result = report(session, 0)
        assert session.vcpus[0].console.checksum == whole.guest.checksums[0]
    source.close()
    assert total(result, "annotated") == 256 - result.eager_pages
    assert total(result, "bare") == 0


# -- a KVM that does not do what it is asked -------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("v1", "KVM_SET_MEM_FAULT_NOWAIT"),
        ("wip-v2", "KVM_ENABLE_CAP"),
        ("v3", "KVM_ENABLE_CAP"),
        ("v4", "KVM_SET_USER_MEMORY_REGION"),
        ("v7", "KVM_SET_USER_MEMORY_REGION"),
        ("userfault-v3", "KVM_SET_USER_MEMORY_REGION"),
    ],
)
@pytest.mark.parametrize("kvm", ["linux-6.8", "kvm"])
def test_a_dialect_that_the_kvm_does_not_speak_is_refused_by_it(
    open_system, snapshot, kvm, name, says
):
    taken = snapshot()
    source = FileSource(taken.open_memory())
    with pytest.raises(KvmError, match=says):
        Session(open_system(kvm), taken, source, dialect=DIALECTS[name])
    source.close()


def test_which_kvm_and_which_dialect():
    soft = choose("soft", None)
    assert (soft.dialect, soft.system.name) == (DIALECTS["seed"], "softkvm (seed)")
    soft.system.close()
    asked = choose("auto", "v5")  # asks for the software KVM
    assert (asked.dialect, asked.system.name, asked.why) == (DIALECTS["v5"], "softkvm (v5)", "")
    asked.system.close()
    for kvm in ("auto", "soft", "kvm"):
        with pytest.raises(Unavailable, match="dialect 'v8': not known"):
            choose(kvm, "v8")


def test_the_dialect_of_a_real_kernel_may_be_named_if_it_announces_it(open_system):
    system = open_system("kvm")
    if not system.check_extension(232):
        pytest.skip("this kernel has no memory-fault exit")
    real = choose("kvm", "linux-7.3")
    assert (real.dialect, real.system.name) == (DIALECTS["linux-7.3"], "/dev/kvm")
    real.system.close()
    with pytest.raises(Unavailable, match=r"does not announce KVM_CAP_MEMORY_FAULT_INFO \(230\)"):
        choose("kvm", "v5")

"""Each bad cell of the table, by a schedule that is written down here and not searched for."""

from __future__ import annotations

import pytest

from guestfault.dialect.published import DIALECTS
from guestfault.explore.scenario import Kind

from .conftest import END

pytestmark = [
    pytest.mark.timeout(30),
    pytest.mark.filterwarnings("ignore"),  # the kernel's own warnings are part of the verdict
]

ASK = "userspace asks for exits, or does not"
HAD = "the page can be had just now, or not"
WORKER = "worker 1 of vCPU 0"

# Page A is not to be had three times: when KVM asks whether to wait, by the worker, and by KVM
# itself, which drops that.  Userspace asks for nothing.
SUPPRESSED = [("vmm", END), ("vcpu0", END), (WORKER, END), ("vcpu0", END)]
NOT_HAD = {ASK: [1], HAD: [1, 1, 1]}


@pytest.mark.parametrize("scenario", ["suppressed-then-absent", "suppressed-then-lost"])
@pytest.mark.parametrize(
    ("dialect", "kind"),
    [
        ("v1", Kind.BARE),
        ("wip-v2", Kind.CORRECT),
        ("seed", Kind.CORRECT),
        ("v3", Kind.WRONG),
        ("v4", Kind.WRONG),
        ("v5", Kind.WARNED),
        ("v6", Kind.CORRECT),
        ("v7", Kind.CORRECT),
        ("linux-6.8", Kind.BARE),
        ("userfault-v3", Kind.BARE),
    ],
)
def test_a_dropped_failure_blocks_the_one_that_is_returned(play, scenario, dialect, kind):
    """Invariant: what userspace decodes is what failed.  v4's hazard (C)."""
    verdict = play(scenario, dialect, SUPPRESSED, NOT_HAD)
    assert verdict.kind is kind, verdict
    if kind is Kind.WRONG:
        assert "is told of 4096 bytes at 0x2000; what failed is 0x3000" in verdict.text


def test_a_dropped_annotation_is_followed_by_a_bare_failure(play):
    """Invariant: a bare failure stays bare.  v4's hazard (B), with KVM Userfault's annotation."""
    moves = [
        ("vcpu0", END),  # halted: the worker is to bring page A in
        ("vmm", "handle_mm_fault"),  # the bitmap is there, and A's bit is set
        (WORKER, END),
        # kvm_arch_async_page_ready: the bit, an annotation, nobody leaves.  A second fault begins.
        ("vcpu0", "kvm_handle_efault: fill kvm_run"),
        ("vcpu0", "vcpu_enter_guest: enter"),
        ("vmm", END),  # page A, and its bit cleared
        ("vcpu0", END),  # A is there; page B's bit is clear and B is lost
    ]
    verdict = play("suppressed-then-lost", "userfault-v3", moves, {ASK: [0], HAD: [1, 1]})
    assert verdict.kind is Kind.WRONG, verdict
    assert "is told of 4096 bytes at 0x2000; what failed is 0x3000" in verdict.text


ACK = [
    ("vcpu0", END),  # halted for page A
    ("vmm", END),
    ("interrupt", END),
    # The handler reads a device; userspace answers, and is about to write the MSR.
    ("vcpu0", "kvm_check_async_pf_completion: look at done"),
    (WORKER, END),
    ("vcpu0", END),
]


@pytest.mark.parametrize(
    ("dialect", "kind"),
    [
        ("v1", Kind.CORRECT),
        ("wip-v2", Kind.MEMORY),
        ("seed", Kind.MEMORY),
        ("v3", Kind.WARNED),
        ("v4", Kind.WARNED),
        ("v5", Kind.CORRECT),
        ("v6", Kind.MEMORY),
        ("v7", Kind.MEMORY),
        ("linux-7.3", Kind.CORRECT),
        ("userfault-v3", Kind.CORRECT),
    ],
)
def test_a_fault_outside_kvm_run_overwrites_an_answer(play, dialect, kind):
    """Invariant: no exit's payload is altered after it is prepared.  The seed's own question."""
    verdict = play("ack-from-userspace", dialect, ACK, NOT_HAD)
    assert verdict.kind is kind, verdict
    if kind is Kind.MEMORY:
        assert "rbx 0x2000" in verdict.text  # where the device's answer was, the page's address


@pytest.mark.parametrize("scenario", ["vcpu-not-loaded", "vcpu-another-loaded"])
@pytest.mark.parametrize(
    ("dialect", "kind"),
    [
        ("v1", Kind.CORRUPTED),
        ("wip-v2", Kind.CORRUPTED),
        ("seed", Kind.WARNED),
        ("v3", Kind.WARNED),
        ("v4", Kind.WARNED),
        ("v5", Kind.WARNED),
        ("v6", Kind.CORRUPTED),
        ("v7", Kind.CORRUPTED),
        ("userfault-v3", Kind.CORRUPTED),
    ],
)
def test_a_vcpu_that_is_not_loaded(play, scenario, dialect, kind):
    """Invariant: no exit's payload is altered after it is prepared, by whatever thread."""
    moves = [("vcpu0", "mutex_unlock"), ("intruder", END), ("vcpu0", END)]
    verdict = play(scenario, dialect, moves)
    assert verdict.kind is kind, verdict


@pytest.mark.parametrize(
    ("dialect", "kind"),
    [
        ("v1", Kind.BARE),
        ("seed", Kind.CORRECT),
        ("v3", Kind.LOST),
        ("v4", Kind.LOST),
        ("v6", Kind.CORRECT),
        ("linux-6.8", Kind.BARE),
    ],
)
def test_pusha_prepares_an_exit_and_ends_in_ss(play, dialect, kind):
    """Invariant: an annotated fault is not lost.  The exit_reason guard meets a dead exit."""
    moves = [
        ("vcpu0", "emulator_read_write: fill kvm_run"),
        ("host", END),  # the page that #SS needs
        ("vcpu0", END),
    ]
    verdict = play("pusha-then-ss", dialect, moves)
    assert verdict.kind is kind, verdict


@pytest.mark.parametrize(
    ("dialect", "kind", "text"),
    [
        ("seed", Kind.WARNED, "mmio_needed"),
        ("v3", Kind.LOST, "0x2000"),
        ("v4", Kind.LOST, "0x2000"),
        ("v5", Kind.WARNED, "is filled already"),
        ("linux-7.3", Kind.WARNED, "mmio_needed"),
    ],
)
def test_an_event_in_real_mode(play, dialect, kind, text):
    """v5's canary: three failed pushes, none of which userspace hears of."""
    verdict = play("realmode-event", dialect)
    assert verdict.kind is kind, verdict
    assert text in verdict.text


@pytest.mark.parametrize("dialect", ["v3", "v4", "v5"])
def test_a_prepared_exit_and_a_failed_copy(play, dialect):
    """v4's hazard (A): the guards keep the second fill out, or count it, and say so."""
    verdict = play("pusha-then-lost", dialect)
    assert verdict.kind is Kind.WARNED, verdict


@pytest.mark.parametrize("dialect", DIALECTS)
def test_an_asynchronous_fault_on_a_lost_page_never_ends(play, dialect):
    """Invariant: no fault is lost for ever.  Nobody asks what the worker came to."""
    verdict = play("async-lost", dialect)
    assert verdict.kind is Kind.STUCK, verdict
    assert "again and again in one KVM_RUN" in verdict.text


@pytest.mark.parametrize(
    ("dialect", "kind"), [("seed", Kind.CORRECT), ("v7", Kind.CORRECT), ("linux-7.3", Kind.STUCK)]
)
def test_an_asynchronous_fault_that_userspace_could_end(play, dialect, kind):
    """Invariant: no fault is lost for ever.  Userfaultfd with SIGBUS, and a local APIC."""
    assert play("async-absent", dialect).kind is kind


@pytest.mark.parametrize(
    ("dialect", "kind"),
    [("v1", Kind.STUCK), ("seed", Kind.CORRECT), ("v3", Kind.CORRECT), ("linux-6.8", Kind.BARE)],
)
def test_a_stale_exit_reason(play, dialect, kind):
    """Invariant: what userspace decodes is what failed.  v1 never resets it: the same for ever."""
    verdict = play("stale-exit-reason", dialect, [("vcpu0", END), ("signal", END)])
    assert verdict.kind is kind, verdict


@pytest.mark.parametrize(
    ("dialect", "kind"), [("seed", Kind.CORRECT), ("v3", Kind.CORRUPTED), ("v4", Kind.CORRECT)]
)
def test_a_reset_at_the_wrong_place(play, dialect, kind):
    """Invariant: an exit stays what it was until KVM_RUN enters the guest.  v3's reset."""
    verdict = play("exit-between-runs", dialect)
    assert verdict.kind is kind, verdict


def test_a_bitmap_that_cannot_be_read(play):
    """Invariant: a failure is at worst honestly bare."""
    assert play("bitmap-unreadable", "userfault-v3", [("vmm", END)]).kind is Kind.BARE

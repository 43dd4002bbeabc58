"""Where both the tracepoint and the decoder answer, they agree: two accounts of every bare fault.

They have nothing in common.  One is what KVM recorded on its way to -EFAULT; the other is worked
out afterwards from registers, guest memory and what the host can serve.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from guestfault.errors import Unavailable
from guestfault.fault.access import Access, AccessKind, FoundBy
from guestfault.fault.locate.chain import Locators
from guestfault.fault.locate.decode import DecodeLocator
from guestfault.fault.locate.tracepoint import TracepointLocator, gpa_from
from guestfault.fault.outcome import BareFault, Outcome
from guestfault.guest.layout import Layout, Mode
from guestfault.guest.snapshot import build
from guestfault.guest.walk import Walk
from guestfault.kvm import KvmSystem
from guestfault.kvm.protocols import Vcpu
from guestfault.linux.tracefs import Tracefs
from guestfault.linux.userfaultfd import Userfaultfd
from guestfault.memory.ram import PAGE_SIZE
from guestfault.memory.slots import SlotMap
from guestfault.paging.source.file import FileSource
from guestfault.vmm import session as vmm
from guestfault.vmm.report import report

MIB = 1 << 20


class Accounts:
    """Both accounts of each bare fault, as :class:`Locators` of a session that asks both."""

    def __init__(self, system: KvmSystem, tracefs: Tracefs) -> None:
        self.both: list[tuple[Access | None, tuple[Access, ...]]] = []
        self._stack = ExitStack()
        accounts = self

        class Both(Locators):
            """Believes the decoder, and writes down what the tracepoint says to the same fault."""

            def __init__(self, vcpu: Vcpu, slots: SlotMap, decode: DecodeLocator) -> None:
                super().__init__(vcpu, slots, decode)
                self._both: TracepointLocator | None = None

            def locate(self, outcome: Outcome) -> tuple[Access, ...]:
                self.tracepoint = None  # the session's own arming is not what is tried here
                if not isinstance(outcome, BareFault):
                    return super().locate(outcome)
                # Before the decoder asks KVM for registers, and after: neither disturbs the other.
                before = self._both.locate() if self._both else None
                decoded = super().locate(outcome)
                if self._both is None:
                    self._both = TracepointLocator(
                        system, translate=gpa_from(self._vcpu), slots=self._slots, tracefs=tracefs
                    )
                    accounts._stack.callback(self._both.close)
                else:
                    assert self._both.locate() == before
                    accounts.both.append((before, decoded))
                return decoded

        self.locators = Both

    def close(self) -> None:
        self._stack.close()


@pytest.fixture
def accounts(
    system: KvmSystem, traced: Tracefs, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Accounts]:
    with closing(Accounts(system, traced)) as accounts:
        monkeypatch.setattr(vmm, "Locators", accounts.locators)
        yield accounts


def disagreement(recorded: Access | None, decoded: tuple[Access, ...]) -> str | None:
    """Both accounts, if they are not of one access."""
    best = decoded[0]
    if recorded is not None and (
        best.certain
        and recorded.gpa is not None
        and best.gpa is not None
        and best.gva is not None
        # The tracepoint has the byte at which the access failed, the decoder all of it.
        and best.gpa <= recorded.gpa < best.gpa + best.size
        and recorded.gpa // PAGE_SIZE == best.gpa // PAGE_SIZE
        and (recorded.gva is None or recorded.gva == best.gva + recorded.gpa - best.gpa)
        and (recorded.hva, recorded.slot) == (_hva_at(best, recorded.gpa), best.slot)
        and recorded.kind in (None, _as_the_processor_says(best.kind))
        and recorded.size == 1
    ):
        return None
    said = "\n".join(f"  decode: {access!r}" for access in decoded)
    return f"they disagree:\n  tracepoint: {recorded!r}\n{said}"


def _hva_at(access: Access, gpa: int) -> int | None:
    return None if access.slot is None else access.slot.hva_of(gpa)


def _as_the_processor_says(kind: AccessKind | None) -> AccessKind | None:
    return AccessKind.WRITE if kind is AccessKind.READ_WRITE else kind


@pytest.mark.parametrize(
    ("walk", "absent", "vcpus"),
    [
        *((walk, "userfaultfd", vcpus) for walk in Walk for vcpus in (1, 2)),
        (Walk.RANDOM, "protected", 2),
    ],
)
def test_the_tracepoint_and_the_decoder_agree_on_every_fault(
    accounts: Accounts,
    system: KvmSystem,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    walk: Walk,
    absent: str,
    vcpus: int,
) -> None:
    if absent == "protected":
        monkeypatch.setattr(Userfaultfd, "open", _refuse)
    guest = build(tmp_path / "guest", MIB, Mode.LONG_CPL3, walk, vcpus)
    with (
        closing(FileSource(guest.open_memory())) as source,
        vmm.Session(system, guest, source) as session,
    ):
        if absent == "userfaultfd" and not session.view.name.startswith(absent):
            pytest.skip("no userfaultfd that handles kernel faults here")
        assert session.run(), session.failure
        result = report(session, 0)
    assert result.verdict == "right"
    disagreements = [text for both in accounts.both if (text := disagreement(*both))]
    assert not disagreements, "\n".join([f"{len(disagreements)} times", *disagreements])
    # Every data page fails once; before each vCPU's first fault nobody listened.
    data = len(Layout(MIB, Mode.LONG_CPL3, vcpus).data)
    assert len(accounts.both) == data - vcpus >= 200
    kinds = {decoded[0].kind for _, decoded in accounts.both}
    assert kinds <= {AccessKind.READ, AccessKind.WRITE, AccessKind.READ_WRITE}


def _refuse(*_args: object, **_kwargs: object) -> Userfaultfd:
    raise Unavailable("userfaultfd", "refused by a test")


def test_what_is_a_disagreement() -> None:
    recorded = Access(0x5010, 1, FoundBy.TRACEPOINT, 0x1_0000_5010, kind=AccessKind.WRITE)
    decoded = Access(0x5010, 8, FoundBy.DECODE, 0x1_0000_5010, kind=AccessKind.READ_WRITE)
    assert disagreement(recorded, (decoded,)) is None
    assert disagreement(recorded._replace(gva=None, kind=None), (decoded,)) is None
    inside = recorded._replace(gpa=0x5017, gva=0x1_0000_5017)
    assert disagreement(inside, (decoded,)) is None
    for other in (
        recorded._replace(gpa=0x6010),
        recorded._replace(gpa=0x5018, gva=0x1_0000_5018),
        recorded._replace(gpa=0x5014),
        recorded._replace(gpa=None),
        recorded._replace(gva=0x1_0000_5018),
        recorded._replace(hva=1),
        recorded._replace(kind=AccessKind.READ),
        None,
    ):
        text = disagreement(other, (decoded,))
        assert text is not None
        assert repr(other) in text
        assert repr(decoded) in text
    assert disagreement(recorded, (decoded._replace(certain=False), decoded)) is not None

"""How often the decode locator is right, and whether it is ever wrong and certain.

Run it from the repository::

    PYTHONPATH=src .venv/bin/python benchmarks/locate_accuracy.py [--kvm soft|kvm|all]
        [--group NAME] [--tracefs DIRECTORY] [--json | --markdown] [--verbose]

Every form of :mod:`instruction_forms` is executed again and again, each time with exactly one
absent page among the pages that it touches, and the decode locator is asked which access failed, as
if nobody had said.  The truth it is compared with is not the locator's own opinion:

- on the software KVM (dialect ``seed``) the annotation names the page, and which pages a form
  touches is learned by running it with *every* page absent, until it has asked for all it needs;
- on ``/dev/kvm`` the page that we made ``PROT_NONE`` is the truth, for it is the only one.

Each run asks twice: as a VMM does that knows which pages it has not filled (their content is then
not believed), and as one does that only has the host's word for it.  An answer is

- *certain*: one access, said to be certain, in the right page;
- *ranked*: the right page is among the candidates, at the position that is counted;
- *unknown*: the right page is not, but an access is whose address is said to be unknown;
- *missed*: the right page is not there at all, in an answer that claims no certainty;
- *wrong*: said to be certain, and another page.  There must be none: the exit status is 1 if so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from guestfault.errors import Unavailable
from guestfault.fault.access import Access, AccessKind
from guestfault.fault.locate.tracepoint import TracepointLocator, gpa_from
from guestfault.fault.outcome import BareFault, Io, MemoryFault, Mmio, Outcome, RamMmio, Shutdown
from guestfault.linux.tracefs import Tracefs
from guestfault.memory.ram import PAGE_SIZE
from instruction_forms import FORMS, GROUPS, Form
from locate_machine import RAM_SIZE, Machine, open_machines

__all__ = ["Question", "Tally", "experiment", "judge"]

Learned = dict[tuple[Form, int], set[int]]

PAGES = RAM_SIZE // PAGE_SIZE
ANSWERS = ("certain", "ranked", "unknown", "missed", "wrong")
_MODES = {(16, 0): "real mode", (64, 0): "long mode, CPL 0", (64, 3): "long mode, CPL 3"}


@dataclass(frozen=True)
class Question:
    """One answer of the locator and the page that was the truth."""

    form: Form
    ring: int
    how: str
    page: int
    answer: str
    position: int
    said: tuple[Access, ...]

    def __str__(self) -> str:
        said = "; ".join(f"{access} ({access.why})" for access in self.said[:3])
        where = f"{self.form}, {_MODES[self.form.bits, self.ring]}, {self.how}"
        return f"{self.answer}: {where}: page {self.page:#x} was absent, said {said}"


@dataclass
class Tally:
    """What came of one machine's forms, by group and mode."""

    machine: str
    questions: list[Question] = field(default_factory=list)
    all_absent: list[Question] = field(default_factory=list)
    runs: Counter[tuple[str, str]] = field(default_factory=Counter)
    forms: dict[tuple[str, str], set[Form]] = field(default_factory=dict)
    skipped: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    disagreements: list[str] = field(default_factory=list)
    agreements: int = 0
    alone: int = 0  # the tracepoint named the page, and decode was not certain
    unrecorded: int = 0

    def skip(self, form: Form, ring: int, reason: str) -> None:
        """Count a form, or a page of one, that could not be run, with the reason."""
        self.skipped[form.group, _MODES[form.bits, ring], reason] += 1

    def count(self, group: str, mode: str, answer: str) -> int:
        """How many questions of a group were answered so."""
        return sum(
            q.answer == answer and q.form.group == group and _MODES[q.form.bits, q.ring] == mode
            for q in self.questions
        )


def judge(said: tuple[Access, ...], page: int) -> tuple[str, int]:
    """The kind of an answer, and the position of the right page in it, 0 if it is not there."""
    pages = [None if a.gpa is None else a.gpa // PAGE_SIZE for a in said]
    if said and said[0].certain:
        return ("certain", 1) if pages[0] == page else ("wrong", 0)
    if page in pages:
        return "ranked", pages.index(page) + 1
    return ("unknown" if None in pages else "missed"), 0


def experiment(
    machine: Machine, forms: Iterable[Form], learned: Learned, tracefs: Tracefs | None = None
) -> Tally:
    """Run ``forms`` on ``machine``.

    ``learned`` holds which pages a form touches, by (form, ring): a software KVM fills it, a real
    one uses it.  ``tracefs``, looked for if not given, is for the tracepoint's account.
    """
    tally = Tally(machine.system.name)
    tracepoint = _tracepoint(machine, tally, tracefs)
    for form in forms:
        for ring in form.rings if form.bits == 64 else (0,):
            reason = _cannot(machine, form, ring)
            if reason:
                tally.skip(form, ring, reason)
                continue
            machine.load(form, ring)
            key = form, ring
            if machine.is_soft:
                learned[key] = _touched(machine, tally)
                machine.load(form, ring)
            pages = learned.get(key) or _plausible(form)
            mode = _MODES[form.bits, ring]
            tally.forms.setdefault((form.group, mode), set()).add(form)
            for page in sorted(pages):
                _one_absent(machine, tally, pages, page, tracepoint)
    return tally


def _cannot(machine: Machine, form: Form, ring: int) -> str:
    if machine.is_soft:
        return f"the software processor has no {form.needs}" if form.needs else ""
    if form.bits == 16 or ring == 0:
        return "" if _runs_natively() else "KVM emulates this mode here: an MMIO exit, no failure"
    if form.needs and (not machine.has_avx or form.needs not in _cpu_flags()):
        return f"this processor or its KVM has no {form.needs}"
    return ""


def _runs_natively() -> bool:
    """Whether this host runs rings below 3 on the processor; under shadow-paged PVM it does not."""
    return bool({"vmx", "svm"} & _cpu_flags())


def _cpu_flags() -> set[str]:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("flags"):
            return set(line.split())
    return set()


def _touched(machine: Machine, tally: Tally) -> set[int]:
    """Every page that the form asks for, when none is there; and the locator's answers to that."""
    machine.take_out(0, PAGES)
    machine.rewind()
    touched: set[int] = set()
    form, ring = machine.form, machine.ring
    following = (form.rip + len(form.bytes) - 1) // PAGE_SIZE + 1
    for _ in range(100):
        match machine.run():
            case MemoryFault(gpa):
                page = gpa // PAGE_SIZE
                if machine.stands_on_form():
                    touched.add(page)
                    # The software processor fetches ahead of RIP, which no processor does.
                    for how in machine.locators if page != following else ():
                        said = machine.ask(how)
                        answer, position = judge(said, page)
                        question = Question(form, ring, how, page, answer, position, said)
                        tally.all_absent.append(question)
                machine.let_in(page)
            case seen:
                _finish(machine, seen)
                break
    return touched


def _plausible(form: Form) -> set[int]:
    """Where nothing was learned: the pages that the group's operands lie in."""
    return {form.rip // PAGE_SIZE, *range(0x230, 0x238)}


def _one_absent(
    machine: Machine,
    tally: Tally,
    touched: set[int],
    page: int,
    tracepoint: TracepointLocator | None,
) -> None:
    form, ring = machine.form, machine.ring
    group = form.group, _MODES[form.bits, ring]
    machine.restore(touched)
    machine.take_out(page)
    machine.rewind()
    seen = machine.run()
    match seen:
        case MemoryFault(gpa) if gpa // PAGE_SIZE != page:
            raise RuntimeError(f"{form}: page {page:#x} was absent, {gpa:#x} was annotated")
        case MemoryFault() | BareFault():
            if not machine.stands_on_form():
                tally.skip(form, ring, "the page is also needed before the form, or after it")
            else:
                tally.runs[group] += 1
                for how in machine.locators:
                    said = machine.ask(how)
                    answer, position = judge(said, page)
                    tally.questions.append(Question(form, ring, how, page, answer, position, said))
                _compare(machine, tally, page, tracepoint)
        case Shutdown() if machine.stands_on_form():
            tally.skip(form, ring, "KVM gave the guest an exception instead of failing")
        case Mmio() | RamMmio():
            tally.skip(form, ring, "an MMIO exit, which names the page itself")
        case _ if machine.is_soft:
            tally.skip(form, ring, "not asked for when it alone is absent")
    _finish(machine, seen)
    machine.let_in(page)


def _finish(machine: Machine, seen: Outcome) -> None:
    if isinstance(seen, Io | Mmio | RamMmio):
        machine.finish_io()


def _tracepoint(
    machine: Machine, tally: Tally, tracefs: Tracefs | None
) -> TracepointLocator | None:
    if machine.is_soft:
        return None
    try:
        translate = gpa_from(machine.vcpu)
        return TracepointLocator(
            machine.system, translate=translate, slots=machine.slots, tracefs=tracefs
        )
    except Unavailable as error:
        tally.notes.append(f"not compared with the tracepoint: {error}")
        return None


def _compare(
    machine: Machine, tally: Tally, page: int, tracepoint: TracepointLocator | None
) -> None:
    """Where the tracepoint answers too, it must name the absent page, and what decode is sure of.

    That is the byte, which must be one of the access's, and the kind; to a processor a
    read-modify-write is a write.
    """
    if tracepoint is None:
        return
    recorded, question = tracepoint.locate(), tally.questions[-1]
    best = question.said[0]
    if recorded is None:
        tally.unrecorded += 1
        return
    if recorded.gpa is None or recorded.gpa // PAGE_SIZE != page:
        same = False
    elif best.certain and best.gpa is not None:
        kind = AccessKind.WRITE if best.kind is AccessKind.READ_WRITE else best.kind
        into = recorded.gpa - best.gpa
        same = 0 <= into < best.size and recorded.kind in (None, kind)
        # A page-table entry has no gva of its own.
        same = same and (None in (recorded.gva, best.gva) or recorded.gva == best.gva + into)
    else:
        tally.alone += 1
        return
    if same:
        tally.agreements += 1
    else:
        tally.disagreements.append(f"the tracepoint says {recorded!r}; {question}; {best!r}")


# -- the account ----------------------------------------------------------------------------------

_HEAD = ("group", "mode", "forms", "runs", "asked", *ANSWERS)


def rows(tally: Tally) -> Iterator[tuple[object, ...]]:
    """The table's rows, the sum last."""
    total: Counter[str] = Counter()
    for group in GROUPS:
        for mode in _MODES.values():
            forms = tally.forms.get((group, mode))
            if not forms:
                continue
            counts = [tally.count(group, mode, answer) for answer in ANSWERS]
            line = (len(forms), tally.runs[group, mode], sum(counts), *counts)
            total.update(dict(zip(_HEAD[2:], line, strict=True)))
            yield (group, mode, *line)
    yield ("all", "", *(total[name] for name in _HEAD[2:]))


def notes(tally: Tally) -> Iterator[str]:
    """What the table does not say."""
    positions = Counter(q.position for q in tally.questions if q.answer == "ranked")
    if positions:
        listed = ", ".join(f"{count} at {place}" for place, count in sorted(positions.items()))
        yield f"position of the right page where ranked: {listed}"
    if tally.all_absent:
        answers = Counter(q.answer for q in tally.all_absent)
        listed = ", ".join(f"{answers[name]} {name}" for name in ANSWERS)
        first = sum(q.position == 1 for q in tally.all_absent)
        yield (
            f"with every page absent at first, {len(tally.all_absent)} asked: {listed}; "
            f"the right page came first in {first}"
        )
    reasons: Counter[str] = Counter()
    for (_, _, reason), count in tally.skipped.items():
        reasons[reason] += count
    for reason, count in sorted(reasons.items()):
        yield f"skipped {count}: {reason}"
    if tally.agreements or tally.disagreements:
        yield (
            f"where decode was certain the tracepoint agreed {tally.agreements} times in page, byte"
            f" and kind, and disagreed {len(tally.disagreements)} times; where it was not, the "
            f"tracepoint named the absent page {tally.alone} times; it had no answer "
            f"{tally.unrecorded} times"
        )
    yield from tally.notes


def as_text(tally: Tally) -> str:
    """A table for the terminal."""
    lines = [tuple(map(str, row)) for row in (_HEAD, *rows(tally))]
    widths = [max(len(line[i]) for line in lines) for i in range(len(_HEAD))]
    text = [f"{tally.machine}:"]
    for line in lines:
        cells = (
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        text.append("  " + "  ".join(cells))
    return "\n".join([*text, *(f"  {note}" for note in notes(tally))])


def as_markdown(tally: Tally) -> str:
    """The same for docs/locating.md."""
    text = [f"### {tally.machine}", "", "| " + " | ".join(_HEAD) + " |"]
    text.append("|---|---|" + "---:|" * (len(_HEAD) - 2))
    text += ["| " + " | ".join(map(str, row)) + " |" for row in rows(tally)]
    return "\n".join([*text, "", *(f"- {note}" for note in notes(tally)), ""])


def as_data(tally: Tally) -> dict[str, object]:
    """The same for programs, with every answer that is not certain and right."""
    return {
        "machine": tally.machine,
        "rows": [dict(zip(_HEAD, row, strict=True)) for row in rows(tally)],
        "notes": list(notes(tally)),
        "not_certain": [str(q) for q in tally.questions if q.answer != "certain"],
        "disagreements": tally.disagreements,
    }


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kvm", choices=("soft", "kvm", "all"), default="all")
    parser.add_argument("--group", choices=GROUPS, action="append", help="only this group")
    parser.add_argument("--tracefs", type=Path, help="where tracefs is mounted, if not as usual")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true")
    output.add_argument("--markdown", action="store_true")
    parser.add_argument("--verbose", action="store_true", help="print what was not certain")
    args = parser.parse_args()
    chosen = [form for form in FORMS if form.group in (args.group or GROUPS)]
    tallies: list[Tally] = []
    learned: Learned = {}
    for make in open_machines(args.kvm):
        try:
            machine = make()
        except Unavailable as error:
            print(f"skipped: {error}", file=sys.stderr)
            continue
        tracefs = None if args.tracefs is None else Tracefs(args.tracefs)
        tallies.append(experiment(machine, chosen, learned, tracefs))
        machine.close()
    if args.json:
        print(json.dumps([as_data(tally) for tally in tallies], indent=2))
    else:
        print("\n\n".join((as_markdown if args.markdown else as_text)(t) for t in tallies))
    failures = [
        *(str(q) for t in tallies for q in (*t.questions, *t.all_absent) if q.answer == "wrong"),
        *(text for t in tallies for text in t.disagreements),
    ]
    if args.verbose:
        for question in (q for t in tallies for q in t.questions if q.answer != "certain"):
            print(question, file=sys.stderr)
    for text in failures:
        print(text, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())

"""Whether the search can fail: it must find what is wrong with code that is wrong.

A table of good cells is worth as much as the errors that would have made them bad.  So each of
:data:`MUTATIONS` takes one precaution out of the kernel half or the user half, in a patched copy,
and the search is run again: some cell must get worse than it is without the mutation.

A mutation is a module, a piece of its text, and what is put in its place; the piece must occur
there exactly once, or the mutation is out of date.  The patched copy is made in a process of its
own, where the text is changed on its way into the interpreter, before anything has imported the
module.
That process is this module run as a program, so its head imports nothing of guestfault.

The command to try them all is ``python -m guestfault.explore.mutation``.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from types import CodeType, ModuleType
from typing import Any

__all__ = ["MUTATIONS", "Mutation", "OutOfDate", "Worse", "worse"]

_OUT_OF_DATE = 3  # exit status


@dataclass(frozen=True, slots=True)
class Mutation:
    """One precaution less: ``old`` is replaced by ``new`` in the text of ``module``.

    ``scenarios`` and ``dialects`` are where it is looked for, with so many ``preemptions``.
    """

    name: str
    module: str
    old: str
    new: str
    scenarios: tuple[str, ...]
    dialects: tuple[str, ...]
    preemptions: int = 1


@dataclass(frozen=True, slots=True)
class Worse:
    """A cell that a mutation makes worse, and the shortest schedule that shows it.

    ``replay`` is good for the mutated code only.
    """

    scenario: str
    dialect: str
    before: str
    after: str
    text: str
    replay: str


class OutOfDate(Exception):
    """The text that a mutation replaces is not there, or there more than once."""


_EFAULT = "guestfault.softkvm.efault"
_MMU = "guestfault.softkvm.mmu"
_SECOND_STAGE = "guestfault.softkvm.second_stage"
_VM = "guestfault.softkvm.vm"

MUTATIONS = (
    Mutation(
        "the helper fills the run page of a vCPU that is not loaded",
        _EFAULT,
        "tripped = running is not vcpu",
        "tripped = False",
        ("vcpu-not-loaded", "vcpu-another-loaded"),
        ("seed",),
    ),
    Mutation(
        "KVM_RUN does not reset exit_reason",
        _EFAULT,
        "if vcpu.kvm.reset is _BEFORE_LOOP:",
        "if False:",
        ("stale-exit-reason",),
        ("v4", "userfault-v3"),
    ),
    Mutation(
        "a fault does not look whether mmu_invalidate_seq has changed",
        _SECOND_STAGE,
        "return self.mmu_invalidate_seq != mmu_seq",
        "return False",
        ("invalidation",),
        ("seed",),
    ),
    Mutation(
        "a fault does not look whether an invalidation is in progress",
        _SECOND_STAGE,
        "if start <= hva < end:",
        "if False:",
        ("invalidation",),
        ("seed",),
        preemptions=2,
    ),
    Mutation(
        "a fault reads mmu_invalidate_seq when it has found the page",
        _MMU,
        """
        preemption_point("direct_page_fault: take mmu_lock", _MMU, True)
""",
        """
        preemption_point("direct_page_fault: read mmu_invalidate_seq", _MMU)
        fault.mmu_seq = stage.mmu_invalidate_seq
        preemption_point("direct_page_fault: take mmu_lock", _MMU, True)
""",
        ("invalidation",),
        ("seed",),
    ),
    Mutation(
        "TLBs are not flushed when the host takes a page away",
        _VM,
        """end):
            kvm_flush_remote_tlbs(kvm)
""",
        """end):
            pass
""",
        ("invalidation",),
        ("seed",),
    ),
    Mutation(
        "TLBs are not flushed when a dirty log begins",
        "guestfault.softkvm.set_memslot",
        "kvm.second_stage.remove_write_access(new):\n        kvm_flush_remote_tlbs(kvm)",
        "kvm.second_stage.remove_write_access(new):\n        pass",
        ("dirty-log",),
        ("seed",),
    ),
    Mutation(
        "a change of slots does not wait for who reads them",
        "guestfault.softkvm.set_memslot",
        "    synchronize_srcu(kvm)\n",
        "    pass\n",
        ("slot-deleted",),
        ("seed",),
    ),
    Mutation(
        "a slot that is being moved or deleted passes for none",
        _MMU,
        "if slot.flags & KVM_MEMSLOT_INVALID:",
        "if False:",
        ("slot-deleted", "slot-moved"),
        ("seed",),
    ),
    Mutation(
        "nobody is woken when another has let the page in",
        "guestfault.memory.view",
        "self.uffd.wake(address, PAGE_SIZE)\n                    address",
        "address",
        ("third-sleeper",),
        ("v7",),
    ),
)


def worse(mutation: Mutation, timeout: float = 60.0) -> list[Worse]:
    """The cells that get worse by the mutation; none if it is not found.

    Raises :class:`OutOfDate`; :class:`subprocess.TimeoutExpired` after ``timeout`` seconds; and
    :class:`RuntimeError` if the search fails, with the mutation or without.
    """
    plain, mutated = (_in_process(mutation, patched, timeout) for patched in (False, True))
    return [
        Worse(
            found["scenario"],
            found["dialect"],
            before["verdict"],
            found["verdict"],
            found["text"],
            found["replay"],
        )
        for before, found in zip(plain, mutated, strict=True)
        if found["rank"] > before["rank"]
    ]


def _in_process(mutation: Mutation, patched: bool, timeout: float) -> list[dict[str, Any]]:
    """The cells of the mutation, searched in a process of their own."""
    request = json.dumps({**asdict(mutation), "patched": patched})
    done = subprocess.run(
        [sys.executable, "-m", "guestfault.explore.mutation", request],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    if done.returncode == _OUT_OF_DATE:
        raise OutOfDate(done.stderr.strip())
    if done.returncode != 0:
        raise RuntimeError(f"{mutation.name}: {done.stderr}")
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


# -- in the process of its own ---------------------------------------------------------------------


class _Patched(importlib.machinery.SourceFileLoader):
    """Loads a module from its source, changed."""

    def __init__(self, module: str, path: str, old: str, new: str) -> None:
        super().__init__(module, path)
        self._old = old
        self._new = new

    def get_code(self, fullname: str) -> CodeType:
        source = self.get_data(self.path).decode()
        count = source.count(self._old)
        if count != 1:
            sys.stderr.write(f"{self._old!r} occurs {count} times in {self.path}\n")
            sys.exit(_OUT_OF_DATE)
        code: CodeType = compile(source.replace(self._old, self._new), self.path, "exec")
        return code


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module, and its loader is :class:`_Patched`."""

    def __init__(self, module: str, old: str, new: str) -> None:
        self._module = module
        self._old = old
        self._new = new

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._module:
            return None
        found = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if found is None or found.origin is None:
            return None
        loader = _Patched(fullname, found.origin, self._old, self._new)
        return importlib.util.spec_from_file_location(fullname, found.origin, loader=loader)


def _search(request: dict[str, Any]) -> list[dict[str, Any]]:
    """Search the cells of a mutation, in code that is patched if it is asked for."""
    if request["patched"]:
        assert request["module"] not in sys.modules
        sys.meta_path.insert(0, _Finder(request["module"], request["old"], request["new"]))
    from guestfault.dialect.published import DIALECTS
    from guestfault.explore.scenario import Kind
    from guestfault.explore.scenarios import SCENARIOS
    from guestfault.explore.search import Bound, explore
    from guestfault.explore.table import cell_of

    cells = []
    for name in request["scenarios"]:
        for dialect in request["dialects"]:
            bound = Bound(request["preemptions"])
            worst = cell_of(explore(SCENARIOS[name], DIALECTS[dialect], bound)).found[0]
            cells.append(
                {
                    "scenario": name,
                    "dialect": dialect,
                    "rank": list(Kind).index(worst.kind),
                    "verdict": worst.kind.value,
                    "text": worst.text,
                    "replay": worst.replay,
                }
            )
    assert not request["patched"] or request["module"] in sys.modules
    return cells


def _main(words: Sequence[str]) -> int:
    """Answer a request, or try all mutations and say what each makes worse."""
    if words:
        print(json.dumps(_search(json.loads(words[0]))))
        return 0
    missed = 0
    for mutation in MUTATIONS:
        found = worse(mutation)
        missed += not found
        print(f"{'found' if found else 'NOT FOUND':9}  {mutation.name}")
        for cell in found:
            print(f"           {cell.scenario}, {cell.dialect}: {cell.before} -> {cell.after}")
            print(f"             {cell.text}")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))

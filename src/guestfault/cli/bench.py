"""``guestfault bench``: what demand paging costs here, and what it would cost on more vCPUs."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from guestfault.bench.experiment import Engine
from guestfault.bench.paging import Summary, as_json, as_text, measure
from guestfault.bench.plain import PlainEngine
from guestfault.bench.plot import FORMATS, Line, draw, require_matplotlib
from guestfault.bench.prediction import calibrate, rates_of
from guestfault.bench.scale import comparison, predicted, prediction
from guestfault.bench.shape import Fault, Shape, Uffds, Way
from guestfault.cli.arguments import positive_number
from guestfault.cli.transient import transient
from guestfault.dialect.published import recognise
from guestfault.errors import GuestfaultError, Unavailable
from guestfault.kvm.protocols import System
from guestfault.kvm.system import KvmSystem
from guestfault.scale import model
from guestfault.scale.published import TABLES, VCPUS
from guestfault.vmm.choice import KVMS, Choice, choose
from guestfault.vmm.compiled import Loop, require_numba

__all__ = ["add_arguments", "main"]

_UFFDS = {"shared": Uffds.SHARED, "per-vcpu": Uffds.PER_VCPU}
_PAGES_PER_MIB = 256


class UsageError(GuestfaultError):
    """The command line asks for something that cannot be."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the commands and their arguments."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    paging = commands.add_parser("paging", help="both ways of bringing pages in, measured here")
    paging.set_defaults(bench=_paging)
    paging.add_argument("--kvm", choices=KVMS, default="auto", help="as of 'guestfault run'")
    paging.add_argument(
        "--loop",
        choices=[loop.value for loop in Loop],
        default=Loop.AUTO.value,
        help="compiled: by numba, for both ways; plain: Python (default: compiled if it can be)",
    )
    paging.add_argument(
        "--vcpus", type=_numbers, default=(1, 2), metavar="N,...", help="default 1,2"
    )
    paging.add_argument(
        "--memory", type=positive_number, default=64, metavar="MiB", help="of each vCPU, default 64"
    )
    paging.add_argument("--way", choices=[way.value for way in Way], help="only this one")
    paging.add_argument(
        "--fault",
        choices=[fault.value for fault in Fault],
        default=Fault.MINOR.value,
        help="minor: the bytes are in the page cache (default); missing: they are copied",
    )
    paging.add_argument(
        "--uffds", choices=_UFFDS, default="shared", help="one userfaultfd, or one for each vCPU"
    )
    paging.add_argument(
        "--readers",
        type=positive_number,
        metavar="N",
        help="threads that read each userfaultfd (default: one for each vCPU that it has)",
    )
    paging.add_argument("--rounds", type=positive_number, default=5, metavar="N", help="default 5")
    paging.add_argument("--json", action="store_true", help="the result as JSON")
    _add_plot(paging)

    scale = commands.add_parser(
        "scale", help="the published tables beside the simulated ones, and a prediction"
    )
    scale.set_defaults(bench=_scale)
    scale.add_argument(
        "--measured",
        type=Path,
        metavar="FILE",
        help="predict the machine on which 'bench paging --json' wrote this",
    )
    _add_plot(scale)


def main(args: argparse.Namespace) -> int:
    """Run the command."""
    if args.plot is not None:
        require_matplotlib()
    status: int = args.bench(args)
    return status


def _add_plot(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--plot",
        type=_plot_file,
        metavar="FILE.svg|png",
        help="rate against vCPUs, and the published points; takes matplotlib",
    )


def _paging(args: argparse.Namespace) -> int:
    with ExitStack() as stack:
        choice = choose(args.kvm, None)
        system = choice.system
        stack.callback(system.close)
        if choice.why:
            _say(f"guestfault: using {system.name}: {choice.why}")
        engine = _engine(Loop(args.loop), choice)
        shapes = [_shape(args, way, n) for n in args.vcpus for way in _ways(args)]
        summaries = measure(system, engine, shapes, args.rounds, transient)
        transient("")
        result = as_json(system, engine, summaries)
        print(json.dumps(result, indent=2) if args.json else as_text(system, engine, summaries))
        if args.plot is not None:
            title = f"Demand paging on {system.name}, {engine.name}"
            _draw(args.plot, title, [*_published(), *_measured(summaries)])
    return 0


def _scale(args: argparse.Namespace) -> int:
    print(comparison())
    lines = _published()
    if args.measured is not None:
        rates, layout = rates_of(_read(args.measured))
        costs = calibrate(rates, layout)
        print("\n" + prediction(costs, layout, rates))
        for name, key, way in (
            ("exits", "exit", model.Way.EXITS),
            ("userfaultfd", "uffd", model.Way.UFFD),
        ):
            points = sorted((n, rate) for (kind, n), rate in rates.items() if kind == key)
            lines.append(Line(f"{name}, measured here", points))
            lines.append(Line(f"{name}, predicted", predicted(costs, way, layout), dashed=True))
    if args.plot is not None:
        _draw(args.plot, "Demand paging by number of vCPUs", lines)
    return 0


def _engine(loop: Loop, choice: Choice) -> Engine:
    system = choice.system
    if loop is not Loop.PLAIN and (loop is Loop.COMPILED or isinstance(system, KvmSystem)):
        try:
            return _compiled(system)
        except Unavailable as error:
            if loop is Loop.COMPILED:
                raise
            _say(f"guestfault: in plain Python: {error}")
    dialect = choice.dialect or recognise(system.check_extension)
    if dialect is None:
        return PlainEngine(system, None, annotates=False)
    return PlainEngine(system, dialect.interface, annotates=not isinstance(system, KvmSystem))


def _compiled(system: System) -> Engine:
    if not isinstance(system, KvmSystem):
        raise Unavailable(
            "the compiled loop", f"{system.name} is Python itself", "use --loop plain"
        )
    require_numba()
    # numba is loaded here and not sooner, for it may not be there.
    from guestfault.bench.compiled import CompiledEngine

    return CompiledEngine(system)


def _ways(args: argparse.Namespace) -> list[Way]:
    return list(Way) if args.way is None else [Way(args.way)]


def _shape(args: argparse.Namespace, way: Way, vcpus: int) -> Shape:
    uffds = _UFFDS[args.uffds]
    readers = args.readers or (vcpus if uffds is Uffds.SHARED else 1)
    pages = args.memory * _PAGES_PER_MIB
    return Shape(way, vcpus, pages, Fault(args.fault), uffds, readers)


def _published() -> list[Line]:
    table = TABLES[0]
    return [
        Line(
            f"{name}, published", [(n, k * 1e3) for n, k in zip(VCPUS, figures, strict=True)], True
        )
        for name, figures in (("exits", table.exits), ("userfaultfd", table.uffd))
    ]


def _measured(summaries: list[Summary]) -> list[Line]:
    lines = []
    for name, way in (("exits", Way.EXIT), ("userfaultfd", Way.UFFD)):
        some = sorted((s for s in summaries if s.shape.way is way), key=lambda s: s.shape.vcpus)
        if some:
            points = [(s.shape.vcpus, s.rate) for s in some]
            lines.append(Line(f"{name}, measured here", points, spreads=[s.rates for s in some]))
    return lines


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: {error}") from None


def _draw(path: Path, title: str, lines: list[Line]) -> None:
    try:
        draw(path, title, lines)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from None
    _say(f"guestfault: wrote {path}")


def _plot_file(text: str) -> Path:
    path = Path(text)
    if path.suffix not in FORMATS:
        raise argparse.ArgumentTypeError(f"{text}: a plot's name ends with {' or '.join(FORMATS)}")
    return path


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted({positive_number(part) for part in text.split(",")}))


def _say(text: str) -> None:
    print(text, file=sys.stderr)

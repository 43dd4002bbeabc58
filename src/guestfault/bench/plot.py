"""The rate against the number of vCPUs, measured, predicted and published: an SVG or a PNG file.

Both axes are logarithmic: the published curves span two decades either way, and what matters of a
curve here is where it bends.  matplotlib draws; it is only needed, and only loaded, for that.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from guestfault.errors import Unavailable

__all__ = ["FORMATS", "Line", "draw", "require_matplotlib"]

FORMATS: Final = (".svg", ".png")
"""What a plot's file name may end with."""


@dataclass(frozen=True, slots=True)
class Line:
    """One curve: ``points`` are (vCPUs, pages per second), ``dashed`` for what was not measured.

    ``spreads`` gives the least and the most of each point, if they are known.
    """

    name: str
    points: Sequence[tuple[int, float]]
    dashed: bool = False
    spreads: Sequence[tuple[float, float]] = ()


def require_matplotlib() -> None:
    """Raises :class:`~guestfault.errors.Unavailable` without it: before the work, not after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise Unavailable(
            "--plot",
            "matplotlib, which draws it, is not installed",
            "pip install 'guestfault[plot]'",
        )


def draw(path: Path, title: str, lines: Sequence[Line]) -> None:
    """Write the plot to ``path``, in the format of its name's end, one of :data:`FORMATS`.

    Raises :class:`ValueError` without a point, :class:`~guestfault.errors.Unavailable` without
    matplotlib, and :class:`OSError` if the file cannot be written.
    """
    if not any(line.points for line in lines):
        raise ValueError("nothing to plot")
    require_matplotlib()
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, LogLocator, NullLocator, StrMethodFormatter

    # A figure of its own rather than pyplot's, which would look for a screen and keep it.
    figure = Figure(figsize=(9, 5.6), layout="constrained")
    axes = figure.subplots()
    for line in lines:
        style = "--" if line.dashed else "-"
        vcpus, rates = zip(*line.points, strict=True) if line.points else ((), ())
        (curve,) = axes.plot(vcpus, rates, style, marker="o", markersize=4, label=line.name)
        if line.spreads:
            least, most = zip(*line.spreads, strict=True)
            axes.vlines(vcpus, least, most, colors=curve.get_color())
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    axes.yaxis.set_major_formatter(EngFormatter())
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
    axes.set(title=title, xlabel="vCPUs", ylabel="pages/s, whole VM")
    axes.grid(color="#dddddd")
    figure.legend(loc="outside right upper", frameon=False, fontsize="small")
    # Text stays text, and the same plot the same file.
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "guestfault"}):
        figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)

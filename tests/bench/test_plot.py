from __future__ import annotations

import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

pytest.importorskip("matplotlib", reason="no matplotlib: pip install 'guestfault[plot]'")

from guestfault.bench import plot
from guestfault.bench.plot import FORMATS, Line, draw
from guestfault.errors import Unavailable

LINES = [
    Line("published <exits>", [(1, 340e3), (256, 4012e3)], dashed=True),
    Line("measured", [(1, 20e3), (2, 38e3)], spreads=[(18e3, 21e3), (36e3, 39e3)]),
]
SVG = "{http://www.w3.org/2000/svg}"


def test_a_plot_names_its_curves_and_axes(tmp_path: Path) -> None:
    path = tmp_path / "a.svg"
    draw(path, "title & more", LINES)
    texts = {text.text for text in ET.parse(path).getroot().iter(f"{SVG}text")}
    assert {"title & more", "published <exits>", "measured", "vCPUs", "256"} <= texts


def test_the_same_plot_is_the_same_file(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw(tmp_path / name, "title", LINES)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_a_png_is_one(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    draw(path, "title", LINES)
    assert path.read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("suffix", FORMATS)
def test_nothing_to_plot_is_an_error_and_no_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    with pytest.raises(ValueError, match="nothing"):
        draw(path, "empty", [Line("none", [])])
    assert not path.exists()


def test_without_matplotlib_the_mend_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(plot.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(Unavailable, match=r"pip install .guestfault\[plot\]"):
        draw(tmp_path / "a.svg", "title", LINES)

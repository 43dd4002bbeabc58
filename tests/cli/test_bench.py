"""``guestfault bench`` as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.timeout(120)


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "guestfault.cli.main", "bench", *map(str, words)]
    script = "import sys; from guestfault.cli.main import main; sys.exit(main())"
    command[1:3] = ["-c", script]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_what_was_measured_can_be_predicted_from(need_uffd, tmp_path: Path) -> None:
    plot = tmp_path / "a.svg"
    done = run("paging", "--kvm", "soft", "--memory", 1, "--rounds", 1, "--json", "--plot", plot)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["results"]) == 4
    assert "published" in plot.read_text()
    measured = tmp_path / "measured.json"
    measured.write_text(done.stdout)
    done = run("scale", "--measured", measured)
    assert done.returncode == 0, done.stderr
    assert "judged" in done.stdout
    assert "this machine, predicted" in done.stdout
    assert "taken over from the published machine" in done.stdout


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["paging", "--kvm", "soft", "--loop", "compiled"], "Python itself"),
        (["paging", "--plot", "a.pdf"], "ends with .svg or .png"),
        (["scale", "--plot", "/nowhere/a.svg"], "/nowhere/a.svg: No such file or directory"),
        (["paging", "--vcpus", "0"], "not a positive number"),
        (["scale", "--measured", "/nowhere.json"], "/nowhere.json"),
    ],
)
def test_bad_input_is_a_line_and_status_2(words: list[str], says: str) -> None:
    done = run(*words)
    assert done.returncode == 2
    assert says in done.stderr
    assert "Traceback" not in done.stderr

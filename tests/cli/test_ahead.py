"""``guestfault run`` with ``--record``, ``--prefetch`` and ``--push``, as its user meets it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import guestfault
from guestfault.guest.recorded import load_recorded
from guestfault.guest.snapshot import Snapshot, load

MAIN = "import sys; from guestfault.cli.main import main; sys.exit(main())"
COMMAND = [sys.executable, "-c", MAIN, "run", "--kvm", "soft"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(guestfault.__file__).parents[1])}

pytestmark = pytest.mark.timeout(60)


def run(*words: object) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=50)


def complaint(*words: object) -> str:
    """The one line with which a run ends at once; status 2."""
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    [line] = done.stderr.splitlines()
    return line.removeprefix("guestfault: ")


@pytest.fixture(scope="module")
def recorded(taken: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recorded") / "wset"
    done = run(taken.path, "--record", path)
    assert done.returncode == 0
    assert done.stderr == (
        "guestfault: recording: every page comes in by itself, by the plain loop\n"
        f"guestfault: 256 pages recorded in {path}\n"
    )
    assert "prefetched" not in done.stdout
    return path


def test_what_was_recorded_is_prefetched_and_counted(taken: Snapshot, recorded: Path) -> None:
    done = run(taken.path, "--prefetch", recorded, "--prefetch-threads", 2, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["verdict"] == "right"
    assert report["prefetch"] == {"planned": 256, "failed": 0, "gave_up": False}
    prefetched = report["ahead"]["prefetch"]
    assert set(prefetched) == {"pages", "withheld", "wanted", "useful", "wasted", "span"}
    assert prefetched["pages"] > 0
    ahead = sum(count["pages"] for count in report["ahead"].values())
    assert report["demanded"] + report["eager_pages"] + ahead == report["pages_in"] == 256
    text = run(taken.path, "--prefetch", recorded).stdout
    assert "\nprefetched " in text
    assert "\non demand " in text


def test_a_push_without_a_record(taken: Snapshot) -> None:
    done = run(taken.path, "--push", "max", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["verdict"] == "right"
    assert report["ahead"]["push"]["pages"] > 0


def test_an_interrupted_run_keeps_its_record(taken: Snapshot, tmp_path: Path) -> None:
    slow = ["--memory", "256M", "--record", tmp_path / "wset", "--save", tmp_path / "guest"]
    process = subprocess.Popen(
        [*COMMAND, *map(str, slow)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stderr is not None
    assert "recording" in process.stderr.readline()
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "not done" in out
    assert "though the guest did not come to its end" in err
    kept = load_recorded(tmp_path / "wset", load(tmp_path / "guest"))
    assert 0 < kept.pages < 65536


def test_what_belongs_to_another_snapshot_is_one_line_with_the_mend(recorded: Path) -> None:
    assert complaint("--memory", "1M", "--prefetch", recorded) == (
        f"working set {recorded}: it was recorded from another snapshot; "
        "record it again: guestfault run SNAPSHOT --record FILE"
    )


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--record", "R", "--prefetch", "R"], "--record and --prefetch: whether a page"),
        (["--record", "R", "--push", "1M"], "--record and --push: whether a page was touched"),
        (["--record", "R", "--loop", "compiled"], "--record and --loop compiled: the compiled"),
        (["--record", "none/R"], "working set none/R: the directory to hold it does not exist"),
        (["--record", "/dev/null"], "working set /dev/null: it exists and is not a working set"),
        (["--prefetch", "none"], "working set none: No such file or directory; record it again"),
        (["--prefetch", __file__], f"working set {__file__}: it is not a working set; record"),
        (["--prefetch-threads", "3"], "--prefetch-threads is for --prefetch FILE"),
        (["--prefetch", "R", "--prefetch-threads", "0"], "--prefetch-threads 0: use 1 to 64"),
        (["--push", "fast"], "--push fast: not a size; write one such as 64M or 1G"),
        (["--push", "0"], "--push 0: nothing would ever come in; leave it out"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(taken: Snapshot, words: list[str], what: str) -> None:
    assert complaint(taken.path, *words).startswith(what)

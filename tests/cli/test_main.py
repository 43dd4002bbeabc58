from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import guestfault
from guestfault.cli import main as cli
from guestfault.cli.main import COMMANDS, Command, main

RUN = "import sys; from guestfault.cli.main import main; sys.exit(main())"

# A command whose behaviour is its argument.
COMMAND_MODULE = """
from guestfault.errors import Unavailable

def add_arguments(parser):
    parser.add_argument("how")

def main(args):
    if args.how == "unavailable":
        raise Unavailable("/dev/kvm", "no such device", "load kvm_intel")
    if args.how == "interrupt":
        raise KeyboardInterrupt
    return int(args.how)
"""


@pytest.fixture
def act(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have a command ``act`` of the test's own."""
    (tmp_path / "act_command.py").write_text(COMMAND_MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cli, "COMMANDS", (Command("act", "does as it is told", "act_command"),))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command.name)
def test_every_command_has_its_module_and_its_help(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(import_module(command.module).main)
    with pytest.raises(SystemExit) as exit:
        main([command.name, "--help"])
    assert exit.value.code == 0
    assert f"usage: guestfault {command.name}" in capsys.readouterr().out


def test_help_names_every_command_and_loads_none() -> None:
    script = (
        "import sys\nfrom guestfault.cli.main import main\n"
        "try: main(['--help'])\n"
        "finally: print(*sorted(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0
    for command in COMMANDS:
        assert f"    {command.name} " in done.stdout
    loaded = set(done.stderr.split())
    assert {name for name in loaded if name.startswith("guestfault")} == {
        "guestfault",
        "guestfault.cli",
        "guestfault.cli.main",
        "guestfault.errors",
    }
    assert not loaded & {"ctypes", "json", "unicorn", "iced_x86", "traceback"}


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["--version"])
    assert exit.value.code == 0
    assert capsys.readouterr().out == f"guestfault {guestfault.__version__}\n"


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        ([], "guestfault: the following arguments are required: COMMAND"),
        (["nonsense"], "guestfault: argument COMMAND: invalid choice: 'nonsense'"),
        (["--verb", "check"], "guestfault: unrecognized arguments: --verb"),
        (["check", "--js"], "guestfault: unrecognized arguments: --js"),
        (["act"], "guestfault act: the following arguments are required: how"),
    ],
)
def test_a_wrong_command_line_is_one_line_and_a_hint(
    words: list[str],
    complaint: str,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "act" in words:
        request.getfixturevalue("act")
    with pytest.raises(SystemExit) as exit:
        main(words)
    assert exit.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    line, hint = printed.err.splitlines()
    assert line.startswith(complaint)
    assert hint.startswith("Try 'guestfault")


@pytest.mark.usefixtures("act")
def test_the_status_is_the_commands() -> None:
    assert main(["act", "0"]) == 0
    assert main(["act", "1"]) == 1


@pytest.mark.usefixtures("act")
def test_an_error_is_one_line_and_status_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["act", "unavailable"]) == 2
    assert capsys.readouterr() == ("", "guestfault: /dev/kvm: no such device; load kvm_intel\n")


@pytest.mark.usefixtures("act")
@pytest.mark.parametrize(
    "words", [["--verbose", "act", "unavailable"], ["act", "unavailable", "--verbose"]]
)
def test_verbose_shows_the_traceback_wherever_it_stands(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("Traceback")
    assert "act_command.py" in printed
    assert printed.endswith("guestfault: /dev/kvm: no such device; load kvm_intel\n")


@pytest.mark.usefixtures("act")
def test_an_interrupt_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["act", "interrupt"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = subprocess.Popen(
        [sys.executable, "-c", RUN, "check"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert command.stdout is not None
    assert command.stderr is not None
    command.stdout.close()
    assert command.stderr.read() == ""
    command.stderr.close()
    assert command.wait() == 141

"""``guestfault run`` as its user meets it: in a process of its own, with a pipe or a terminal."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import guestfault
from guestfault.errors import Unavailable
from guestfault.guest.layout import Mode as GuestMode
from guestfault.guest.snapshot import Snapshot, build, save
from guestfault.guest.walk import Walk
from guestfault.kvm.system import KvmSystem
from guestfault.linux.userfaultfd import Feature, Userfaultfd

MAIN = "import sys; from guestfault.cli.main import main; sys.exit(main())"
COMMAND = [sys.executable, "-c", MAIN, "run"]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(guestfault.__file__).parents[1])}
NOBODY = 65534

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def run(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, words)],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=60,
        **options,  # type: ignore[call-overload]
    )


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    """The one line with which a run ended at once; status 2."""
    assert done.returncode == 2, done
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("guestfault: ")
    return line.removeprefix("guestfault: ")


@pytest.fixture
def copy(taken: Snapshot, tmp_path: Path) -> Path:
    """A snapshot to spoil."""
    path = tmp_path / "copy"
    memory = taken.memory_path.read_bytes()
    return save(path, memory, taken.vcpus, guest=taken.guest).path


def need_uffd() -> None:
    try:
        Userfaultfd.open().close()
    except Unavailable as error:
        pytest.skip(str(error))


def need_kvm() -> None:
    try:
        KvmSystem().close()
    except Unavailable as error:
        pytest.skip(str(error))


# -- what it prints --------------------------------------------------------------------------------


def test_the_report_has_all_that_was_asked_for(taken: Snapshot) -> None:
    done = run("--kvm", "soft", taken.path)
    assert (done.returncode, done.stderr) == (0, "")
    lines = dict(re.split(r"  +", line, maxsplit=1) for line in done.stdout.splitlines())
    kept_out = r"(userfaultfd, failing|protected)"  # by what the machine has
    assert re.fullmatch(rf"softkvm \(seed\), mode exit, absent pages: {kept_out}", lines["KVM"])
    assert lines["guest"] == "random walk, long-cpl3, 1 MiB, 2 vCPUs"
    assert re.fullmatch(r"[\d.]+ ms", lines["first instruction"])
    assert lines["pages in"] == "256 of 256"
    assert re.match(r"\d+: \d+ annotated", lines["faults"])
    assert re.fullmatch(r"p50 .*, p90 .*, p99 .*, max .*", lines["latency"])
    for vcpu, checksum in enumerate(taken.guest.checksums):
        assert lines[f"vCPU {vcpu}"] == f"done, checksum {checksum:#018x} is right"
    assert lines["memory"] == "as expected"
    assert lines["verdict"] == "right"


def test_json_is_one_object_and_nothing_else(taken: Snapshot) -> None:
    done = run("--json", taken.path)
    assert done.returncode == 0
    document = json.loads(done.stdout)
    assert document["verdict"] == "right"
    assert document["pages_in"] == document["pages"] == 256
    assert document["failure"] is None
    assert [vcpu["checksum"] for vcpu in document["vcpus"]] == list(taken.guest.checksums)
    assert set(document["latency"]) == {"p50", "p90", "p99", "max"}


def test_auto_says_which_kvm_it_took_and_why(taken: Snapshot) -> None:
    done = run(taken.path)
    assert done.returncode == 0
    assert re.fullmatch(r"guestfault: using (/dev/kvm|softkvm \(seed\)): .+\n", done.stderr)


def test_without_a_snapshot_a_guest_is_made_and_may_be_kept(tmp_path: Path) -> None:
    words = ("--memory", "256K", "--vcpus", 2, "--walk", "zipf", "--guest", "real", "--seed", 4)
    done = run("--kvm", "soft", *words, "--save", tmp_path / "kept")
    assert (done.returncode, done.stderr) == (0, "")
    assert "zipf walk, real, 256 KiB, 2 vCPUs" in done.stdout
    again = run("--kvm", "soft", tmp_path / "kept")
    assert [line for line in done.stdout.splitlines() if "checksum" in line] == [
        line for line in again.stdout.splitlines() if "checksum" in line
    ]


def test_uffd_on_the_software_kvm(taken: Snapshot) -> None:
    need_uffd()
    done = run("--kvm", "soft", "--dialect", "linux-6.8", "--mode", "uffd", taken.path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "through userfaultfd" in done.stdout


@pytest.mark.parametrize(("dialect", "how"), [("seed", "annotated"), ("linux-6.8", "bare")])
def test_without_two_dimensional_paging(taken: Snapshot, dialect: str, how: str) -> None:
    """Shadow page tables: the guest's own are brought in first, every other page by its fault."""
    one_by_one = ("--fault-around", "off")
    done = run("--kvm", "soft", "--npt", 0, "--dialect", dialect, *one_by_one, "--json", taken.path)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["verdict"] == "right"
    eager = document["eager_pages"]
    assert eager > 0
    assert sum(vcpu[how] - vcpu["again"] for vcpu in document["vcpus"]) == 256 - eager


@pytest.mark.parametrize("dialect", ["seed", "linux-6.8"])
def test_uffd_without_two_dimensional_paging(taken: Snapshot, dialect: str) -> None:
    need_uffd()
    done = run("--npt", 0, "--dialect", dialect, "--mode", "uffd", taken.path)
    assert done.returncode == 0, done.stderr
    assert f"softkvm ({dialect}, npt=0), mode uffd" in done.stdout


def test_uffd_on_the_real_kvm(taken: Snapshot) -> None:
    need_kvm()
    need_uffd()
    done = run("--kvm", "kvm", "--mode", "uffd", "--json", taken.path)
    assert (done.returncode, done.stderr) == (0, "")
    document = json.loads(done.stdout)
    assert (document["kvm"], document["verdict"]) == ("/dev/kvm", "right")


@pytest.mark.parametrize("mode", ["exit", "uffd"])
def test_fewer_faults_by_windows_of_a_chosen_size(tmp_path: Path, mode: str) -> None:
    if mode == "uffd":
        need_uffd()
    guest = build(tmp_path / "guest", 4 << 20, GuestMode.LONG_CPL3, Walk.SEQUENTIAL).path
    demanded = {}
    for window in ("off", "1", "4", "64", None):
        words = ("--fault-around", window) if window else ()
        done = run("--kvm", "soft", "--mode", mode, *words, "--json", guest)
        assert done.returncode == 0, done.stderr
        document = json.loads(done.stdout)
        around = document["ahead"]["around"]["pages"]
        demanded[window] = document["demanded"]
        assert document["eager_pages"] + demanded[window] + around == document["pages_in"] == 1024
        assert (around == 0) == (window in ("off", "1"))
    assert demanded["off"] == demanded["1"]
    assert demanded[None] * 5 < demanded["4"] * 2 < demanded["off"]
    assert demanded["64"] < demanded[None]


@pytest.mark.parametrize("window", ["0", "3", "on", "-1", "1024", "64K", ""])
def test_a_window_that_cannot_be(taken: Snapshot, window: str) -> None:
    says = complaint(run(f"--fault-around={window}", taken.path))
    assert says.startswith(f"--fault-around {window}: use off, or a power of two up to 512")


def test_a_released_kernel_announces_no_dialect_that_was_not_merged(taken: Snapshot) -> None:
    need_kvm()
    says = complaint(run("--kvm", "kvm", "--dialect", "seed", taken.path))
    assert says.startswith("--dialect seed: the running kernel does not announce KVM_CAP_X86_MEM")
    assert says.endswith("leave it out, or use --kvm soft")


def test_a_released_kernel_has_given_the_first_number_away(taken: Snapshot) -> None:
    """226 is KVM_CAP_PMU_EVENT_MASKED_EVENTS since Linux 6.3: the ioctl tells, not the number."""
    need_kvm()
    says = complaint(run("--kvm", "kvm", "--dialect", "v1", taken.path))
    assert "KVM_SET_MEM_FAULT_NOWAIT: ENOTTY" in says or "does not announce" in says


# -- what it refuses -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--memory", "3"], "3 bytes and 1 vCPUs: the memory must be a multiple of 4096 bytes"),
        (["--memory", "0"], "0 bytes and 1 vCPUs: the memory must be at least 65536 bytes"),
        (["--memory", "1T"], "making it takes twice that of the host's memory"),
        (["--memory", "99999999T"], "a built-in guest reaches 70368744177664 bytes"),
        (["--memory", "lots"], "--memory lots: not a size; write one such as 64M or 1G"),
        (["--memory=-64M"], "--memory -64M: not a size"),
        (["--memory", "4G", "--guest", "real"], "a real-mode guest reaches 3221225472 bytes"),
        (["--vcpus", "0"], "0 vCPUs: there must be at least one vCPU"),
        (["--vcpus", "-1"], "-1 vCPUs: there must be at least one vCPU"),
        (["--memory", "1M", "--vcpus", "300"], "251 of 256 pages are left for data"),
        (["--dialect", "v99"], "dialect 'v99': not known; known are v1, wip-v2, seed, v3"),
        (["/nowhere"], "snapshot /nowhere: there is no such directory"),
        (["/dev/null"], "snapshot /dev/null: it is not a packed snapshot or a directory"),
        (["/dev"], "snapshot /dev: it has no manifest.json, so it is not a snapshot"),
        (["--save", "/dev", "--memory", "64K"], "it exists and is not a snapshot"),
        (["--save", "/nowhere/x", "--memory", "64K"], "the directory to hold it does not exist"),
    ],
    ids=" ".join,
)
def test_bad_input_is_one_line_and_status_2(words: list[str], says: str) -> None:
    assert says in complaint(run(*words))


@pytest.mark.parametrize(
    "words",
    [["--vcpus", "two"], ["--mode", "post-copy"], ["--kvm", "xen"], ["--walk", "drunken"]],
    ids=" ".join,
)
def test_an_unknown_choice_is_a_line_and_a_hint(words: list[str]) -> None:
    done = run(*words)
    assert (done.returncode, done.stdout) == (2, "")
    line, hint = done.stderr.splitlines()
    assert f"argument {words[0]}: invalid" in line
    assert hint == "Try 'guestfault run --help'."


@pytest.mark.parametrize(
    "option", ["--memory=1M", "--vcpus=1", "--walk=zipf", "--guest=real", "--seed=0", "--save=x"]
)
def test_what_a_snapshot_has_cannot_be_asked_for(taken: Snapshot, option: str) -> None:
    name = option.partition("=")[0]
    says = f"{name} is for a guest to be made; SNAPSHOT has its own"
    assert complaint(run(option, taken.path)) == says


def truncate(path: Path) -> None:
    os.truncate(path / "memory", 4096)


def remove_memory(path: Path) -> None:
    (path / "memory").unlink()


def spoil_manifest(path: Path) -> None:
    (path / "manifest.json").write_text("{")


def spoil_registers(path: Path) -> None:
    (path / "vcpus.json").write_text("[]")


def age(path: Path) -> None:
    manifest = json.loads((path / "manifest.json").read_text())
    [version] = [name for name in manifest if "version" in name]
    manifest[version] = 99
    (path / "manifest.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (truncate, "its memory is truncated: 4096 bytes instead of 1048576"),
        (remove_memory, "memory: No such file or directory"),
        (spoil_manifest, "manifest.json: "),
        (spoil_registers, "vcpus.json does not have the digest in the manifest"),
        (age, "99"),
    ],
)
def test_a_spoilt_snapshot_is_refused(copy: Path, spoil: Callable[[Path], None], says: str) -> None:
    spoil(copy)
    line = complaint(run(copy))
    assert line.startswith(f"snapshot {copy}: ")
    assert says in line


def test_a_flipped_bit_of_memory_is_found_at_the_end_or_with_verify_at_the_start(
    copy: Path,
) -> None:
    with open(copy / "memory", "r+b") as file:
        file.seek(200 * 4096 + 17)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x10]))
    done = run("--kvm", "soft", copy)
    assert done.returncode == 2
    assert "is WRONG" in done.stdout
    assert "the guest ended with wrong checksum; --verify tells" in done.stderr
    says = f"snapshot {copy}: its memory does not have the digest in the manifest"
    assert complaint(run("--kvm", "soft", "--verify", copy)) == says


def test_verify_lets_a_sound_snapshot_pass(taken: Snapshot) -> None:
    assert run("--kvm", "soft", "--verify", taken.path).returncode == 0


def test_a_guest_that_triple_faults_ends_with_its_rip_and_status_2(
    taken: Snapshot, tmp_path: Path
) -> None:
    state = taken.vcpus[0]
    state.regs.rip += 64 << 20  # nothing is mapped there, and there is no IDT
    rip = state.regs.rip
    try:
        bad = save(tmp_path / "bad", taken.memory_path.read_bytes(), [state])
    finally:
        state.regs.rip -= 64 << 20
    done = run("--kvm", "soft", bad.path)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert line == f"guestfault: vCPU 0 at rip {rip:#x}: the guest shut down (a triple fault)"
    assert f"not done, at rip {rip:#x}" in done.stdout


def test_a_bare_fault_is_named_and_resolved(taken: Snapshot) -> None:
    done = run("--kvm", "soft", "--dialect", "linux-6.8", taken.path)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.search(r"^faults +\d+: \d+ bare", done.stdout, re.MULTILINE)
    assert re.search(r"^named by +decoding the instruction \d+", done.stdout, re.MULTILINE)


def test_a_bare_fault_that_only_the_kernel_may_name_ends_the_run(taken: Snapshot) -> None:
    done = run("--kvm", "soft", "--dialect", "linux-6.8", "--locate", "kernel", taken.path)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert re.search(r"vCPU \d at rip 0x\w+: KVM_RUN failed with a bare -EFAULT", line)
    assert line.endswith("use --locate all, or --mode uffd")
    assert "not done" in done.stdout


# -- what it may do --------------------------------------------------------------------------------


# The interpreter and this working copy may be where only root can read them: so it becomes nobody
# after a first run, which loads all that is needed.  PR_SET_DUMPABLE: /proc/self stays its own.
AS_NOBODY = f"""
import contextlib, ctypes, io, locale, os, sys
from guestfault.cli.main import main
with contextlib.redirect_stdout(io.StringIO()):
    main(["run", "--kvm", "soft", "--memory", "64K"])
os.setgroups([])
os.setgid({NOBODY})
os.setuid({NOBODY})
ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
sys.exit(main())
"""


def as_nobody(*words: str) -> subprocess.CompletedProcess[str]:
    """Run it without the right to /dev/kvm or userfaultfd, or to anything else."""
    return subprocess.run(
        [sys.executable, "-c", AS_NOBODY, "run", *words],
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        timeout=60,
        cwd="/",
    )


@as_root
def test_the_default_run_needs_no_rights_at_all() -> None:
    done = as_nobody("--memory", "256K")
    assert done.returncode == 0, done.stderr
    assert "verdict            right" in done.stdout
    assert "using softkvm (seed): no real KVM here (/dev/kvm: " in done.stderr


@as_root
def test_kvm_without_permission_says_how_to_get_it() -> None:
    need_kvm()
    if os.stat("/dev/kvm").st_mode & 0o006 == 0o006:
        pytest.skip("/dev/kvm is open to everybody here")
    line = complaint(as_nobody("--kvm", "kvm"))
    assert line.startswith("/dev/kvm: Permission denied; add yourself to its group")


@as_root
def test_uffd_without_permission_names_the_grants() -> None:
    need_uffd()
    done = as_nobody("--kvm", "soft", "--mode", "uffd", "--memory", "256K")
    if done.returncode == 0:
        pytest.skip("everybody may use userfaultfd here")
    line = complaint(done)
    assert "any one of these would do: " in line
    assert "sysctl vm.unprivileged_userfaultfd=1" in line


@as_root
def test_kvm_without_the_device_says_how_to_get_it() -> None:
    # In a mount namespace of its own, where an empty /dev is over the real one.
    script = 'mount -t tmpfs none /dev && mknod -m 666 /dev/null c 1 3 && exec "$@"'
    words = ["unshare", "--mount", "sh", "-c", script, "sh", *COMMAND]
    hidden = subprocess.run(
        [*words, "--kvm", "kvm"], capture_output=True, text=True, env=ENVIRONMENT, timeout=60
    )
    if "unshare:" in hidden.stderr or "mount:" in hidden.stderr or "mknod:" in hidden.stderr:
        pytest.skip("no mount namespaces here: " + hidden.stderr.strip())
    line = complaint(hidden)
    assert line.startswith("/dev/kvm: No such file or directory; load kvm_intel or kvm_amd")


# -- Ctrl-C and the terminal -----------------------------------------------------------------------


def wait_until_it_runs(process: subprocess.Popen[str]) -> None:
    """Until it has threads, which are its vCPUs."""
    deadline = time.monotonic() + 20
    while len(os.listdir(f"/proc/{process.pid}/task")) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(0.15)


@contextmanager
def terminal() -> Iterator[tuple[int, Callable[[], str]]]:
    """A pseudo-terminal's end for a child, and what has been shown on it since."""
    ours, theirs = pty.openpty()
    os.set_blocking(ours, False)

    def shown() -> str:
        parts = []
        try:
            while part := os.read(ours, 65536):
                parts.append(part)
        except OSError:
            pass
        return b"".join(parts).decode()

    try:
        yield theirs, shown
    finally:
        os.close(theirs)
        os.close(ours)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that takes seconds to run."""
    path = tmp_path_factory.mktemp("large") / "guest"
    return build(path, 64 << 20, GuestMode.LONG_CPL3, Walk.WRITE_HEAVY).path


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize(
    "words",
    [["--kvm", "soft"], ["--kvm", "soft", "--mode", "uffd"], ["--kvm", "kvm", "--mode", "uffd"]],
    ids=" ".join,
)
def test_ctrl_c_ends_it_within_a_second_with_the_report_so_far(
    large: Path, words: list[str], times: int
) -> None:
    if "uffd" in words:
        need_uffd()
    if "kvm" in words:
        need_kvm()
    process = subprocess.Popen(
        [*COMMAND, *words, "--fault-around", "off", "--json", large],  # not to be done too soon
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    wait_until_it_runs(process)
    began = time.monotonic()
    for _ in range(times):
        process.send_signal(signal.SIGINT)
        time.sleep(0.02)
    out, err = process.communicate(timeout=20)
    took = time.monotonic() - began
    assert (process.returncode, err) == (130, "")
    document = json.loads(out)
    assert document["verdict"] == "not done"
    assert document["failure"] is None
    assert 0 < document["pages_in"] < document["pages"]
    assert took < 1


def test_on_a_terminal_progress_is_one_line_that_the_report_replaces(large: Path) -> None:
    with terminal() as (theirs, shown):
        process = subprocess.Popen(
            [*COMMAND, "--kvm", "soft", "--fault-around", "off", large],
            stdout=subprocess.PIPE,
            stderr=theirs,
            text=True,
            env=ENVIRONMENT,
        )
        wait_until_it_runs(process)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=20)
        text = shown()
    assert process.returncode == 130
    assert re.search(r"\r\d+ of 16384 pages in \(\d+ %\)", text)
    assert "\n" not in text
    assert text.endswith("\r\x1b[K")  # wiped
    assert out.startswith("KVM ")


def test_in_a_pipe_there_is_no_progress(taken: Snapshot) -> None:
    assert run("--kvm", "soft", taken.path).stderr == ""


def test_ctrl_c_while_a_guest_is_made_ends_it_and_leaves_nothing(tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, "--kvm", "soft", "--memory", "512M", "--save", str(tmp_path / "never")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "")
    assert list(tmp_path.iterdir()) == []


# -- a page that is broken -------------------------------------------------------------------------

POISONED = """
import sys
from guestfault.cli.main import main
from guestfault.vmm.session import Session

offset = int(sys.argv.pop(1))
run = Session.run

def on_broken_memory(session, *watch):
    hva = session.ram.guest.address + offset
    assert session.view.uffd.poison(hva, 4096).done == 4096
    return run(session, *watch)

Session.run = on_broken_memory
sys.exit(main())
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize("mode", ["exit", "uffd"])
@pytest.mark.parametrize("kvm", [("--kvm", "soft", "--dialect", "linux-6.8"), ("--kvm", "kvm")])
def test_a_page_that_is_broken_ends_the_run_with_its_name(
    taken: Snapshot, kvm: tuple[str, ...], mode: str
) -> None:
    if "kvm" in kvm:
        need_kvm()
    try:
        Userfaultfd.open(required=Feature.POISON, user_mode_only=mode == "exit").close()
    except Unavailable as error:
        pytest.skip(str(error))
    gpa = taken.memory_size - 4096
    command = [sys.executable, "-c", POISONED, str(gpa), "run", *kvm, "--mode", mode]
    # One page at a time: with its neighbours a page may come in before the guest asks for it.
    command += ["--fault-around", "off", str(taken.path)]
    for more in ([], ["--json"]):
        done = subprocess.run(
            [*command, *more], capture_output=True, text=True, env=ENVIRONMENT, timeout=60
        )
        assert done.returncode == 2, done
        what = done.stderr.splitlines()[-1]
        assert re.match(r"guestfault: vCPU [01] at rip 0x[0-9a-f]+: KVM sent SIGBUS: ", what)
        assert f"gpa {gpa:#x}"[:-3] in what
        assert "is poisoned: broken memory, or declared so by UFFDIO_POISON" in what
        if more:
            document = json.loads(done.stdout)
            assert document["verdict"] == "not done"
            assert document["lost_pages"][0]["gpa"] == gpa
            assert document["failure"] == what.removeprefix("guestfault: ")
        else:
            assert f"lost pages         gpa {gpa:#x} (accessed by vCPU" in done.stdout

"""What is refused before a machine is started, and whole machines where there is a kernel.

The machines are real: a stock kernel under QEMU, about five seconds each.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from tests.lab.conftest import module

from guestfault.errors import Unavailable
from guestfault.lab.errors import (
    EmulatorError,
    HungError,
    KernelPanicError,
    NeverBootedError,
    NoKvmError,
    NoModulesError,
    StorageError,
    TooSmallError,
)
from guestfault.lab.frames import Kind
from guestfault.lab.image import Kernel
from guestfault.lab.machine import run
from guestfault.lab.qemu import Qemu

Built = Callable[..., Kernel]


def python(code: str) -> list[str]:
    return ["python3", "-c", code]


# -- without a machine ---------------------------------------------------------------------------


def test_no_qemu(built: Built, empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(Unavailable, match="no qemu-system-x86_64 on this system"):
        run(built(), ["x"])


def test_modules_that_do_not_serve(built: Built) -> None:
    kernel = built({"kvm-amd.ko": module(depends="kvm")})
    with pytest.raises(NoModulesError, match="which kvm_amd needs"):
        run(kernel, ["x"], emulator=Qemu(Path("/nonexistent"), (10, 0, 0)))


def test_a_machine_that_cannot_hold_its_initramfs(built: Built) -> None:
    with pytest.raises(TooSmallError) as caught:
        run(built(), ["x"], memory=64, emulator=Qemu(Path("/nonexistent"), (10, 0, 0)))
    assert 128 < caught.value.least < 512


def test_a_qemu_that_is_gone(built: Built) -> None:
    with pytest.raises(StorageError, match="No such file"):
        run(built(), ["x"], emulator=Qemu(Path("/nonexistent"), (10, 0, 0)))


def test_a_qemu_that_refuses(built: Built) -> None:
    with pytest.raises(EmulatorError, match="exit status 1"):
        run(built(), ["x"], emulator=Qemu(Path("/bin/false"), (10, 0, 0)))


def test_numba_needs_more_memory(built: Built, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("guestfault.lab.initramfs.numba_layer", lambda: bytes(200 << 20))
    nobody = Qemu(Path("/bin/false"), (10, 0, 0))
    with pytest.raises(TooSmallError) as caught:
        run(built(), ["x"], memory=512, numba=True, emulator=nobody)
    assert 512 < caught.value.least < 1024
    with pytest.raises(EmulatorError):
        run(built(), ["x"], numba=True, emulator=nobody)


# -- real machines -------------------------------------------------------------------------------


@pytest.mark.timeout(180)
def test_a_command_and_what_comes_of_it(lab_kernel: Kernel, tmp_path: Path) -> None:
    code = (
        "import os, sys\n"
        "print('out', os.uname().release, open('/sys/module/kvm_amd/parameters/npt').read())\n"
        "print('err', file=sys.stderr)\n"
        "open('/tmp/made', 'wb').write(bytes(range(256)) * 1000)\n"
        "assert open('/added').read() == 'taken along'\n"
        "assert os.path.exists('/sys/kernel/tracing/events/kvm')\n"
        "os.open('/dev/kvm', os.O_RDWR)\n"
        "sys.exit(7)\n"
    )
    (tmp_path / "here").write_text("taken along")
    seen: list[tuple[Kind, bytes]] = []
    result = run(
        lab_kernel,
        python(code),
        npt=False,
        files=["/tmp/made", "/tmp/none"],
        added={"/added": tmp_path / "here"},
        on_output=lambda kind, data: seen.append((kind, data)),
    )
    assert result.stderr == b"err\n"
    assert result.stdout == f"out {lab_kernel.release} N\n\n".encode()
    assert result.status == 7
    assert b"".join(data for kind, data in seen if kind is Kind.STDOUT) == result.stdout
    assert result.files == {"/tmp/made": bytes(range(256)) * 1000}
    assert result.missing == {"/tmp/none": "No such file or directory"}
    assert result.warnings == []
    assert 0 < result.boot_seconds < result.seconds


@pytest.mark.timeout(240)
def test_numba_compiles_inside(lab_kernel: Kernel) -> None:
    pytest.importorskip("numba")
    code = "import numba\nprint(numba.njit(lambda n: n * 6)(7))"
    result = run(lab_kernel, python(code), numba=True, needs_kvm=False)
    assert (result.status, result.stdout) == (0, b"42\n"), result.stderr


@pytest.mark.timeout(240)
@pytest.mark.parametrize("npt", [True, False])
def test_a_guest_completes_on_its_kvm(lab_kernel: Kernel, npt: bool) -> None:
    """Faults of a real SVM, named by its tracepoints and by decoding, bring every page in."""
    command = ["guestfault", "run", "--kvm", "kvm", "--memory", "1M", "--mode", "exit", "--json"]
    result = run(lab_kernel, command, npt=npt)
    assert result.status == 0, result.stderr.decode()
    report = json.loads(result.stdout)
    assert report["verdict"] == "right"


@pytest.mark.timeout(120)
def test_a_panic_is_told_with_what_was_said_before_it(lab_kernel: Kernel) -> None:
    code = "print('before'); open('/proc/sysrq-trigger', 'w').write('c')"
    with pytest.raises(KernelPanicError, match="sysrq triggered crash") as caught:
        run(lab_kernel, python(code))
    assert caught.value.stdout == b"before\n"
    assert b"Kernel panic" in caught.value.console


@pytest.mark.timeout(120)
def test_a_command_that_does_not_end(lab_kernel: Kernel) -> None:
    with pytest.raises(HungError, match="within 2 s") as caught:
        run(lab_kernel, python("import time; print('on'); time.sleep(99)"), timeout=2)
    assert caught.value.stdout == b"on\n"
    assert our_machines(os.getpid()) == []


@pytest.mark.timeout(120)
def test_a_kernel_without_kvm(lab_kernel: Kernel) -> None:
    bare = replace(lab_kernel, modules=None)
    with pytest.raises(NoKvmError, match="no modules came along"):
        run(bare, ["x"])
    assert run(bare, python("print(1)"), needs_kvm=False).stdout == b"1\n"


@pytest.mark.timeout(60)
def test_a_kernel_that_never_boots(lab_kernel: Kernel, tmp_path: Path) -> None:
    data = bytearray(lab_kernel.image.read_bytes())
    data[0x8000:0x9000] = bytes(0x1000)
    (tmp_path / "bzImage").write_bytes(data)
    kernel = Kernel(tmp_path / "bzImage", lab_kernel.release, None)
    with pytest.raises((NeverBootedError, EmulatorError)):
        run(kernel, ["x"], boot_timeout=4)
    assert our_machines(os.getpid()) == []


def our_machines(parent: int) -> list[int]:
    """The processes that ``parent`` started and that are alive."""
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in children if "qemu" in name_of(int(child))]


def name_of(process: int) -> str:
    try:
        stat = Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return ""
    name, _, rest = stat.partition("(")[2].rpartition(")")
    return "" if rest.split()[0] == "Z" else name


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_machine_ends_with_whoever_started_it(lab_kernel: Kernel, how: signal.Signals) -> None:
    """Invariant: no machine outlives the process that started it, however that one ends."""
    words = ["lab", "run", "--kernel", str(lab_kernel.image), "--without-kvm"]
    words += ["--", *python("import time; print('on', flush=True); time.sleep(99)")]
    program = "import sys; from guestfault.cli.main import main; sys.exit(main())"
    child = subprocess.Popen([sys.executable, "-c", program, *words], stdout=subprocess.PIPE)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"on\n"
        (machine,) = our_machines(child.pid)
        child.send_signal(how)
    deadline = time.monotonic() + 10
    while name_of(machine) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert name_of(machine) == ""

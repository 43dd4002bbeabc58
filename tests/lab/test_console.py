from __future__ import annotations

from guestfault.lab import console

PANICKED = (
    b"\x1b[2J\x1bc[    0.000000] Linux version 7.3.4\r\n"
    b"[    4.5][   T70] BUG: kernel NULL pointer dereference, address: 0000000000000000\r\n"
    b"[    4.5] Oops: Oops: 0002 [#1] SMP NOPTI\r\n"
    b"[    4.6] Kernel panic - not syncing: Fatal exception\r\n"
    b"[    4.6] Kernel Offset: 0x26000000\r\n"
)


def test_a_panic_and_what_was_before_it() -> None:
    assert console.panic(PANICKED) == "Fatal exception"
    assert console.first_trouble(PANICKED).startswith("BUG: kernel NULL pointer")
    assert console.last_line(PANICKED) == "Kernel Offset: 0x26000000"


def test_nothing_is_no_trouble() -> None:
    assert console.panic(b"") == console.first_trouble(b"") == console.last_line(b"") == ""
    assert console.lines(b"\r\n\xff\r\n") == ["\N{REPLACEMENT CHARACTER}"]


def test_a_warning_names_a_place_and_advice_is_none() -> None:
    text = (
        b"[    0.1] WARNING: See https://kernel.org/doc/html/latest for mitigation options.\r\n"
        b"[    5.1] WARNING: CPU: 0 PID: 70 at arch/x86/kvm/x86.c:11 kvm_arch_vcpu+0x1/0x2\r\n"
        b"[    5.2] WARNING: arch/x86/kvm/mmu/mmu.c:12 at kvm_mmu+0x1/0x2, CPU#0: vmm/70\r\n"
    )
    assert [warning.split(":")[1] for warning in console.warnings(text)] == [
        " CPU",
        " arch/x86/kvm/mmu/mmu.c",
    ]

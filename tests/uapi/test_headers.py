"""Every number and every layout of the uapi room against the C headers of a real kernel.

A C program is written from the Python modules: one line for each integer, each structure's size and
each field's offset and size.  What the compiler rejects is what these headers are too old for; the
rest is printed by the program and compared.  ``GUESTFAULT_KERNEL_HEADERS`` names another include
directory (``make headers_install`` makes one, in ``usr/include``), to check against a newer kernel.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from ctypes import Structure, Union, c_uint32, c_uint64, sizeof
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import pytest

from guestfault.uapi import kvm, kvm_para, mman, perf, signal, userfaultfd

MODULES = [kvm, kvm_para, mman, perf, signal, userfaultfd]
HEADERS = [
    "asm/kvm_para.h",
    "asm/mman.h",
    "asm/siginfo.h",
    "asm/unistd.h",
    "linux/falloc.h",
    "linux/kvm.h",
    "linux/memfd.h",
    "linux/mman.h",
    "linux/kernel-page-flags.h",
    "linux/perf_event.h",
    "linux/userfaultfd.h",
    "linux/version.h",
]

# Linux exports these in no header: test_mman.py asks the kernel itself.
IN_NO_HEADER = re.compile(r"PM_\w+")
# Structures that grow, and of which the kernel takes every size that was ever published.
GROWING = frozenset({"sizeof(perf_event_attr)"})
# What Linux 6.1 lacks.  A missing name that is not here is a slip of ours, not a newer kernel's.
NEWER_THAN_6_1 = frozenset(
    """
    KVM_CAP_DIRTY_LOG_RING_WITH_BITMAP KVM_CAP_PMU_EVENT_MASKED_EVENTS KVM_CAP_USER_MEMORY2
    KVM_CAP_MEMORY_FAULT_INFO KVM_CAP_MEMORY_ATTRIBUTES KVM_CAP_GUEST_MEMFD KVM_CAP_VM_TYPES
    KVM_CAP_PRE_FAULT_MEMORY KVM_CAP_X86_APIC_BUS_CYCLES_NS KVM_CAP_X86_GUEST_MODE
    KVM_CAP_GUEST_MEMFD_FLAGS

    KVM_EXIT_LOONGARCH_IOCSR KVM_EXIT_MEMORY_FAULT KVM_EXIT_TDX KVM_EXIT_ARM_SEA
    KVM_EXIT_ARM_LDST64B KVM_EXIT_SNP_REQ_CERTS KVM_EXIT_HYPERCALL_LONG_MODE
    KVM_MEMORY_EXIT_FLAG_PRIVATE KVM_RUN_X86_GUEST_MODE KVM_SYSTEM_EVENT_TDX_FATAL
    memory_fault tdx snp_req_certs hypercall.flags kvm_exit_snp_req_certs

    KVM_MEM_GUEST_MEMFD GUEST_MEMFD_FLAG_MMAP GUEST_MEMFD_FLAG_INIT_SHARED
    KVM_MEMORY_ATTRIBUTE_PRIVATE KVM_SET_USER_MEMORY_REGION2 KVM_SET_MEMORY_ATTRIBUTES
    KVM_CREATE_GUEST_MEMFD KVM_PRE_FAULT_MEMORY KVM_X86_DEFAULT_VM KVM_X86_SW_PROTECTED_VM
    KVM_X86_SEV_VM KVM_X86_SEV_ES_VM KVM_X86_SNP_VM KVM_X86_TDX_VM
    kvm_userspace_memory_region2 kvm_create_guest_memfd kvm_memory_attributes
    kvm_pre_fault_memory

    MADV_GUARD_INSTALL MADV_GUARD_REMOVE MFD_EXEC MFD_NOEXEC_SEAL

    UFFD_FEATURE_WP_UNPOPULATED UFFD_FEATURE_POISON UFFD_FEATURE_WP_ASYNC UFFD_FEATURE_MOVE
    UFFD_FEATURE_RWP UFFD_FEATURE_RWP_ASYNC UFFD_PAGEFAULT_FLAG_RWP UFFDIO_REGISTER_MODE_RWP
    UFFDIO_CONTINUE_MODE_WP UFFDIO_POISON_MODE_DONTWAKE UFFDIO_MOVE_MODE_DONTWAKE
    UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES UFFDIO_RWPROTECT_MODE_RWP UFFDIO_RWPROTECT_MODE_DONTWAKE
    _UFFDIO_MOVE _UFFDIO_POISON _UFFDIO_RWPROTECT _UFFDIO_SET_MODE
    UFFDIO_MOVE UFFDIO_POISON UFFDIO_RWPROTECT UFFDIO_SET_MODE
    uffdio_move uffdio_poison uffdio_rwprotect uffdio_set_mode
    """.split()  # noqa: SIM905 (by subject, not one a line)
)


@dataclass(frozen=True)
class Headers:
    """What one compiler found in one set of headers."""

    version: tuple[int, int]
    values: dict[str, int]
    missing: list[str]


def facts(module: ModuleType) -> dict[str, int]:
    """Everything that ``module`` claims, by the key that :func:`expression` turns into C."""
    found: dict[str, int] = {}
    for name, value in vars(module).items():
        if isinstance(value, int) and not IN_NO_HEADER.fullmatch(name):
            found[name] = value
        elif isinstance(value, type) and is_kernel_type(value) and name == value.__name__:
            found |= {key: fact for key, fact in layout(value).items() if key not in GROWING}
    return found


def is_kernel_type(ctype: type) -> bool:
    """Whether the kernel gives it a name; the nameless ones are met inside their owners."""
    own = issubclass(ctype, Structure | Union) and ctype.__module__.startswith("guestfault.")
    return own and not ctype.__name__.startswith("_")


def layout(ctype: type[Structure | Union]) -> dict[str, int]:
    """The size of a structure, and the offset and size of its fields at every depth.

    Of a bit field, the bits that it takes in the 8 bytes at its offset.
    """
    name = ctype.__name__
    found = {f"sizeof({name})": sizeof(ctype)}
    for path, offset, size in fields(ctype):
        if size >> 16:  # as ctypes packs width and position of a bit field
            found[f"bits({name}, {path}, {offset})"] = (1 << (size >> 16)) - 1 << (size & 0xFFFF)
            continue
        found[f"offset({name}, {path})"] = offset
        if size:  # a flexible array has an offset only
            found[f"size({name}, {path})"] = size
    return found


def fields(
    ctype: type[Structure | Union], prefix: str = "", base: int = 0
) -> Iterator[tuple[str, int, int]]:
    for name, kind, *_ in ctype._fields_:
        descriptor = getattr(ctype, name)
        # As in C, what is anonymous adds nothing to the path.
        anonymous = name in getattr(ctype, "_anonymous_", ())
        path = prefix if anonymous else f"{prefix}{name.rstrip('_')}"
        if not anonymous:
            yield path, base + descriptor.offset, descriptor.size
        if issubclass(kind, Structure | Union) and not is_kernel_type(kind):
            yield from fields(kind, path if anonymous else f"{path}.", base + descriptor.offset)


def expression(key: str) -> str:
    """The C expression of a key of :func:`facts`."""
    if match := re.fullmatch(r"sizeof\((\w+)\)", key):
        return f"sizeof(struct {match[1]})"
    if match := re.fullmatch(r"offset\((\w+), (.+)\)", key):
        return f"__builtin_offsetof(struct {match[1]}, {match[2]})"
    if match := re.fullmatch(r"size\((\w+), (.+)\)", key):
        return f"sizeof(((struct {match[1]} *)0)->{match[2]})"
    if match := re.fullmatch(r"bits\((\w+), (.+), (\d+)\)", key):
        value = f"struct {match[1]} s = {{0}}; s.{match[2]} = -1"
        return f"({{ {value}; *(unsigned long long *)((char *)&s + {match[3]}); }})"
    return re.sub(r"^SYS_", "__NR_", key)


def program(keys: list[str]) -> str:
    """Prints one ``value key`` per line.  The line of key ``i`` is ``FIRST_LINE + i``."""
    return "\n".join(
        [
            *(f"#include <{header}>" for header in HEADERS),
            "int printf(const char *, ...);",
            "int main(void) {",
            *(f'printf("%llu {key}\\n", (unsigned long long)({expression(key)}));' for key in keys),
            "return 0; }",
        ]
    )


FIRST_LINE = len(HEADERS) + 3


def read_headers(compiler: str, include: Path | None, keys: list[str], tmp: Path) -> Headers:
    source, binary = tmp / "facts.c", tmp / "facts"
    command = [compiler, "-w", "-fmax-errors=0", "-o", str(binary), str(source)]
    if include is not None:
        # Debian keeps asm/ in a directory of its own; an installed kernel tree does not.
        command += [f"-I{include}", f"-I{include}/x86_64-linux-gnu"]

    def compile_all(keys: list[str]) -> subprocess.CompletedProcess[str]:
        source.write_text(program(keys))
        return subprocess.run(command, text=True, capture_output=True, timeout=60, check=False)

    keys = ["LINUX_VERSION_CODE", *keys]
    result = compile_all(keys)
    errors = re.findall(rf"^{re.escape(str(source))}:(\d+):.*error:", result.stderr, re.MULTILINE)
    rejected = {int(line) - FIRST_LINE for line in errors}
    assert all(0 <= index < len(keys) for index in rejected), result.stderr
    if rejected:
        missing = [key for index, key in enumerate(keys) if index in rejected]
        keys = [key for index, key in enumerate(keys) if index not in rejected]
        result = compile_all(keys)
    else:
        missing = []
    assert result.returncode == 0, result.stderr
    output = subprocess.run([binary], text=True, capture_output=True, timeout=10, check=True).stdout
    values = {
        key: int(value) for value, key in (line.split(" ", 1) for line in output.splitlines())
    }
    code = values.pop("LINUX_VERSION_CODE")
    return Headers((code >> 16, code >> 8 & 0xFF), values, missing)


def differences(ours: dict[str, int], headers: Headers) -> list[str]:
    return [
        f"{key}: {ours[key]:#x} here, {value:#x} in the headers"
        for key, value in headers.values.items()
        if key in ours and ours[key] != value
    ]


@pytest.fixture(scope="module")
def headers(tmp_path_factory: pytest.TempPathFactory) -> Headers:
    named = os.environ.get("GUESTFAULT_KERNEL_HEADERS")
    include = Path(named) if named else None
    if include is not None and not (include / "linux/kvm.h").exists():
        pytest.fail(f"GUESTFAULT_KERNEL_HEADERS: no linux/kvm.h in {include}")
    if include is None and not Path("/usr/include/linux/kvm.h").exists():
        pytest.skip("no /usr/include/linux/kvm.h (linux-libc-dev has it)")
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler (cc, gcc or clang)")
    keys = [key for module in MODULES for key in facts(module)]
    return read_headers(compiler, include, keys, tmp_path_factory.mktemp("headers"))


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_module_says_what_the_headers_say(module: ModuleType, headers: Headers) -> None:
    ours = facts(module)
    assert ours.keys() & headers.values.keys(), "nothing was compared"
    assert differences(ours, headers) == []


def newer_names(key: str) -> frozenset[str]:
    """The names in a key that explain why old headers lack it."""
    return NEWER_THAN_6_1.intersection(re.findall(r"\w+", key) + re.findall(r"[\w.]+", key))


def test_names_the_headers_lack_are_newer_than_they_are(headers: Headers) -> None:
    if headers.version >= (7, 3):
        assert headers.missing == []
    if headers.version >= (6, 1):
        assert [key for key in headers.missing if not newer_names(key)] == []
    if headers.missing:
        version = ".".join(map(str, headers.version))
        names = dict.fromkeys(
            name for key in headers.missing for name in sorted(newer_names(key)) or [key]
        )
        pytest.skip(f"headers of Linux {version} are too old for: {', '.join(names)}")


def test_a_wrong_number_is_found(headers: Headers, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kvm, "KVM_EXIT_MMIO", 7)
    assert differences(facts(kvm), headers) == ["KVM_EXIT_MMIO: 0x7 here, 0x6 in the headers"]


def test_a_wrong_layout_is_found(headers: Headers) -> None:
    class kvm_segment(Structure):
        _fields_ = [("limit", c_uint32), ("base", c_uint64)]

    found = [line.split(":")[0] for line in differences(layout(kvm_segment), headers)]
    assert found == [
        "sizeof(kvm_segment)",
        "offset(kvm_segment, base)",
        "offset(kvm_segment, limit)",
    ]


def test_a_wrong_bit_is_found(headers: Headers) -> None:
    class _flags(Structure):
        _fields_ = [("inherit", c_uint64, 1), ("disabled", c_uint64, 1)]

    class perf_event_attr(Structure):
        _anonymous_ = ("_flags",)
        _fields_ = [("before", c_uint64 * 5), ("_flags", _flags)]

    found = [line.split(":")[0] for line in differences(layout(perf_event_attr), headers)]
    assert found == [
        "bits(perf_event_attr, disabled, 40)",
        "bits(perf_event_attr, inherit, 40)",
    ]


def test_every_depth_of_kvm_run_is_compared() -> None:
    keys = facts(kvm).keys()
    assert {
        "offset(kvm_run, mmio.is_write)",
        "size(kvm_run, emulation_failure.insn_bytes)",
        "offset(kvm_run, tdx.get_quote.gpa)",
        "offset(kvm_run, s.regs)",
        "offset(kvm_sync_regs, events)",
        "offset(kvm_hyperv_exit, u.synic.control)",
        "offset(kvm_cpuid2, entries)",
    } <= keys

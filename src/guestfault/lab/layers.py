"""What a machine needs of this one to run Python, as layers of an initramfs that are kept.

There is nothing inside but what is put there, so the interpreter that runs this comes along: its
program, its standard library, and every shared library that they are linked with, each at the path
it has here, where they look for one another.  The dynamic loader itself says which libraries those
are (``ld.so --list``), so the answer is right for every way that it can be told to find them.

The standard library goes as bytecode alone: compiling or checking sources takes an emulated
processor long, and it halves the size.  Programs and libraries go without their symbols.

A layer is made once and kept with the list of the files that it was made from, their sizes and
times; it is used again as long as these are all the same.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import json
import marshal
import os
import platform
import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import guestfault
from guestfault.errors import Unavailable
from guestfault.lab.cpio import Archive
from guestfault.lab.elf import interpreter, is_elf, without_symbols
from guestfault.lab.errors import StorageError
from guestfault.lab.store import store, storing, write_file

__all__ = [
    "DEPENDENCIES",
    "PACKAGE",
    "PYTHON",
    "libraries",
    "numba_layer",
    "package_layer",
    "python_layer",
]

PYTHON = "/usr/bin/python3"
"""Where the interpreter is inside, whatever its path is here."""
PACKAGE = "/lab/package"
"""Where this package is inside."""
DEPENDENCIES = "/lab/dependencies"
"""Where the packages are that it needs."""

_VERSION = "1"  # of what is in a layer; a kept one of another version is not used
_LOADER_CACHE = Path("/etc/ld.so.cache")
_NOT_INSIDE = frozenset(
    (
        *("test", "tests", "idle_test", "idlelib", "tkinter", "turtledemo", "ensurepip", "lib2to3"),
        *("pydoc_data", "site-packages", "dist-packages", "__pycache__"),
    )
)
# Their libraries weigh much, and there is no screen, no network and no disk.
_NO_MODULE = re.compile(
    r"(_test|_xx|xx|_ctypes_test|_tkinter|_sqlite3|_dbm|_gdbm|_curses|readline|nis)[\w-]*\."
)
# Pools for numba's parallel loops, of which there is none here: they need libraries of their own.
_NO_PART = re.compile(r"(tbb|omp)pool\.")
_UNCHECKED = (0b01).to_bytes(4, "little")  # PEP 552: by hash, and not to be compared with a source
_ENTRY_POINT = f"""\
#!{PYTHON}
import sys
from guestfault.cli.main import main
sys.exit(main())
""".encode()

Input = tuple[str, int, int]
"""A file that went into a layer: path, size, time of its last change in ns."""


def python_layer() -> bytes:
    """The interpreter, the standard library and this package's dependencies, as an archive."""
    sources = [Path(sys.executable).resolve(), *_standard_library()]
    packages = list(_installed(_needed_distributions("guestfault", set())))
    roots = sources + [path for path, _ in packages]

    def make() -> tuple[bytes, list[Path]]:
        archive = Archive()
        needed = _put_all(archive, [*((path, str(path)) for path in sources), *packages])
        archive.symlink(PYTHON, str(sources[0]))
        archive.symlink(PYTHON.removesuffix("3"), PYTHON)
        return bytes(archive), needed

    return _kept("python", roots, make)


def numba_layer() -> bytes:
    """What the compiled loop needs, numba and LLVM above all, as an archive of 200 MB.

    Raises :class:`~guestfault.errors.Unavailable` if numba is not installed here.
    """
    if importlib.util.find_spec("numba") is None:
        why = "numba is not installed"
        raise Unavailable("numba inside", why, "pip install 'guestfault[fast]'")
    found = _installed(["numba", *_needed_distributions("numba", {"numba"})])
    packages = [(path, inside) for path, inside in found if not _NO_PART.match(path.name)]

    def make() -> tuple[bytes, list[Path]]:
        archive = Archive()
        needed = _put_all(archive, packages)
        return bytes(archive), needed

    return _kept("numba", [path for path, _ in packages], make)


def package_layer() -> bytes:
    """This package itself, with its sources for the sake of tracebacks, as an archive."""
    base = Path(guestfault.__file__).parent
    files = sorted(path for path in base.rglob("*") if path.is_file() and _is_ours(path))

    def make() -> tuple[bytes, list[Path]]:
        archive = Archive()
        for path in files:
            inside = f"{PACKAGE}/guestfault/{path.relative_to(base)}"
            archive.file(inside, data := path.read_bytes())
            if path.suffix == ".py":
                name = Path(importlib.util.cache_from_source(inside, optimization="")).name
                at = f"{os.path.dirname(inside)}/__pycache__/{name}"
                archive.file(at, _bytecode(data, inside))
        archive.file("/usr/bin/guestfault", _ENTRY_POINT, mode=0o755)
        return bytes(archive), []

    return _kept("guestfault", files, make)


def _is_ours(path: Path) -> bool:
    return "__pycache__" not in path.parts and not path.name.startswith(".")


# -- what goes in --------------------------------------------------------------------------------


def _standard_library() -> list[Path]:
    base = Path(sysconfig.get_path("stdlib"))
    dynamic = sysconfig.get_config_var("DESTSHARED")  # of C modules, where it is elsewhere
    roots = [base] + ([Path(dynamic)] if dynamic and not Path(dynamic).is_relative_to(base) else [])
    found = []
    for root in roots:
        for where, below, files in os.walk(root):
            below[:] = sorted(d for d in below if d not in _NOT_INSIDE and "config-" not in d)
            found += [Path(where, name) for name in sorted(files) if _wanted(name)]
    if not any(path.name == "os.py" for path in found):
        why = f"no standard library in {base}"
        raise Unavailable("Python inside", why, "run guestfault by a Python that has one in files")
    return found


def _wanted(name: str) -> bool:
    return name.endswith(".py") or (name.endswith(".so") and not _NO_MODULE.match(name))


def _installed(distributions: Iterable[str]) -> Iterator[tuple[Path, str]]:
    """Each file of these packages that is of use inside, and its path there."""
    for name in distributions:
        for file in importlib.metadata.files(name) or ():
            path = Path(str(file.locate()))
            not_inside = ".." in file.parts or "tests" in file.parts  # "..": scripts, headers
            if not not_inside and path.suffix not in (".a", ".pyc", ".h") and path.is_file():
                yield path, f"{DEPENDENCIES}/{file}"


def _needed_distributions(name: str, seen: set[str]) -> Iterator[str]:
    try:
        required = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        # Run from its sources without having been installed.
        required = ["unicorn", "iced-x86"] if name == "guestfault" else []
    for line in required:
        match = re.match(r"[\w.-]+", line)
        if match is None or ";" in line or match[0] in seen:
            continue  # with a condition: an extra, or for older Pythons
        seen.add(match[0])
        yield match[0]
        yield from _needed_distributions(match[0], seen)


def _put_all(archive: Archive, files: Iterable[tuple[Path, str]]) -> list[Path]:
    """Put files in, and the libraries that they need; which these are."""
    needed: dict[Path, None] = {}
    files = list(files)
    own = {path.resolve() for path, _ in files}  # a wheel finds its libraries beside it, inside too
    for path, inside in files:
        data = path.read_bytes()
        if path.suffix == ".py":
            try:
                archive.file(inside + "c", _bytecode(data, inside))
            except SyntaxError:  # such as a package's file for another Python
                archive.file(inside, data)
        elif is_elf(data):
            archive.file(inside, without_symbols(data), mode=0o755)
            needed |= dict.fromkeys(p for p in libraries(path) if p.resolve() not in own)
        else:
            archive.file(inside, data)
    for library in needed:
        archive.file(str(library), without_symbols(library.read_bytes()), mode=0o755)
    if _LOADER_CACHE.exists():
        archive.file(str(_LOADER_CACHE), _LOADER_CACHE.read_bytes())
    return [*needed, *([_LOADER_CACHE] if _LOADER_CACHE.exists() else [])]


def _bytecode(source: bytes, path: str) -> bytes:
    code = compile(source, path, "exec", dont_inherit=True, optimize=0)
    head = importlib.util.MAGIC_NUMBER + _UNCHECKED + importlib.util.source_hash(source)
    return head + marshal.dumps(code)


def libraries(program: Path) -> list[Path]:
    """The shared libraries that a program or a library needs, its dynamic loader first.

    Empty for a static one.  Raises :class:`~guestfault.errors.Unavailable` if one is not here.
    """
    with storing(program):
        data = program.read_bytes()
    loader = interpreter(data)
    if loader is None and b".so" not in program.name.encode():
        return []
    loader = loader or _own_loader()
    done = subprocess.run(
        [loader, "--list", str(program)],
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    missing = re.search(r"(\S+) => not found", done.stdout)
    if missing or done.returncode:
        why = f"needs {missing[1]}, not found" if missing else done.stderr.strip()
        raise Unavailable(str(program), f"cannot go inside: {why}")
    found = re.findall(r"=> (/.+?) \(0x", done.stdout)
    found += re.findall(r"^\s*(/.+?) \(0x", done.stdout, re.MULTILINE)
    return [Path(loader), *(Path(path) for path in dict.fromkeys(found) if path != loader)]


@functools.cache
def _own_loader() -> str:
    found = interpreter(Path(sys.executable).resolve().read_bytes())
    if found is None:
        why = "it is a static program, and cannot load this package's libraries"
        raise Unavailable(sys.executable, why)
    return found


# -- keeping -------------------------------------------------------------------------------------


def _kept(name: str, roots: list[Path], make: Callable[[], tuple[bytes, list[Path]]]) -> bytes:
    """The layer of that name from the store, if its inputs are as they were; else made, and kept.

    ``make`` gives its bytes and the further files that went into it.
    """
    with storing(name):
        now = [_input(path) for path in roots]
    whose = f"{_VERSION} {platform.machine()} {sys.version} {now}"
    key = hashlib.sha256(whose.encode()).hexdigest()[:16]
    layer = store() / "layers" / f"{name}-{key}"
    if (data := _reused(layer)) is not None:
        return data
    with storing(name):
        data, further = make()
    inputs = json.dumps([_input(path) for path in further]).encode()
    head = len(inputs).to_bytes(8, "little")
    write_file(layer, head + inputs + data)
    _forget_older(name, layer)
    return data


def _reused(layer: Path) -> bytes | None:
    """A kept layer, if the further files that went into it are still what they were."""
    try:
        data = layer.read_bytes()
        length = int.from_bytes(data[:8], "little")
        for path, size, time in json.loads(data[8 : 8 + length]):
            if _input(Path(path)) != (path, size, time):
                return None
        return data[8 + length :]
    except (OSError, ValueError):
        return None


def _input(path: Path) -> Input:
    found = path.stat()
    return str(path), found.st_size, found.st_mtime_ns


_KEPT = 3


def _forget_older(name: str, newest: Path) -> None:
    """Keep a few: several checkouts may take turns, and each has its own."""
    layers = sorted(newest.parent.glob(f"{name}-*"), key=lambda path: -path.stat().st_mtime_ns)
    for layer in layers[_KEPT:]:
        try:
            layer.unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(layer, error.errno or 0, error.strerror or "") from error

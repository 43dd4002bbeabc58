"""The architecture, as a test: a room imports from rooms below it only, and no modules in a circle.

Every import counts, those inside functions and under ``TYPE_CHECKING`` too: who needs to know a
name in order to read a module depends on it.
"""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "guestfault"
SOURCE = Path(__file__).parents[1] / "src"

# From the ground up.  The package itself ("") holds its version and stands below them all.
ROOMS = (
    "",
    "errors",
    "closing",
    "uapi",
    "dialect",
    "x86",
    "linux",
    "memory",
    "kvm",
    "softkvm",
    "fault",
    "paging",
    "guest",
    "vmm",
    "explore",
    "scale",
    "explain",
    "check",
    "conform",
    "bench",
    "lab",
    "cli",
)


def module_name(path: Path, source: Path) -> str:
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(source: Path) -> dict[str, set[str]]:
    """For each module of the package, the modules of the package that it imports."""
    trees = {
        module_name(path, source): (ast.parse(path.read_text(), str(path)), path)
        for path in sorted((source / PACKAGE).rglob("*.py"))
    }
    return {
        name: set(imports(name, path.name == "__init__.py", tree, trees.keys())) - {name}
        for name, (tree, path) in trees.items()
    }


def imports(
    name: str, is_package: bool, tree: ast.Module, modules: Collection[str]
) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == PACKAGE:
                    yield alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:  # relative to the package: a package is its own
                parts = name.split(".")
                above = parts[: len(parts) - node.level + is_package]
                base = ".".join([*above, base] if base else above)
            if base.split(".")[0] == PACKAGE:
                for alias in node.names:
                    submodule = f"{base}.{alias.name}"
                    yield submodule if submodule in modules else base


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def climbs(graph: dict[str, set[str]]) -> list[str]:
    """Each import that reaches up, as a line to read.  A room without a place is below none."""
    height = {name: level for level, name in enumerate(ROOMS)}
    return [
        f"{module} imports {imported}: {room(imported)!r} is above {room(module)!r}"
        for module, found in graph.items()
        for imported in sorted(found)
        if height.get(room(imported), len(ROOMS)) > height.get(room(module), len(ROOMS))
    ]


def circle(graph: dict[str, set[str]]) -> list[str]:
    """The modules of one import cycle; empty if there is none."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    return import_graph(SOURCE)


def test_every_room_has_its_place_in_the_order(graph: dict[str, set[str]]) -> None:
    assert {room(module) for module in graph} <= set(ROOMS)


def test_every_import_is_of_a_module_that_exists(graph: dict[str, set[str]]) -> None:
    assert set().union(*graph.values()) <= graph.keys()


def test_rooms_import_from_below_only(graph: dict[str, set[str]]) -> None:
    assert climbs(graph) == []


def test_no_modules_import_each_other_in_a_circle(graph: dict[str, set[str]]) -> None:
    assert circle(graph) == []


def build(source: Path, **files: str) -> dict[str, set[str]]:
    for name, text in files.items():
        path = source / PACKAGE / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return import_graph(source)


@pytest.mark.parametrize(
    "line",
    [
        "import guestfault.kvm.vm",
        "from guestfault.kvm.vm import Vm",
        "from guestfault.kvm import vm",
        "from ..kvm.vm import Vm",
        "from ..kvm import vm",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from guestfault.kvm import vm",
        "def later():\n    import guestfault.kvm.vm",
    ],
)
def test_an_import_from_above_is_found_however_it_is_written(tmp_path: Path, line: str) -> None:
    graph = build(tmp_path, linux__ioctl=line, kvm__vm="")
    assert climbs(graph) == [
        "guestfault.linux.ioctl imports guestfault.kvm.vm: 'kvm' is above 'linux'"
    ]


def test_an_import_from_below_is_none(tmp_path: Path) -> None:
    graph = build(tmp_path, linux__ioctl="", kvm__vm="from guestfault.linux import ioctl")
    assert graph["guestfault.kvm.vm"] == {"guestfault.linux.ioctl"}
    assert climbs(graph) == []


def test_a_circle_within_a_room_is_found(tmp_path: Path) -> None:
    graph = build(tmp_path, kvm__vm="from . import vcpu", kvm__vcpu="from .vm import Vm")
    assert set(circle(graph)) == {"guestfault.kvm.vm", "guestfault.kvm.vcpu"}

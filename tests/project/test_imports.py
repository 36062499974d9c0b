"""A guard over the import graph: what may import what, and what must not load before it is used."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import kvtool
from cli_probe import HANGS

PACKAGE = Path(kvtool.__file__).parent
HEAVY = {
    "torch",
    "matplotlib",
    "transformers",
    "numpy",
    "safetensors",
    "tokenizers",
    "rapidfuzz",
    "sacrebleu",
    "jinja2",
}
FILES = sorted(PACKAGE.rglob("*.py"))
# From the bottom to the top: a file imports from its own wing, and from those before it.
SPINE = (
    "native", "kernels", "cache", "models", "text", "checkpoint", "decoding", "training", "verify",
    "servers",
    "reference", "bench", "plan",
)  # fmt: skip
DOORS = {
    "kvtool",
    "kvtool.__main__",
    "kvtool.app",
    "kvtool.pytest_plugin",
    "kvtool.results",
    "kvtool.testing",
}  # what users come in by


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(
    tree: ast.AST, package: str, top_level_only: bool = False, types: bool = False
) -> Iterator[str]:
    """Full names of what a module imports; imports for type checkers alone count with `types`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from imported_from(node, package)
        elif not types and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            yield from imports(ast.Module(node.orelse, []), package, top_level_only)
        elif not (top_level_only and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)):
            yield from imports(node, package, top_level_only, types)


def imported_from(node: ast.ImportFrom, package: str) -> Iterator[str]:
    base = node.module or ""
    if node.level:
        parents = package.split(".")[: len(package.split(".")) - node.level + 1]
        base = ".".join([*parents, base]).rstrip(".")
    yield base
    yield from (f"{base}.{alias.name}" for alias in node.names)


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports_of(path: Path, top_level_only: bool = False, types: bool = False) -> set[str]:
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    return set(imports(parsed(path), package, top_level_only, types))


def arrows() -> dict[str, set[str]]:
    """Which modules of kvtool each of them imports, late imports and those for types included."""
    paths = {module_name(path): path for path in FILES}
    return {
        name: (imports_of(path, types=True) & paths.keys()) - {name, *packages_of(name)}
        for name, path in paths.items()
    }


def packages_of(name: str) -> set[str]:
    parts = name.split(".")
    return {".".join(parts[:n]) for n in range(1, len(parts))}


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Names that import each other in turn, the first once more at the end; none if there is no
    circle."""
    done: set[str] = set()

    def follow(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        done.add(name)
        return next(filter(None, (follow(other, [*way, name]) for other in graph[name])), [])

    return next(filter(None, (follow(name, []) for name in sorted(graph))), [])


def storey(name: str) -> int:
    """How high in the house a module is: the ground, the wings of core, then the commands."""
    if name in DOORS:
        return len(SPINE) + 2
    if name.startswith("kvtool.commands"):
        return len(SPINE) + 1
    wing = name.removeprefix("kvtool.core.").partition(".")[0]
    return SPINE.index(wing) + 1 if wing in SPINE else 0


def within(names: set[str], package: str) -> set[str]:
    return {name for name in names if name == package or name.startswith(f"{package}.")}


def files_in(folder: str) -> list[Path]:
    return [path for path in FILES if path.is_relative_to(PACKAGE / folder)]


def test_there_are_files_to_guard() -> None:
    assert files_in("ui") and files_in("core") and files_in("commands")


def test_the_guard_sees_every_way_to_import() -> None:
    source = """
import torch.nn
def late():
    import numpy
if TYPE_CHECKING:
    import transformers
from kvtool import core
from ..core.decoding import engine
"""
    found = set(imports(ast.parse(source), "kvtool.ui"))
    assert {"torch.nn", "numpy", "kvtool.core", "kvtool.core.decoding.engine"} <= found
    assert "transformers" not in found
    assert "numpy" not in set(imports(ast.parse(source), "kvtool.ui", top_level_only=True))


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle(arrows()) == []


def test_nothing_imports_what_is_above_it() -> None:
    wings = {path.name for path in (PACKAGE / "core").iterdir() if (path / "__init__.py").exists()}
    assert wings == set(SPINE)
    up = [
        f"{name} -> {other}"
        for name, others in arrows().items()
        for other in others
        if storey(other) > storey(name)
    ]
    assert up == []


@pytest.mark.parametrize(("folder", "other"), [("ui", "kvtool.core"), ("core", "kvtool.ui")])
def test_ui_and_core_never_import_each_other(folder: str, other: str) -> None:
    for path in files_in(folder):
        assert not within(imports_of(path), other), path.name


@pytest.mark.parametrize("folder", ["ui", "core"])
def test_nothing_below_the_commands_imports_them(folder: str) -> None:
    for path in files_in(folder):
        found = imports_of(path)
        assert not within(found, "kvtool.commands") | within(found, "kvtool.app"), path.name


@pytest.mark.parametrize("name", ["registry.py", "config", "errors.py", "files.py", "app.py"])
def test_the_ground_files_import_nothing_heavy(name: str) -> None:
    paths = files_in(name)
    assert paths
    for path in paths:
        roots = {found.partition(".")[0] for found in imports_of(path)}
        assert not roots & HEAVY, path.name


def test_ui_imports_nothing_heavy_but_matplotlib_to_draw() -> None:
    for path in files_in("ui"):
        roots = {found.partition(".")[0] for found in imports_of(path)}
        assert not roots & (HEAVY - {"matplotlib"}), path.name
        roots = {found.partition(".")[0] for found in imports_of(path, top_level_only=True)}
        assert not roots & HEAVY, path.name


def test_commands_import_torch_and_core_only_inside_functions() -> None:
    for path in files_in("commands"):
        found = imports_of(path, top_level_only=True)
        assert not within(found, "kvtool.core"), path.name
        assert not {name.partition(".")[0] for name in found} & HEAVY, path.name


def test_no_file_imports_click_which_typer_no_longer_brings() -> None:
    for path in FILES:
        assert not within(imports_of(path), "click"), path.name


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys; from kvtool.app import run; assert run(['--help']) == 0;"
        f"print('LOADED', sorted(set({sorted(HEAVY)!r}) & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=HANGS
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "LOADED []"

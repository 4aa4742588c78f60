"""Imports point down only (docs/architecture.md): checked on the source, without importing it."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

CLONE = Path(__file__).resolve().parent.parent
FOLDERS = {  # where the packages live -> the name under which they are installed
    CLONE / "python" / "commfuse": "commfuse",
    CLONE / "triton_kernels": "commfuse.triton_kernels",
    CLONE / "bench": "commfuse.bench",
}
# From the ground up. A module imports from its own part and from the lines before its own.
LAYERS = [
    ["errors"],
    ["_extension", "_C", "triton_kernels"],
    ["runtime"],
    ["ops"],
    ["nn"],
    ["models", "pipeline"],
    ["planner", "speculative"],
    ["generation"],
    ["testing"],
    ["bench"],
    ["cli"],
    ["__main__"],
]
HEIGHT = {part: height for height, layer in enumerate(LAYERS) for part in layer}


def modules() -> dict[str, Path]:
    """Every Python module of the package, by the name under which it is imported."""
    found = {}
    for folder, name in FOLDERS.items():
        for path in folder.rglob("*.py"):
            parts = list(path.relative_to(folder).with_suffix("").parts)
            found[".".join([name, *parts])] = path
    return found


def imported(name: str, source: str) -> set[str]:
    """The names below commfuse that a module imports, wherever in it the import statement stands.

    A package is given by its file, as ``commfuse.ops.__init__``: relative imports count from there.
    """
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = name.split(".")[: -node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            names.update(".".join([*base, alias.name]) for alias in node.names)
    return {found for found in names if found.startswith("commfuse.")}


def upward(name: str, source: str) -> list[str]:
    """The imports of a module that do not point down, as readable complaints."""
    part = name.split(".")[1]
    if part == "__init__":  # the package itself only names its parts, and loads them when asked
        return [f"{name} imports {found}" for found in sorted(imported(name, source))]
    complaints = []
    for found in sorted(imported(name, source)):
        other = found.split(".")[1]
        if other != part and other in HEIGHT and HEIGHT[other] >= HEIGHT[part]:
            complaints.append(f"{name} imports {found}, which is not below it")
    return complaints


def test_every_part_of_the_package_has_a_layer():
    parts = {name.split(".")[1] for name in modules()} - {"__init__"}
    assert parts <= set(HEIGHT), f"without a layer in this file: {sorted(parts - set(HEIGHT))}"


def test_imports_point_down():
    complaints = []
    for name, path in sorted(modules().items()):
        complaints += upward(name, path.read_text())
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize(
    ("name", "statement"),
    [
        ("commfuse.ops.matmul", "from commfuse.nn import Linear"),
        ("commfuse.ops.matmul", "import commfuse.generation.engine"),
        ("commfuse.ops.matmul", "from commfuse import cli"),
        ("commfuse.ops.matmul", "def f():\n    from ..nn.linear import Linear"),
        ("commfuse.nn.__init__", "from ..models import llama"),
        ("commfuse.models.llama", "from commfuse.pipeline import stage"),
        ("commfuse.__init__", "from commfuse.ops import explain"),
    ],
)
def test_an_import_that_points_up_is_found(name, statement):
    assert upward(name, statement)


@pytest.mark.parametrize(
    ("name", "statement"),
    [
        ("commfuse.nn.linear", "from commfuse.ops import matmul"),
        ("commfuse.nn.linear", "from . import block"),
        ("commfuse.nn.__init__", "from .linear import Linear"),
        ("commfuse.ops.matmul", "import torch, commfuse"),
        ("commfuse.triton_kernels.all_reduce", "from commfuse.errors import UsageError"),
    ],
)
def test_an_import_that_points_down_is_allowed(name, statement):
    assert not upward(name, statement)

"""Imports go one way: a part of the package imports parts above it in the layout of CONTRIBUTING, in no circle."""

from __future__ import annotations

import ast
import graphlib
import re
from pathlib import Path

import pytest

import skipkernels

PACKAGE = Path(skipkernels.__file__).parent


@pytest.fixture(scope="module")
def imported() -> dict[str, set[str]]:
    """Modules of the package that each module imports. The roots, which import public names at their first use, not."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        *folders, stem = path.relative_to(PACKAGE.parent).with_suffix("").parts
        name = ".".join(folders if stem == "__init__" else [*folders, stem])
        if name not in ("skipkernels", "skipkernels.app"):
            found[name] = imports(path) - {name}
    return found


def test_parts_import_parts_above_them(imported):
    place = places()
    upward = [
        (module, name) for module in imported for name in imported[module] if place[part(name)] > place[part(module)]
    ]
    assert not upward


def test_imports_form_no_circle(imported):
    graphlib.TopologicalSorter(imported).prepare()  # raises a CycleError that names the modules


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports, in functions too, except for types only."""
    folder = path.relative_to(PACKAGE.parent).parent.parts
    names: set[str] = set()

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            start = folder[: len(folder) - node.level + 1] if node.level else ()
            module = ".".join((*start, *filter(None, [node.module])))
            names.update(module_of(f"{module}.{alias.name}", module) for alias in node.names)
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text()))
    return {name for name in names if name.startswith("skipkernels.")}


def module_of(name: str, parent: str) -> str:
    """A name imported from a module: itself if it is a module, else the module."""
    path = PACKAGE.parent.joinpath(*name.split("."))
    return name if path.is_dir() or path.with_suffix(".py").exists() else parent


def part(module: str) -> str:
    """Part of the house that `skipkernels.a.b.c` is in: `a`, in the application `app.b`."""
    parts = module.split(".")[1:]
    return ".".join(parts[:2] if parts[0] == "app" else parts[:1])


def places() -> dict[str, int]:
    """Line of each part in the layout of CONTRIBUTING.md; nothing imports `__main__`."""
    contributing = (PACKAGE.parent / "CONTRIBUTING.md").read_text("utf-8")
    layout = re.search(r"^skipkernels/.*?^bench/", contributing, re.MULTILINE | re.DOTALL)[0]
    found, prefix = {"__main__": len(layout)}, ""
    for place, line in enumerate(layout.splitlines()):
        if line.startswith("skipkernels/app/"):
            prefix = "app."
        elif re.match("  [a-z_]", line):
            names = line.split("   ")[0].replace(".py", "")
            found |= {prefix + name: place for name in re.findall(r"\w+", names)}
    return found

"""Check that no generator holds a context manager while it is suspended. `make lint` runs it.

A generator that is not exhausted leaves its `with` block when it is collected, in any thread: a display or a pool then
joins threads, and waits for the thread that it runs in. An open file may be held, and functions under
`@contextmanager` are meant to hold what they enter.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("skipkernels", "bench", "recipes", "examples", "tools")  # fixtures of pytest, in tests, are closed by it


def _own_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes below a function or statement, without those of functions and classes inside."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            yield child
            yield from _own_nodes(child)


def _opens_file(item: ast.withitem) -> bool:
    return isinstance(item.context_expr, ast.Call) and ast.unparse(item.context_expr.func).split(".")[-1] == "open"


def suspended_contexts(source: str) -> list[tuple[int, str]]:
    """Line and function of each `with` around a `yield`."""
    found = []
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        if any(ast.unparse(decorator).endswith("contextmanager") for decorator in function.decorator_list):
            continue
        for node in _own_nodes(function):
            if isinstance(node, (ast.With, ast.AsyncWith)) and not all(map(_opens_file, node.items)):
                if any(isinstance(inner, (ast.Yield, ast.YieldFrom)) for inner in _own_nodes(node)):
                    found.append((node.lineno, function.name))
    return found


def main() -> int:
    """Check the files, print the findings, and return 1 if there are any."""
    failed = False
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        for line, name in suspended_contexts(path.read_text("utf-8")):
            print(f"{path.relative_to(ROOT)}:{line}: {name} yields within a with block. Enter it in the caller.")
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

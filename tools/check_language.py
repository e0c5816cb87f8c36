"""Check the English of docstrings, comments, messages and documentation. `make lint` runs it.

Prints the findings as file:line: text and fails if there are any. `--only skipkernels/towers csrc` checks these paths.
"""

from __future__ import annotations

import argparse
import ast
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("skipkernels", "csrc", "bench", "recipes", "examples", "tests", "docs")
FILES = ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "setup.py")
SUFFIXES = (".py", ".cpp", ".h", ".cu", ".md")

PHRASES = (
    r"who|whoever|whose|whom",
    r"nobody|somebody",
    r"mend|mends|mended",
    r"goes on|go on",
    r"so many|so much",
    r"is told|are told",
    r"by itself",
    r"lies in|stands for|comes to be|at hand",
    r"one's own",
    r"as it came",
)
PHRASE = re.compile(rf"\b(?:{'|'.join(PHRASES)})\b".replace(" ", r"\s+"), re.IGNORECASE)
OPENING = re.compile(r"\s*(?:Of|What|That|Whether|Who|Where|How|For|As)\b")
ARGUMENT = re.compile(r"^ +\w+: (?:Of|That|Who)\b", re.MULTILINE)  # a fragment that continues the argument's name

Finding = tuple[int, str]  # line, and the text found


def phrases(text: str, line: int) -> Iterator[Finding]:
    """Findings in a text that begins at a line."""
    for match in PHRASE.finditer(text):
        yield line + text.count("\n", 0, match.start()), " ".join(match.group().lower().split())


def in_python(source: str) -> Iterator[Finding]:
    """Findings in the strings, comments and names of definitions of a Python file."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from phrases(node.value, node.lineno)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            text, line = node.value.value, node.lineno
            if opening := OPENING.match(text):
                yield line, f"a docstring begins with {opening.group().strip()}"
            for match in ARGUMENT.finditer(text):
                yield line + text.count("\n", 0, match.start()), match.group().strip()
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            yield from phrases(node.name.replace("_", " "), node.lineno)

    first, comment = 0, ""  # of consecutive lines, which may break a phrase
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT:
            continue
        line, text = token.start[0], token.string.lstrip("#")
        if comment and line == first + comment.count("\n") + 1:
            comment += f"\n{text}"
            continue
        yield from phrases(comment, first)
        first, comment = line, text
    yield from phrases(comment, first)


def in_cpp(source: str) -> Iterator[Finding]:
    """Findings in the comments and strings of a C++ file."""
    for match in re.finditer(r'(?://[^\n]*\n\s*)+|/\*(?s:.*?)\*/|"(?:[^"\\\n]|\\.)*"', source):
        text = re.sub(r"\n[ \t]*(?://|\*)", "\n", match.group())
        yield from phrases(text, source.count("\n", 0, match.start()) + 1)


def in_markdown(source: str) -> Iterator[Finding]:
    """Findings in a Markdown file outside its blocks of code."""
    text = re.sub(r"(?ms)^```.*?^```", lambda block: "\n" * block.group().count("\n"), source)
    yield from phrases(text, 1)


def findings(path: Path) -> list[Finding]:
    """Findings in a file, by line."""
    check = {".py": in_python, ".md": in_markdown}.get(path.suffix, in_cpp)
    return sorted(set(check(path.read_text("utf-8"))))


def files(paths: list[Path]) -> list[Path]:
    """Files below paths that are checked."""
    found = [path for top in paths for path in ([top] if top.is_file() else top.rglob("*")) if path.is_file()]
    return sorted(path for path in set(found) if path.suffix in SUFFIXES and "egg-info" not in str(path))


def main() -> int:
    """Check the files, print the findings, and return 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", type=Path, metavar="PATH", help="check these files and folders alone")
    only: list[Path] | None = parser.parse_args().only
    paths = [path.resolve() for path in only] if only else [ROOT / name for name in (*FOLDERS, *FILES)]
    failed = False
    for path in files([path for path in paths if path.exists()]):
        for line, text in findings(path):
            print(f"{path.relative_to(ROOT)}:{line}: {text}")
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

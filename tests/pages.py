"""Pages of the documentation: their blocks, prose and texts in backticks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]


class Block(NamedTuple):
    """A fenced block: its info string, its text, and the line number of the text."""

    kind: str
    text: str
    line: int


class Page(NamedTuple):
    path: Path
    text: str

    @classmethod
    def read(cls, path: Path) -> Page:
        return cls(path, path.read_text(encoding="utf-8"))

    @property
    def blocks(self) -> list[Block]:
        lines, found, start = self.text.splitlines(keepends=True), [], None
        for number, line in enumerate(lines):
            if not line.lstrip().startswith("```"):
                continue
            if start is None:
                start = number
            else:
                text = "".join(lines[start + 1 : number])
                found.append(Block(lines[start].strip().removeprefix("```"), text, start + 2))
                start = None
        assert start is None, f"{self.path.name}, line {start}: a block is not closed"
        return found

    @property
    def prose(self) -> str:
        """The page with empty lines in place of its blocks."""
        lines = self.text.splitlines()
        for block in self.blocks:
            for number in range(block.line - 2, block.line + block.text.count("\n")):
                lines[number] = ""
        return "\n".join(lines)

    @property
    def spans(self) -> list[str]:
        """Texts in backticks, one line each."""
        return [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", self.prose)]


PATHS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "tests/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
each_page = pytest.mark.parametrize(
    "page", [pytest.param(Page.read(path), id=str(path.relative_to(ROOT))) for path in PATHS]
)

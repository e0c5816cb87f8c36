"""CONTRIBUTING lists the files that an addition touches: no other file names it."""

from __future__ import annotations

import fnmatch
import re
import subprocess
from pathlib import Path

import pytest

from skipkernels.towers.families import FAMILIES

ROOT = Path(__file__).parent.parent


def additions():
    """Name of the paragraph in CONTRIBUTING, file name, and names of classes or functions of the addition."""
    for family in FAMILIES:
        if family.file != "open_clip":  # general code and tests use its classes as examples
            yield "A model family", family.file, {*family.image.values(), *family.text.values(), *family.block.values()}
    yield "A method", "clip_adapter", {"clip[-_]adapter", "CLIPAdapter"}
    yield "A data source", "hugging_face_sets", {"open_hugging_face"}


@pytest.fixture(scope="module")
def texts():
    """Text of each file of the repository but this, by path."""
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split()
    suffixes = (".py", ".md", ".cpp", ".h", ".toml", ".yml", ".sh", "ops/tables/defaults.json")
    return {
        file: ROOT.joinpath(file).read_text("utf-8")
        for file in files
        if file.endswith(suffixes) and file not in __file__
    }


def listed(texts, kind: str, name: str) -> tuple[str, ...]:
    """Ends of the paths that a paragraph lists, with a file name in place of NAME."""
    paragraph = re.search(rf"- \*\*{kind}\*\*:.*?(?=\n- |\n\n)", texts["CONTRIBUTING.md"], re.DOTALL)[0]
    paths = [path.replace("NAME", name) for path in re.findall(r"`([\w./*-]+[./][\w*]*)`", paragraph)]
    paths += [f"{folder}{file}.py" for folder in paths if folder[-1] == "/" for file in (name, f"test_{name}")]
    return (*paths, *(file for path in paths if "*" in path for file in fnmatch.filter(texts, f"*{path}")))


@pytest.mark.parametrize(("kind", "name", "words"), [pytest.param(*x, id=x[1]) for x in additions()])
def test_files_of_an_addition_are_listed(texts, kind, name, words):
    naming = [file for file, text in texts.items() if any(re.search(rf"\b{word}\b", text) for word in words)]
    assert naming and not [file for file in naming if not file.endswith(listed(texts, kind, name))]

"""Errors about arguments, which tyro prints: each names the option and what it takes, and nothing runs."""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from skipkernels import app
from skipkernels.app.cli.main import main
from skipkernels.app.config import TuneConfig


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("tun", ["tun", "tune", "compare"]),
        ("", ["tune", "compare"]),
        ("tune --dta x", ["--dta", "--data STR", "skipkernels tune --help"]),
        ("eval run --jsn", ["--jsn", "--json"]),
        ("tune stray", ["stray"]),
        ("tune --shots x", ["--shots INT|{all}", "'x'"]),
        ("blend run --alpha x", ["--alpha", "FLOAT", "auto", "'x'"]),
        ("tune --class-weight balancd", ["'balancd'", "--class-weight {balanced}|FLOAT"]),
        ("tune --head nope", ["'nope'", "('none', 'anchored', 'gaussian', 'probe', 'auto')"]),
        ("tune --shots", ["Missing value", "'--shots'"]),
        ("export", ["Missing", "RUN", "--to {open-clip,hugging-face,onnx}", "--out PATH"]),
    ],
)  # fmt: skip
def test_error_names_option_and_values(arguments, words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    error = capsys.readouterr().err
    assert ended.value.code == 2 and all(word in error for word in words), error


def test_list_without_items(tmp_path, capsys):
    assert main(["tune", "--out", str(tmp_path / "run"), "--template"]) == 2
    assert "--template must have an item, such as 'a photo of a {}.'; got none." in capsys.readouterr().err


def _messages(file: Path) -> Iterator[str]:
    """Texts with a space in a file, but for docstrings; values in f-strings are {}."""
    tree = ast.parse(file.read_text())
    of_other = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    of_other |= {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        parts = node.values if isinstance(node, ast.JoinedStr) else [node]
        text = "".join(part.value if isinstance(getattr(part, "value", None), str) else "{}" for part in parts)
        if id(node) not in of_other and " " in text:
            yield text


def test_settings_in_messages_become_flags():
    """A message sets a setting in backquotes, `name=value`, or begins with it; the command line prints its flag."""
    settings = "|".join(field.name for field in dataclasses.fields(TuneConfig))
    bare = re.compile(rf"(?<![`\w.-])({settings})=(?=[\"\w])")
    found = [text for file in Path(app.__file__).parent.rglob("*.py") for text in _messages(file)]
    wrong = [text for text in found if (at := bare.search(text)) and not re.fullmatch(r"(\w+: )?", text[: at.start()])]
    assert wrong == [] and sum("`overwrite=True`" in text for text in found) > 5

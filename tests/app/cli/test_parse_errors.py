"""Errors about arguments, which tyro prints: each names the option and what it takes, and nothing runs."""

from __future__ import annotations

import pytest

from skipkernels.app.cli.main import main


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("tun", ["tun", "tune", "compare"]),
        ("tune --shots x", ["--shots INT|{all}", "'x'"]),
        ("blend run --alpha x", ["--alpha", "FLOAT", "auto", "'x'"]),
        ("tune --class-weight balancd", ["'balancd'", "--class-weight {balanced}|FLOAT"]),
        ("tune --head nope", ["'nope'", "'anchored'", "'probe'"]),
        ("export", ["Missing", "RUN", "--to {open-clip,hugging-face,onnx}", "--out PATH"]),
    ],
)  # fmt: skip
def test_error_names_option_and_values(arguments, words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    error = capsys.readouterr().err
    assert ended.value.code == 2 and all(word in error for word in words), error

"""bench.memory: the weights of both optimizers are compared before measuring, and each optimizer gets a row."""

from __future__ import annotations

import csv
from functools import partial

import pytest
import torch

import skipkernels as sk
from bench import measure, memory

SMALL = ["--model", "glyph-tiny", "--skip-layers", "3", "--classes", "20", "--device", "cpu", "--rounds", "1"]


@pytest.fixture(autouse=True)
def results(monkeypatch, tmp_path):
    """Folder for rows."""
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    return tmp_path


def test_memory_writes_a_row_per_optimizer(results, capsys, monkeypatch):
    monkeypatch.setattr(measure, "in_new_process", lambda function, *arguments: 2**20 + function(*arguments))
    memory.main(SMALL)
    theirs, ours = csv.DictReader(next(results.glob("*/memory.csv")).open())
    assert (theirs["optimizer"], ours["optimizer"]) == ("torch.optim.SGD", "FusedSGD")
    assert theirs["saved_mib"] == ours["saved_mib"] and theirs["K"] == ours["K"] == "11"
    assert float(ours["gradients_mib"]) < float(theirs["gradients_mib"]) / 2
    assert all(float(row["peak_mib"]) > 0 and float(row["p50_ms"]) > 0 for row in (theirs, ours))
    assert "of the gradients" in capsys.readouterr().out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_memory_refuses_different_weights(monkeypatch, results, precision):
    wrong = partial(torch.optim.SGD, nesterov=True)
    monkeypatch.setattr(memory, "_OPTIMIZERS", {"torch.optim.SGD": wrong, "FusedSGD": sk.FusedSGD})
    with pytest.raises(SystemExit, match="the two optimizers leave other weights: no measurement"):
        memory.main([*SMALL, "--precision", precision])
    assert not list(results.iterdir())

"""Checkpoints: the last epoch and the best; damage is named when it is read."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from skipkernels.app.data import InputError
from skipkernels.app.train import checkpoint, weights
from skipkernels.app.train.checkpoint import MODEL
from skipkernels.app.train.description import Description
from skipkernels.app.train.run_folder import read_model
from skipkernels.app.train.weights import read_metadata, save_weights
from skipkernels.digests import digest_file, digest_json
from skipkernels.folders import delete_folder, locked

CLASSIFIER = Description(
    "model", None, "skip", {}, "data", "few-shot", ["a"], ["{}"], None, weights=MODEL, holds="model", logit_scale=1.0
)
ACCURACIES = {1: 50.0, 2: 70.0, 3: 60.0}  # on the validation images; the second epoch is the best


class Epoch:
    """Stands in for `WeightsFile`: weights that are all equal to the number of an epoch."""

    def __init__(self, epoch: int):
        self.epoch = epoch

    def save(self, path: Path) -> None:
        save_weights(path, {"weight": torch.full((1000,), float(self.epoch))}, holds="model")


def save(folder: Path, epoch: int) -> None:
    row = {"loss": 1.0, "accuracy": {}, "steps": 1, "seconds": 1.0, "kept_classes": 2.0}
    rows = [row | {"epoch": number, "validation": ACCURACIES[number]} for number in range(1, epoch + 1)]
    known = {"settings": {"seed": 0}, "rows": rows, "seconds": 1.0}
    checkpoint.save(folder, Epoch(epoch), CLASSIFIER, {"epoch": epoch}, **known)


def value(path: Path) -> float:
    return load_file(path)["weight"][0].item()


def found_epoch(folder: Path) -> int | None:
    """Epoch of the checkpoint; checks that its parts agree, and the best weights."""
    found = checkpoint.load(folder)
    if found is None:
        return None
    epoch = found.training["epoch"]
    assert len(found.rows) == epoch == value(found.weights)
    best = folder / "checkpoint" / "best.safetensors"
    assert value(best if best.exists() else found.weights) == (1 if epoch == 1 else 2)
    assert read_model(folder)[1] == found.weights
    return epoch


def test_save_replaces_epoch_and_keeps_best(tmp_path):
    assert found_epoch(tmp_path) is None
    for epoch in (1, 2, 3):
        save(tmp_path, epoch)
        assert found_epoch(tmp_path) == epoch
    files = {"model.safetensors", "best.safetensors", "classifier.json", "training.pt", "checkpoint.json"}
    assert {path.name for path in (tmp_path / "checkpoint").iterdir()} == files
    delete_folder(tmp_path / "checkpoint")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("method", "delta", "holds"),
    [(nn.Linear, False, "model"), (nn.Sequential, False, "method"), (nn.Linear, True, "changes")],
    ids=["model", "method", "changes"],
)
def test_weights_file_is_deterministic(tmp_path, method, delta, holds):
    """safetensors writes several metadata keys in random order."""
    model = nn.Linear(2, 2)
    tuned = model if method is nn.Linear else nn.Sequential(model)
    kept = weights.WeightsFile(tuned, model, delta=delta)
    model.bias.data.add_(1)
    written = set()
    for number in range(20):
        kept.save(tmp_path / f"{number}")
        written.add((tmp_path / f"{number}").read_bytes())
    assert len(written) == 1 and read_metadata(tmp_path / "0")["holds"] == holds
    assert len(load_file(tmp_path / "0")) == (1 if delta else 2)


def test_read_metadata_of_other_files(tmp_path):
    save_file({"weight": torch.ones(1)}, tmp_path / "a.safetensors", metadata={"format": "pt", "holds": "changes"})
    assert read_metadata(tmp_path / "a.safetensors") == {}
    for notes in ("no notes", "[]", '{"holds": 1}'):
        save_file({"weight": torch.ones(1)}, tmp_path / "a.safetensors", metadata={"skipkernels": notes})
        with pytest.raises(InputError, match=r"a\.safetensors: not usable as weights"):
            read_metadata(tmp_path / "a.safetensors")


# ---- damage ------------------------------------------------------------------------------------------------------


FILES = ("model.safetensors", "training.pt", "checkpoint.json")
DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "changed": lambda path: path.write_bytes(path.read_bytes().replace(b"0", b"1", 1)),
}


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_load_names_damaged_file(tmp_path, file, damage):
    save(tmp_path, 1)
    DAMAGE[damage](tmp_path / "checkpoint" / file)
    before = sorted(path.name for path in (tmp_path / "checkpoint").iterdir())
    with pytest.raises(InputError) as caught:
        checkpoint.load(tmp_path)
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'checkpoint'}: damaged, or not a checkpoint: ") and "\n" not in message
    assert file in message or damage in ("empty", "truncated"), "or why it is not JSON"
    assert "Restore the folder from a copy" in message and "overwrite=True" in message
    assert sorted(path.name for path in (tmp_path / "checkpoint").iterdir()) == before, "nothing is lost"


def test_load_executes_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "boom"), "w"))

    save(tmp_path, 1)
    folder = tmp_path / "checkpoint"
    torch.save(Bomb(), folder / "training.pt")
    values = {"settings": {}, "rows": [], "seconds": 1.0}
    values["files"] = {name: digest_file(folder / name) for name in FILES[:2]}
    (folder / "checkpoint.json").write_text(json.dumps({"format": 3, "digest": digest_json(values)} | values))
    with pytest.raises(InputError, match=r"training\.pt holds more than tensors\. Restore"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "boom").exists()


def test_read_model_while_run_replaces_checkpoint(tmp_path, monkeypatch):
    """The run completes an epoch between the reads of classifier.json and of the weights."""
    save(tmp_path, 1)
    read, left = Description.read.__func__, iter([2, 3])

    def completed_after(cls, folder):
        found = read(cls, folder)
        for epoch in itertools.islice(left, 1):
            save(tmp_path, epoch)
        return found

    monkeypatch.setattr(Description, "read", classmethod(completed_after))
    with locked(tmp_path):
        assert value(read_model(tmp_path)[1]) == 3


def test_read_model_refuses_other_weights(tmp_path):
    save(tmp_path, 1)
    Epoch(2).save(tmp_path / "other")
    os.replace(tmp_path / "other", tmp_path / "checkpoint" / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors: missing or damaged: it does not match"):
        read_model(tmp_path)

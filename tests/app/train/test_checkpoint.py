"""Checkpoints: the last epoch and the best; damage is named when it is read."""

from __future__ import annotations

import contextlib
import itertools
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from skipkernels.app.data import InputError
from skipkernels.app.results.files import MODEL
from skipkernels.app.train import checkpoint
from skipkernels.app.train.description import Description
from skipkernels.app.train.reading import read_model
from skipkernels.digests import digest_file, digest_json
from skipkernels.folders import locked
from tests.failures import STOPS, Killed, stopped_at

CLASSIFIER = Description("model", None, "skip", {}, "data", ["a"], ["{}"], weights=MODEL, whole_model=True)
ACCURACIES = {1: 50.0, 2: 70.0, 3: 60.0}  # on the validation images; the second epoch is the best


def weights_of(epoch: int) -> dict[str, torch.Tensor]:
    return {"weight": torch.full((1000,), float(epoch))}


def save(folder: Path, epoch: int) -> None:
    row = {"loss": 1.0, "accuracy": {}, "steps": 1, "seconds": 1.0, "kept_classes": 2.0}
    rows = [row | {"epoch": number, "validation": ACCURACIES[number]} for number in range(1, epoch + 1)]
    known = {"settings": {"seed": 0}, "rows": rows, "seconds": 1.0}
    checkpoint.save(folder, weights_of(epoch), CLASSIFIER, {"epoch": epoch}, **known)


def value(path: Path) -> float:
    return load_file(path)["weight"][0].item()


def found_epoch(folder: Path) -> int | None:
    """Epoch of the checkpoint; checks that its parts agree, and the best weights."""
    found = checkpoint.load(folder)
    if found is None:
        return None
    epoch = found.training["epoch"]
    assert len(found.rows) == epoch == value(found.weights)
    assert value(checkpoint.weights_of(folder, checkpoint.best_epoch(found.rows))) == (1 if epoch == 1 else 2)
    return epoch


def test_save_replaces_epoch_and_keeps_best(tmp_path):
    assert found_epoch(tmp_path) is None
    for epoch in (1, 2, 3):
        save(tmp_path, epoch)
        assert found_epoch(tmp_path) == epoch and value(read_model(tmp_path)[1]) == epoch
    files = {"model-3.safetensors", "model-2.safetensors", "classifier.json", "training-3.pt", "checkpoint.json"}
    assert {path.name for path in (tmp_path / "checkpoint").iterdir()} == files
    checkpoint.delete(tmp_path)
    checkpoint.delete(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("stop", STOPS)
@pytest.mark.parametrize(
    ("work", "found"),
    [(lambda run: save(run, 3), {2, 3}), (checkpoint.delete, {2, None})],
    ids=["save", "delete"],
)
def test_stop_at_any_call_leaves_a_whole_checkpoint(tmp_path, stop, work, found):
    """The checkpoint is that of the earlier or of the new epoch, or none. The next one deletes what is left."""
    seen, moment, made = [], 0, []
    while moment <= len(made):
        moment, run = moment + 1, tmp_path / f"{moment}"
        run.mkdir()
        save(run, 1), save(run, 2)
        with contextlib.suppress(Killed, OSError, InputError), stopped_at(moment, stop) as made:
            work(run)
        seen.append(found_epoch(run))
        assert seen[-1] is None or value(read_model(run)[1]) in (2, 3)
        save(run, 1)
        assert found_epoch(run) == 1 and len(list((run / "checkpoint").iterdir())) == 4
    assert found == set(seen)


# ---- damage ------------------------------------------------------------------------------------------------------


FILES = ("model-1.safetensors", "training-1.pt", "checkpoint.json")
DAMAGE = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "changed": lambda path: path.write_bytes(path.read_bytes().replace(b"0", b"1", 1)),
}


DAMAGED = [(file, damage) for file in FILES for damage in DAMAGE]
DAMAGED.remove(("checkpoint.json", "missing"))  # then there is no checkpoint


@pytest.mark.parametrize(("file", "damage"), DAMAGED)
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


def test_load_without_checkpoint_json(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "checkpoint" / "checkpoint.json").unlink()
    assert checkpoint.load(tmp_path) is None


def test_load_executes_no_code(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "boom"), "w"))

    save(tmp_path, 1)
    folder = tmp_path / "checkpoint"
    torch.save(Bomb(), folder / "training-1.pt")
    values = {"settings": {}, "rows": [{"epoch": 1}], "seconds": 1.0}
    values["files"] = {name: digest_file(folder / name) for name in FILES[:2]}
    (folder / "checkpoint.json").write_text(json.dumps({"format": 4, "digest": digest_json(values)} | values))
    with pytest.raises(InputError, match=r"training-1\.pt holds more than tensors\. Restore"):
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
        assert value(read_model(tmp_path)[1]) == 2, "the best epoch stays"

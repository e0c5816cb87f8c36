"""Checkpoints: both files are of one epoch whenever a process is killed, and are validated when read."""

from __future__ import annotations

import itertools
import os
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from skipkernels.app.data import InputError
from skipkernels.app.train import checkpoint, weights
from skipkernels.app.train.description import Description
from skipkernels.app.train.weights import read_metadata
from skipkernels.digests import digest_file
from skipkernels.folders import locked


class Killed(BaseException):
    """Stands in for SIGKILL."""


STATE = {"config": {}, "rows": [], "seconds": 1.0, "trainer": None}  # of a run before its first epoch


def save(folder: Path, epoch: int, file: str = checkpoint.MODEL) -> None:
    tensors, metadata = {"weight": torch.full((3,), float(epoch))}, weights.metadata(holds="model")
    checkpoint.save(folder, file, tensors, metadata, STATE | {"epoch": epoch})


def found_epoch(folder: Path) -> int | None:
    """Epoch of the checkpoint; checks that weights and state agree."""
    found = checkpoint.find(folder)
    if found is None:
        return None
    weights = torch.tensor(list(found.weights.read_bytes()[-12:]), dtype=torch.uint8).view(torch.float32)
    assert weights.tolist() == [found.state["epoch"]] * 3
    assert read_metadata(found.weights) == {"holds": "model"}
    return found.state["epoch"]


def test_find_after_save(tmp_path):
    assert found_epoch(tmp_path) is None and checkpoint.recover(tmp_path) is None
    for epoch in (1, 2):
        save(tmp_path, epoch)
        assert found_epoch(tmp_path) == epoch
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "state.pt"}


def describe(folder: Path) -> None:
    digest = checkpoint.find(folder).state["weights"]["xxh3"]
    named = {"weights": checkpoint.MODEL, "holds": "model", "weights_xxh3": digest}
    Description("model", None, "skip", {}, "data", "few-shot", ["a"], ["{}"], None, logit_scale=1.0, **named).write(
        folder
    )


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("renaming", [1, 2, 3, 4])
def test_save_killed_at_rename_leaves_one_epoch(tmp_path, monkeypatch, renaming, after):
    save(tmp_path, 1)
    describe(tmp_path)
    replace, calls = os.replace, iter(range(1, 100))

    def killed(*names):
        number = next(calls)
        if number == renaming and not after:
            raise Killed
        replace(*names)
        if number == renaming:
            raise Killed

    monkeypatch.setattr(os, "replace", killed)
    monkeypatch.setattr(tempfile.TemporaryDirectory, "cleanup", lambda self: None)  # a killed process does not clean up
    with pytest.raises(Killed):
        save(tmp_path, 2)
    monkeypatch.undo()
    expected = 1 if (renaming, after) < (2, True) else 2
    assert found_epoch(tmp_path) == expected
    described, path = checkpoint.weights_of(tmp_path)
    assert digest_file(path) == described.weights_xxh3
    recovered = checkpoint.recover(tmp_path)
    assert (
        recovered is not None
        and recovered.weights == tmp_path / "model.safetensors"
        and found_epoch(tmp_path) == expected
    )
    assert {path.name for path in tmp_path.iterdir()} == {"model.safetensors", "state.pt", "classifier.json"}
    save(tmp_path, 3)
    assert found_epoch(tmp_path) == 3
    assert checkpoint.weights_of(tmp_path)[1] == tmp_path / "model.safetensors"


@pytest.mark.parametrize(
    ("method", "delta", "expected"),
    [(nn.Linear, False, {"holds": "model"}), (nn.Sequential, False, {"holds": "method"}),
     (nn.Linear, True, {"holds": "changes", "of": ...})],
    ids=["model", "method", "changes"],
)  # fmt: skip
def test_save_is_deterministic(tmp_path, method, delta, expected):
    """safetensors writes several metadata keys in random order."""
    model = nn.Linear(2, 2)
    tuned = model if method is nn.Linear else nn.Sequential(model)
    kept = weights.WeightsFile(tuned, model, delta=delta)
    model.bias.data.add_(1)
    written = set()
    for _ in range(20):
        checkpoint.save(tmp_path, checkpoint.MODEL, *kept.contents(), {})
        written.add((tmp_path / "model.safetensors").read_bytes())
    assert len(written) == 1
    found = read_metadata(tmp_path / "model.safetensors")
    assert found == expected | ({"of": found["of"]} if delta else {})


def test_read_metadata_of_other_files(tmp_path):
    save_file({"weight": torch.ones(1)}, tmp_path / "a.safetensors", metadata={"format": "pt", "holds": "changes"})
    assert read_metadata(tmp_path / "a.safetensors") == {}
    for notes in ("no notes", "[]", '"text"', '{"holds": 1}', '{"holds": ["model"]}', '{"a":' * 50_000, "[" * 50_000):
        save_file({"weight": torch.ones(1)}, tmp_path / "a.safetensors", metadata={"skipkernels": notes})
        with pytest.raises(InputError, match=r"a\.safetensors: not usable as weights"):
            read_metadata(tmp_path / "a.safetensors")


OURS = [
    ".state.pt.0123456789abcdef.skipkernels-partial",
    "..next.model.safetensors.0123456789abcdef.skipkernels-partial",
    ".metrics.json.0123456789abcdef.skipkernels-partial",
    ".state.pt.4711.partial",  # of an older version
    ".next.delta.safetensors",
]
OTHERS = [".my-download.partial", ".mine.partial", ".notes.txt.4711.partial", ".tmpAbCdEf"]


def test_remove_leftovers_keeps_other_files(tmp_path):
    for name in (*OURS, *OTHERS):
        (tmp_path / name).touch()
    checkpoint.remove_leftovers(tmp_path, ["metrics.json"])
    assert {path.name for path in tmp_path.iterdir()} == set(OTHERS)


@pytest.mark.parametrize("name", ["replace_tensors", "replaced_file"])
def test_save_on_full_disk_keeps_old_checkpoint(tmp_path, monkeypatch, name):
    save(tmp_path, 1)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, name, full)
    message = "can't be written to .*: No space left on device. The previous one, if any, is kept; free disk space"
    with pytest.raises(InputError, match=message):
        checkpoint.save(tmp_path, checkpoint.MODEL, {"weight": torch.full((30,), 2.0)}, {}, STATE)
    assert found_epoch(tmp_path) == 1


def test_weights_of_run_without_state(tmp_path):
    with pytest.raises(InputError, match="before its first epoch was complete"):
        checkpoint.weights_of(tmp_path)
    save(tmp_path, 1, checkpoint.DELTA)
    (tmp_path / "state.pt").unlink()
    assert checkpoint.weights_of(tmp_path) == (None, tmp_path / "delta.safetensors")


def test_find_refuses_damaged_state(tmp_path):
    save(tmp_path, 1)
    file = tmp_path / "state.pt"
    content = file.read_bytes()
    half = len(content) // 2
    directory = content.index(b"PK\1\2")  # ten bytes later: compression method of a part, stored
    places = (content.index(b"epoch"), directory, directory + 10)
    changed = [content[:place] + bytes([content[place] ^ 8]) + content[place + 1 :] for place in places]
    cut = [content[:keep] for keep in (0, 1, 100, half, len(content) - 1)]
    for wrong in (*cut, *changed, b"some text", b"PK"):
        file.write_bytes(wrong)
        with pytest.raises(InputError) as caught:
            checkpoint.find(tmp_path)
        expected = "damaged: it was truncated, or changed after it was written; tune again with `overwrite=True`."
        assert str(caught.value) == f"{file}: {expected}", "names the file, not a part of it"


def test_find_refuses_unreadable_state(tmp_path):
    (tmp_path / "state.pt").mkdir()
    with pytest.raises(InputError, match=r"state\.pt: can't be read \(Is a directory\)\."):
        checkpoint.find(tmp_path)


def test_find_executes_no_pickle(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "boom"), "w"))

    torch.save({"format": 2, "weights": Bomb()}, tmp_path / "state.pt")
    with pytest.raises(InputError, match="holds more than a state"):
        checkpoint.find(tmp_path)
    assert not (tmp_path / "boom").exists()


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ([1], "not the state of a run"),
        ({"format": 2}, "not the state of a run"),
        ({"format": 2, "weights": {"file": "../other.safetensors", "xxh3": ""}}, "not the state of a run"),
        ({"format": 1, "weights": {"file": "model.safetensors", "xxh3": ""}}, "written in format 1"),
    ],
)
def test_find_refuses_other_state(tmp_path, state, message):
    torch.save(state, tmp_path / "state.pt")
    with pytest.raises(InputError, match=message):
        checkpoint.find(tmp_path)


ROW = {"epoch": 1, "loss": 1.5, "lr": {"text": 0.1}, "steps": 2, "kept_classes": 3.0, "kept_histogram": {"3": 2}}
ROW |= {"seconds": 1.0, "seconds_waiting_for_features": 0.0, "stage_seconds": {"data": 0.0}, "accuracy": {"base": None}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"config": None}, "config must be plain mapping; got NoneType"),
        ({"config": {"seed": torch.ones(2)}}, "config must be plain mapping; got dict"),
        ({"rows": {}}, "rows must be plain list; got dict"),
        ({"rows": [7]}, r"rows\[0\] must be mapping; got int"),
        ({"rows": [ROW, {"epoch": 1}]}, r"rows\[1\].loss is missing"),
        ({"rows": [ROW | {"loss": float("nan")}]}, "rows must be plain list"),
        ({"rows": [ROW | {"steps": "2"}]}, r"rows\[0\].steps must be whole number; got str"),
        ({"rows": [ROW | {"lr": {"text": [1]}}]}, r"rows\[0\].lr must be numbers by name; got dict"),
        ({"rows": [ROW | {"extra": torch.ones(1)}]}, "rows must be plain list"),
        ({"seconds": "long"}, "seconds must be number; got str"),
        ({"seconds": float("inf")}, "seconds must be number; got float"),
        ({"trainer": []}, "trainer must be mapping or null; got list"),
    ],
)
def test_find_names_wrong_value(tmp_path, changes, message):
    checkpoint.save(tmp_path, checkpoint.MODEL, {}, {}, STATE | {"rows": [ROW]})
    assert checkpoint.find(tmp_path) is not None
    checkpoint.save(tmp_path, checkpoint.MODEL, {}, {}, STATE | {"rows": [ROW]} | changes)
    with pytest.raises(InputError, match=rf"state\.pt: damaged: {message}.*; tune again with `overwrite=True`\.$"):
        checkpoint.find(tmp_path)


def test_find_refuses_compressed_state(tmp_path):
    save(tmp_path, 1)
    file = tmp_path / "state.pt"
    with zipfile.ZipFile(file) as archive:
        parts = {part.filename: archive.read(part) for part in archive.infolist()}
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in parts.items():
            archive.writestr(name, data)
    with pytest.raises(InputError, match="state.pt: damaged"):
        checkpoint.find(tmp_path)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_find_refuses_special_file(tmp_path, kind):
    path = tmp_path / "state.pt"
    os.mkfifo(path) if kind == "pipe" else path.symlink_to("/dev/zero")
    with pytest.raises(InputError, match=r"state\.pt: can't be read \(not a regular file\)"):
        checkpoint.find(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "state.pt"])
def test_find_detects_flipped_bits(tmp_path, name):
    save(tmp_path, 1)
    whole, found = (tmp_path / name).read_bytes(), 0
    expected = checkpoint.find(tmp_path)
    for place in range(0, len(whole), 5):
        (tmp_path / name).write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        try:
            assert checkpoint.find(tmp_path) == expected, "a byte of the archive that is not read"
        except InputError:
            found += 1
    assert found > (0.99 if name == "model.safetensors" else 0.3) * len(whole) / 5


def replaced_while_read(monkeypatch, folder: Path, epochs: list[int]) -> None:
    """Let a run complete one of these epochs each time a file is digested."""
    digest, left = checkpoint.digest_file, iter(epochs)

    def after_another_epoch(path, *how):
        for epoch in itertools.islice(left, 1):
            monkeypatch.setattr(checkpoint, "digest_file", digest)  # for the writer
            save(folder, epoch)
            monkeypatch.setattr(checkpoint, "digest_file", after_another_epoch)
        return digest(path, *how)

    monkeypatch.setattr(checkpoint, "digest_file", after_another_epoch)


@pytest.mark.parametrize("epochs", [[2], [2, 3], [2, 3, 4, 5, 6]], ids=str)
def test_find_while_run_replaces_files(tmp_path, monkeypatch, epochs):
    save(tmp_path, 1)
    replaced_while_read(monkeypatch, tmp_path, epochs)
    assert found_epoch(tmp_path) == epochs[-1]


def test_find_while_weights_are_renamed(tmp_path, monkeypatch):
    """The weights are renamed between the reads of the two names."""
    save(tmp_path, 1)
    old = (tmp_path / "model.safetensors").read_bytes()
    save(tmp_path, 2)
    (tmp_path / "model.safetensors").rename(tmp_path / ".next.model.safetensors")
    (tmp_path / "model.safetensors").write_bytes(old)
    digest, calls = checkpoint.digest_file, itertools.count(1)

    def renamed_after_the_first(path):
        found = digest(path)
        if next(calls) == 1:
            os.replace(tmp_path / ".next.model.safetensors", tmp_path / "model.safetensors")
        return found

    monkeypatch.setattr(checkpoint, "digest_file", renamed_after_the_first)
    assert found_epoch(tmp_path) == 2


def test_find_names_run_in_progress(tmp_path):
    save(tmp_path, 1)
    (tmp_path / "model.safetensors").unlink()
    with locked(tmp_path), pytest.raises(InputError) as caught:
        checkpoint.find(tmp_path)
    assert "a run in progress in this folder" in str(caught.value)
    assert "overwrite" not in str(caught.value)
    with pytest.raises(InputError, match=r"missing or damaged: .* Restore both from a copy, or .*`overwrite=True`\.$"):
        checkpoint.find(tmp_path)


def test_weights_of_run_before_first_epoch(tmp_path):
    with locked(tmp_path), pytest.raises(InputError, match="no such file yet: the run in progress"):
        checkpoint.weights_of(tmp_path)

"""Checkpoint of a run: the weights and the training state of an epoch, in a folder.

    RUN/checkpoint/
        model-N.safetensors   weights after epoch N, the last; and after the best on the validation images
        training-N.pt         state of the optimizer, schedule, loader and random generators after the last
        classifier.json       description of the model; see `Description`
        checkpoint.json       settings, rows of the complete epochs, and digests of the files of weights and state

checkpoint.json is replaced after the others are written, and before those of an earlier epoch are deleted: a process
that is killed at any moment leaves the checkpoint of the earlier or of the new epoch, whole.
"""

from __future__ import annotations

import contextlib
import json
import pickle
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError

from ...digests import digest_file, digest_json
from ...folders import replace_tensors, replace_text, replaced_file
from ...formatting import first_line
from ..data import InputError
from ..data.tasks import VALIDATION
from ..results.class_metrics import BALANCED
from ..results.files import CLASSIFIER
from ..untrusted import read_object
from .description import Description

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "checkpoint"
_INDEX = "checkpoint.json"
_FORMAT = 4


class Checkpoint(NamedTuple):
    """Contents of a checkpoint."""

    weights: Path
    settings: dict[str, Any]  # `TuneConfig.identity`
    rows: list[dict[str, Any]]  # of metrics.jsonl
    seconds: float  # since the start of the run
    training: dict[str, Any]  # state of the trainer


def save(
    run: Path,
    weights: Mapping[str, Tensor],
    described: Description,
    training: dict[str, Any],
    *,
    settings: dict[str, Any],
    rows: list[dict[str, Any]],
    seconds: float,
) -> None:
    """Replace the checkpoint of a run, with `weights` and their description."""
    import torch

    folder = run / FOLDER
    model, state = weights_of(run, len(rows)), _state_of(run, len(rows))
    with _disk_errors(folder):
        folder.mkdir(exist_ok=True)
        replace_tensors(model, weights)
        with replaced_file(state) as new, new.open("wb") as file:  # of a path, torch.save hides the cause of an error
            torch.save(training, file)
        files = {path.name: digest_file(path) for path in _files_of(run, rows)}
        replace(described, weights=model.name, weights_xxh3=files[model.name]).write(folder)
        index = {"settings": settings, "rows": rows, "seconds": seconds, "files": files}
        text = json.dumps({"format": _FORMAT, "digest": digest_json(index)} | index)
        replace_text(folder / _INDEX, text)
        for path in folder.iterdir():
            if path.name not in (*files, CLASSIFIER, _INDEX):  # of an earlier epoch, or what a kill left
                shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    """Convert errors of writing to one that says what is left."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save gives no reason, but the error before it does.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = (getattr(cause, "strerror", None) or first_line(cause)).rstrip(".")
        raise InputError(
            f"the checkpoint can't be written to {folder}: {reason}. The previous one, if any, is kept; "
            "free disk space and continue with `resume=RUN`.",
            "out",
            "tune",
        ) from error


def load(run: Path) -> Checkpoint | None:
    """Read the checkpoint of a run, executing no code of it; None if there is none."""
    import torch

    if not exists(run):
        return None
    folder = run / FOLDER
    try:
        values = read_object(folder / _INDEX)
        written, digest = values.pop("format", None), values.pop("digest", None)
        if written != _FORMAT:
            raise ValueError(f"{_INDEX} has format {written}, and this version reads {_FORMAT}")
        if digest != digest_json(values):
            raise ValueError(f"{_INDEX} was changed after it was written")
        rows = values["rows"]
        for path in _files_of(run, rows):
            if digest_file(path) != values["files"].get(path.name):
                raise ValueError(f"{path.name} does not match {_INDEX}")
        state = _state_of(run, len(rows))
        training = torch.load(state, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its message says how to execute the file anyway
        raise _damaged(folder, f"{state.name} holds more than tensors") from error
    except OSError as error:
        raise _damaged(folder, f"{Path(error.filename).name}: {error.strerror}") from error
    except ValueError as error:
        raise _damaged(folder, first_line(error)) from error
    return Checkpoint(weights_of(run, len(rows)), values["settings"], rows, values["seconds"], training)


def exists(run: Path) -> bool:
    """Return True if a run has a checkpoint."""
    return (run / FOLDER / _INDEX).exists()


def delete(run: Path) -> None:
    """Delete the checkpoint of a run; a kill leaves none."""
    (run / FOLDER / _INDEX).unlink(missing_ok=True)
    if (run / FOLDER).exists():
        shutil.rmtree(run / FOLDER)


def weights_of(run: Path, epoch: int) -> Path:
    """Path of the weights after the last or the best epoch."""
    return run / FOLDER / f"model-{epoch}.safetensors"


def _state_of(run: Path, epoch: int) -> Path:
    return run / FOLDER / f"training-{epoch}.pt"


def _files_of(run: Path, rows: Sequence[Mapping[str, Any]]) -> list[Path]:
    """Files of weights and state after the complete epochs with `rows`."""
    epochs = dict.fromkeys([len(rows), best_epoch(rows) or len(rows)])
    return [*(weights_of(run, epoch) for epoch in epochs), _state_of(run, len(rows))]


def _damaged(folder: Path, reason: str) -> InputError:
    return InputError(
        f"{folder}: damaged, or not a checkpoint: {reason}. Restore the folder from a copy, or tune again in another "
        "folder, or in this one with `overwrite=True`."
    )


def best_epoch(rows: Sequence[Mapping[str, Any]]) -> int | None:
    """Return the epoch with the highest validation accuracy, of equal ones the last; None without validation.

    It is the balanced accuracy where a row has it. The last: with few validation images many epochs are equal, and
    those at the end of the schedule change least.

    >>> best_epoch([{"epoch": epoch, "validation": accuracy} for epoch, accuracy in ((1, 90.0), (2, 90.0), (3, 85.0))])
    2
    """
    accuracies = {row["epoch"]: row.get(BALANCED, row.get(VALIDATION)) for row in rows}
    measured = [(accuracy, epoch) for epoch, accuracy in accuracies.items() if accuracy is not None]
    return max(measured)[1] if measured else None

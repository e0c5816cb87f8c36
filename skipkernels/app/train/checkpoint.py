"""Checkpoint of a run: the weights and the training state of an epoch, in a folder that is replaced as a whole.

    RUN/checkpoint/
        model.safetensors    weights after the last epoch
        best.safetensors     weights of the best epoch on the validation images, unless that is the last
        classifier.json      description of the model; see `Description`
        training.pt          state of the optimizer, schedule, loader and random generators
        checkpoint.json      settings, rows of the complete epochs, and digests of the other files

The folder is replaced by `replaced_folder`, so a process that is killed at any moment leaves the checkpoint of an
earlier or of the new epoch, whole.
"""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors import SafetensorError

from ...digests import digest_file, digest_json
from ...folders import replace_tensors, replaced_folder, restored
from ...formatting import first_line
from ..data import InputError
from ..data.tasks import VALIDATION
from ..results.class_metrics import BALANCED
from ..results.files import MODEL
from ..untrusted import read_object
from .description import Description

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "checkpoint"
BEST, TRAINING, INDEX = "best.safetensors", "training.pt", "checkpoint.json"
FORMAT = 3


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
    try:
        with replaced_folder(folder, ["*"]) as new:
            replace_tensors(new / MODEL, weights)
            if rows and best_epoch(rows) not in (None, rows[-1]["epoch"]):  # an earlier epoch is the best
                shutil.copyfile(folder / BEST if (folder / BEST).exists() else folder / MODEL, new / BEST)
            torch.save(training, new / TRAINING)
            files = {path.name: digest_file(path) for path in sorted(new.iterdir())}
            replace(described, weights_xxh3=files[MODEL]).write(new)
            index = {"settings": settings, "rows": rows, "seconds": seconds, "files": files}
            (new / INDEX).write_text(json.dumps({"format": FORMAT, "digest": digest_json(index)} | index), "utf-8")
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch.save gives no reason, but the error before it does.
        cause = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = (getattr(cause, "strerror", None) or first_line(cause)).rstrip(".")
        raise InputError(
            f"the checkpoint can't be written to {folder}: {reason}. The previous one, if any, is kept; "
            "free disk space and continue with `resume=True`.",
            "out",
            "tune",
        ) from error


def load(run: Path) -> Checkpoint | None:
    """Read the checkpoint of a run, executing no code of it; None if there is none."""
    import torch

    folder = restored(run / FOLDER)
    if not folder.is_dir():
        return None
    try:
        values = read_object(folder / INDEX)
        written, digest = values.pop("format", None), values.pop("digest", None)
        if written != FORMAT:
            raise ValueError(f"{INDEX} has format {written}, and this version reads {FORMAT}")
        if digest != digest_json(values):
            raise ValueError(f"{INDEX} was changed after it was written")
        for name, expected in values["files"].items():
            if digest_file(folder / name) != expected:
                raise ValueError(f"{name} does not match {INDEX}")
        training = torch.load(folder / TRAINING, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its message says how to execute the file anyway
        raise _damaged(folder, f"{TRAINING} holds more than tensors") from error
    except OSError as error:
        raise _damaged(folder, f"{Path(error.filename).name}: {error.strerror}") from error
    except ValueError as error:
        raise _damaged(folder, first_line(error)) from error
    return Checkpoint(folder / MODEL, values["settings"], values["rows"], values["seconds"], training)


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

"""Checkpoint of a run: weights in safetensors, and training state of the same epoch in state.pt.

New weights are written beside the old file. Then state.pt, which has their digest, is replaced, which commits the new
epoch. Then classifier.json gets the digest, and the weights are renamed. If a process is killed at any point, `find`
returns both files of one epoch, and `weights_of` the weights of classifier.json.

With validation images, state.pt also has the digest of the weights of the best epoch. They are in the weights file, or
in best.safetensors beside it if a later epoch is not better. After the last epoch they become the weights file.
"""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...digests import digest_file
from ...folders import is_locked, partial_of, replace_tensors, replaced_file
from ...formatting import first_line
from ..data import InputError
from ..untrusted import open_regular
from .description import CLASSIFIER, Description
from .errors import argument_error
from .state_checks import check_types

MODEL, DELTA, STATE = "model.safetensors", "delta.safetensors", "state.pt"
BEST = "best.safetensors"
FORMAT = 2
_MAX_READS = 100  # attempts to read a checkpoint that a running process replaces
# Errors of torch.load for a damaged file.
_LOAD_ERRORS: tuple[type[Exception], ...] = (OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError)
_LOAD_ERRORS += (AttributeError, zipfile.BadZipFile, zlib.error)

_STATE: dict[str, Any] = {
    "config": "plain mapping",
    "rows": "plain list",
    "seconds": "number",
    "trainer": ("mapping", "null"),
}
_ROW: dict[str, Any] = {
    "epoch": "whole number",
    "loss": "number",
    "lr": "numbers by name",
    "steps": "whole number",
    "kept_classes": "number",
    "kept_histogram": "numbers by name",
    "seconds": "number",
    "seconds_waiting_for_features": "number",
    "stage_seconds": "numbers by name",
    "accuracy": "numbers by name",
}


class Checkpoint(NamedTuple):
    """Weights file and training state of a run."""

    weights: Path
    state: dict[str, Any]


def save(
    folder: Path,
    file: str,
    weights: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    state: dict[str, Any],
    *,
    best: str | None = None,
    is_best: bool = False,
) -> tuple[str, str | None]:
    """Replace the checkpoint of a run atomically: a weights file, and a state that `torch.load` reads as weights only.

    The weights with the digest `best`, of the best epoch so far, are kept, unless the new ones are the best.

    Returns:
        Digests of the weights, and of those of the best epoch now.

    Raises:
        InputError: If the disk is full, or the folder can't be written; the old checkpoint is kept.
    """
    next_weights = folder / _next_name(file)

    state = state | {"format": FORMAT}
    try:
        replace_tensors(next_weights, weights, dict(metadata))
        digest = digest_file(next_weights)
        state["weights"] = {"file": file, "xxh3": digest}
        state["best"] = digest if is_best else best
        with replaced_file(folder / STATE) as new:
            torch.save(state, new)
        _rename(folder, next_weights, state)
    except (OSError, TypeError, RuntimeError) as error:
        raise argument_error(
            "out",
            f"the checkpoint can't be written to {folder}: {_reason(error)} The previous one, if any, is "
            "kept; free disk space and continue with `resume=True`.",
        ) from error
    return state["weights"]["xxh3"], state["best"]


def _rename(folder: Path, written: Path, state: dict[str, Any]) -> None:
    """Rename weights that `state` names to their final name; keep those of the best epoch, and only those."""
    _set_digest(folder, state)
    named, best = folder / state["weights"]["file"], state.get("best")
    if best == state["weights"]["xxh3"]:
        os.replace(written, named)
        (folder / BEST).unlink(missing_ok=True)
        return
    if best is not None and _digest(named) == best:
        os.replace(named, folder / BEST)
    os.replace(written, named)


def _set_digest(folder: Path, state: dict[str, Any]) -> None:
    """Write the digest of the weights that `state` names to the classifier.json of the run, if there is one."""
    if (folder / CLASSIFIER).exists() and (described := Description.read(folder)).weights == state["weights"]["file"]:
        replace(described, weights_xxh3=state["weights"]["xxh3"]).write(folder)


def best_weights(folder: Path, state: dict[str, Any]) -> Path:
    """Return the weights file of the best epoch of a run.

    Raises:
        InputError: If it is missing or damaged.
    """
    path = _with_digest(folder, state["weights"]["file"], state["best"])
    if path is not None:
        return path
    raise InputError(
        f"{folder / BEST}: missing or damaged: it does not match {STATE}. Restore both from a copy, or tune again in "
        "another folder, or in this one with `overwrite=True`."
    )


def keep_best(folder: Path) -> Path:
    """Make the weights of the best epoch those of the run; return their file.

    Raises:
        InputError: If they are damaged, or can't be written.
    """
    found = find(folder)
    assert found is not None and found.state["best"] is not None
    path, named = best_weights(folder, found.state), folder / found.state["weights"]["file"]
    found.state["weights"]["xxh3"] = found.state["best"]
    try:
        if path != named:
            with replaced_file(folder / STATE) as new:
                torch.save(found.state, new)
            _set_digest(folder, found.state)
            os.replace(path, named)
        (folder / BEST).unlink(missing_ok=True)
    except (OSError, TypeError, RuntimeError) as error:
        raise argument_error("out", f"the checkpoint can't be written to {folder}: {_reason(error)}") from error
    return named


def find(folder: Path) -> Checkpoint | None:
    """Return the last complete checkpoint of a run; None if there is none.

    A running process may replace both files between the two reads. They are read until they match, or until the same
    state is found twice without its weights.

    Raises:
        InputError: If the checkpoint is damaged, or replaced faster than it is read.
    """
    missed = None
    for _ in range(_MAX_READS):
        if not (folder / STATE).exists():
            return None
        state = _load_state(folder / STATE)
        named = state["weights"]
        path = _with_digest(folder, named["file"], named["xxh3"])
        if path is not None:
            return Checkpoint(path, state)
        if missed == named:
            break
        missed = named
    if is_locked(folder):
        raise InputError(
            f"{folder / named['file']}: does not match {STATE}, but a run in progress in this folder "
            "replaces both. Try again, or wait for its end."
        )
    raise InputError(
        f"{folder / named['file']}: missing or damaged: it does not match {STATE}. Restore both from a copy, or tune "
        "again in another folder, or in this one with `overwrite=True`."
    )


def _with_digest(folder: Path, file: str, digest: str) -> Path | None:
    """Return the weights file, or a later or earlier one beside it, with a digest."""
    paths = (folder / file, folder / _next_name(file), folder / BEST)
    return next((path for path in paths if _digest(path) == digest), None)


def _digest(path: Path) -> str | None:
    """Return the digest of a file; None if there is no such file."""
    try:
        return digest_file(path) if path.is_file() else None
    except FileNotFoundError:
        return None


def recover(folder: Path) -> Checkpoint | None:
    """Find a checkpoint, and complete it: rename the weights and delete temporary files of a killed process."""
    found = find(folder)
    if found is None:
        return None
    named = folder / found.state["weights"]["file"]
    if found.weights != named:
        _rename(folder, found.weights, found.state)
    remove_leftovers(folder)
    return Checkpoint(named, found.state)


def remove_leftovers(folder: Path, others: Iterable[str] = ()) -> None:
    """Delete the temporary files that killed processes left of a checkpoint and of `others`, names of other files."""
    next_names = [_next_name(file) for file in (MODEL, DELTA)]
    written = {*others, MODEL, DELTA, STATE, CLASSIFIER, *next_names}
    partial = [path for path in folder.iterdir() if partial_of(path.name) in written]
    for path in (*partial, *(folder / name for name in next_names)):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def weights_of(folder: Path) -> tuple[Description | None, Path]:
    """Return the contents of classifier.json, or None if there is none, and the weights file that has its digest.

    The run may be in progress: then both are read again until they match. A folder without a digest is of an earlier
    version, or a run that could not be described; its weights are those of the training state, or else found by name.

    Raises:
        InputError: If there are no such weights.
    """
    missed = None
    for _ in range(_MAX_READS):
        described = Description.read(folder) if (folder / CLASSIFIER).exists() else None
        if described is None or described.weights_xxh3 is None:
            return described, _without_digest(folder, described)
        path = _with_digest(folder, described.weights, described.weights_xxh3)
        if path is not None:
            return described, path
        if described == missed:
            break
        missed = described
    assert described is not None
    raise InputError(
        f"{folder / described.weights}: missing or damaged: it does not match {CLASSIFIER}. Copy the whole folder, or "
        "tune again in another folder, or in this one with `overwrite=True`."
    )


def _without_digest(folder: Path, described: Description | None) -> Path:
    names = (MODEL, DELTA) if described is None else (described.weights,)
    found = find(folder) if names[0] in (MODEL, DELTA) else None
    if found is not None:
        return found.weights
    for name in names:
        if (folder / name).is_file():
            return folder / name
    if described is not None:
        raise InputError(f"{folder / names[0]}: no such file, though {CLASSIFIER} names it. Copy the whole folder.")
    if is_locked(folder):
        raise InputError(
            f"{folder / MODEL}: no such file yet: the run in progress in this folder has not completed its "
            "first epoch. Wait for it."
        )
    raise InputError(
        f"{folder / MODEL}: no such file; the run stopped before its first epoch was complete. Restart it with "
        "`resume=True`."
    )


def _next_name(file: str) -> str:
    return f".next.{file}"  # the same suffix: open_clip selects the format by it


def _load_state(path: Path) -> dict[str, Any]:
    try:
        opened = open_regular(path)
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}). Is it a file that you may read?") from error
    try:
        with opened as file:
            with zipfile.ZipFile(file) as archive:
                stored = all(part.compress_type == zipfile.ZIP_STORED for part in archive.infolist())
                if not stored or archive.testzip() is not None:  # torch.load does not compare checksums
                    raise zipfile.BadZipFile
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:  # its message says how to execute the file anyway
        raise InputError(
            f"{path}: damaged, or it holds more than a state; tune again with `overwrite=True`."
        ) from error
    except _LOAD_ERRORS as error:  # their messages are about parts of the archive
        raise InputError(
            f"{path}: damaged: it was truncated, or changed after it was written; tune again with `overwrite=True`."
        ) from error
    if not (isinstance(state, dict) and "format" in state and _names_weights(state.get("weights"))):
        raise InputError(f"{path}: not the state of a run; tune again with `overwrite=True`.")
    if state["format"] != FORMAT:
        raise InputError(
            f"{path}: written in format {state['format']}, and this version reads {FORMAT}; use the version that wrote "
            "it, or tune again with `overwrite=True`."
        )
    try:
        check_types(state, _STATE)
        check_types({"best": state.setdefault("best", None)}, {"best": ("text", "null")})  # none in earlier versions
        for number, row in enumerate(state["rows"]):
            check_types(row, _ROW, f"rows[{number}]")
            check_types({"validation": row.get("validation")}, {"validation": ("number", "null")}, f"rows[{number}]")
    except ValueError as error:
        raise InputError(f"{path}: damaged: {error}; tune again with `overwrite=True`.") from error
    return state


def _names_weights(value: Any) -> bool:
    return isinstance(value, dict) and value.get("file") in (MODEL, DELTA) and isinstance(value.get("xxh3"), str)


def _reason(error: BaseException) -> str:
    if isinstance(error.__context__, OSError) and not isinstance(error, OSError):  # torch.save gives no reason
        error = error.__context__
    text = getattr(error, "strerror", None) or first_line(error)
    return text if text.endswith(".") else f"{text}."

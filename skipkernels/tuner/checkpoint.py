"""The checkpoint of a run: weights in safetensors, all else in state.pt, and never of two different epochs.

The weights of an epoch are written beside the old ones. Then state.pt is replaced, which names their digest: at that
moment the new epoch takes the place of the old. Then the weights get their name. Whatever the moment at which a process
is killed, `find` has both halves of one epoch.
"""

from __future__ import annotations

import os
import pickle
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..data import InputError
from ..store import open_regular, partial_of, replace_file, write_tensors
from ..store.digest import digest_file
from ..store.lock import holder
from .state_checks import check_types

MODEL, DELTA, STATE = "model.safetensors", "delta.safetensors", "state.pt"
FORMAT = 1
_READS = 100  # at most, of a checkpoint that a run replaces meanwhile
# What torch.load raises for a file that is damaged.
_NO_STATE: tuple[type[Exception], ...] = (OSError, RuntimeError, EOFError, LookupError, ValueError, TypeError)
_NO_STATE += (AttributeError, zipfile.BadZipFile, zlib.error)


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
    "budget": "numbers by name",
    "accuracy": "numbers by name",
}


class Checkpoint(NamedTuple):
    """What a run left: the file of its weights, and the rest."""

    weights: Path
    state: dict[str, Any]


def save(
    folder: Path, file: str, weights: Mapping[str, Tensor], notes: Mapping[str, str], state: dict[str, Any]
) -> None:
    """Replace the checkpoint of a run as a whole.

    Args:
        folder: Of the run.
        file: Name of the file of weights.
        weights: Tensors by name.
        notes: Metadata of that file, as `weights.notes` makes them.
        state: What `torch.load` reads with `weights_only=True`.

    Raises:
        InputError: If there is no room, or the folder can't be written; the old checkpoint stays.
    """
    following = folder / _following(file)

    def write(opened: BinaryIO) -> None:
        _, digest = write_tensors(opened, weights, notes)
        state["weights"] = {"file": file, "xxh3": digest}

    state = state | {"format": FORMAT}
    try:
        replace_file(following, write)
        replace_file(folder / STATE, lambda opened: torch.save(state, opened))
        os.replace(following, folder / file)
    except (OSError, TypeError, RuntimeError) as error:
        raise InputError(
            f"--out: the checkpoint can't be written to {folder}: {_reason(error)} The one before it, if any, is kept; "
            "make room and go on with --resume."
        ) from error


def find(folder: Path) -> Checkpoint | None:
    """The last complete checkpoint of a run; what was begun after it is of no account.

    A run may replace both files between the reading of one and of the other. So they are read again until they match,
    or the same state was found twice without its weights.

    Raises:
        InputError: If it is damaged, or replaced faster than it is read.
    """
    missed = None
    for _ in range(_READS):
        if not (folder / STATE).exists():
            return None
        state = _load_state(folder / STATE)
        named = state["weights"]
        for path in (folder / named["file"], folder / _following(named["file"])):
            if _digest(path) == named["xxh3"]:
                return Checkpoint(path, state)
        if missed == named:
            break
        missed = named
    at_work = holder(folder)
    if at_work is not None:
        raise InputError(
            f"{folder / named['file']}: not the one that {STATE} belongs to, but a run is going on in this folder "
            f"({at_work}) and replaces both. Try again, or wait for its end."
        )
    raise InputError(
        f"{folder / named['file']}: missing or damaged: it is not the one that {STATE} belongs to. Put both back "
        "from a copy, or tune again in another folder, or in this one with --overwrite."
    )


def _digest(path: Path) -> str | None:
    """Digest of a file; None if there is none, or no longer."""
    try:
        return digest_file(path) if path.is_file() else None
    except FileNotFoundError:
        return None


def settle(folder: Path) -> Checkpoint | None:
    """`find`, and what a killed process left half-done is done: the weights have their name."""
    found = find(folder)
    if found is None:
        return None
    named = folder / found.state["weights"]["file"]
    if found.weights != named:
        os.replace(found.weights, named)
    remove_leftovers(folder)
    return Checkpoint(named, found.state)


def remove_leftovers(folder: Path, others: Iterable[str] = ()) -> None:
    """Delete temporary files that killed processes left of a checkpoint and of `others`, files written beside it."""
    following = [_following(file) for file in (MODEL, DELTA)]
    written = {*others, MODEL, DELTA, STATE, *following}
    partial = [path for path in folder.iterdir() if partial_of(path.name) in written]
    for path in (*partial, *(folder / name for name in following)):
        path.unlink(missing_ok=True)


def weights_of(folder: Path) -> Path:
    """The file of the weights of a run that may still go on, or was copied without its state.

    Raises:
        InputError: If there is none, or it is damaged.
    """
    found = find(folder)
    if found is not None:
        return found.weights
    for path in (folder / MODEL, folder / DELTA):
        if path.is_file():
            return path
    at_work = holder(folder)
    if at_work is not None:
        raise InputError(
            f"{folder / MODEL}: no such file yet: the run that is going on in this folder ({at_work}) has not "
            "completed its first epoch. Wait for that."
        )
    raise InputError(
        f"{folder / MODEL}: no such file; the run stopped before its first epoch was complete. Begin it again with "
        "tune --resume."
    )


def _following(file: str) -> str:
    return f".next.{file}"  # with its suffix, by which open_clip knows how to read it


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
    except pickle.UnpicklingError as error:  # its text tells how to execute the file after all
        raise InputError(f"{path}: damaged, or it holds more than a state; tune again with --overwrite.") from error
    except _NO_STATE as error:  # whose texts are about parts of an archive
        raise InputError(
            f"{path}: damaged: it was cut short, or changed after it was written; tune again with --overwrite."
        ) from error
    if not (isinstance(state, dict) and "format" in state and _names_weights(state.get("weights"))):
        raise InputError(f"{path}: not the state of a run; tune again with --overwrite.")
    if state["format"] != FORMAT:
        raise InputError(
            f"{path}: written in format {state['format']}, and this version reads {FORMAT}; use the version that wrote "
            "it, or tune again with --overwrite."
        )
    try:
        check_types(state, _STATE)
        for number, row in enumerate(state["rows"]):
            check_types(row, _ROW, f"rows[{number}]")
    except ValueError as error:
        raise InputError(f"{path}: damaged: {error}; tune again with --overwrite.") from error
    return state


def _names_weights(value: Any) -> bool:
    return isinstance(value, dict) and value.get("file") in (MODEL, DELTA) and isinstance(value.get("xxh3"), str)


def _reason(error: BaseException) -> str:
    if not isinstance(error, OSError) and isinstance(error.__context__, OSError):  # torch.save says only that it failed
        error = error.__context__
    text = getattr(error, "strerror", None) or next(iter(str(error).strip().splitlines()), type(error).__name__)
    return text if text.endswith(".") else f"{text}."

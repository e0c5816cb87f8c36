"""Loading of the weights of a run into a model and a method."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from ...digests import digest_file
from ..data import InputError
from ..heads import Head
from ..methods import Method
from ..results.files import CLASSIFIER, HEAD
from ..untrusted import OPEN_CLIP, check_source
from .description import Description
from .model import LOCAL_DIR, Loaded, load_model, load_weights


def load_into(method: Method, path: Path) -> None:
    """Load a weights file, of which the digest has been compared, into a method."""
    method.load_state_dict(load_file(path))


def load_run_model(folder: Path, described: Description, file: Path, device: torch.device, *, trust: bool) -> Loaded:
    """Load the model of a run, with its weights if `file` has all of them; else the pretrained one.

    `described` and `file` are those of `reading.read_model`. `trust`: see `Classifier.load`.
    """
    name, pretrained = described.model, described.pretrained
    if described.whole_model and (folder / OPEN_CLIP).is_file():
        name, pretrained = f"{LOCAL_DIR}{folder.absolute()}", None
    else:
        check_source(folder / CLASSIFIER, "model", name, trust)
        check_source(folder / CLASSIFIER, "pretrained", pretrained or "", trust)
    try:
        loaded = load_model(name, pretrained, device, architecture_only=described.whole_model, trust=trust)
    except InputError as error:  # the caller gave a folder, and no model
        raise InputError(f"{folder / CLASSIFIER}: {error.about(error.argument)}") from error
    if described.whole_model:
        load_weights(loaded[0], file)
    return loaded


def load_run_method(method: Method, described: Description, file: Path) -> None:
    """Load what a run trained beside its model, and its head, into a method on the result of `load_run_model`."""
    if not described.whole_model:
        load_into(method, file)
    method.use_head(_load_head(file.parent, described), described.classes)


def _load_head(folder: Path, described: Description) -> Head | None:
    """Read the head that a description names; None if there is none."""
    if described.head_xxh3 is None:
        return None
    path = folder / HEAD
    try:
        if digest_file(path) != described.head_xxh3:
            raise ValueError("it does not match classifier.json")
        return Head.from_tensors(load_file(path))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: missing or damaged ({error}). Copy the whole folder, or tune again in another folder, or in this "
            "one with `overwrite=True`."
        ) from error

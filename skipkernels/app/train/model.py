"""Loading of models by name, with their weights, image transform and tokenizer."""

from __future__ import annotations

import contextlib
import difflib
import logging
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ...formatting import first_line
from ..data import InputError
from ..data.files import absolute_path, expanded
from ..devices import seeded
from ..methods.registry import PACKAGED, packaged
from ..untrusted import OPEN_CLIP, read_open_clip_config
from .hugging_face_model import load_hugging_face

Loaded = tuple[nn.Module, Callable, Callable]
"""Model, image transform and tokenizer."""
RANDOM = "random"
LOCAL_DIR, HUB = "local-dir:", "hf-hub:"
_FILE_TYPES = (".safetensors", ".pt", ".pth", ".bin")
# What open_clip, transformers and their downloads raise for files that are missing, damaged or of another version.
_LOADING_ERRORS = (OSError, RuntimeError, ValueError, TypeError, KeyError, ImportError, SafetensorError)
_IN_FOLDER = (
    f"The folder must have {OPEN_CLIP} and its weights, or a model of transformers and its processor: save both with "
    "save_pretrained."
)
_DOWNLOADED = (
    "Is the name correct, and the network available? Some models need transformers: pip install "
    "'skipkernels[hugging-face]'. A file of weights needs no network, nor does `model=pictogram-tiny`."
)


def load_model(
    name: str,
    pretrained: str | None,
    device: torch.device,
    *,
    architecture_only: bool = False,
    seed: int = 0,
    trust: bool = False,
) -> Loaded:
    """Load a model in evaluation mode, with its image transform and tokenizer. Runs no code of a folder or of the hub.

    A model of open_clip has its configuration in the attribute `model_cfg`.

    Args:
        name: A model of `open_clip.list_models()`, or pictogram-tiny; or one with its weights: "hf-hub:ORG/NAME" of the
            Hugging Face hub, or "local-dir:DIR", a folder in the form of open_clip, such as a run folder, or a
            `CLIPModel`, `MetaClip2Model`, `SiglipModel` or `Siglip2Model` of transformers with its processor.
        pretrained: An open_clip tag, the path of a state dict (safetensors, or a file that `torch.load` reads with
            `weights_only=True`), "random", or None for those of pictogram-tiny.
        device: Device of the model.
        architecture_only: Load no weights of a folder or of the hub; those of the model are random.
        seed: Seed of random weights.
        trust: Load models of the hub that the configuration of the model names as its towers.
    """
    check_model(name, pretrained)
    packaged().register()  # also the image tower of a folder with a tuned pictogram-tiny
    try:
        with quiet(), seeded(seed, torch.device("cpu")):
            if name.startswith((LOCAL_DIR, HUB)):
                model, transform, tokenizer = _load_saved(name, weights=not architecture_only, trust=trust)
            else:
                model, transform, tokenizer = _load_by_tag(name, pretrained)
    except InputError:
        raise
    except _LOADING_ERRORS as error:
        cause: BaseException = error
        while isinstance(cause.__context__, OSError):  # the first cause of a failed download
            cause = cause.__context__
        tag = "" if pretrained is None else f" with {pretrained}"
        remedy = _IN_FOLDER if name.startswith(LOCAL_DIR) else _DOWNLOADED
        raise _refused(f"{name}{tag} could not be loaded: {first_line(cause).strip('. ')}. {remedy}") from error
    return model.to(device).eval(), transform, tokenizer


def _refused(reason: str, argument: str = "model") -> InputError:
    return InputError(reason, argument, "tune")


def check_model(name: str, pretrained: str | None) -> None:
    """Raise the errors of `load_model` about the names of a model and its weights, without loading anything."""
    if name.startswith((LOCAL_DIR, HUB)):
        if pretrained is not None:
            raise _refused(f"{name} has its own weights; leave it out.", "pretrained")
        if name in (LOCAL_DIR, HUB):
            raise _refused(f"{name}: must name a model, as in {LOCAL_DIR}DIR or {HUB}ORG/NAME.")
        return
    known = [*open_clip.list_models(), PACKAGED]
    if name not in known:
        close = difflib.get_close_matches(name, known, 3)
        hint = f"did you mean {' or '.join(close)}?" if close else "open_clip.list_pretrained() has the names."
        raise _refused(f"open_clip has no model {name!r}; {hint}")
    tags, file = open_clip.list_pretrained_tags_by_model(name), _file(pretrained)
    if pretrained is None:
        if name != PACKAGED:
            choices = ", ".join(tags) or "no tags"
            raise _refused(f"{name} needs weights: a file, random, or one of {choices}.", "pretrained")
    elif file is not None:
        if not file.is_file():
            raise _refused(f"no file {file}.", "pretrained")
    elif pretrained != RANDOM:
        check_activation(name, pretrained)
        if pretrained not in tags:
            shown = ", ".join(tags) or "none"
            raise _refused(
                f"{name} has no tag {pretrained!r}, and {pretrained} is not a file; tags: {shown}.", "pretrained"
            )


def check_activation(name: str, tag: str) -> None:
    """Check that the weights of a tag were trained with the activation of the model, QuickGELU or GELU.

    Otherwise open_clip only warns, and the model is less accurate. Downloads nothing.
    """
    suffix = "-quickgelu"
    other = name.removesuffix(suffix) if name.endswith(suffix) else name + suffix
    fitting = open_clip.get_pretrained_cfg(other, tag) if other in open_clip.list_models() else {}
    if not fitting:
        return
    has, trained = ((config or {}).get("quick_gelu", False) for config in (open_clip.get_model_config(name), fitting))
    if has != trained:
        names = {True: "QuickGELU", False: "GELU"}
        raise _refused(f"{tag} was trained with {names[trained]}, and {name} has {names[has]}; use {other}.")


def _file(pretrained: str | None) -> Path | None:
    """Path of a file of weights; None for a tag."""
    if pretrained is None or Path(pretrained).suffix not in _FILE_TYPES:
        return None
    return expanded(pretrained)


def _load_by_tag(name: str, pretrained: str | None) -> Loaded:
    """Load a model of open_clip with the weights of a tag, of a file, or random ones."""
    file = _file(pretrained)
    tag = pretrained if file is None and pretrained != RANDOM else None
    model, _, transform = open_clip.create_model_and_transforms(name, pretrained=tag)
    if file is not None:
        load_weights(model, file)
    elif pretrained is None:
        model.load_state_dict(packaged().state_dict())
    model.model_cfg = open_clip.get_model_config(name)
    return model, transform, _tokenizer(name, model.model_cfg)


def _load_saved(name: str, *, weights: bool, trust: bool) -> Loaded:
    """Load a model with its weights from a folder or the hub: one of open_clip, else of transformers."""
    where = name.partition(":")[2]
    if name.startswith(LOCAL_DIR):
        folder = absolute_path(where)
        if not folder.is_dir():
            raise _refused(f"{name}: no folder {folder}.")
        if not (folder / OPEN_CLIP).is_file():
            return load_hugging_face(name, folder, weights=weights)
        file, source, repository = folder / OPEN_CLIP, f"{LOCAL_DIR}{folder}", None
    else:
        try:
            file, source, repository = Path(hf_hub_download(where, OPEN_CLIP)), name, where
        except EntryNotFoundError:  # a model of transformers, which may be in the cache without a network
            return load_hugging_face(name, where, weights=weights)
    config = read_open_clip_config(file, repository=repository, trust=trust)
    if tower := config["text_cfg"].get("hf_model_name"):
        from transformers import AutoConfig

        AutoConfig.from_pretrained(tower, trust_remote_code=False)  # refuses code, which open_clip would ask to run
    model, _, transform = open_clip.create_model_and_transforms(
        source,
        load_weights=weights,
        require_pretrained=weights,
        pretrained_text=False,  # the weights of a text tower alone, which would be downloaded
    )
    model.model_cfg = config
    return model, transform, _tokenizer(source, config)


def _tokenizer(source: str, config: dict[str, Any]) -> Callable:
    """Return the tokenizer of a model of open_clip, by its name or folder."""
    options = {"trust_remote_code": False} if config["text_cfg"].get("hf_tokenizer_name") else {}
    return open_clip.get_tokenizer(source, **options)


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict into a model, without executing code from the file."""
    try:
        if hasattr(model, "visual"):
            open_clip.load_checkpoint(model, str(path), weights_only=True)
        else:  # a model of transformers
            model.load_state_dict(load_file(path))
    except pickle.UnpicklingError as error:  # its message says how to execute the file anyway
        raise InputError(f"{path}: not usable as weights: it holds more than tensors.") from error
    except Exception as error:  # open_clip checks no structure: a file with another one raises any type
        reason = first_line(error)
        if isinstance(error, AssertionError) or reason.startswith("Error(s) in loading state_dict"):
            last = (str(error).splitlines() or ["another structure"])[-1].strip(".\t ")
            reason = f"they are those of another ({last}). Pass the `model` of the weights."
        if "TorchScript" in reason:  # PyTorch's message says how to execute the file
            reason = "it is a TorchScript archive, which holds code. Pass the tag of these weights, or a state dict."
        raise InputError(f"{path}: not usable as weights of this model: {reason}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Disable logging up to ERROR.

    open_clip warns of a model without weights, which are loaded later or meant to be random, and logs the error of a
    download that it then raises.
    """
    before, handlers = logging.root.manager.disable, list(logging.root.handlers)
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)
        logging.root.handlers[:] = handlers  # without any, logging.info of open_clip adds one to stderr

"""Loading of models by name, with their weights, image transform and tokenizer."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.utils import EntryNotFoundError
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms import Compose, RandomHorizontalFlip

from ...formatting import first_line
from ...options import Preset
from ..data import InputError
from ..data.files import absolute_path
from ..methods.registry import PACKAGED, packaged
from ..untrusted import OPEN_CLIP, read_open_clip_config
from .hugging_face_model import load_hugging_face

Loaded = tuple[nn.Module, Callable, Callable]
"""Model, image transform and tokenizer."""
RANDOM = "random"
LOCAL_DIR, HUB = "local-dir:", "hf-hub:"
_FILE_TYPES = (".safetensors", ".pt", ".pth", ".bin")


class _Asked(NamedTuple):
    """A model of a folder or of the hub; see `load_model`."""

    name: str
    weights: bool
    trust: bool


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
    if name == PACKAGED:
        packaged().register()
    check_model(name, pretrained)
    where, asked = name.partition(":")[2], _Asked(name, not architecture_only, trust)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name.startswith(LOCAL_DIR):
            model, transform, tokenizer = _load_folder(asked, absolute_path(where))
        elif name.startswith(HUB):
            model, transform, tokenizer = _load_hub(asked, where)
        else:
            model, transform, tokenizer = _load_by_tag(name, pretrained)
    return model.to(device).eval(), transform, tokenizer


def check_model(name: str, pretrained: str | None) -> None:
    """Raise the errors of `load_model` about the names of a model and its weights, without loading anything."""
    if name.startswith((LOCAL_DIR, HUB)):
        if pretrained is not None:
            raise InputError(f"{name} has its own weights; leave it out.", "pretrained", "tune")
        if name in (LOCAL_DIR, HUB):
            raise InputError(f"{name}: must name a model, as in {LOCAL_DIR}DIR or {HUB}ORG/NAME.", "model", "tune")
        return
    known = [*open_clip.list_models(), PACKAGED]
    if name not in known:
        close = difflib.get_close_matches(name, known, 3)
        hint = f"did you mean {' or '.join(close)}?" if close else "open_clip.list_pretrained() has the names."
        raise InputError(f"open_clip has no model {name!r}; {hint}", "model", "tune")
    _check_weights(name, pretrained)


def _check_weights(name: str, pretrained: str | None) -> None:
    """Raise an InputError unless a model of open_clip has weights of this name."""
    tags, file = open_clip.list_pretrained_tags_by_model(name), _file(pretrained)
    if pretrained is None:
        if name != PACKAGED:
            choices = ", ".join(tags) or "no tags"
            raise InputError(f"{name} needs weights: a file, random, or one of {choices}.", "pretrained", "tune")
        return
    check_activation(name, pretrained)
    if file is None and pretrained != RANDOM and pretrained not in tags:
        raise InputError(
            f"{name} has no tag {pretrained!r}, and {pretrained} is not a file; tags: {', '.join(tags) or 'none'}.",
            "pretrained",
            "tune",
        )
    if file is not None and not file.is_file():
        raise InputError(f"no file {file}.", "pretrained", "tune")


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
        raise InputError(
            f"{tag} was trained with {names[trained]}, and {name} has {names[has]}; use {other}.", "model", "tune"
        )


def _file(pretrained: str | None) -> Path | None:
    """Path of a file of weights; None for a tag."""
    if pretrained is None or Path(pretrained).suffix not in _FILE_TYPES:
        return None
    return Path(os.path.expanduser(pretrained))


def _load_by_tag(name: str, pretrained: str | None) -> Loaded:
    """Load a model of open_clip with the weights of a tag, of a file, or random ones."""
    file = _file(pretrained)
    tag = pretrained if file is None and pretrained != RANDOM else None
    try:
        with quiet():
            model, _, transform = open_clip.create_model_and_transforms(name, pretrained=tag)
    except (OSError, RuntimeError) as error:
        raise _not_created(name, tag, error) from error
    if file is not None:
        load_weights(model, file)
    elif pretrained is None:
        model.load_state_dict(packaged().state_dict())
    model.model_cfg = open_clip.get_model_config(name)
    return model, transform, _tokenizer(name, name, model.model_cfg)


def _not_created(name: str, tag: str | None, error: BaseException) -> InputError:
    """Return the error for a model that open_clip could not create, with the first cause of a failed download."""
    while isinstance(error.__context__, OSError):
        error = error.__context__
    reason = first_line(error).strip(". ")
    if tag is None:
        return InputError(f"{name} could not be created: {reason}.", "model", "tune")
    return InputError(
        f"the weights {tag} of {name} could not be downloaded: {reason}. Is the network available? If not, pass the "
        f"path of their file, or use `model={PACKAGED}`, which needs no download.",
        "pretrained",
        "tune",
    )


def _load_folder(asked: _Asked, folder: Path) -> Loaded:
    """Load a model from a folder."""
    name = asked.name
    if not folder.is_dir():
        raise InputError(f"{name}: no folder {folder}.", "model", "tune")
    if (folder / OPEN_CLIP).is_file():
        return _load_open_clip(asked, f"{LOCAL_DIR}{folder}", folder / OPEN_CLIP)
    if not (folder / "config.json").is_file():
        raise InputError(
            f"{name}: {folder} has no {OPEN_CLIP} of open_clip, and no config.json of transformers; name "
            "the folder of a saved model.",
            "model",
            "tune",
        )
    return load_hugging_face(name, folder, weights=asked.weights)


def _load_hub(asked: _Asked, where: str) -> Loaded:
    """Load a model from the Hugging Face hub."""
    try:
        with quiet():
            file = hf_hub_download(where, OPEN_CLIP)
    except EntryNotFoundError:  # a model of transformers, which may be in the cache without a network
        return load_hugging_face(asked.name, where, weights=asked.weights)
    except (OSError, ValueError) as error:
        raise InputError(f"{asked.name} could not be loaded: {first_line(error)}", "model", "tune") from error
    return _load_open_clip(asked, asked.name, Path(file))


def _load_open_clip(asked: _Asked, source: str, file: Path) -> Loaded:
    """Load a model that has a configuration file of open_clip. `source` is the name that open_clip takes."""
    packaged()  # for a folder with its image tower
    try:
        config = read_open_clip_config(file, trust=asked.trust)
        _check_text_tower(config["text_cfg"])
        with quiet():
            model, _, transform = open_clip.create_model_and_transforms(
                source,
                load_weights=asked.weights,
                require_pretrained=asked.weights,
                pretrained_text=False,  # the weights of a text tower alone, which would be downloaded
            )
    except InputError:
        raise
    except (OSError, RuntimeError, ValueError, TypeError, KeyError, SafetensorError) as error:
        # a damaged file, or one of another version of open_clip
        raise InputError(f"{asked.name} could not be loaded: {first_line(error)}", "model", "tune") from error
    model.model_cfg = config
    return model, transform, _tokenizer(asked.name, source, config)


def _check_text_tower(config: dict[str, Any]) -> None:
    """Refuse a text tower of transformers with code, which open_clip would ask to run."""
    if name := config.get("hf_model_name"):
        from transformers import AutoConfig

        AutoConfig.from_pretrained(name, trust_remote_code=False)


def _tokenizer(name: str, source: str, config: dict[str, Any]) -> Callable:
    """Return the tokenizer of a model, from the name or the folder that open_clip takes."""
    options = {"trust_remote_code": False} if config["text_cfg"].get("hf_tokenizer_name") else {}
    try:
        with quiet():
            return open_clip.get_tokenizer(source, **options)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(
            f"the Hugging Face tokenizer of {name} could not be loaded: {first_line(error)} It is "
            "downloaded once, and needs transformers (pip install 'skipkernels[hugging-face]').",
            "model",
            "tune",
        ) from error


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


def augmentation(model: Any, preset: Preset = "default") -> Callable:
    """Return the transform of training images: open_clip's random crop, or the crop and flip of Wu et al."""
    cfg = PreprocessCfg(**getattr(model, "visual", model).preprocess_cfg)
    if preset == "default":
        return image_transform_v2(cfg, is_train=True)
    crop = image_transform_v2(cfg, is_train=True, aug_cfg=AugmentationCfg(scale=(0.08, 1.0)))
    return Compose([RandomHorizontalFlip(), crop])


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

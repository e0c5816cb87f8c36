"""Loading of open_clip models by name, with their weights, image transform and tokenizer."""

from __future__ import annotations

import contextlib
import difflib
import logging
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.pretrained import download_pretrained_from_hf
from open_clip.transform import AugmentationCfg, PreprocessCfg, image_transform_v2
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.transforms import Compose, RandomHorizontalFlip

from ...formatting import first_line
from ...options import Preset
from ..data import InputError
from ..data.files import absolute_path
from ..methods.registry import PACKAGED, packaged
from .errors import argument_error
from .hugging_face_model import load_hugging_face
from .plain_config import OPEN_CLIP, read_open_clip_config

RANDOM = "random"
LOCAL_DIR, HUB = "local-dir:", "hf-hub:"
# Errors of open_clip for a file that is damaged, empty, or of another structure or model.
_LOAD_ERRORS: tuple[type[Exception], ...] = (SafetensorError, RuntimeError, OSError, EOFError, ValueError)
_LOAD_ERRORS += (LookupError, AttributeError, TypeError, AssertionError, StopIteration, ArithmeticError)
_FILE_TYPES = (".safetensors", ".pt", ".pth", ".bin")
# The functions of `nn.init` that pass themselves to a mode, and what the others call.
_RANDOM_FILLS = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)


class _WithoutRandomWeights(TorchFunctionMode):
    """Leave the weights of new modules uninitialised: to draw them took 0.9 of 1.3 s of loading a ViT-B/16."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _RANDOM_FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def load_model(
    name: str,
    pretrained: str | None,
    device: torch.device,
    *,
    architecture_only: bool = False,
    seed: int = 0,
    trust: bool = False,
) -> tuple[nn.Module, Callable, Callable]:
    """Load a model in evaluation mode, with its image transform and tokenizer. Runs no code of a folder or of the hub.

    A model of open_clip has its configuration in the attribute `model_cfg`.

    Args:
        name: A model of `open_clip.list_models()`, or pictogram-tiny; or one with its weights: "hf-hub:ORG/NAME" of the
            Hugging Face hub, or "local-dir:DIR", a folder in the form of open_clip, such as a run folder, or a
            `CLIPModel`, `MetaClip2Model`, `SiglipModel` or `Siglip2Model` of transformers with its processor.
        pretrained: An open_clip tag, the path of a state dict (safetensors, or a file that `torch.load` reads with
            `weights_only=True`), "random", or None for those of pictogram-tiny.
        device: Device of the model.
        architecture_only: Leave the weights uninitialised. The image transform is still that of the tag, if it has its
            own.
        seed: Seed of random weights.
        trust: Load models of the hub that the configuration of the model names as its towers.
    """
    if name.startswith((LOCAL_DIR, HUB)):
        check_model(name, pretrained)
        return _load_whole(name, device, architecture_only=architecture_only, seed=seed, trust=trust)
    if name == PACKAGED:
        packaged().register()
    check_model(name, pretrained, architecture_only=architecture_only)
    file = _file(pretrained)
    tag = pretrained if file is None and pretrained != RANDOM else None
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            with contextlib.nullcontext() if pretrained == RANDOM else _WithoutRandomWeights():
                model, _, transform = open_clip.create_model_and_transforms(
                    name, pretrained=None if architecture_only else tag, **_tag_settings(name, tag)
                )
        except (OSError, RuntimeError) as error:
            raise _not_loaded(name, tag, error) from error
    if not architecture_only:
        if file is not None:
            load_weights(model, file)
        elif pretrained is None:
            model.load_state_dict(packaged().state_dict())
    model.model_cfg = open_clip.get_model_config(name)
    return model.to(device).eval(), transform, _tokenizer(name, name, model.model_cfg)


def check_model(name: str, pretrained: str | None, *, architecture_only: bool = False) -> None:
    """Raise the errors of `load_model` about the names of a model and its weights, without loading anything."""
    if name.startswith((LOCAL_DIR, HUB)):
        if pretrained is not None:
            raise argument_error("pretrained", f"{name} has its own weights; leave it out.")
        return
    known = [*open_clip.list_models(), PACKAGED]
    if name not in known:
        close = difflib.get_close_matches(name, known, 3)
        hint = f"did you mean {' or '.join(close)}?" if close else "open_clip.list_pretrained() has the names."
        raise argument_error("model", f"open_clip has no model {name!r}; {hint}")
    tags, file = open_clip.list_pretrained_tags_by_model(name), _file(pretrained)
    if pretrained is None:
        if name != PACKAGED and not architecture_only:
            choices = ", ".join(tags) or "no tags"
            raise argument_error("pretrained", f"{name} needs weights: a file, random, or one of {choices}.")
        return
    if not architecture_only:
        check_activation(name, pretrained)
    if file is None and pretrained != RANDOM and pretrained not in tags:
        choices = ", ".join(tags) or "none"
        raise argument_error(
            "pretrained", f"{name} has no tag {pretrained!r}, and {pretrained} is not a file; tags: {choices}."
        )
    if file is not None and not architecture_only and not file.is_file():
        raise argument_error("pretrained", f"no file {file}.")


def _file(pretrained: str | None) -> Path | None:
    """Path of a file of weights; None for a tag."""
    if pretrained is None or Path(pretrained).suffix not in _FILE_TYPES:
        return None
    return Path(os.path.expanduser(pretrained))


def _without_network(name: str, tag: str) -> str:
    """Remedy without a network: the packaged model, or the weights from another machine."""
    known = open_clip.get_pretrained_cfg(name, tag)
    place = f"https://huggingface.co/{known['hf_hub'].rstrip('/')}" if known.get("hf_hub") else known.get("url", "")
    weights = f"get the weights from {place} on another machine, and pass" if place else "pass"
    return f"Use `model={PACKAGED}`, which needs no download, or {weights} the path of their file as `pretrained`."


def _load_whole(
    name: str, device: torch.device, *, architecture_only: bool, seed: int, trust: bool
) -> tuple[nn.Module, Callable, Callable]:
    """Load a model with its weights from a folder or the hub; see `load_model`."""
    kind, _, where = name.partition(":")
    local = f"{kind}:" == LOCAL_DIR
    folder = absolute_path(where)
    if not where or (local and not folder.is_dir()):
        missing = f"no folder {folder}" if where else f"must name a model, as in {LOCAL_DIR}DIR or {HUB}ORG/NAME"
        raise argument_error("model", f"{name}: {missing}.")
    converted = local and not (folder / OPEN_CLIP).is_file()
    if converted and not (folder / "config.json").is_file():
        raise argument_error(
            "model",
            f"{name}: {folder} has no {OPEN_CLIP} of open_clip, and no config.json of transformers; name the "
            "folder of a saved model.",
        )
    if not converted:
        packaged()  # for a folder with its image tower
        source = f"{LOCAL_DIR}{folder}" if local else name
        with quiet(), torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            try:
                file = folder / OPEN_CLIP if local else Path(download_pretrained_from_hf(where, filename=OPEN_CLIP))
                config = read_open_clip_config(file, trust=trust)
                _check_text_tower(config["text_cfg"])
                with _WithoutRandomWeights():
                    model, _, transform = open_clip.create_model_and_transforms(
                        source,
                        load_weights=not architecture_only,
                        require_pretrained=not architecture_only,
                        pretrained_text=False,  # the weights of a text tower alone, which would be downloaded
                    )
                model.model_cfg = config
                return model.to(device).eval(), transform, _tokenizer(name, source, config)
            except _LOAD_ERRORS as error:
                if isinstance(error, InputError):
                    raise
                converted = not local and OPEN_CLIP in str(error)
                if not converted:
                    raise argument_error("model", f"{name} could not be loaded: {first_line(error)}") from error
    found = load_hugging_face(name, folder if local else where, architecture_only=architecture_only, seed=seed)
    return found[0].to(device).eval(), *found[1:]


def _check_text_tower(config: dict[str, Any]) -> None:
    """Refuse a text tower of transformers with code, which open_clip would ask to run."""
    if name := config.get("hf_model_name"):
        from transformers import AutoConfig

        AutoConfig.from_pretrained(name, trust_remote_code=False)


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
        raise argument_error(
            "model", f"{tag} was trained with {names[trained]}, and {name} has {names[has]}; use {other}."
        )


def augmentation(model: Any, preset: Preset = "default") -> Callable:
    """Return the transform of training images: open_clip's random crop, or the crop and flip of Wu et al."""
    cfg = PreprocessCfg(**getattr(model, "visual", model).preprocess_cfg)
    if preset == "default":
        return image_transform_v2(cfg, is_train=True)
    crop = image_transform_v2(cfg, is_train=True, aug_cfg=AugmentationCfg(scale=(0.08, 1.0)))
    return Compose([RandomHorizontalFlip(), crop])


def _tokenizer(name: str, source: str, config: dict[str, Any]) -> Callable:
    """Return the tokenizer of a model, from the name or the folder that open_clip takes."""
    options = {"trust_remote_code": False} if config["text_cfg"].get("hf_tokenizer_name") else {}
    try:
        with quiet():
            return open_clip.get_tokenizer(source, **options)
    except (OSError, ImportError) as error:
        raise argument_error(
            "model",
            f"the Hugging Face tokenizer of {name} could not be loaded: {first_line(error)} It is "
            "downloaded once, and needs transformers (pip install 'skipkernels[hugging-face]').",
        ) from error


def _tag_settings(name: str, tag: str | None) -> dict[str, Any]:
    """Return the image transform settings of a tag, which open_clip ignores when it loads no weights."""
    settings = {"mean": "image_mean", "std": "image_std"}
    settings |= {"interpolation": "image_interpolation", "resize_mode": "image_resize_mode"}
    known = open_clip.get_pretrained_cfg(name, tag) if tag is not None else {}
    return {argument: known[key] for key, argument in settings.items() if key in known}


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict into a model, without executing code from the file."""
    try:
        if hasattr(model, "visual"):
            open_clip.load_checkpoint(model, str(path), weights_only=True)
        else:  # a model of transformers
            model.load_state_dict(load_file(path))
    except pickle.UnpicklingError as error:  # its message says how to execute the file anyway
        raise InputError(f"{path}: not usable as weights: it holds more than tensors.") from error
    except _LOAD_ERRORS as error:
        reason = first_line(error)
        if isinstance(error, AssertionError) or reason.startswith("Error(s) in loading state_dict"):
            last = (str(error).splitlines() or ["another structure"])[-1].strip(".\t ")
            reason = f"they are those of another ({last}). Pass the `model` of the weights."
        if "TorchScript" in reason:  # PyTorch's message says how to execute the file
            reason = "it is a TorchScript archive, which holds code. Pass the tag of these weights, or a state dict."
        raise InputError(f"{path}: not usable as weights of this model: {reason}") from error


def _not_loaded(name: str, tag: str | None, error: BaseException) -> InputError:
    """Return the error for a model that open_clip could not create, with the first cause of a failed download."""
    while error.__context__ is not None and isinstance(error.__context__, OSError):
        error = error.__context__
    reason = first_line(error).strip(". ")
    if tag is None:
        return argument_error("model", f"{name} could not be created: {reason}.")
    return argument_error(
        "pretrained",
        f"the weights {tag} of {name} could not be downloaded: {reason}. {_without_network(name, tag)}",
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings, such as that of open_clip without weights, which are loaded later or meant to be random."""
    before, handlers = logging.root.manager.disable, list(logging.root.handlers)
    logging.disable(logging.ERROR)  # open_clip logs the error of a download that it then raises
    try:
        yield
    finally:
        logging.disable(before)
        logging.root.handlers[:] = handlers  # without any, logging.info of open_clip adds one to stderr

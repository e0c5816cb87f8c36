"""What a run is made of. The command line and config.yaml are made from this dataclass."""

from __future__ import annotations

import dataclasses
import inspect
import math
import reprlib
import types
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import yaml

from ..data import InputError, open_source
from ..data.tasks import Protocol
from ..features import Refresh, SamplerKind
from ..selection import Tail
from ..store import read_regular
from ..towers import Memory
from ..towers.attention import AttentionName
from . import optimizers
from .methods import METHODS, Method, Recipe
from .precision import Precision
from .registry import experiments_hint

Preset = Literal["default", "reference"]
CacheDtype = Literal["fp32", "fp16", "bf16", "int8"]  # the keys of store.DTYPES

_GLYPH_CLASSES = 100
# At least so much, where there is a value.
_LEAST = {"classes": 1, "batch_size": 1, "views": 1, "workers": 0, "warmup_epochs": 0, "momentum": 0, "log_every": 1}
_LEAST |= {"weight_decay": 0, "text_lr": 0, "image_lr": 0, "warmup_lr": 0, "seed": 0}
# Below so much, which is more than can be meant.
_BELOW = {"momentum": 1, "clip_grad_norm": math.inf, "weight_decay": math.inf}
_BELOW |= {"text_lr": math.inf, "image_lr": math.inf, "warmup_lr": math.inf, "seed": 2**31}
# What a method takes, or has no use for.
_OF_METHODS = ("skip_layers", "keep_ratio", "max_keep", "decay", "tail", "memory", "attention", "keep_embeddings")
# The same, of those parts of a recipe that have no default for all.
_OF_TOWERS = ("text_lr", "image_lr")
# Of those whose recipe is that of Wu et al., CVPR 2025, which has a quarter of the epochs on large datasets.
_SCHEDULED, _LARGE = ("skip", "full"), ("imagenet", "sun397", "food101")
# What does not change the results of a run, or only by rounding: it may go on with another value.
_FREE = {"root", "download", "cache", "workers", "memory", "attention", "device", "log_every", "out"}
_FREE |= {"overwrite", "resume"}

_MOST_BYTES = 2**20  # of a config.yaml
_MOST_BITS = 63  # of a number in it
_short = reprlib.Repr()
_short.maxlevel, _short.maxlist, _short.maxdict, _short.maxstring, _short.maxother = 2, 4, 4, 80, 80


@dataclass(frozen=True)
class TuneConfig:
    """Tune a CLIP on some images of a dataset, and test it, also on classes or images of another kind."""

    data: str = "glyphs"
    """glyphs, glyphs:BLOCK of the Unicode standard, imagefolder:PATH, coop:NAME or torchvision:NAME."""
    root: Path | None = None
    """Folder of the datasets, for coop: and torchvision:."""
    download: bool = False
    """Let torchvision fetch what is not there."""
    protocol: Protocol | None = None
    """few-shot: all classes train, the default of imagefolder:. base-to-new: the first half trains and both halves are
    tested, the default of other data. The others test on targets too."""
    targets: tuple[str, ...] | None = None
    """Datasets to test on, with cross-dataset and domain-generalization; coop:imagenet and glyphs bring their own."""
    template: tuple[str, ...] | None = None
    """Prompts such as "a photo of a {}.", or paper or coop. The first trains; embeddings of several are averaged."""
    model: str = "glyph-tiny"
    """Any open_clip model, such as ViT-B-16-quickgelu."""
    pretrained: str | None = None
    """Weights: a tag of open_clip, a file, or "random". glyph-tiny brings its own."""
    method: str = "skip"
    """skip: Skip Tuning. full: full fine-tuning on all classes. The others are for comparison too."""
    preset: Preset = "default"
    """reference: as published, with one mask for the tail of classes and the paper's schedule."""
    shots: int = 16
    """Training images of each class."""
    classes: int | None = None
    """Most classes, base and new together; by default all, and 100 of glyphs."""
    epochs: int | None = None
    """Passes over the training images; by default the method's: 8 for skip on glyph-tiny, 20 on other models."""
    batch_size: int | None = None
    """Images in a step; by default 4, or as the method's paper has it."""
    sampler: SamplerKind | None = None
    """class_pure: images of one class where it has enough. random: any. By default the method's."""
    skip_layers: int | float = 0.5
    """Blocks of each tower that are skipped: a number, or a fraction such as 0.5."""
    keep_ratio: float = 0.5
    """Share of classes that always stay in a step (up to 1), or their number."""
    max_keep: int = 50
    """Most classes that always stay."""
    decay: float = 0.3
    """How slowly the chance to stay falls over the other classes."""
    tail: Tail | None = None
    """resample: draw the other classes anew in each step, the default. fixed: once, as published."""
    keep_embeddings: bool = False
    """coop and clip-adapter: run the frozen image tower once for each image, and not in every step as published."""
    optimizer: str | None = None
    """sgd: ours, in one pass. torch-sgd, or a class of torch.optim such as AdamW. By default the method's."""
    text_lr: float | None = None
    """Learning rate of the text tower; by default 2e-5 for skip, on glyph-tiny 4e-3 (1e-3 off glyphs)."""
    image_lr: float | None = None
    """Learning rate of the image tower; by default 5e-6 for skip, on glyph-tiny 2e-3 (1e-3 off glyphs)."""
    warmup_epochs: int | None = None
    """Epochs at the warm-up rate before the cosine; by default the method's."""
    warmup_lr: float | None = None
    """Learning rate of the warm-up; by default the method's."""
    momentum: float | None = None
    """Of optimizers that have it; by default the method's."""
    weight_decay: float | None = None
    """Of the optimizer; by default the method's."""
    clip_grad_norm: float | None = None
    """Scale the gradients of a step down to this norm where they are longer."""
    precision: Precision = "auto"
    """bf16: fp32 weights. bf16-sr: bf16 weights, rounded at random. auto: bf16 on a GPU that has it, else fp32."""
    memory: Memory = "auto"
    """What a block keeps for backward. fast: all but what is cheap. min: its input. auto: fast where that fits."""
    attention: AttentionName = "sdpa"
    """Who computes attention. sdpa: PyTorch. xformers: on a GPU, where it is installed."""
    cache: Path | None = None
    """Folder to keep the images' features at the cut in, for the next run too; by default they are in memory."""
    cache_dtype: CacheDtype = "bf16"
    """How they are kept there; int8 is lossy."""
    views: int = 1
    """Random crops of each training image that epochs go round, with --cache; 1: the image as it is tested."""
    refresh: Refresh = "never"
    """epoch: a new random crop in each epoch, made in the background of the one before, with --cache."""
    workers: int = 0
    """Processes that load images."""
    fused_optimizer: bool = False
    """Update each weight inside backward and free its gradient: gradients never add up to a copy of the model."""
    device: str = "auto"
    """cpu, cuda, cuda:1, …; auto is cuda where there is one."""
    seed: int = 0
    """Chooses training images, their order, and the classes drawn."""
    log_every: int = 50
    """Steps after which the loss is shown, and looked at."""
    out: Path | None = None
    """Folder for the results; by default runs/DATA-METHOD."""
    overwrite: bool = False
    """Replace the results of an earlier run in that folder."""
    resume: bool | Path = False
    """Go on after the last complete epoch in that folder, to the same bits; begin where there is none. A folder: go on
    with the run in it, with its settings."""
    delta: bool = False
    """Keep only those weights that tuning changed, in delta.safetensors."""

    def resolved(self) -> TuneConfig:
        """The same run with every default of the recipe written out.

        Raises:
            InputError: If a value is out of its range, or two don't go together.
        """
        self.method_class()
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"--device: {device!r} can't be used: {str(error).splitlines()[0]}") from None
        half: Precision = "bf16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "fp32"
        config = dataclasses.replace(
            self,
            device=device,
            precision=half if self.precision == "auto" else self.precision,
            out=self.out or Path("runs", f"{self.data.replace(':', '-').replace('/', '-')}-{self.method}"),
            **{name: value for name, value in self._defaults().items() if getattr(self, name) is None},
        )
        config._check()
        return config

    def _defaults(self) -> dict[str, Any]:
        """Of settings whose default is None."""
        reference = self.preset == "reference"
        recipe = dataclasses.asdict(self._recipe())
        if self.method in _SCHEDULED and self.data.rpartition(":")[2] in _LARGE:
            recipe["epochs"] //= 4
        if reference and self.method == "skip" and self.shots < 4:
            recipe["sampler"] = "random"
        recipe["classes"] = _GLYPH_CLASSES if self._on_glyphs else None
        recipe["protocol"] = self.chosen_protocol
        if "tail" in inspect.signature(self.method_class()).parameters:
            recipe["tail"] = "fixed" if reference else "resample"
        return recipe

    @property
    def chosen_protocol(self) -> Protocol:
        """The protocol, by default that of the data: of a user's own images every class trains."""
        own = self.data.partition(":")[0] == "imagefolder"
        return self.protocol or ("few-shot" if own else "base-to-new")

    def _recipe(self) -> Recipe:
        """What the method trains with here."""
        name = "" if self.preset == "reference" else self.model  # that of no model is as published
        recipe = partial(self.method_class().recipe, name, self.chosen_protocol, self.shots, data=self.data)
        if self.epochs is not None or recipe(classes=2) == recipe(classes=2000):
            return recipe()
        there = len(open_source(self.data, self.root, download=self.download).classes)
        classes = min(there, self.classes or there)
        return recipe(classes=math.ceil(classes / 2) if self.chosen_protocol == "base-to-new" else classes)

    def method_class(self) -> type[Method]:
        """Return the class of the method.

        Raises:
            InputError: If none is registered under this name.
        """
        if self.method not in METHODS:
            known = ", ".join(METHODS)
            raise InputError(f"--method must be one of {known}; got {self.method!r}.{experiments_hint()}")
        return METHODS[self.method]

    def of_method(self, method: str) -> TuneConfig:
        """The same run of another method, without the settings that it has no use for."""
        config = dataclasses.replace(self, method=method)
        return dataclasses.replace(config, **{name: getattr(TuneConfig, name) for name in config._without_effect()})

    def _without_effect(self) -> list[str]:
        """Settings that differ from their default, and that the method has no use for."""
        made = self.method_class()
        published = made.recipe(self.model, self.chosen_protocol, self.shots)
        takes, recipe = inspect.signature(made).parameters, dataclasses.asdict(published)
        if published.epochs > 0:
            idle = {name for name in _OF_TOWERS if recipe[name] is None}
        else:  # without steps
            idle = {name for name in recipe if getattr(self, name) != recipe[name]}
            idle |= {"clip_grad_norm", "fused_optimizer"}
        idle |= {name for name in _OF_METHODS if name not in takes}
        every = [field.name for field in dataclasses.fields(TuneConfig)]
        return [name for name in every if name in idle and getattr(self, name) != getattr(TuneConfig, name)]

    def _check(self) -> None:
        for name in self._without_effect():
            given = f"--{name.replace('_', '-')} {getattr(self, name)}"
            raise InputError(f"{given} has no effect with --method {self.method}; leave it out.")
        for name, bound in _LEAST.items():
            if getattr(self, name) is not None and not getattr(self, name) >= bound:
                raise InputError(f"--{name.replace('_', '-')} must be at least {bound}; got {getattr(self, name)}.")
        for name, limit in _BELOW.items():
            if getattr(self, name) is not None and not getattr(self, name) < limit:
                raise InputError(f"--{name.replace('_', '-')} must be below {limit}; got {getattr(self, name)}.")
        assert self.epochs is not None
        if self.epochs < 1 and self.method_class().recipe(self.model, self.chosen_protocol, self.shots).epochs > 0:
            raise InputError(f"--epochs must be at least 1; got {self.epochs}.")
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise InputError(f"--clip-grad-norm must be above 0; got {self.clip_grad_norm}.")
        if self.cache is None and self.augments:
            raise InputError("--views and --refresh: several views of an image are kept on the disk; add --cache PATH.")
        if self.resume and self.overwrite:
            raise InputError("--resume goes on with a run and --overwrite replaces it; give one of them.")
        self._check_optimizer()

    def _check_optimizer(self) -> None:
        if self.epochs == 0 or self.optimizer is None:
            return
        optimizers.find(self.optimizer)
        ours = self.optimizer == optimizers.FUSED
        if self.precision == "bf16-sr" and not ours:
            raise InputError(f"--precision bf16-sr rounds in --optimizer sgd; got {self.optimizer}. Use bf16 with it.")
        if self.fused_optimizer:
            against = {
                f"--optimizer {self.optimizer} does not; use sgd": not ours,
                "--clip-grad-norm needs all gradients; leave one of them out": self.clip_grad_norm is not None,
                "--precision fp16 needs gradients to scale; use bf16": self.precision == "fp16",
            }
            for reason, wrong in against.items():
                if wrong:
                    raise InputError(f"--fused-optimizer updates weights inside backward, and {reason}.")

    @property
    def _on_glyphs(self) -> bool:
        return self.data.partition(":")[0] == "glyphs"

    @property
    def augments(self) -> bool:
        """Whether training images are random crops."""
        return self.views > 1 or self.refresh == "epoch"

    def identity(self) -> dict[str, Any]:
        """The settings that a run can't be resumed with others of, as plain values."""
        values = {name: value for name, value in _plain(self).items() if name not in _FREE}
        return values | {"cache_dtype": None if self.cache is None else self.cache_dtype}

    def differs_from(self, other: TuneConfig) -> list[str]:
        """Names of the settings by which the results of two runs differ; both are resolved."""
        own, others = self.identity(), other.identity()
        return [name for name in own if own[name] != others[name]]

    def to_yaml(self) -> str:
        """As `from_yaml` reads it."""
        return yaml.safe_dump(_plain(self), sort_keys=False)

    @classmethod
    def from_yaml(cls, path: Path) -> TuneConfig:
        """Read what `to_yaml` wrote.

        Raises:
            InputError: If the file is not there, is no YAML mapping, or has a field that is unknown or mistyped.
        """
        try:
            values = read_settings(path)
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; a run's folder has one.") from None
        except OSError as error:
            raise InputError(f"{path}: can't be read ({error.strerror}).") from None
        except (ValueError, RecursionError, yaml.YAMLError) as error:
            raise InputError(f"{path}: not readable as YAML ({(str(error).splitlines() or ['empty'])[0]}).") from None
        if not isinstance(values, dict):
            raise InputError(f"{path}: expected a mapping of settings; got {type(values).__name__}.")
        hints = get_type_hints(cls)
        for name, value in values.items():
            if name not in hints:
                raise InputError(f"{path}: unknown setting {_shown(name)}.")
            if not _fits(value, hints[name]):
                raise InputError(f"{path}: {name} must be {hints[name]}; got {_shown(value)}.")
        return cls(**{name: _made(value, hints[name]) for name, value in values.items()})


def read_settings(path: Path) -> Any:
    """What a config.yaml holds; it may be anybody's, so what it can cost is bounded.

    Raises:
        OSError, ValueError, RecursionError, yaml.YAMLError: If it can't be read, is too large, or is no YAML.
    """
    return yaml.load(read_regular(path, _MOST_BYTES), _Loader)


class _Loader(yaml.SafeLoader):
    """Reads no aliases: with them a few lines can stand for more than fits into memory."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases are not read")
        return super().compose_node(parent, index)


def _shown(value: Any) -> str:
    """A value for a message, in at most some hundred characters."""
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return f"a number of {value.bit_length()} bits"
    return _short.repr(value)


def _plain(config: TuneConfig) -> dict[str, Any]:
    """Its settings as YAML has them."""

    def plain(value: Any) -> Any:
        return str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value

    return {name: plain(value) for name, value in dataclasses.asdict(config).items()}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of YAML is one of a setting."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return isinstance(value, str) and value in get_args(hint)
    if get_origin(hint) is tuple:
        return isinstance(value, list) and all(_fits(item, get_args(hint)[0]) for item in value)
    if hint is Path:
        return isinstance(value, str)
    if isinstance(value, int) and value.bit_length() > _MOST_BITS:
        return False
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))


def _made(value: Any, hint: Any) -> Any:
    """A value of YAML as the setting has it."""
    if isinstance(value, list):
        return tuple(value)
    return Path(value) if isinstance(value, str) and Path in get_args(hint) else value

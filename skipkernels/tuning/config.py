"""What a run is made of. The command line and config.yaml are made from this dataclass."""

from __future__ import annotations

import dataclasses
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch
import yaml

from ..cache import Refresh, SamplerKind
from ..data import InputError
from ..data.glyph_tiny import NAME as GLYPH_TINY
from ..selection import Tail
from ..towers import Memory
from ..towers.attend import Attention

Method = Literal["skip", "full"]
Precision = Literal["auto", "fp32", "bf16"]
CacheDtype = Literal["fp32", "fp16", "bf16", "int8"]  # the keys of store.DTYPES


@dataclass(frozen=True)
class Recipe:
    """Learning rates and schedule that suit a model."""

    epochs: int
    text_lr: float
    image_lr: float
    warmup_epochs: int
    warmup_lr: float


# Base-to-new, Wu et al. 2025: for CLIPs that were trained on hundreds of millions of images.
PUBLISHED = Recipe(epochs=20, text_lr=2e-5, image_lr=5e-6, warmup_epochs=1, warmup_lr=1e-6)
# glyph-tiny saw half a million small images: at the published rates it does not move in 20 epochs, and with rates that
# move it, it needs no warm-up. Full fine-tuning moves the lower blocks too, and does best at a twentieth of the rate.
# Both were chosen on seed 10, from six and four pairs of rates.
GLYPHS = {
    "skip": Recipe(epochs=8, text_lr=4e-3, image_lr=2e-3, warmup_epochs=0, warmup_lr=0.0),
    "full": Recipe(epochs=8, text_lr=2e-4, image_lr=1e-4, warmup_epochs=0, warmup_lr=0.0),
}


@dataclass(frozen=True)
class TuneConfig:
    """Tune a CLIP on some images of the base classes of a dataset, and test it on base and new classes."""

    data: str = "glyphs"
    """glyphs, or glyphs:BLOCK with a block of the Unicode standard, such as glyphs:greek."""
    model: str = GLYPH_TINY
    """Any open_clip model, such as ViT-B-16-quickgelu."""
    pretrained: str | None = None
    """Weights: a tag of open_clip, a file, or "random". glyph-tiny brings its own."""
    method: Method = "skip"
    """skip: Skip Tuning. full: full fine-tuning on all base classes, for comparison."""
    shots: int = 16
    """Training images of each base class."""
    classes: int = 100
    """Most classes, base and new together."""
    epochs: int | None = None
    """Passes over the training images; by default 8 for glyph-tiny, 20 for others."""
    batch_size: int = 4
    """Images in a step."""
    sampler: SamplerKind = "class_pure"
    """class_pure: images of one class where it has enough. random: any."""
    skip_layers: int | float = 0.5
    """Blocks of each tower that are skipped: a number, or a fraction such as 0.5."""
    keep_ratio: float = 0.5
    """Share of classes that always stay in a step (up to 1), or their number."""
    max_keep: int = 50
    """Most classes that always stay."""
    decay: float = 0.3
    """How slowly the chance to stay falls over the other classes."""
    tail: Tail = "resample"
    """resample: draw the other classes anew in each step. fixed: once, as published."""
    text_lr: float | None = None
    """Learning rate of the text tower; by default 2e-5; 4e-3 for glyph-tiny, 2e-4 with method full."""
    image_lr: float | None = None
    """Learning rate of the image tower; by default 5e-6; 2e-3 for glyph-tiny, 1e-4 with method full."""
    warmup_epochs: int | None = None
    """Epochs at the warm-up rate before the cosine; by default 1, none for glyph-tiny."""
    warmup_lr: float | None = None
    """Learning rate of the warm-up; by default 1e-6."""
    momentum: float = 0.9
    """Of SGD."""
    weight_decay: float = 5e-4
    """Of SGD."""
    precision: Precision = "auto"
    """bf16 computes in bf16 and keeps weights in fp32; auto is bf16 on a GPU that has it, else fp32."""
    memory: Memory = "auto"
    """What a block keeps for backward. fast: all but what is cheap. min: its input. auto: fast where that fits."""
    attention: Attention = "sdpa"
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
    out: Path | None = None
    """Folder for the results; by default runs/DATA-METHOD."""
    overwrite: bool = False
    """Replace the results of an earlier run in that folder."""

    def resolved(self) -> TuneConfig:
        """The same run with every default of the recipe written out.

        Raises:
            InputError: If a value is out of its range.
        """
        recipe = GLYPHS[self.method] if self.model == GLYPH_TINY else PUBLISHED
        chosen: dict[str, Any] = {
            name: getattr(recipe, name) if getattr(self, name) is None else getattr(self, name)
            for name in (field.name for field in dataclasses.fields(Recipe))
        }
        device = ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise InputError(f"--device: {device!r} can't be used: {str(error).splitlines()[0]}") from None
        half = "bf16" if device.startswith("cuda") and torch.cuda.is_bf16_supported() else "fp32"
        chosen |= {"device": device, "precision": half if self.precision == "auto" else self.precision}
        out = self.out or Path("runs", f"{self.data.replace(':', '-')}-{self.method}")
        config = dataclasses.replace(self, out=out, **chosen)
        if config.cache is not None and (config.method == "full" or config.skip_layers == 0):
            raise InputError("--cache: nothing below a cut is kept where every layer trains; leave it out.")
        if config.cache is None and config.augments:
            raise InputError("--views and --refresh: several views of an image are kept on the disk; add --cache PATH.")
        least = {"epochs": 1, "batch_size": 1, "views": 1, "workers": 0, "warmup_epochs": 0, "momentum": 0}
        least |= {"weight_decay": 0, "text_lr": 0, "image_lr": 0, "warmup_lr": 0}
        for name, bound in least.items():
            if not getattr(config, name) >= bound:
                raise InputError(f"--{name.replace('_', '-')} must be at least {bound}; got {getattr(config, name)}.")
        return config

    @property
    def augments(self) -> bool:
        """Whether training images are random crops."""
        return self.views > 1 or self.refresh == "epoch"

    def to_yaml(self) -> str:
        """As `from_yaml` reads it."""
        values = {name: str(v) if isinstance(v, Path) else v for name, v in dataclasses.asdict(self).items()}
        return yaml.safe_dump(values, sort_keys=False)

    @classmethod
    def from_yaml(cls, path: Path) -> TuneConfig:
        """Read what `to_yaml` wrote.

        Raises:
            InputError: If the file is not there, is no YAML mapping, or has a field that is unknown or mistyped.
        """
        try:
            values = yaml.safe_load(path.read_text())
        except FileNotFoundError:
            raise InputError(f"{path}: no such file; --checkpoint takes the folder of a run.") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: not readable as YAML ({str(error).splitlines()[0]}).") from None
        if not isinstance(values, dict):
            raise InputError(f"{path}: expected a mapping of settings; got {type(values).__name__}.")
        hints = get_type_hints(cls)
        for name, value in values.items():
            if name not in hints:
                raise InputError(f"{path}: unknown setting {name!r}.")
            if not _fits(value, hints[name]):
                raise InputError(f"{path}: {name} must be {hints[name]}; got {value!r}.")
        paths = {name: values[name] and Path(values[name]) for name in ("out", "cache") if name in values}
        return cls(**(values | paths))


def _fits(value: Any, hint: Any) -> bool:
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is Path:
        return isinstance(value, str)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and not (hint is int and isinstance(value, bool))

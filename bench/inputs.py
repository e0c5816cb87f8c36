"""Common options of the benchmarks of a whole model, and random inputs for them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from torch import Tensor

from skipkernels.app.data import InputError
from skipkernels.app.devices import seeded
from skipkernels.app.train.model import RANDOM, load_model

from . import measure
from .rows import PRECISIONS, command

open_clip.add_model_config(Path(__file__).with_name("vit-tiny.json"))  # for quick runs


def positive(text: str) -> int:
    """Parse a positive integer.

    >>> positive("4")
    4
    """
    if not (text.isdecimal() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"expected a whole number above 0; got {text!r}")
    return int(text)


class Inputs(NamedTuple):
    """An open_clip CLIP with random weights, and its inputs."""

    model: Any
    tokens: Tensor  # [C, L], the prompts of all classes
    images: Tensor  # [B, 3, height, width]
    labels: Tensor  # [B], one class for all images, as the published sampler draws


class Case(NamedTuple):
    """Model, sizes and device of steps that are compared."""

    model: str
    batch: int
    classes: int
    device: torch.device
    skip_layers: int | None = None  # None: half of the blocks of each tower


_OPTIONS: dict[str, dict[str, Any]] = {
    "--model": {"help": "one of open_clip's; its weights are random"},
    "--batch": {"type": positive, "help": "images in a batch"},
    "--classes": {"type": positive, "help": "of the task"},
    "--skip-layers": {"type": positive, "help": "blocks of each tower below the cut"},
    "--precision": {"choices": PRECISIONS, "help": "bf16 is that of autocast"},
    "--rounds": {"type": positive, "help": "every implementation runs in each"},
}


def parser(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """A parser with --device and the options of `defaults`; one with a list as its default takes several values."""
    parser = command(description)
    for name, default in defaults.items():
        count: Any = {"nargs": "+"} if isinstance(default, list) else {}
        option = f"--{name.replace('_', '-')}"
        parser.add_argument(option, default=default, **_OPTIONS[option], **count)
    parser.add_argument("--device", type=torch.device, default=measure.default_device())
    return parser


def random_inputs(model: str, images: int, classes: int, device: torch.device) -> Inputs:
    """Random inputs, the same on each call, which leave the random generators as they are."""
    try:
        with seeded(0, device):
            clip, _, tokenizer = load_model(model, RANDOM, device)
    except InputError as error:
        raise SystemExit(str(error)) from None
    tokens = tokenizer([f"a photo of a {name}." for name in class_names(classes)]).to(device)
    with seeded(0, device):
        pixels = torch.randn(images, 3, *clip.visual.image_size, device=device)
        return Inputs(clip, tokens, pixels, torch.randint(classes, (1,), device=device).repeat(images))


def class_names(count: int) -> list[str]:
    """Class names of ImageNet, so that prompts have the lengths of a real task; more have adjectives in front.

    Of 1,000 names CLIP's tokenizer makes 1 to 11 tokens, 2.2 on average.
    """
    words = "red blue green small large old young wild tame striped spotted golden silver common northern southern"
    adjectives = [*words.split(), "sleeping", "broken", "wet", "dry", "tiny"]
    known = list(dict.fromkeys(open_clip.IMAGENET_CLASSNAMES))
    # In steps of a prime number: in the list similar things, with names of similar lengths, follow each other.
    names = longest = [known[617 * i % len(known)] for i in range(len(known))]
    while len(names) < count:
        longest = [f"{adjective} {name}" for adjective in adjectives for name in longest]
        names = [*names, *longest]
    return names[:count]

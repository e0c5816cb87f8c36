"""Default training settings of a method, and what they depend on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from ...options import OptimizerName, Protocol, SamplerKind, Tail


class TrainingData(NamedTuple):
    """Properties of the data, on which the recipe of a method may depend."""

    name: str = ""  # of the dataset
    protocol: Protocol = "few-shot"
    shots: int = 16  # images of each class
    classes: Callable[[], int] = lambda: 1  # number of trained classes; may open the dataset
    reference: bool = False  # as in the published code, where the default differs


@dataclass(frozen=True)
class Recipe:
    """Default training settings of a method; None for settings that it does not use."""

    epochs: int  # Passes over the training images; 0 for a method without steps
    batch_size: int | None = None  # Images per step
    optimizer: OptimizerName | None = None
    text_lr: float | None = None  # Learning rate of the weights on the text side
    image_lr: float | None = None  # Learning rate of the weights on the image side
    momentum: float | None = None
    weight_decay: float | None = None
    warmup_epochs: int | None = None  # Epochs at the warm-up rate, before the cosine
    warmup_lr: float | None = None  # Learning rate of the warm-up
    sampler: SamplerKind | None = None  # "class_pure" or "random"
    tail: Tail | None = None  # Ranks of the tail of Skip Tuning

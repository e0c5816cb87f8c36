"""Schemas of metrics.json and of the rows of metrics.jsonl: the values that are read again, with their bounds."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, InstanceOf
from typing_extensions import NotRequired, TypedDict  # pydantic needs these before Python 3.12

Text = InstanceOf[str]  # pydantic's own str refuses names of folders that are not UTF-8
Count = Annotated[int, Field(ge=0, lt=1 << 63)]
Number = Annotated[float, Field(gt=-1e15, lt=1e15)]  # finite
Percent = Annotated[float, Field(ge=0, le=100)] | None


class Threshold(TypedDict):
    """Row of `calibration.find_thresholds`."""

    wanted: Text
    target: Number
    threshold: Number | None
    coverage: Percent
    accuracy: Percent


class ClassSize(TypedDict):
    """Class of a test."""

    name: Text
    images: Count


class ByClass(TypedDict):
    """Metrics of a test by class."""

    balanced_accuracy: Percent
    classes: list[ClassSize]


class Validation(TypedDict):
    """Accuracy on the validation images."""

    images: Count
    zero_shot: Percent
    tuned: Percent
    balanced: NotRequired[Percent]
    thresholds: NotRequired[list[Threshold]]


class Images(TypedDict, total=False):
    """Number of images."""

    train: Count
    tests: dict[Text, Count]


class Parameters(TypedDict):
    """Number of parameters."""

    trained: Count
    all: Count


class Checkpoint(TypedDict):
    """Weights file."""

    file: Text
    mib: Number


class Cost(TypedDict):
    """Time and memory."""

    device: Text
    seconds_total: Number
    seconds_per_epoch: Number | None
    milliseconds_per_step: Number | None
    peak_memory_mib: Number | None
    baseline_memory_mib: Number | None


class Environment(TypedDict, total=False):
    """Versions and machine."""

    finished: Text
    versions: dict[Text, Text]
    machine: Text


class Blend(TypedDict):
    """Curve of `blend`."""

    alphas: list[Number]
    accuracy: dict[Text, list[Percent]]
    chosen: NotRequired[Number | None]


class Candidate(TypedDict):
    """Row of a search within a time budget."""

    name: Text
    method: Text
    settings: Text
    status: Text
    accuracy: Percent
    interval: list[Number] | None
    seconds: Number
    chosen: bool


class TimeBudget(TypedDict):
    """Search within a time budget."""

    command: Text
    seconds: Number
    sentences: list[Text]
    candidates: list[Candidate]


class Metrics(TypedDict):
    """Contents of metrics.json."""

    status: Text
    classes: Annotated[dict[Text, Count], Field(min_length=1)]
    zero_shot: dict[Text, Percent]
    tuned: dict[Text, Percent] | None
    epochs: Count
    steps: Count
    kept_classes: Number | None
    parameters: Parameters
    checkpoint: Checkpoint
    cost: Cost
    by_class: NotRequired[dict[Text, ByClass]]
    zero_shot_by_class: NotRequired[dict[Text, ByClass]]
    validation: NotRequired[Validation | None]
    best_epoch: NotRequired[Count | None]
    images: NotRequired[Images]
    environment: NotRequired[Environment | None]
    notes: NotRequired[list[Text]]
    command: NotRequired[Text | None]
    protocol: NotRequired[Text | None]
    processes: NotRequired[Count]
    alpha: NotRequired[Number]
    blend: NotRequired[Blend]
    time_budget: NotRequired[TimeBudget]


class Row(TypedDict):
    """Row of metrics.jsonl. Losses may be NaN."""

    epoch: Count
    accuracy: dict[Text, Percent]
    loss: NotRequired[float | None]
    step_loss: NotRequired[list[float | None] | None]
    validation: NotRequired[Percent]
    validation_balanced: NotRequired[Percent]
    stage_seconds: NotRequired[dict[Text, Number] | None]

"""Types of the settings that `tune` takes by name, for editors and type checkers."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypedDict

from .. import options


class TuneSettings(TypedDict, total=False):
    """Fields of `TuneConfig`, without those that `tune` has as parameters; paths may be text, and tuples lists.

    They are explained in `option_groups`. tests/app/test_config.py compares them with `TuneConfig`.
    """

    data: str
    root: str | Path | None
    template: list[str] | tuple[str, ...] | None
    shots: options.Shots | None
    fold: str | None
    unreadable: Literal["error", "skip"]
    max_classes: int | None
    protocol: options.Protocol | None
    targets: list[str] | tuple[str, ...] | None
    model: str
    pretrained: str | None
    trust: bool
    method: str
    preset: options.Preset
    tail: options.Tail | None
    skip_layers: int | float
    keep_ratio: float
    max_keep: int
    decay: float
    max_tail: int | None
    train_text: bool
    epochs: int | None
    batch_size: int | None
    sampler: options.SamplerKind | None
    class_weight: options.ClassWeight | None
    optimizer: str | None
    text_lr: float | None
    image_lr: float | None
    patience: int | None
    warmup_epochs: int | None
    warmup_lr: float | None
    momentum: float | None
    weight_decay: float | None
    clip_grad_norm: float | None
    fused_optimizer: bool
    precision: options.Precision
    memory: options.Memory
    attention: options.AttentionName
    graph: bool
    cache: str | Path | None
    cache_dtype: options.CacheDtype
    refresh: options.Refresh
    device: str
    workers: int
    seed: int
    timeout: float
    out: str | Path | None
    overwrite: bool
    resume: bool | str | Path
    delta: bool
    log_every: int
    log: list[options.LoggerName] | tuple[options.LoggerName, ...] | None

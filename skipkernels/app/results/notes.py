"""Notes and warnings about a run: settings that are easily confused, and lost accuracy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..config import TuneConfig
from ..methods.registry import PACKAGED


def setting_notes(config: TuneConfig) -> tuple[str, ...]:
    """Return notes on settings: the packaged model on the user's own data, and `skip_layers` 1 or 1.0."""
    notes: tuple[str, ...] = ()
    if config.own_data and (demonstration := demonstration_note(config.model)) is not None:
        notes += (demonstration,)
    if "skip_layers" in config.method_class().settings and config.skip_layers == 1:
        one = "--skip-layers 1 skips one block of each tower; 1.0 would skip every block."
        every = "--skip-layers 1.0 skips every block of each tower; 1 would skip one block."
        notes += (one if isinstance(config.skip_layers, int) else every,)
    return notes


def compared(config: TuneConfig, held_out: int, factors: Sequence[float]) -> str:
    """Return a line on the images on which candidates are compared, and on the learning rates of the trained ones.

    >>> compared(TuneConfig(text_lr=0.0001, image_lr=0.0002), 0, (1.0, 3.0))
    'candidates: on held-out training images, which train in the end; text_lr 0.0001 and image_lr 0.0002, times 1, 3'
    """
    images = f"the {held_out} validation images" if held_out else "held-out training images"
    rates = [f"{name} {rate:g}" for name in ("text_lr", "image_lr") if (rate := getattr(config, name)) is not None]
    trained = f"; {' and '.join(rates)}, times {', '.join(f'{factor:g}' for factor in factors)}" if factors else ""
    return f"candidates: on {images}, which train in the end{trained}"


def demonstration_note(model: str) -> str | None:
    """Return a note that a packaged model is a demonstration; None for another model."""
    if model != PACKAGED:
        return None
    return (
        f"{model} is a small model for demonstrations, of icons of 32 × 32 pixels. For your own images "
        "use a pretrained model: --model ViT-B-16-quickgelu --pretrained openai."
    )


def result_notes(config: TuneConfig, metrics: Mapping[str, Any]) -> list[str]:
    """Return a warning if training lowered the accuracy on the trained classes; `metrics` are those of metrics.json."""
    test = next(iter(metrics["classes"]))
    before, after = metrics["zero_shot"][test], metrics["tuned"][test]
    if not config.epochs or before is None or after is None or after >= before:
        return []
    rates = " and ".join(f"--{side}-lr" for side in ("text", "image") if getattr(config, f"{side}_lr") is not None)
    return [
        f"accuracy on the trained classes is {after:.2f} %, below zero-shot ({before:.2f} %). Lower {rates}, or change "
        "--epochs or --shots."
    ]

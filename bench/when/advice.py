"""The setting of Skip Tuning that `skipkernels analyze` suggests for a task, before any run of Skip Tuning on it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from skipkernels.experiments import glyph_tiny
from skipkernels.experiments.sensitivity import analyze
from skipkernels.tuner.model import load_model

from . import tasks
from .runs import CANDIDATES, SEARCH_SEED, Candidate, Run
from .tasks import Shift

EPOCHS = 3  # the default of `skipkernels analyze`


@dataclass(frozen=True)
class Advised:
    """Advice for a task.

    Attributes:
        skip_layers: ω of the image tower and of the text tower.
        keep_ratio: Share of kept classes.
        max_keep: Largest number of kept classes.
    """

    skip_layers: tuple[int, int]
    keep_ratio: float
    max_keep: int

    @classmethod
    def of(cls, row: dict[str, str]) -> Advised:
        """The advice of a row."""
        blocks = int(row["image_blocks"]), int(row["text_blocks"])
        return cls(blocks, float(row["keep_ratio"]), int(row["max_keep"]))

    def setting(self) -> dict[str, Any]:
        """The fields of a `Run`."""
        return {"skip_layers": self.skip_layers, "keep_ratio": self.keep_ratio, "max_keep": self.max_keep}


def measure(item: tuple[Shift, Candidate, Path]) -> dict[str, Any]:
    """Analyze the task of the search of (task, setting of full fine-tuning, font of emoji). Returns the row."""
    shift, full, emoji_font = item
    model, transform, tokenizer = load_model(glyph_tiny.NAME, None, torch.device("cpu"))
    task = tasks.load(shift, "search", SEARCH_SEED, transform, emoji_font)
    config = replace(Run(shift, "full", full, "search", SEARCH_SEED).config(), epochs=EPOCHS)
    compared = Run(shift, "skip", CANDIDATES["skip"][0], "search", SEARCH_SEED).config()
    found = analyze(model, tokenizer, task, config, compared, console=Console(quiet=True))
    advised, other = found.advice.advised, found.advice.other
    return {
        "task": shift.name,
        "image_blocks": advised.skip_layers[0],
        "text_blocks": advised.skip_layers[1],
        "keep_ratio": advised.keep_ratio,
        "max_keep": advised.max_keep,
        "image_sensitivity": " ".join(f"{value:.3f}" for value in found.sensitivity.image),
        "text_sensitivity": " ".join(f"{value:.3f}" for value in found.sensitivity.text),
        "gradient_share": round(other.kept.share, 5),
        "notes": " ".join(found.advice.notes),
    }

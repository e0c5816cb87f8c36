"""Methods that the study compares, with their settings, and the runs of its search."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from skipkernels.app.config import TuneConfig
from skipkernels.app.demo import pictogram_tiny
from skipkernels.options import HeadName

from .tasks import Phase, Shift

SEARCH_SEEDS = (10, 11, 12)


class Candidate(NamedTuple):
    """Optimizer and learning rates of a run."""

    optimizer: str
    text_lr: float
    image_lr: float

    @property
    def name(self) -> str:
        """Text of a row."""
        return f"{self.optimizer} {self.text_lr:g} {self.image_lr:g}"


# Candidates of each method: AdamW, or the published SGD, with rates below and above those for this model.
_SGD = [Candidate("sgd", rate, rate / 2) for rate in (1e-3, 4e-3, 1.6e-2)]
CANDIDATES: dict[str, list[Candidate]] = {
    "zero-shot": [Candidate("fit", 0.0, 0.0)],
    "skip": [*_SGD, *(Candidate("adamw", rate, rate) for rate in (1e-4, 3e-4, 1e-3))],
    "skip, one class": _SGD,
    "skip, image only": [Candidate("sgd", 0.0, rate) for rate in (1e-3, 4e-3, 1.6e-2)],
    "full": [*_SGD, *(Candidate("adamw", rate, rate) for rate in (1e-4, 3e-4, 1e-3))],
    "lora": [Candidate("adamw", rate, rate) for rate in (5e-4, 1e-3, 2e-3, 5e-3)],
    "clip-adapter": [Candidate("sgd", rate, rate) for rate in (2e-3, 2e-2, 0.1, 0.3)],
    "coop": [Candidate("sgd", rate, rate) for rate in (2e-3, 2e-2, 0.1, 0.3)],
    "linear-probe": [Candidate("fit", 0.0, 0.0)],
    "auto": [Candidate("adamw", 3e-4, 3e-4)],  # the default of `skipkernels tune`, which chooses
}
# Epochs, images per batch and sampler. "One class": the batches of the published recipe, here of the two images of a
# class. The steps of CLIP-Adapter are short, so it has more.
SCHEDULES = {
    "sgd": (8, 4, "random"),
    "adamw": (8, 16, "random"),
    "skip, one class": (8, 2, "class_pure"),
    "clip-adapter": (100, 32, "random"),
    "coop": (10, 32, "random"),
}


class Variant(NamedTuple):
    """A method of the tables: a key of `CANDIDATES`, further fields of a `TuneConfig`, and label smoothing."""

    method: str
    changes: tuple[tuple[str, Any], ...] = ()
    label_smoothing: float = 0.0


VARIANTS = {
    "zero-shot": Variant("zero-shot"),
    **{
        f"skip, ω = {name}": Variant("skip", (("skip_layers", w),))
        for name, w in (("¼", 0.25), ("½", 0.5), ("¾", 0.75))
    },
    **{name: Variant(name) for name in CANDIDATES if name not in ("skip", "skip, one class")},
}
# Other numbers of kept classes, on the tasks "all" and "many classes"; and other recipes, on "all".
KEPT = {f"skip, K/C = {r:g}": Variant("skip", (("keep_ratio", r), ("max_keep", 10**6))) for r in (0.05, 0.2, 0.5, 1.0)}
RECIPES = {
    "skip, one class": Variant("skip, one class"),
    "skip, warm-up": Variant("skip", (("warmup_epochs", 1), ("warmup_lr", 1e-5))),
    "skip, 16 epochs": Variant("skip", (("epochs", 16),)),
    "skip, label smoothing": Variant("skip", label_smoothing=0.1),
}
EVERY = VARIANTS | KEPT | RECIPES
MANY_EPOCHS = 2  # of "many classes"
# Heads (`skipkernels.app.heads`), and the variants that are also tested with each, before and after a blend.
HEADS: tuple[HeadName, ...] = ("anchored", "gaussian")
HEADED = ("zero-shot", "skip, ω = ½", "full")


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        shift: The task.
        name: Key of `EVERY`; in the search, of `CANDIDATES`.
        variant: The method.
        candidate: Optimizer and rates.
        phase: Part of the names.
        seed: Seed of classes, batches and initial weights.
        weights: Weights of pictogram-tiny. Default: those in the package.
        drawings: File with the drawings, if they are not in the package.
    """

    shift: Shift
    name: str
    variant: Variant
    candidate: Candidate
    phase: Phase
    seed: int
    weights: Path = pictogram_tiny.WEIGHTS
    drawings: Path | None = None

    @property
    def columns(self) -> dict[str, Any]:
        """Columns that identify the run among rows."""
        of = {"task": self.shift.name, "method": self.name, "phase": self.phase, "seed": str(self.seed)}
        return of | {"setting": self.candidate.name}

    def config(self) -> TuneConfig:
        """The configuration of the trainer."""
        optimizer, text_lr, image_lr = self.candidate
        method, _, part = self.variant.method.partition(", ")
        settings: dict[str, Any] = {"method": method, "seed": self.seed, "device": "cpu", "precision": "fp32"}
        settings |= {"pretrained": str(self.weights), "protocol": "base-to-new", "shots": "all"}
        if method == "auto":
            settings["epochs"] = MANY_EPOCHS if self.shift.many else None
        elif optimizer != "fit":
            epochs, batch, sampler = SCHEDULES.get(self.variant.method) or SCHEDULES[optimizer]
            epochs = min(epochs, MANY_EPOCHS) if self.shift.many else epochs
            settings |= {"epochs": epochs, "batch_size": batch, "sampler": sampler, "optimizer": optimizer}
            settings |= {"warmup_epochs": 0, "warmup_lr": 0.0}
            if part == "image only":
                settings["train_text"] = False
            elif method != "clip-adapter":
                settings["text_lr"] = text_lr
            if method != "coop":
                settings["image_lr"] = image_lr
        return TuneConfig(**settings | dict(self.variant.changes)).resolved()


def searched(methods: Collection[str]) -> Iterator[Run]:
    """The runs of the search: every candidate of each method on all names."""
    for method, candidates in CANDIDATES.items():
        for candidate in candidates if len(candidates) > 1 and method in methods else ():
            for seed in SEARCH_SEEDS:
                yield Run(Shift("all"), method, Variant(method), candidate, "search", seed)

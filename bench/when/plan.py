"""The runs of the study: methods with the settings of their search, and the variants of the tables."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from skipkernels.app.config import RATES, TuneConfig
from skipkernels.app.demo import pictogram_tiny
from skipkernels.options import HeadName

from ..rows import Row, grouped
from .tasks import Phase, Shift

SEARCH_SEEDS = (10, 11, 12)
MANY_EPOCHS = 2  # of "many classes"


# ---- methods ---------------------------------------------------------------------------------------------------------


class Candidate(NamedTuple):
    """Optimizer, learning rates and batches that a search tries."""

    optimizer: str
    text_lr: float
    image_lr: float
    epochs: int = 8
    batch_size: int = 16
    sampler: str = "random"

    @property
    def name(self) -> str:
        """Text of a row."""
        return f"{self.optimizer} {self.text_lr:g} {self.image_lr:g}"


class Search(NamedTuple):
    """A method of `tune` with further fields of a `TuneConfig`, and the candidates of its search, if more than one.

    `rates` are the learning rates that the method has; none without steps, or if the default chooses.
    """

    method: str
    candidates: Sequence[Candidate]
    rates: tuple[str, ...] = RATES
    settings: dict[str, Any] = {}


_FIT = [Candidate("fit", 0.0, 0.0)]  # without steps
# The published SGD, and AdamW, with rates below and above those for this model.
_SGD = [Candidate("sgd", rate, rate / 2, batch_size=4) for rate in (1e-3, 4e-3, 1.6e-2)]
_ADAMW = [Candidate("adamw", rate, rate) for rate in (1e-4, 3e-4, 1e-3)]
# Batches of the published recipe: of one class, which has two images here.
_ONE_CLASS = [candidate._replace(batch_size=2, sampler="class_pure") for candidate in _SGD]
_IMAGE_ONLY = [Candidate("sgd", 0.0, rate, batch_size=4) for rate in (1e-3, 4e-3, 1.6e-2)]
_LORA = [Candidate("adamw", rate, rate) for rate in (5e-4, 1e-3, 2e-3, 5e-3)]
# The steps of CLIP-Adapter are short, so it has more.
_ADAPTER = [Candidate("sgd", rate, rate, epochs=100, batch_size=32) for rate in (2e-3, 2e-2, 0.1, 0.3)]
_COOP = [candidate._replace(epochs=10) for candidate in _ADAPTER]
_CHOSEN = [Candidate("adamw", 3e-4, 3e-4)]  # by the default of `skipkernels tune`

SEARCHES = {
    "zero-shot": Search("zero-shot", _FIT, rates=()),
    "skip": Search("skip", [*_SGD, *_ADAMW]),
    "skip, one class": Search("skip", _ONE_CLASS),
    "skip, image only": Search("skip", _IMAGE_ONLY, rates=("image_lr",), settings={"train_text": False}),
    "full": Search("full", [*_SGD, *_ADAMW]),
    "lora": Search("lora", _LORA),
    "clip-adapter": Search("clip-adapter", _ADAPTER, rates=("image_lr",)),
    "coop": Search("coop", _COOP, rates=("text_lr",)),
    "linear-probe": Search("linear-probe", _FIT, rates=()),
    "auto": Search("auto", _CHOSEN, rates=()),
}


class Variant(NamedTuple):
    """A method of the tables: a key of `SEARCHES`, further fields of a `TuneConfig`, and label smoothing."""

    search: str
    settings: dict[str, Any] = {}
    label_smoothing: float = 0.0


VARIANTS = {
    "zero-shot": Variant("zero-shot"),
    "skip, ω = ¼": Variant("skip", {"skip_layers": 0.25}),
    "skip, ω = ½": Variant("skip", {"skip_layers": 0.5}),
    "skip, ω = ¾": Variant("skip", {"skip_layers": 0.75}),
    **{name: Variant(name) for name in SEARCHES if name not in ("zero-shot", "skip", "skip, one class")},
}
# Other numbers of kept classes, on the tasks "all" and "many classes"; and other recipes, on "all".
KEPT = {f"skip, K/C = {r:g}": Variant("skip", {"keep_ratio": r, "max_keep": 10**6}) for r in (0.05, 0.2, 0.5, 1.0)}
RECIPES = {
    "skip, one class": Variant("skip, one class"),
    "skip, warm-up": Variant("skip", {"warmup_epochs": 1, "warmup_lr": 1e-5}),
    "skip, 16 epochs": Variant("skip", {"epochs": 16}),
    "skip, label smoothing": Variant("skip", label_smoothing=0.1),
}
EVERY = VARIANTS | KEPT | RECIPES
_WHOLE_TOWERS = ("full", "lora", "coop")  # train through the whole text tower
# Heads (`skipkernels.app.heads`), and the variants that are also tested with each, before and after a blend.
HEADS: tuple[HeadName, ...] = ("anchored", "gaussian")
HEADED = ("zero-shot", "skip, ω = ½", "full")


# ---- runs ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        shift: The task.
        name: Key of `EVERY`; in the search, of `SEARCHES`.
        variant: The method.
        candidate: Optimizer, rates and batches.
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
        search, candidate = SEARCHES[self.variant.search], self.candidate
        settings = {"method": search.method, "seed": self.seed, "device": "cpu", "precision": "fp32"}
        settings |= {"pretrained": str(self.weights), "protocol": "base-to-new", "shots": "all"}
        if search.rates:
            fields = "optimizer", "epochs", "batch_size", "sampler", *search.rates
            settings |= {field: getattr(candidate, field) for field in fields}
            settings |= {"warmup_epochs": 0, "warmup_lr": 0.0}
        settings |= search.settings | self.variant.settings
        if self.shift.many and candidate.optimizer != "fit":
            settings["epochs"] = MANY_EPOCHS
        return TuneConfig(**settings).resolved()


def searched(methods: Collection[str]) -> Iterator[Run]:
    """The runs of the search: every candidate of each method on all names."""
    for name, search in SEARCHES.items():
        if name not in methods or len(search.candidates) == 1:
            continue
        for candidate, seed in itertools.product(search.candidates, SEARCH_SEEDS):
            yield Run(Shift("all"), name, Variant(name), candidate, "search", seed)


def reported(
    shift: Shift, seed: int, rows: Sequence[Row], methods: Collection[str], *, skip_slow: bool = True, **files: Any
) -> Iterator[Run]:
    """The reported runs of a task with a seed, with the best settings in `rows`, and `files` as fields of a `Run`.

    `skip_slow` leaves out the methods that train for hours with many classes.
    """
    variants = dict(VARIANTS)
    if shift.many or shift.name == "all":
        variants |= KEPT
    if shift.name == "all":
        variants |= RECIPES
    for name, variant in variants.items():
        slow = shift.many and variant.search in _WHOLE_TOWERS
        if variant.search in methods and not (slow and skip_slow):
            yield Run(shift, name, variant, best(rows, variant.search), "report", seed, **files)


def best(rows: Sequence[Row], method: str) -> Candidate:
    """The candidate of a method with the best mean of base and new over the seeds of the search.

    The harmonic mean would follow the noise of new classes where they are near chance.
    """
    candidates = SEARCHES[method].candidates
    if len(candidates) == 1:
        return candidates[0]
    where = {"phase": "search", "method": method, "blended": "0"}
    of_search = grouped((row for row in rows if where.items() <= row.items() and not row.get("head")), "setting")

    def mean(candidate: Candidate) -> float:
        return statistics.fmean(float(row["base"]) + float(row["new"]) for row in of_search[candidate.name,])

    return max(candidates, key=mean)

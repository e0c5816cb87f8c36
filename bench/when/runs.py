"""One run of the study: train a method with a setting on a task, and test it, blended and not."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import time
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from skipkernels import FeatureCache
from skipkernels.app import heads
from skipkernels.app.config import TuneConfig
from skipkernels.app.data.tasks import summarise
from skipkernels.app.demo import pictogram_tiny
from skipkernels.app.methods import Method
from skipkernels.app.methods.frozen import FrozenModel
from skipkernels.app.methods.lora import LoRA
from skipkernels.app.methods.tuned import TunedModel
from skipkernels.app.methods.zero_shot import ZeroShot
from skipkernels.app.serve.blending import WITHOUT_VALIDATION
from skipkernels.app.train.evaluation import Evaluator
from skipkernels.app.train.model import load_model
from skipkernels.app.train.precision import MixedPrecision
from skipkernels.app.train.processes import ALONE
from skipkernels.app.train.run import Run as TuneRun
from skipkernels.app.train.setup import BATCH, RunSetup, build_method
from skipkernels.app.train.trainer import Trainer
from skipkernels.memory import PeakMemory
from skipkernels.options import HeadName

from . import tasks
from .tasks import Phase, Shift

SEARCH_SEEDS = (10, 11, 12)
TIMED_STEPS = 3  # of `first_steps`


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
# The accuracies of a run. "joint": on the test images of base and new classes, among all of them.
ACCURACIES = ("base", "new", "harmonic", "joint")
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
        key, (method, _, part) = self.variant.method, self.variant.method.partition(", ")
        common: dict[str, Any] = {"method": method, "seed": self.seed, "device": "cpu", "precision": "fp32"}
        if method in ("linear-probe", "zero-shot"):
            return TuneConfig(**common).resolved()
        if method == "auto":
            epochs = MANY_EPOCHS if self.shift.many else None
            settings = {"pretrained": str(self.weights), "protocol": "base-to-new", "shots": "all", "epochs": epochs}
            return TuneConfig(**common | settings).resolved()
        epochs, batch, sampler = SCHEDULES.get(key) or SCHEDULES[optimizer]
        epochs = min(epochs, MANY_EPOCHS) if self.shift.many else epochs
        common |= {"epochs": epochs, "batch_size": batch, "sampler": sampler, "optimizer": optimizer}
        common |= {"warmup_epochs": 0, "warmup_lr": 0.0}
        if method != "clip-adapter" and part != "image only":
            common["text_lr"] = text_lr
        if method != "coop":
            common["image_lr"] = image_lr
        if part == "image only":
            common["train_text"] = False
        return TuneConfig(**common | dict(self.variant.changes)).resolved()


def searched(methods: Collection[str]) -> Iterator[Run]:
    """The runs of the search: every candidate of each method on all names."""
    for method, candidates in CANDIDATES.items():
        for candidate in candidates if len(candidates) > 1 and method in methods else ():
            for seed in SEARCH_SEEDS:
                yield Run(tasks.Shift("all"), method, Variant(method), candidate, "search", seed)


def setup_of(run: Run) -> RunSetup:
    """The model, task and method of a run."""
    torch.manual_seed(run.seed)
    config, device = run.config(), torch.device("cpu")
    model, transform, tokenizer = load_model(pictogram_tiny.NAME, str(run.weights), device)
    task = tasks.load(run.shift, run.phase, run.seed, transform, run.drawings)
    method = build_method(config, model, tokenizer, task)
    if run.variant.label_smoothing:
        method.clip.label_smoothing = run.variant.label_smoothing
    zero_shot = ZeroShot(model, tokenizer, task) if isinstance(method, FrozenModel) else method
    return RunSetup(config, model, tokenizer, MixedPrecision("fp32", device), task, method, zero_shot)


def epochs_of(setup: RunSetup, train: FeatureCache) -> Iterator[tuple[int, float]]:
    """Train; after each epoch, yield the steps and the seconds of training so far."""
    steps, seconds = 0, 0.0
    started = time.perf_counter()
    if not setup.config.epochs:
        inputs, labels = zip(*train.loader(BATCH, "sequential"), strict=True)
        setup.method.fit(torch.cat(inputs), torch.cat(labels))
        yield steps, time.perf_counter() - started
        return
    trainer = Trainer(setup.config, setup.method, setup.precision, train, setup.task.tests[0].classes)
    for _ in range(setup.config.epochs):
        started = time.perf_counter()
        steps += trainer.epoch(on_step=lambda: None, on_loss=lambda loss: None)["steps"]
        seconds += time.perf_counter() - started
        yield steps, seconds


def execute(run: Run) -> list[dict[str, Any]]:
    """Train and test. Returns a row for the run, for its blend if it has one, and for each head of these.

    A blend has the mean of the weights before and after tuning, as WiSE-FT recommends without validation images of new
    classes; of LoRA, half of the update. Heads are fitted to the training images, with the penalty of the model before
    tuning.
    """
    if run.name == "auto":
        return chosen(run)
    setup = setup_of(run)
    method, train, tests = setup.method, setup.train_features(), setup.test_features()
    zero_shot = accuracies(setup, setup.zero_shot, tests)
    l2 = heads.anchored_l2(*fit_arguments(setup.zero_shot, train)) if run.name in HEADED else None
    before = {name: weight.clone() for name, weight in _blended_weights(method)}
    diverged = False
    try:
        *_, (steps, seconds) = epochs_of(setup, train)
    except FloatingPointError:
        diverged, steps, seconds = True, 0, 0.0
    cost = {"steps": steps, "train_s": round(seconds, 2)}
    of_zero_shot = rounded({f"zero_shot_{name}": zero_shot[name] for name in ACCURACIES})

    def rows(blended: bool) -> Iterator[dict[str, Any]]:
        found = {"": dict.fromkeys(ACCURACIES, 0.0) if diverged else accuracies(setup, method, tests)}
        if l2 is not None and not diverged:
            fitted = fit_heads(method, train, l2)
            found |= {name: accuracies(setup, method, tests, head) for name, head in fitted.items()}
        for head, accuracy in found.items():
            columns = run.columns | {"blended": int(blended), "head": head, "l2": l2 if head == "anchored" else None}
            yield columns | rounded(accuracy) | of_zero_shot | cost

    found = [*rows(blended=False)]
    if before and not diverged:
        with torch.no_grad():
            for name, weight in _blended_weights(method):
                weight.lerp_(before[name], 1 - WITHOUT_VALIDATION)
        found += rows(blended=True)
    return found


def chosen(run: Run) -> list[dict[str, Any]]:
    """Train and test as `skipkernels tune` does by default. Returns a row, with the name of the chosen candidate."""
    open_data = partial(tasks.source, run.shift, run.phase, run.seed, run.drawings)
    torch.manual_seed(run.seed)
    tuning = TuneRun(run.config(), open_data, ALONE, None)
    tuning.embed()
    setup, tests = tuning.setup, tuning.setup.test_features()
    zero_shot = accuracies(setup, setup.zero_shot, tests)
    started = time.perf_counter()
    tuning.choose()
    tuning.prepare()
    with tuning.display:
        tuning.train()
    tuning.complete()
    assert tuning.choice is not None
    found = accuracies(setup, tuning.method, tests, tuning.method.fitted)
    cost = {"steps": sum(row["steps"] for row in tuning.rows), "train_s": round(time.perf_counter() - started, 2)}
    columns = run.columns | {"blended": 0, "head": "", "l2": tuning.l2, "chosen": tuning.choice.name}
    return [columns | rounded(found) | rounded({f"zero_shot_{name}": zero_shot[name] for name in ACCURACIES}) | cost]


@torch.no_grad()
def embedded(method: Method, features: FeatureCache) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [n, D] and labels [n] of images."""
    method.train(False)
    image, labels = zip(*((method.embed(x), of) for x, of in features.loader(BATCH, "sequential")), strict=True)
    return torch.cat(image), torch.cat(labels)


def fit_arguments(method: Method, train: FeatureCache) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Images, labels, texts and scale, as a head is fitted to them."""
    text = method.class_embeddings(method.task.tests[0].name)
    return *embedded(method, train), text, method.model.logit_scale.exp().item()


def fit_heads(method: Method, train: FeatureCache, l2: float) -> dict[str, heads.Head | None]:
    """Fit each of `HEADS`."""
    found = heads.Examples(*fit_arguments(method, train))
    return {name: heads.fit_head(name, found, l2) for name in HEADS}


def accuracies(
    setup: RunSetup, method: Method, tests: Mapping[str, FeatureCache], head: heads.Head | None = None
) -> dict[str, float | None]:
    """Compute `ACCURACIES`, in per cent; None where the method has no logits for new classes."""
    base, new = setup.task.tests
    whole = head and head.with_new_classes(method.class_embeddings(new.name))

    def logits(image: torch.Tensor) -> torch.Tensor:
        """Logits over the base and the new classes, or over the base classes alone."""
        if whole is not None:
            return whole.logits(image)
        found = (method.logits_of(test.name, image) for test in (base, new))
        return torch.cat([each for each in found if each is not None], dim=1)

    def accuracy(found: torch.Tensor, labels: torch.Tensor) -> float:
        if not found.isfinite().all():
            raise FloatingPointError(f"{method.name}: logits are not finite")
        return 100.0 * (found.argmax(dim=1) == labels).double().mean().item()

    classes = len(base.classes)
    (of_base, base_labels), (of_new, new_labels) = (
        (logits(image), labels) for image, labels in (embedded(method, tests[test.name]) for test in (base, new))
    )
    if of_base.shape[1] == classes:
        return dict.fromkeys(ACCURACIES) | {"base": accuracy(of_base, base_labels)}
    split = {"base": accuracy(of_base[:, :classes], base_labels), "new": accuracy(of_new[:, classes:], new_labels)}
    joint = accuracy(torch.cat([of_base, of_new]), torch.cat([base_labels, new_labels + classes]))
    return dict(summarise(setup.task.protocol, split)) | {"joint": joint}


def curve(run: Run) -> list[dict[str, Any]]:
    """Train, and test after each epoch. Returns a row for each; the seconds are of training only."""
    setup = setup_of(run)
    evaluator, rows = Evaluator(setup, setup.test_features()), []
    for epoch, (steps, seconds) in enumerate(epochs_of(setup, setup.train_features()), start=1):
        found = rounded(evaluator.evaluate(setup.method).accuracies)
        rows.append(run.columns | {"epoch": epoch} | found | {"steps": steps, "train_s": round(seconds, 2)})
    return rows


def first_steps(run: Run) -> list[dict[str, Any]]:
    """Train for a few steps. Returns a row with the median time of those after the first, and the peak of memory.

    The memory is that above the process with PyTorch: weights, features, and what the steps need.
    """
    memory, ends = PeakMemory(torch.device("cpu")), []
    resident, setup = memory.read(), setup_of(run)
    classes = setup.task.tests[0].classes
    trainer = Trainer(setup.config, setup.method, setup.precision, setup.train_features(), classes)

    def on_step() -> None:
        ends.append(time.perf_counter())
        if len(ends) > TIMED_STEPS:
            raise _Enough

    with contextlib.suppress(_Enough):
        trainer.epoch(on_step=on_step, on_loss=lambda loss: None)
    seconds = statistics.median(after - before for before, after in itertools.pairwise(ends))
    cost = {"step_s": round(seconds, 4), "train_mib": round((memory.read() - resident) / 2**20, 1)}
    return [run.columns | {"classes": len(classes), "batch_size": setup.config.batch_size} | cost]


class _Enough(Exception):
    """Ends an epoch."""


def rounded(accuracies: dict[str, Any]) -> dict[str, Any]:
    """Accuracies for a row; a linear probe has none on new classes."""
    return {name: None if value is None else round(value, 2) for name, value in accuracies.items()}


def _blended_weights(method: Method) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that a blend interpolates; none if the method adds layers that the zero-shot model lacks.

    The update of LoRA is B A, and B is zero before tuning: half of B is half of the update.
    """
    for name, weight in method.state_dict().items():
        if isinstance(method, TunedModel) and weight.is_floating_point():
            yield name, weight
        elif isinstance(method, LoRA) and name.endswith(".up"):
            yield name, weight

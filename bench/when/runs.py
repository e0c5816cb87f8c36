"""One run of the study: train a method with a setting on a task, and test it, blended and not."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from skipkernels.app.config import TuneConfig
from skipkernels.app.demo import glyph_tiny
from skipkernels.app.methods import Method
from skipkernels.app.methods.base import FrozenModel, TunedModel
from skipkernels.app.methods.lora import LoRA
from skipkernels.app.methods.zero_shot import ZeroShot
from skipkernels.app.serve.blending import WITHOUT_VALIDATION
from skipkernels.app.train.evaluation import Evaluator
from skipkernels.app.train.model import load_model
from skipkernels.app.train.precision import MixedPrecision
from skipkernels.app.train.setup import RunSetup, build_method
from skipkernels.app.train.trainer import Trainer
from skipkernels.memory import PeakMemory

from . import tasks
from .tasks import Phase, Shift

SEARCH_SEED = 10


class Candidate(NamedTuple):
    """Optimizer and learning rates of a run."""

    optimizer: str
    text_lr: float
    image_lr: float

    @property
    def name(self) -> str:
        """Text of a row."""
        return f"{self.optimizer} {self.text_lr:g} {self.image_lr:g}"


_ADAMW = [Candidate("adamw", rate, rate) for rate in (1e-4, 3e-4, 1e-3)]
# Four candidates for each method. Skip Tuning and full fine-tuning: SGD with the recipe of glyph-tiny, or AdamW. The
# others have their published optimizer, with rates below and above the recipe of glyph-tiny or the published one.
CANDIDATES: dict[str, list[Candidate]] = {
    "skip": [Candidate("sgd", 4e-3, 2e-3), *_ADAMW],
    "full": [Candidate("sgd", 5e-4, 2e-4), *_ADAMW],
    "lora": [Candidate("adamw", rate, rate) for rate in (5e-4, 1e-3, 2e-3, 5e-3)],
    "clip-adapter": [Candidate("sgd", rate, rate) for rate in (2e-3, 2e-2, 0.1, 0.3)],
    "coop": [Candidate("sgd", rate, rate) for rate in (2e-3, 2e-2, 0.1, 0.3)],
}
# Epochs and images per batch: for SGD of Skip Tuning and full fine-tuning the recipe of glyph-tiny, for AdamW larger
# batches. The steps of CLIP-Adapter and CoOp are short, so they have more.
SCHEDULES = {"sgd": (8, 4), "adamw": (12, 16), "clip-adapter": (100, 32), "coop": (40, 32)}
OMEGAS = (0.25, 0.5, 0.75)
KEEP_RATIO = 0.5


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        shift: The task.
        method: Key of `CANDIDATES`.
        candidate: Optimizer and rates.
        phase: Part of the characters.
        seed: Seed of classes, images and initial weights.
        skip_layers: ω; only for skip.
        emoji_font: See `tasks.EMOJI_FONT`.
        weights: File of `glyph_tiny.save`. Default: the weights in the package.
    """

    shift: Shift
    method: str
    candidate: Candidate
    phase: Phase
    seed: int
    skip_layers: float = 0.5
    emoji_font: Path = tasks.EMOJI_FONT
    weights: Path = glyph_tiny.WEIGHTS

    @property
    def name(self) -> str:
        """Name of the method in the tables.

        >>> Run(tasks.SHIFTS[0], "skip", CANDIDATES["skip"][0], "report", 0, skip_layers=0.25).name
        'skip 1/4'
        """
        if self.method != "skip":
            return self.method
        return f"skip {round(4 * self.skip_layers)}/4"

    @property
    def key(self) -> tuple[str, ...]:
        """Identifies the run among rows."""
        return self.shift.name, self.name, self.phase, str(self.seed), self.candidate.name

    def config(self) -> TuneConfig:
        """The configuration of the trainer."""
        optimizer, text_lr, image_lr = self.candidate
        epochs, batch = SCHEDULES.get(self.method) or SCHEDULES[optimizer]
        published = self.method == "skip" and optimizer == "sgd" and self.shift.shots >= batch
        settings: dict[str, Any] = {"text_lr": text_lr, "image_lr": image_lr}
        if self.method == "skip":
            settings |= {"skip_layers": self.skip_layers, "keep_ratio": KEEP_RATIO, "max_keep": 50}
        elif self.method == "clip-adapter":
            del settings["text_lr"]
        elif self.method == "coop":
            del settings["image_lr"]
        return TuneConfig(
            method=self.method,
            epochs=epochs,
            batch_size=batch,
            optimizer=optimizer,
            warmup_epochs=0,
            warmup_lr=0.0,
            sampler="class_pure" if published else "random",
            shots=self.shift.shots,
            seed=self.seed,
            device="cpu",
            precision="fp32",
            **settings,
        ).resolved()


def searched(shift: Shift, methods: Iterable[str] = CANDIDATES, **settings: Any) -> Iterator[Run]:
    """The runs of the search of a task: every candidate of each method. Settings are further fields of a `Run`."""
    for method in methods:
        for candidate in CANDIDATES[method]:
            yield Run(shift, method, candidate, "search", SEARCH_SEED, **settings)


def setup_of(run: Run) -> RunSetup:
    """The model, task and method of a run."""
    torch.manual_seed(run.seed)
    config, device = run.config(), torch.device("cpu")
    model, transform, tokenizer = load_model(glyph_tiny.NAME, None, device, architecture_only=True)
    model.load_state_dict(glyph_tiny.state_dict(run.weights))
    task = tasks.load(run.shift, run.phase, run.seed, transform, run.emoji_font)
    method = build_method(config, model, tokenizer, task)
    zero_shot = ZeroShot(model, tokenizer, task) if isinstance(method, FrozenModel) else method
    return RunSetup(config, model, tokenizer, MixedPrecision("fp32", device), task, method, zero_shot)


def execute(run: Run) -> list[dict[str, Any]]:
    """Train and test. Returns the row of the run, and that of its blend if it has one.

    A blend has the mean of the weights before and after tuning, as WiSE-FT recommends without validation images of new
    classes; of LoRA, half of the update.
    """
    setup = setup_of(run)
    evaluator = Evaluator(setup, setup.test_features())
    zero_shot = evaluator.evaluate(setup.zero_shot).accuracies
    before = {name: weight.clone() for name, weight in _blended_weights(setup.method)}
    train = setup.train_features()
    trainer = Trainer(setup.config, setup.method, setup.precision, train, setup.task.tests[0].classes)
    memory = PeakMemory(setup.device)
    resident, started, steps = memory.read(), time.perf_counter(), 0
    diverged = False
    try:
        for _ in range(setup.config.epochs or 0):
            steps += trainer.epoch(on_step=lambda: None, on_loss=lambda loss: None)["steps"]
    except FloatingPointError:
        diverged = True
    seconds, peak = time.perf_counter() - started, memory.read() - resident
    common = {
        "task": run.shift.name,
        "method": run.name,
        "phase": run.phase,
        "seed": run.seed,
        "setting": run.candidate.name,
        "skip_layers": "" if run.method != "skip" else str(setup.config.skip_layers),
        "keep_ratio": "" if run.method != "skip" else KEEP_RATIO,
    }
    cost = {"steps": steps, "train_s": round(seconds, 2), "train_mib": round(peak / 2**20, 1)}

    def row(blended: bool) -> dict[str, Any]:
        found = {"base": 0.0, "new": 0.0, "harmonic": 0.0}
        if not diverged:
            found = evaluator.evaluate(setup.method).accuracies
        of_zero_shot = {f"zero_shot_{key}": round(zero_shot[key], 2) for key in found}
        return common | {"blended": int(blended)} | {k: round(v, 2) for k, v in found.items()} | of_zero_shot | cost

    rows = [row(blended=False)]
    if before and not diverged:
        with torch.no_grad():
            for name, weight in _blended_weights(setup.method):
                weight.lerp_(before[name], 1 - WITHOUT_VALIDATION)
        rows.append(row(blended=True))
    return rows


def _blended_weights(method: Method) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights that a blend interpolates; none if the method adds layers that the zero-shot model lacks.

    The update of LoRA is B A, and B is zero before tuning: half of B is half of the update.
    """
    for name, weight in method.state_dict().items():
        if isinstance(method, TunedModel) and weight.is_floating_point():
            yield name, weight
        elif isinstance(method, LoRA) and name.endswith(".up"):
            yield name, weight

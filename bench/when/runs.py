"""The runs of the study: train a method with a setting on a task, and test it, blended and not; curves and steps."""

from __future__ import annotations

import contextlib
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from skipkernels import FeatureCache
from skipkernels.app.data import Source
from skipkernels.app.heads import choose_l2, fit_head
from skipkernels.app.methods import Method
from skipkernels.app.methods.lora import LoRA
from skipkernels.app.methods.tuned import TunedModel
from skipkernels.app.train.candidates import BLENDS
from skipkernels.app.train.evaluation import Evaluator
from skipkernels.app.train.interpolation import Interpolation
from skipkernels.app.train.run import Run as TuneRun
from skipkernels.app.train.setup import BATCH, RunSetup, build_run
from skipkernels.app.train.trainer import Trainer
from skipkernels.app.train.writing import RunFolder
from skipkernels.peak_memory import PeakMemory

from . import tasks
from .accuracy import ACCURACIES, accuracies, rounded
from .plan import HEADED, HEADS, Run

TIMED_STEPS = 3  # of `first_steps`


def setup_of(run: Run) -> RunSetup:
    """The model, task and method of a run."""
    torch.manual_seed(run.seed)
    setup = build_run(run.config(), open_data=open_data(run))
    if run.variant.label_smoothing:
        setup.method.clip.label_smoothing = run.variant.label_smoothing
    return setup


def open_data(run: Run) -> Callable[[], Source]:
    """A function that opens the images of a run."""
    return partial(tasks.source, run.shift, run.phase, run.seed, run.drawings)


def epochs_of(setup: RunSetup, train: FeatureCache) -> Iterator[tuple[int, float]]:
    """Train; after each epoch, yield the steps and the seconds of training so far."""
    steps, seconds = 0, 0.0
    started = time.perf_counter()
    if not setup.config.epochs:
        inputs, labels = zip(*train.loader(BATCH, "sequential"), strict=True)
        setup.method.fit(torch.cat(inputs), torch.cat(labels))
        yield steps, time.perf_counter() - started
        return
    trainer = Trainer(setup.config, setup.method, train)
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
    train, tests = setup.train_features(), setup.test_features()
    zero_shot = of_zero_shot(setup, tests)
    l2 = choose_l2("anchored", setup.examples(train)) if run.name in HEADED else None
    blended_weights = weights_of_a_blend(setup.method)
    between = Interpolation(blended_weights.values())
    columns = run.columns | {"blended": 0, "head": "", "l2": None}
    try:
        *_, (steps, seconds) = epochs_of(setup, train)
    except FloatingPointError:  # training diverged
        return [columns | dict.fromkeys(ACCURACIES, 0.0) | zero_shot | {"steps": 0, "train_s": 0.0}]
    cost = {"steps": steps, "train_s": round(seconds, 2)}
    rows = [columns | found | zero_shot | cost for found in tested(setup, train, tests, l2)]
    if blended_weights:
        between.end()
        between.set(BLENDS[1])
        blended = columns | {"blended": 1}
        rows += [blended | found | zero_shot | cost for found in tested(setup, train, tests, l2)]
    return rows


def of_zero_shot(setup: RunSetup, tests: Mapping[str, FeatureCache]) -> dict[str, Any]:
    """Columns of the accuracies before tuning."""
    found = accuracies(setup, setup.zero_shot, tests)
    return rounded({f"zero_shot_{name}": found[name] for name in ACCURACIES})


def tested(
    setup: RunSetup, train: FeatureCache, tests: Mapping[str, FeatureCache], l2: float | None
) -> Iterator[dict[str, Any]]:
    """Columns of the accuracies of the method, and of each head on its embeddings if a penalty is given."""
    yield rounded(accuracies(setup, setup.method, tests))
    if l2 is not None:
        examples = setup.examples(train)
        for name in HEADS:
            found = rounded(accuracies(setup, setup.method, tests, fit_head(name, examples, l2)))
            yield {"head": name, "l2": l2 if name == "anchored" else None} | found


def chosen(run: Run) -> list[dict[str, Any]]:
    """Train and test as `skipkernels tune` does by default. Returns a row, with the name of the chosen candidate."""
    torch.manual_seed(run.seed)
    with tempfile.TemporaryDirectory() as folder:
        config = replace(run.config(), out=Path(folder, "run"))
        quiet: dict[str, Any] = {"command": "", "console": Console(quiet=True), "loggers": []}
        tuning = TuneRun(config, RunFolder(config), open_data(run), **quiet)
        setup, tests = tuning.setup, tuning.setup.test_features()
        zero_shot = of_zero_shot(setup, tests)
        metrics = tuning.execute()
    found = rounded(accuracies(setup, setup.method, tests, setup.method.fitted))
    cost = {"steps": metrics["steps"], "train_s": round(metrics["cost"]["seconds_tuning"], 2)}
    columns = run.columns | {"blended": 0, "head": "", "l2": metrics["l2"], "chosen": metrics["classifier"]}
    return [columns | found | zero_shot | cost]


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
    trainer = Trainer(setup.config, setup.method, setup.train_features())

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


def weights_of_a_blend(method: Method) -> dict[str, torch.Tensor]:
    """The weights that a blend interpolates; none if the method adds layers that the zero-shot model lacks.

    The update of LoRA is B A, and B is zero before tuning: half of B is half of the update.
    """
    state = method.state_dict()
    if isinstance(method, LoRA):
        return {name: weight for name, weight in state.items() if name.endswith(".lora_B")}
    return state if isinstance(method, TunedModel) else {}

"""A run, step by step: what `tune` does with a resolved configuration. `Run.execute` is the story."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from rich.console import Console

from ...features import CacheError, FeatureCache
from ...formatting import escaped
from ...peak_memory import PeakMemory
from ..config import TuneConfig
from ..console import print_plain
from ..data import InputError, Source
from ..heads import choose_l2
from ..methods.registry import PACKAGED
from ..report.words import before_text, name_of_run, title_of
from ..results import notes
from ..results.class_metrics import BALANCED
from ..results.files import CANDIDATES
from . import checkpoint, weights
from .checkpoint import best_epoch
from .description import describe, write_open_clip_config
from .evaluation import Evaluation, Evaluator, Trained
from .interpolation import Interpolation
from .metrics import cost_of, metrics_of
from .progress import Logger, ProgressDisplay
from .reading import how_to_resume
from .search import Search
from .setup import BATCH, build_run
from .trainer import REMEDY, Trainer
from .writing import RunFolder

_log = logging.getLogger("skipkernels")
_log.addHandler(logging.NullHandler())  # silent, unless the program that uses the library configures logging


class Embedded(NamedTuple):
    """Features of a run's images, and the accuracy of the pretrained weights."""

    train: FeatureCache
    evaluator: Evaluator
    zero_shot: Evaluation


class Run:
    """A run in a folder.

    Args:
        config: Resolved configuration.
        folder: Folder of the run, with the checkpoint and the choice of an earlier process.
        open_data: Function that opens the dataset.
        command: Command that repeats the run; empty for a dataset of Python.
        console: Console for progress.
        loggers: Loggers of the rows of the epochs.

    Attributes:
        setup: Model, data, method and settings; after the choice between candidates, those of the chosen one.
        choice: The choice, also of an earlier process; None if there is none.
        rows: Rows of metrics.jsonl, of the complete epochs.
    """

    def __init__(
        self,
        config: TuneConfig,
        folder: RunFolder,
        open_data: Callable[[], Source],
        *,
        command: str,
        console: Console,
        loggers: Sequence[Logger],
    ):
        earlier_seconds = 0.0 if folder.checkpoint is None else folder.checkpoint.seconds
        self.started = time.perf_counter() - earlier_seconds
        self.folder, self.choice, self.command = folder, folder.choice, command
        self.console, self.loggers = console, loggers
        self.memory = PeakMemory(torch.device(config.device))
        self.baseline_memory = self.memory.read()
        if config.model != PACKAGED:
            print_plain(self.console, f"loading {config.model}; what is not on this machine is downloaded first")
        self.setup = build_run(config, open_data=open_data)
        self.method, self.task = self.setup.method, self.setup.task
        self.display = ProgressDisplay(self.console, title=title_of(config, name_of_run(config)))
        self.rows = [] if folder.checkpoint is None else list(folder.checkpoint.rows)

    @property
    def config(self) -> TuneConfig:
        """Settings, with those of the choice."""
        return self.setup.config

    @property
    def seconds(self) -> float:
        """Seconds since the start of the run, in all processes that continued it."""
        return time.perf_counter() - self.started

    def execute(self) -> dict[str, Any]:
        """Execute all steps; return the contents of metrics.json."""
        with self._errors_completed(), self.display:
            for note in (*notes.setting_notes(self.config), *self.task.notes, *self.method.notes):
                self._tell("note", note)
            images = self._embed()  # features of all images, and the accuracy of the pretrained weights
            l2 = self._choose(images.train)  # method, learning rates and head, where the configuration leaves them open
            trainer = self._trainer(images.train)
            before = Interpolation(self.setup.trained) if self.config.blend != 1 else None
            with self.folder.lock(self.config):  # nothing is written before
                self._write_setup()  # files that training does not change
                if trainer is not None:
                    self._resume(trainer)  # from the checkpoint, if there is one
                self.memory.reset()
                fit_seconds = 0.0 if self.config.has_steps else self._fit(images.train)  # in closed form
                if trainer is not None:
                    self._train(trainer, images)  # by epochs
                trained = self._complete(images, l2, before)  # blend, head, calibration
                return self._write(trained, fit_seconds)  # model, report, metrics

    # ---- steps -------------------------------------------------------------------------------------------------------

    def _embed(self) -> Embedded:
        with self.display.features(self.setup.num_images) as advance:
            test, held = self.setup.test_features(advance), self.setup.validation_features(advance)
            train = self.setup.train_features(advance)
        evaluator = Evaluator(self.setup, test, held)
        when = "for the pretrained weights. Check `pretrained`, or use `precision=fp32`."
        return Embedded(train, evaluator, evaluator.evaluate(self.setup.zero_shot, when))

    def _choose(self, train: FeatureCache) -> float:
        """Choose what the configuration leaves open: settings, and the penalty of the head, which is returned."""
        if not self.config.chooses and self.config.head == "none":
            return 0.0
        frozen = self.setup.examples(train)  # with the pretrained weights
        if self.config.chooses:
            self._choose_settings(Search(self.setup, train, frozen))
        return choose_l2(self.config.head, frozen)

    def _choose_settings(self, search: Search) -> None:
        """Choose the settings of the best candidate; of those before Ctrl-C, if it ends the search."""
        if search.splits:
            print_plain(self.console, notes.compared(self.config, self.task.held_out, search.factors))
        advance = self.display.candidates(search.steps)
        stopped, started = False, time.perf_counter()
        try:
            for trials in search.run(advance):
                self.display.trials(trials)
        except KeyboardInterrupt as error:
            if type(error) is not KeyboardInterrupt or not search.allowed:  # not Ctrl-C, but the end of the job
                raise
            stopped = True
        self.choice = replace(search.choice(stopped=stopped), seconds=time.perf_counter() - started)
        self.setup = replace(self.setup, config=replace(self.config, **self.choice.settings))
        chosen = f"{name_of_run(self.config)} ({self.choice.because})"
        print_plain(self.console, f"chosen: {chosen}. It now gets all training images.")

    def _trainer(self, train: FeatureCache) -> Trainer | None:
        """Make the trainer; None without epochs."""
        if not self.config.epochs:
            return None
        trainer = Trainer(self.config, self.method, train)
        if trainer.not_graphed is not None:
            self._tell("note", f"steps run without a CUDA graph: {trainer.not_graphed}")
        return trainer

    def _write_setup(self) -> None:
        """Write the files that training does not change: the configuration of the model, and the choice."""
        if self.method.trains_model:
            write_open_clip_config(self.folder.path, self.setup.model, self.setup.tokenizer)
        if self.choice is not None:
            self.folder.write(CANDIDATES, self.choice.to_json())

    def _resume(self, trainer: Trainer) -> None:
        """Load the checkpoint to resume, if there is one."""
        if self.folder.checkpoint is not None:
            weights.load_into(self.method, self.folder.checkpoint.weights)
            trainer.load_state_dict(self.folder.checkpoint.training)

    def _fit(self, train: FeatureCache) -> float:
        """Train a method without steps; return the seconds."""
        batches = list(train.loader(BATCH, "sequential", device=self.setup.device))
        inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        started = time.perf_counter()
        with self.setup.autocast():
            self.method.fit(inputs, labels)
        return time.perf_counter() - started

    def _train(self, trainer: Trainer, images: Embedded) -> None:
        """Train by epochs, and return to the weights of the best one on the validation images."""
        config = self.config
        assert config.epochs
        if before := before_text(config):
            print_plain(self.console, f"epochs are those of the trained model{before}")
        self.display.begin(
            epochs=config.epochs,
            steps_per_epoch=trainer.steps,
            zero_shot=images.zero_shot.accuracies,
            done=trainer.epochs,
        )
        while trainer.epochs < config.epochs:
            row = trainer.epoch(self.display.step, self.display.loss)
            when = f"after this epoch, though its loss and weights are. {REMEDY}"
            evaluation = images.evaluator.evaluate(self.method, when)
            row["accuracy"], row["validation"] = evaluation.accuracies, evaluation.validation
            if (balanced := images.evaluator.balanced(evaluation)) is not None:
                row[BALANCED] = balanced
            self._end_epoch(row, trainer)
            for logger in self.loggers:
                logger.write(row)
        best = best_epoch(self.rows)
        if best is not None and best < len(self.rows):
            weights.load_into(self.method, checkpoint.weights_of(self.folder.path, best))

    def _end_epoch(self, row: dict[str, Any], trainer: Trainer) -> None:
        """Write the checkpoint and the row of an epoch, and show it."""
        rows = [*self.rows, row]
        checkpoint.save(
            self.folder.path,
            self.method.state_dict(),
            describe(self.setup),
            trainer.state_dict(),
            settings=self.config.identity(),
            rows=rows,
            seconds=self.seconds,
        )
        self.folder.write_rows(rows)
        self.rows = rows
        self.display.epoch(row)
        _log.info("epoch %d/%d: loss %.4f, accuracy %s", row["epoch"], self.config.epochs, row["loss"], row["accuracy"])

    def _complete(self, images: Embedded, l2: float, before: Interpolation | None) -> Trained:
        """Blend the weights with those before training, fit the head, and calibrate the probabilities."""
        if before is not None:
            before.end()
            before.set(self.config.blend)
        if self.config.head != "none":
            self.setup.fit_head(images.train, l2)
        return Trained.measured(
            self.setup, images.evaluator, images.zero_shot, l2=l2, choice=self.choice, rows=self.rows
        )

    def _write(self, trained: Trained, fit_seconds: float) -> dict[str, Any]:
        """Write the results; return the metrics."""
        cost = cost_of(
            trained,
            total_seconds=self.seconds,
            fit_seconds=fit_seconds,
            baseline_memory=self.baseline_memory,
            peak_memory=self.memory.read(),
        )
        metrics = metrics_of(trained, self.command, cost)
        metrics["notes"] = notes.result_notes(self.config, metrics)
        self.folder.write_results(trained, metrics)
        for warning in metrics["notes"]:
            self._tell("warning", warning)
        return metrics

    # ---- messages ----------------------------------------------------------------------------------------------------

    def _tell(self, kind: str, text: str) -> None:
        """Print and log a line."""
        print_plain(self.console, f"{kind}: {text}")
        (_log.info if kind == "note" else _log.warning)(escaped(text))

    @contextlib.contextmanager
    def _errors_completed(self) -> Iterator[None]:
        """Complete the errors of a run: say what to do about an image that can't be read, and how to resume."""
        try:
            yield
        except CacheError as error:
            if error.item is None:
                raise
            remedy = "`skipkernels check` lists all such images, and `unreadable=skip` leaves them out."
            raise InputError(f"{error} {remedy}") from error
        except KeyboardInterrupt as error:
            folder = self.folder.path
            done = f"{len(self.rows)} of {self.config.epochs} epochs are" if self.rows else "no epoch is"
            started = self.rows or (folder / CANDIDATES).exists()
            how = f"; continue it with {how_to_resume(folder, self.config.data)}" if started else ""
            error.args = (f"{done} complete in {folder}{how}",)
            raise

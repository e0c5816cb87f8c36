"""A run, step by step: what `tune` does with a resolved configuration. `Run.execute` is the story."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console

from ...features import CacheError, FeatureCache
from ...formatting import escaped, first_line
from ...memory import PeakMemory
from ..config import TuneConfig
from ..console import print_plain
from ..data import InputError, Source, save_few_shot
from ..data.check import unreadable_images
from ..data.files import format_names
from ..heads import Examples, choose_l2
from ..report.words import name_of_run, title_of
from . import checkpoint, notes, weights
from .calibration import calibrate
from .candidates import Search
from .checkpoint import MODEL, best_epoch
from .choice import Choice
from .class_metrics import BALANCED
from .description import Description, describe, write_open_clip_config
from .evaluation import Evaluation, Evaluator
from .loggers import Logger
from .progress import ProgressDisplay
from .results import metrics_of
from .run_folder import CANDIDATES, FEW_SHOT, REPORT, RunFolder
from .setup import BATCH, build_run
from .trainer import Trainer
from .weights import Interpolation

_log = logging.getLogger("skipkernels")
_log.addHandler(logging.NullHandler())  # silent, unless the program that uses the library configures logging


class Run:
    """A run with its model and data; without a `folder` it writes nothing. `choice`: of an earlier process."""

    def __init__(
        self,
        config: TuneConfig,
        open_data: Callable[[], Source],
        folder: RunFolder | None,
        *,
        choice: Choice | None = None,
        console: Console | None = None,
        command: str = "",
        loggers: Sequence[Logger] = (),
    ):
        self.folder = folder
        self.console, self.command, self.loggers = console or Console(quiet=True), command, loggers
        self.started = time.perf_counter()
        self.memory = PeakMemory(torch.device(config.device))
        self.baseline_memory = self.memory.read()
        self.setup = build_run(config, open_data=open_data)
        self.method, self.task = self.setup.method, self.setup.task
        self.display = ProgressDisplay(self.console, title=title_of(config, name_of_run(config)), memory=self.memory)

        self.resumed = resumed = None if folder is None else folder.resumed
        self.rows = [] if resumed is None else list(resumed.rows)  # of the complete epochs, as in metrics.jsonl
        self.seconds_before = 0.0 if resumed is None else resumed.seconds  # of earlier processes

        # Results of the steps.
        self.features: FeatureCache  # of the training images
        self.evaluator: Evaluator
        self.zero_shot: Evaluation
        self.between: Interpolation  # for a blend
        self.choice = choice
        self.l2 = 0.0  # penalty of the head, if it has one
        self.trainer: Trainer | None = None  # of a method that trains by steps
        self.seconds_fit = 0.0  # of one that does not
        self.tuned: Evaluation | None = None  # of the model as it is now
        self.calibration: dict[str, Any] = {}  # fields of a `Description`
        self.thresholds: list[dict[str, Any]] = []  # by accuracy on the validation images
        self.warnings: list[str] = []

    @property
    def config(self) -> TuneConfig:
        """Settings, with those of the choice after `choose`."""
        return self.setup.config

    @property
    def seconds(self) -> float:
        """Seconds since the start of the run, in all processes that continued it."""
        return self.seconds_before + time.perf_counter() - self.started

    def execute(self) -> dict[str, Any]:
        """Execute all steps; return the contents of metrics.json."""
        assert self.folder is not None
        with self._errors_completed(), self.display:
            for note in (*notes.setting_notes(self.config), *self.task.notes, *self.method.notes):
                self._tell("note", note)
            self.embed()  # features of all images, and the accuracy of the pretrained weights
            self.choose()  # method, learning rates and head, where the configuration leaves them open
            self.prepare()  # the trainer
            with self.folder.lock():  # nothing is written before
                self.begin()  # files that training does not change, and the checkpoint to resume
                self.train()  # by epochs or in closed form
                self.complete()  # blend, head, calibration
                return self.write()  # model, report, metrics

    # ---- steps -------------------------------------------------------------------------------------------------------

    def embed(self) -> None:
        """Compute the features of all images at the cut, and the accuracy of the pretrained weights."""
        advance = self.display.features(self.setup.images)
        test, held = self.setup.test_features(advance), self.setup.validation_features(advance)
        self.features = self.setup.train_features(advance)
        self.evaluator = Evaluator(self.setup, test, held)
        self.zero_shot = self.evaluator.evaluate(
            self.setup.zero_shot, "for the pretrained weights. Check `pretrained`, or use `precision=fp32`."
        )

    def choose(self) -> None:
        """Choose the settings among candidates, if the configuration leaves them open, and the penalty of the head."""
        frozen: Examples | None = None
        if self.config.chooses:
            search = Search(self.setup, self.features)
            self.choice, frozen = self._choice(search), search.frozen
            config = replace(self.config, **self.choice.settings)
            self.setup = replace(self.setup, config=config)
            if self.folder is not None:
                self.folder.config = config
        if self.config.head != "none":  # before training, and before a resumed run loads tuned weights
            self.l2 = choose_l2(self.config.head, frozen or self.setup.examples(self.features))

    def prepare(self) -> None:
        """Make the trainer of a method with epochs, and keep the weights that a blend needs."""
        if self.config.epochs:
            self.trainer = Trainer(self.config, self.method, self.features, self.task.tests[0].classes)
            if self.trainer.not_graphed is not None:
                self._tell("note", f"steps run without a CUDA graph: {self.trainer.not_graphed}")
        if self.config.blend != 1:
            self.between = Interpolation(self.setup.trained)

    def begin(self) -> None:
        """Write the files that training does not change, and load the checkpoint to resume, if there is one."""
        assert self.folder is not None
        if self.method.trains_model:
            write_open_clip_config(self.folder.path, self.setup.model, self.setup.tokenizer)
        if self.choice is not None:
            self.folder.write(CANDIDATES, self.choice.to_json())
        known = {name: getattr(self.config, name) for name in ("data", "shots", "seed")}
        save_few_shot(self.folder.path / FEW_SHOT, self.task.train, classes=self.task.tests[0].classes, **known)
        if self.resumed is not None and self.trainer is not None:
            weights.load_into(self.method, self.resumed.weights)
            self.trainer.load_state_dict(self.resumed.training)
            self.tuned = self.evaluator.evaluate(self.method)

    def train(self) -> None:
        """Train, by epochs or in closed form, and return to the weights of the best epoch on the validation images."""
        self.memory.reset()
        if self.trainer is None:
            self._fit()
            self.tuned = self.evaluator.evaluate(self.method)
            return
        self._run_epochs(self.trainer)
        if best_epoch(self.rows) not in (None, len(self.rows)):
            assert self.config.out is not None
            weights.load_into(self.method, self.config.out / checkpoint.FOLDER / checkpoint.BEST)
            self.tuned = self.evaluator.evaluate(self.method)

    def complete(self) -> None:
        """Blend the weights with those before training, fit the head, and calibrate the probabilities."""
        config = self.config
        if config.blend != 1:
            self.between.end()
            self.between.set(config.blend)
        if config.head != "none":
            self.setup.fit_head(self.features, self.l2)
        if config.blend != 1 or config.head != "none":
            self.tuned = self.evaluator.evaluate(self.method)
        if self.choice is not None:
            self.calibration = self.choice.calibration
        elif (held_out := self.evaluator.validation_logits(self.method)) is not None:
            self.calibration, self.thresholds = calibrate(*held_out)

    def write(self) -> dict[str, Any]:
        """Write the model, the report and, last, the metrics; return the metrics. A failed report is a warning."""
        assert self.folder is not None and self.tuned is not None
        described = replace(self._describe(), **self.calibration)
        described = self.folder.write_model(described, self.method.state_dict(), self.method.fitted)
        metrics = metrics_of(self)
        metrics["notes"] = self.warnings  # also those to come
        doubts = [notes.weak_result(self.config, metrics), notes.few_held_out(metrics)]
        doubts.append(notes.optimistic_validation(metrics))
        self.warnings += [note for note in doubts if note is not None]
        self.folder.write_card(described, metrics)
        try:
            self.folder.write_report(metrics, self.evaluator.predictions(self.zero_shot, self.tuned), self.rows)
        except Exception as error:  # any: the results are complete without the report
            self.warnings.append(f"{REPORT} was not written ({type(error).__name__}: {first_line(error)}).")
        self.folder.write_metrics(metrics)
        self.folder.delete_checkpoint()
        return metrics

    # ---- parts of the steps ------------------------------------------------------------------------------------------

    def _choice(self, search: Search) -> Choice:
        """Try candidates until all are done, or Ctrl-C."""
        if search.masks:
            print_plain(self.console, notes.compared(self.config, self.task.held_out, search.factors))
        search.advance = self.display.candidates(search.steps)
        stopped, started = False, time.perf_counter()
        try:
            for number, trials in enumerate(search.run() if search.masks else ()):
                done = time.perf_counter() - started
                self.display.trials(trials, done / number * (len(search.factors) - number) if number else 0.0)
        except KeyboardInterrupt as error:
            if type(error) is not KeyboardInterrupt or not search.allowed:  # not Ctrl-C, but the end of the job
                raise
            stopped = True
        choice = replace(search.choice(stopped), seconds=time.perf_counter() - started)
        print_plain(self.console, f"chosen: {choice.name} ({choice.because}). It now gets all training images.")
        return choice

    def _fit(self) -> None:
        """Train a method without steps; of another one, without epochs, only a head is fitted later."""
        if self.config.has_steps:
            return
        batches = list(self.features.loader(BATCH, "sequential", device=self.setup.device))
        inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        started = time.perf_counter()
        with self.setup.autocast():
            self.method.fit(inputs, labels)
        self.seconds_fit = time.perf_counter() - started

    def _run_epochs(self, trainer: Trainer) -> None:
        config = self.config
        assert config.epochs
        later = ["blend"] * (config.blend != 1) + ["head"] * (config.head != "none")
        if later:
            print_plain(self.console, f"epochs are those of the trained model, before its {' and its '.join(later)}")
        self.display.begin(
            epochs=config.epochs,
            steps_per_epoch=trainer.steps,
            zero_shot=self.zero_shot.accuracies,
            batch_size=len(self.task.train) / trainer.steps,
            done=trainer.epochs,
        )
        with contextlib.ExitStack() as closing:  # closes all loggers, also if one fails to
            for logger in self.loggers:
                closing.callback(logger.close)
            while trainer.epochs < config.epochs:
                row = trainer.epoch(self.display.step, self.display.loss)
                evaluation = self.evaluator.evaluate(self.method)
                row["accuracy"], row["validation"] = evaluation.accuracies, evaluation.validation
                if (balanced := self.evaluator.balanced(evaluation)) is not None:
                    row[BALANCED] = balanced
                self._end_epoch(row, evaluation)
                for logger in self.loggers:
                    logger.write(row)

    def _end_epoch(self, row: dict[str, Any], evaluation: Evaluation) -> None:
        """Write the checkpoint and the row of an epoch, and show it."""
        rows = [*self.rows, row]
        if self.folder is not None and self.trainer is not None:
            known: dict[str, Any] = {"settings": self.config.identity(), "rows": rows, "seconds": self.seconds}
            state = self.method.state_dict(), self._describe(), self.trainer.state_dict()
            checkpoint.save(self.folder.path, *state, **known)
            self.folder.write_rows(rows)
        self.rows, self.tuned = rows, evaluation
        self.display.epoch(row)
        _log.info("epoch %d/%d: loss %.4f, accuracy %s", row["epoch"], self.config.epochs, row["loss"], row["accuracy"])

    def _describe(self) -> Description:
        return describe(self.config, self.setup.model, self.task, weights=MODEL)

    # ---- messages ----------------------------------------------------------------------------------------------------

    def _tell(self, kind: str, text: str) -> None:
        """Print and log a line."""
        print_plain(self.console, f"{kind}: {text}")
        (_log.info if kind == "note" else _log.warning)(escaped(text))

    @contextlib.contextmanager
    def _errors_completed(self) -> Iterator[None]:
        """Complete the errors of a run: name all images that can't be read, and how to resume; print warnings last."""
        try:
            yield
        except CacheError as error:
            if error.item is not None:
                self._list_unreadable()
            raise
        except KeyboardInterrupt as error:
            done = f"{len(self.rows)} of {self.config.epochs} epochs are" if self.rows else "no epoch is"
            started = self.rows or (self.config.out is not None and (self.config.out / CANDIDATES).exists())
            how = f"; continue it with skipkernels tune --resume {self.config.out}" if started else ""
            error.args = (f"{done} complete in {self.config.out}{how}",)
            raise
        finally:
            for warning in self.warnings:
                self._tell("warning", warning)

    def _list_unreadable(self) -> None:
        """Raise an error that names all images that can't be read, if there are any."""
        unreadable = unreadable_images(self.task)
        for reason in unreadable.values():
            self._tell("unreadable", reason)
        if unreadable:
            raise InputError(
                f"{len(unreadable)} of the images can't be read: {format_names(list(unreadable))}. Replace or remove "
                "them, or leave them out with `unreadable=skip`."
            )

"""A run: the steps of `tune`, from the features of the images to the files of the results."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ...features import CacheError
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
from .checkpoint import HEAD, MODEL, Checkpoint, best_epoch, has_stalled
from .choice import Choice
from .class_metrics import VALIDATION
from .description import Description, describe, write_open_clip_config
from .environment import environment
from .errors import argument_error
from .evaluation import Evaluation, Evaluator
from .fitted_head import examples, save_head, use_fitted_head
from .interpolation import Interpolation
from .loggers import Logger, open_loggers
from .processes import Processes
from .progress import ProgressDisplay
from .run_folder import CANDIDATES, FEW_SHOT, REPORT, RunFolder
from .setup import BATCH, build_run
from .trainer import Trainer

_log = logging.getLogger("skipkernels")
_log.addHandler(logging.NullHandler())  # silent, unless the program that uses the library configures logging


class Run:
    """A run with its model and data; `folder` is None on processes other than the first."""

    def __init__(
        self,
        config: TuneConfig,
        open_data: Callable[[], Source],
        processes: Processes,
        folder: RunFolder | None,
        *,
        console: Console | None = None,
        command: str = "",
        loggers: Sequence[Logger] = (),
    ):
        self.config, self.processes, self.folder = config, processes, folder
        self.console, self.command, self.loggers = console or Console(quiet=True), command, loggers
        self.resumed: Checkpoint | None = processes.from_first(lambda: None if folder is None else folder.resumed)
        self.started = time.perf_counter()
        self.memory = PeakMemory(torch.device(config.device))
        self.baseline_memory = self.memory.read()
        self.setup = build_run(config, open_data=open_data, processes=processes)
        self.method, self.task = self.setup.method, self.setup.task
        if config.patience is not None and self.task.validation is None:
            raise argument_error("patience", "there are no validation images to stop by; add some, or leave it out.")
        self.holds = weights.contents(self.method, self.setup.model)
        self.described = self._describe()
        for note in (*notes.setting_notes(config), *self.task.notes, *self.method.notes):
            print_plain(self.console, f"note: {note}")
            _log.info(escaped(note))
        between = [name_of_run(config), *([f"{processes.size} processes"] if processes.size > 1 else [])]
        title = title_of(config, *between)
        self.display = ProgressDisplay(self.console, title=title, memory=self.memory)
        self.rows = [] if self.resumed is None else list(self.resumed.rows)  # of the complete epochs
        self.tuned: Evaluation | None = None  # after the last complete epoch, in the end of the best
        self.choice: Choice | None = None
        if config.train_on_validation and config.resume:
            found = processes.from_first(lambda: None if folder is None else Choice.read(folder.path))
            self.choice = found if found is not None and found.made(config) else None
            if self.choice is None:
                note = f"no {CANDIDATES} of these settings: the results have no candidates, and no temperature of them"
                print_plain(self.console, f"note: {note}.")
        self.l2 = 0.0  # penalty of the head, if it has one
        self.thresholds: list[dict[str, Any]] = []  # by accuracy on the validation images
        self.warnings: list[str] = []
        self.seconds_before = 0.0 if self.resumed is None else self.resumed.seconds  # of earlier processes
        self.seconds_fit = 0.0

    def _describe(self) -> Description:
        return describe(self.config, self.setup.model, self.task, weights=MODEL, holds=self.holds)

    @contextlib.contextmanager
    def reported(self) -> Iterator[None]:
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
                print_plain(self.console, f"warning: {warning}")
                _log.warning(escaped(warning))

    def compute_features(self) -> None:
        """Compute the features of all images, and evaluate the pretrained weights."""
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
            if search.masks:
                print_plain(self.console, notes.compared(self.config, self.task.held_out, search.factors))
            self._adopt(self._choice(search))
            frozen = search.frozen
        head = self.config.head
        if head != "none":  # before training, and before a resumed run loads tuned weights
            self.l2 = choose_l2(head, frozen or examples(self.setup, self.features))
        if self.config.blend != 1:
            self.between = Interpolation(self.setup.trained)

    def _choice(self, search: Search) -> Choice:
        """Try candidates until all are done, or Ctrl-C."""
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

    def _adopt(self, choice: Choice) -> None:
        """Continue with the settings of a choice."""
        self.choice, self.config = choice, replace(self.config, **choice.settings).resolved()
        self.setup = replace(self.setup, config=self.config)
        self.described = self._describe()
        if self.folder is not None:
            self.folder.config = self.config

    def trainer(self) -> Trainer | None:
        """Return the trainer; None for a method without epochs."""
        if not self.config.epochs:
            return None
        arguments = self.method, self.setup.precision, self.features, self.task.tests[0].classes
        trainer = Trainer(self.config, *arguments, self.processes)
        if trainer.not_graphed is not None:
            print_plain(self.console, f"note: steps run without a CUDA graph: {trainer.not_graphed}")
        return trainer

    def _list_unreadable(self) -> None:
        """Raise an error that names all images that can't be read, if there are any."""
        found = unreadable_images(self.task)
        for reason in found.values():
            print_plain(self.console, f"unreadable: {reason}")
            _log.warning(reason)
        if found:
            raise InputError(
                f"{len(found)} of the images can't be read: {format_names(list(found))}. Replace or remove them, or "
                "leave them out with `unreadable=skip`."
            )

    def begin(self, trainer: Trainer | None) -> None:
        """Write the files that training does not change, and load the checkpoint to resume, if there is one."""
        if self.folder is not None:
            if self.holds == weights.MODEL:
                write_open_clip_config(self.folder.path, self.setup.model, self.setup.tokenizer)
            config, path = self.config, self.folder.path / FEW_SHOT
            known: dict[str, Any] = {"data": config.data, "shots": config.shots, "seed": config.seed}
            if self.choice is not None:
                self.folder.write(CANDIDATES, self.choice.to_json())
            save_few_shot(path, self.task.train, classes=self.task.tests[0].classes, **known)
        if self.resumed is None:
            return
        self._load(self.resumed.weights)
        if trainer is not None:
            try:
                trainer.load_state_dict(self.resumed.training or {})
            except (LookupError, TypeError, ValueError, RuntimeError, AttributeError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(
                    f"{self.resumed.weights.parent}: not the training state of this run: {first_line(error)}. Tune "
                    "again in another folder, or in this one with `overwrite=True`."
                ) from error
        self.tuned = self.evaluator.evaluate(self.method)

    def _load(self, file: Path) -> None:
        """Load weights on the first process, and send them to the others."""
        if self.processes.first:
            weights.load_into(self.method, file)
        self.processes.broadcast(self.method.state_dict().values())

    def train(self, trainer: Trainer | None) -> None:
        """Train, and return to the weights of the best epoch on the validation images."""
        self.memory.reset()
        if trainer is not None:
            self._epochs(trainer)
            if best_epoch(self.rows) not in (None, len(self.rows)):
                assert self.config.out is not None
                self._load(self.config.out / checkpoint.FOLDER / checkpoint.BEST)
                self.tuned = self.evaluator.evaluate(self.method)
        elif self.resumed is None:
            self._fit()
        self._complete_model()
        self._calibrate()

    def _epochs(self, trainer: Trainer) -> None:
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
        with contextlib.ExitStack() as closing:  # closes all, also if one fails to open or to close
            loggers: list[Logger] = []
            if self.folder is not None:
                for logger in chain(self.loggers, open_loggers(config.log, config.identity(), self.folder.path)):
                    closing.callback(logger.close)
                    loggers.append(logger)
            while trainer.epochs < config.epochs and not has_stalled(self.rows, config.patience):
                row = trainer.epoch(self.display.step, self.display.loss)
                started = time.perf_counter()
                evaluation = self.evaluator.evaluate(self.method)
                row["stage_seconds"]["evaluation"] = time.perf_counter() - started
                row["accuracy"], row["validation"] = evaluation.accuracies, evaluation.validation
                if config.class_weight is not None and evaluation.validation is not None:
                    row["validation_balanced"] = self.evaluator.by_class(evaluation)[VALIDATION]["balanced_accuracy"]
                self._complete(row, evaluation, trainer)
                self.display.epoch(row)
                _log.info(
                    "epoch %d/%d: loss %.4f, accuracy %s", row["epoch"], config.epochs, row["loss"], row["accuracy"]
                )
                for logger in loggers:
                    logger.write(row)

    def _fit(self) -> None:
        """Train a method without steps."""
        batches = list(self.features.loader(BATCH, "sequential", device=self.setup.device))
        inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        started = time.perf_counter()
        with self.setup.precision.autocast():
            if not self.config.has_steps:
                self.method.fit(inputs, labels)
        self.seconds_fit = time.perf_counter() - started
        self._complete(None, self.evaluator.evaluate(self.method), None)

    def _complete(self, row: dict[str, Any] | None, evaluation: Evaluation, trainer: Trainer | None) -> None:
        """Complete an epoch: write the checkpoint and the row. A method without epochs has no row."""
        rows = self.rows if row is None else [*self.rows, row]
        if self.folder is not None:
            state = None if trainer is None else trainer.state_dict()
            known: dict[str, Any] = {"settings": self.config.identity(), "rows": rows, "seconds": self._seconds()}
            checkpoint.save(self.folder.path, self.method.state_dict(), self.described, state, **known)
            self.folder.write_rows(rows)
        self.rows, self.tuned = rows, evaluation

    def _complete_model(self) -> None:
        """Blend the weights with those before training, and fit the head."""
        config = self.config
        if config.blend != 1:
            self.between.end()
            self.between.set(config.blend)
        if config.head != "none":
            use_fitted_head(self.setup, self.features, self.l2)
        if config.blend != 1 or config.head != "none":
            self.tuned = self.evaluator.evaluate(self.method)

    def _calibrate(self) -> None:
        """Fit probabilities and find thresholds on the validation images, with the final weights."""
        if self.choice is not None:
            self.described = replace(self.described, **self.choice.calibration)
            return
        found = self.evaluator.validation_logits(self.method)
        if found is not None:
            fitted, self.thresholds = calibrate(*found)
            self.described = replace(self.described, **fitted)

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def finish(self) -> dict[str, Any]:
        """Write the model, the report and the metrics, which complete the run.

        An error in the report becomes a warning.
        """
        assert self.folder is not None and self.tuned is not None
        save = None if self.config.blend == 1 else lambda path: weights.save_weights(path, self.method.state_dict())
        with self.folder.writing(HEAD):
            self.described = save_head(self.folder.path, self.method.fitted, self.described)
        self.folder.publish(self.described, save)
        metrics = {"status": "complete", "notes": self.warnings} | self._metrics(self.tuned)
        weak = notes.weak_result(self.config, metrics)
        self.warnings += [note for note in (weak, notes.optimistic_validation(metrics)) if note is not None]
        self.folder.write_card(self.described, metrics)
        try:
            self.folder.write_report(metrics, self.evaluator.predictions(self.zero_shot, self.tuned), self.rows)
        except Exception as error:  # any: the results are complete without the report
            self.warnings.append(f"{REPORT} was not written ({type(error).__name__}: {first_line(error)}).")
        self.folder.write_metrics(metrics)
        self.folder.delete_checkpoint()
        return metrics

    def _metrics(self, tuned: Evaluation) -> dict[str, Any]:
        """Contents of metrics.json."""
        rows, config, choice = self.rows, self.config, self.choice
        seconds, steps = [row["seconds"] for row in rows], sum(row["steps"] for row in rows)
        validation: dict[str, Any] | None = None
        if self.task.validation is not None:
            images = len(self.task.validation.images)
            validation = {"images": images, "zero_shot": self.zero_shot.validation, "tuned": tuned.validation}
            validation["thresholds"] = self.thresholds
            if config.class_weight is not None:
                validation["balanced"] = self.evaluator.by_class(tuned)[VALIDATION]["balanced_accuracy"]
        by_class = [self.evaluator.by_class(found) for found in (self.zero_shot, tuned)]
        if choice is not None:
            validation = choice.validation
            for of_tests, of_held_out in zip(by_class, choice.by_class, strict=False):  # none if nothing was held out
                of_tests[VALIDATION] = of_held_out
        return {
            "command": self.command,
            "environment": environment(config.device, self.processes.size),
            "method": config.method,
            "head": config.head,
            "classifier": name_of_run(config) if choice is None else choice.name,
            "l2": self.l2,
            "protocol": config.protocol,
            "classes": {test.name: len(test.classes) for test in self.task.tests},
            "zero_shot": self.zero_shot.accuracies,
            "tuned": tuned.accuracies,
            "by_class": by_class[1],
            "zero_shot_by_class": by_class[0],
            "candidates": None if choice is None else choice.candidates,
            "chosen_because": None if choice is None else choice.because,
            "validation": validation,
            "epochs": len(rows),
            "best_epoch": best_epoch(rows),
            "steps": steps,
            "images": {
                "train": len(self.task.train),
                "tests": {test.name: len(test.images) for test in self.task.tests},
            },
            "processes": self.processes.size,
            "batch_size": config.batch_size,
            "kept_classes": rows[-1]["kept_classes"] if rows else None,
            "parameters": self._parameters(),
            "checkpoint": self._weights_size(),
            "cost": {
                "device": config.device,
                "seconds_total": self._seconds(),
                "seconds_tuning": (0.0 if choice is None else choice.seconds) + sum(seconds) + self.seconds_fit,
                "baseline_memory_mib": _mib(self.baseline_memory),
                "peak_memory_mib": _mib(self.memory.read()),
                "seconds_per_epoch": sorted(seconds)[len(seconds) // 2] if rows else None,
                "milliseconds_per_step": 1000 * sum(seconds) / steps if rows else None,
            },
        }

    def _parameters(self) -> dict[str, int]:
        """Number of parameters: trained, and all."""
        groups = self.method.parameter_groups(text_lr=0.0, image_lr=0.0)
        trained = {id(weight): weight for group in groups for weight in group["params"]}
        every = trained | {id(weight): weight for weight in self.setup.model.parameters()}
        return {name: sum(w.numel() for w in by_id.values()) for name, by_id in (("trained", trained), ("all", every))}

    def _weights_size(self) -> dict[str, Any]:
        """Name and size of the weights file."""
        file = Path(self.config.out or "", self.described.weights)
        return {"file": file.name, "mib": _mib(file.stat().st_size)}


def _mib(count: float) -> float:
    return round(count / 2**20, 1)

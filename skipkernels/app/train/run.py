"""A training run: zero-shot evaluation, epochs of training, and writing of the results."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor

from ...features import FeatureCache
from ...formatting import escaped, first_line
from ...memory import PeakMemory, out_of_memory
from ...store import StoreError
from ..config import TuneConfig
from ..console import ignore_write_errors, plain
from ..data import Images, InputError, SizedDataset, Source, save_few_shot
from ..data.check import unreadable_images
from ..data.files import format_names
from ..methods.skip import Skip
from ..report import report_html
from ..report.mistakes import predictions_with_thumbnails
from . import checkpoint, notes
from .calibration import fit_temperature
from .command_line import command_line
from .description import CLASSIFIER, Description, describe, write_open_clip_config
from .environment import environment
from .errors import argument_error
from .evaluation import Evaluator
from .forward_profile import forward_milliseconds
from .loggers import Logger, open_loggers
from .model_card import model_card
from .own_dataset import own_data
from .plain_config import OPEN_CLIP
from .predictions import TestPredictions, TopClasses, consistent
from .processes import ALONE, Processes, join
from .progress import ProgressDisplay
from .run_folder import FEW_SHOT, REPORT, FollowedFolder, RunFolder, interrupt_deferred, resumed
from .setup import BATCH, build_run
from .trainer import Trainer
from .validation import best_epoch, has_stalled
from .weights import MODEL, WeightsFile

Status = Literal["complete", "interrupted", "diverged"]
_log = logging.getLogger("skipkernels")
_log.addHandler(logging.NullHandler())  # silent, unless the program that uses the library configures logging


def tune(
    config: TuneConfig | None = None,
    console: Console | None = None,
    *,
    dataset: SizedDataset | None = None,
    test: SizedDataset | str | None = None,
    validation: SizedDataset | str | float | None = None,
    classes: Sequence[str] | int | None = None,
    name: str | None = None,
    key: Any = None,
    loggers: Sequence[Logger] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Tune a model and write the results.

    Checks the configuration before writing anything. Each epoch replaces the checkpoint, so an interrupted run can be
    resumed from its last complete epoch.

    In processes that torchrun started, each takes its part of every batch, and the result is that of one process, to
    rounding. The first process writes the files and shows the progress.

    Args:
        config: Configuration of the run, equal in all processes. Default: `TuneConfig()`.
        console: Console for progress. Default: none; notes, epochs and warnings also go to the Python logger
            "skipkernels".
        dataset: Training images, instead of the setting `data`: a map-style dataset of (image, label), as
            `data.from_datasets` describes it. Images are Pillow's, or tensors that are preprocessed for the model.
        test: Test images. Default: those of `validation`, or else 30 % of the images of each class of `dataset`. Or the
            setting `test`, "none".
        validation: Validation images; or the setting `validation`, a text or a share.
        classes: Class names by label. Default: the `classes` of a dataset. Or the setting `classes`, a number.
        name: Name of the dataset in the results. Default: its type.
        key: Text or JSON value that identifies the datasets when a run is resumed. Default: a digest of their files and
            labels; see `FeatureCache.build`.
        loggers: Loggers of the rows of the epochs, besides those of `config.log`. They are closed at the end.
        **settings: Fields of `TuneConfig`, which replace those of `config`.

    Returns:
        Contents of metrics.json: zero-shot and tuned accuracy, kept classes, steps, and cost in seconds and memory.

    Raises:
        InputError: If a setting can't be used, or the disk is full.
        MemoryError: If the device or the host is out of memory.
        FloatingPointError: If the loss is not finite. The last good checkpoint is kept.
        KeyboardInterrupt: On Ctrl-C; the message says how many epochs are complete.

    Example:
        >>> import tempfile, torch, skipkernels as sk
        >>> from PIL import Image
        >>> from skipkernels.app.train import evaluate_run
        >>> class Squares(torch.utils.data.Dataset):
        ...     classes = ["black square", "white square"]
        ...
        ...     def __init__(self, count):
        ...         self.labels = [index % 2 for index in range(count)]
        ...
        ...     def __len__(self):
        ...         return len(self.labels)
        ...
        ...     def __getitem__(self, index):
        ...         label = self.labels[index]
        ...         return Image.new("RGB", (32, 32), ("black", "white")[label]), label
        >>> folder = tempfile.mkdtemp()
        >>> metrics = sk.tune(dataset=Squares(16), test=Squares(8), model="glyph-tiny", epochs=2, out=folder)
        >>> metrics["classes"], metrics["best_epoch"] in (1, 2)
        ({'all': 2}, True)
        >>> evaluate_run(folder, dataset=Squares(16), test=Squares(8)) == metrics["tuned"]
        True
    """
    if validation is not None and isinstance(validation, (str, int, float)):
        settings["validation"], validation = validation, None
    if isinstance(test, str):
        settings["test"], test = test, None
    if isinstance(classes, int):
        settings["classes"], classes = classes, None
    config = replace(config or TuneConfig(), **settings)
    open_data = None
    if dataset is not None:
        parts: Any = {"test": test, "validation": validation, "classes": classes, "name": name, "key": key}
        config, open_data = own_data(config, dataset, **parts)
    elif not (test is validation is classes is None):
        raise InputError(
            "tune: test, validation images and class names need the training images as dataset.", "dataset"
        )
    processes = join(config.timeout)
    shown = console if console is not None and processes.first else Console(quiet=True)
    return _tune(config, shown, processes, loggers, open_data)


def _tune(
    config: TuneConfig,
    console: Console,
    processes: Processes,
    loggers: Sequence[Logger],
    open_data: Callable[[], Source] | None = None,
) -> dict[str, Any]:
    config = resumed(config)
    # A dataset that is passed in Python has no command.
    command = command_line("tune", config, processes=processes.size) if open_data is None else ""
    processes.set_device(config.device)
    open_data = functools.cache(open_data or config.open_data)
    with processes.one_first():
        config = config.resolved(open_data)
    _check_processes(config, processes)
    folder = RunFolder(config) if processes.first else FollowedFolder(config)
    finished = processes.from_first(lambda: folder.finished)
    if finished is not None:
        _print(console, f"{folder.path}: the run is complete; there is nothing to resume.")
        return finished
    with ignore_write_errors(console), _memory_errors(), _seeded(config):
        return _Run(config, console, folder, open_data, processes, command, loggers).run()


def _check_processes(config: TuneConfig, processes: Processes) -> None:
    """Raise an InputError for a setting that is not supported in several processes."""
    if processes.size == 1:
        return
    if config.method_class() is not Skip:
        raise argument_error(
            "method", f"only skip trains in several processes; got {config.method} in {processes.size}. Start one."
        )
    for name, used in {"fused_optimizer": config.fused_optimizer, "refresh": config.refresh == "epoch"}.items():
        if used:
            raise argument_error(
                name, f"{getattr(config, name)} is not supported in several processes; leave it out, or start one."
            )


def check(config: TuneConfig) -> None:
    """Raise the errors that `tune` would raise before training, without training."""
    config = resumed(config)
    open_data = functools.cache(config.open_data)
    config = config.resolved(open_data)
    with _memory_errors(), _seeded(config):
        _Run(config, Console(quiet=True), RunFolder(config), open_data)


class _Run:
    def __init__(
        self,
        config: TuneConfig,
        console: Console,
        folder: RunFolder,
        open_data: Callable[[], Source],
        processes: Processes = ALONE,
        command: str = "",
        loggers: Sequence[Logger] = (),
    ):
        self.command, self.loggers = command, loggers
        self.config, self.folder, self.console, self.processes = config, folder, console, processes
        self.started = time.perf_counter()
        self.memory = PeakMemory(torch.device(config.device))
        self.baseline_memory = self.memory.read()
        self.setup = build_run(config, open_data=open_data, processes=processes)
        self.method, self.task = self.setup.method, self.setup.task
        validated = self.task.validation is not None
        if config.patience is not None and not validated:
            raise argument_error("patience", "there are no validation images to stop by; add some, or leave it out.")
        self.folder.check_room(self._checkpoint_bytes(), self._weights_bytes() if validated else 0)
        self.weights = WeightsFile(self.method, self.setup.model, delta=config.delta, reloaded=validated)
        for note in (*notes.setting_notes(config), *self.task.notes, *self.method.notes):
            _print(console, f"note: {note}")
            _log.info(escaped(note))
        title = f"{config.model} on {config.data}, {config.method}, {config.shots_text}"
        title += f", {processes.size} processes" if processes.size > 1 else ""
        self.display = ProgressDisplay(console, title=title, memory=self.memory)
        self.zero_shot: dict[str, Tensor] = {}
        self.zero_shot_top: dict[str, TopClasses] = {}
        self.tuned: dict[str, Tensor] | None = None  # predictions after the last complete epoch, in the end the best
        self.validation: dict[str, Any] | None = None  # accuracies on the validation images
        self.described: Description | None = None
        self.temperature: tuple[float, int] | None = None  # and the number of images that it was fitted on
        self.warnings: list[str] = []
        self.seconds_before = self.seconds_fit = 0.0  # training seconds of earlier processes; seconds of `fit`

    def run(self) -> dict[str, Any]:
        """Compute features, train, and write the results. Returns the metrics."""
        try:
            with self.display:
                advance = self.display.features(self.setup.images)
                test, held = self.setup.test_features(advance), self.setup.validation_features(advance)
                with self.setup.train_features(advance) as train:
                    self.evaluator = Evaluator(self.setup, test, held)
                    self.zero_shot = self.evaluator.zero_shot()
                    self.zero_shot_top = dict(self.evaluator.top)
                    if held is not None:
                        accuracy = self.evaluator.validation_accuracy(self.setup.zero_shot)
                        count = len(self.task.validation.images) if self.task.validation is not None else 0
                        self.validation = {"images": count, "zero_shot": accuracy, "tuned": None}
                    arguments = self.config, self.method, self.setup.precision, train, self.task.tests[0].classes
                    trainer = Trainer(*arguments, self.processes) if self.config.epochs else None
                    if trainer is not None and trainer.not_graphed is not None:
                        _print(self.console, f"note: steps run without a CUDA graph: {trainer.not_graphed}")
                    with self.folder.lock():
                        self.folder.follow(self.processes.from_first(lambda: self.folder.epochs))
                        self._save_few_shot()
                        self._resume(trainer)
                        return self._train(trainer, train)
        except StoreError as error:
            if error.item is not None:
                self._list_unreadable()
            raise
        except KeyboardInterrupt as error:  # also a second one, while the first is handled
            epochs = self.folder.epochs
            complete = f"{epochs} of {self.config.epochs} epochs are" if epochs else "no epoch is"
            message = f"{complete} complete in {self.folder.path}{'; `resume=True` continues it' if epochs else ''}"
            error.args = error.args or (message,)
            raise
        finally:
            for warning in self.warnings:
                _print(self.console, f"warning: {warning}")
                _log.warning(escaped(warning))

    def _list_unreadable(self) -> None:
        """Raise an error that names all images that can't be read, if there are any."""
        found = unreadable_images(self.task)
        for reason in found.values():
            _print(self.console, f"unreadable: {reason}")
            _log.warning(reason)
        if found:
            raise InputError(
                f'tune: unreadable="error" stops at images that can\'t be read, of which there are {len(found)}: '
                f'{format_names(list(found))}. Replace or remove them, or leave them out with unreadable="skip".'
            )

    def _save_few_shot(self) -> None:
        """Write the list of training images, unless they are glyphs, which the seed determines."""
        if isinstance(self.task.train, Images) and self.processes.first:
            config, classes = self.config, self.task.tests[0].classes
            path = self.folder.path / FEW_SHOT
            save_few_shot(
                path, self.task.train, data=config.data, classes=classes, shots=config.shots, seed=config.seed
            )

    def _train(self, trainer: Trainer | None, train: FeatureCache) -> dict[str, Any]:
        """Train and write the metrics, also if the run is interrupted or diverges."""
        self.memory.reset()
        try:
            if trainer is not None:
                self._epochs(trainer)
                self._keep_best()
            elif self.folder.resumed is None:
                self._fit(train)
            self._calibrate()
        except (KeyboardInterrupt, FloatingPointError) as error:
            if self.processes.first:
                self._finish("diverged" if isinstance(error, FloatingPointError) else "interrupted", train)
            raise
        return self.processes.from_first(lambda: self._finish("complete", train))

    def _resume(self, trainer: Trainer | None) -> None:
        """Load the checkpoint of the run folder, if there is one."""
        resumed = self.folder.resumed
        if resumed is None:
            return
        self.weights.load(resumed.weights)
        self.seconds_before = resumed.state["seconds"]
        if trainer is not None:
            try:
                trainer.load_state_dict(resumed.state["trainer"])
            except InputError:
                raise
            except (ValueError, RuntimeError) as error:
                state = self.folder.path / checkpoint.STATE
                raise InputError(
                    f"{state}: not the state of this run: {first_line(error)}; tune again with `overwrite=True`."
                ) from error
        self._evaluate()

    def _evaluate(self) -> dict[str, Tensor]:
        """Evaluate the current weights."""
        self.tuned = self.evaluator.predictions()
        if self.validation is not None:
            self.validation["tuned"] = self.evaluator.validation_accuracy()
        return self.tuned

    def _epochs(self, trainer: Trainer) -> None:
        config = self.config
        assert config.epochs
        self.display.begin(
            epochs=config.epochs,
            steps_per_epoch=trainer.steps,
            zero_shot=self.evaluator.accuracies(self.zero_shot),
            batch_size=len(self.task.train) / trainer.steps,
            done=trainer.epochs,
        )
        with contextlib.ExitStack() as closing:  # closes all, also if one fails to open or to close
            loggers: list[Logger] = []
            if self.processes.first:
                for logger in chain(self.loggers, open_loggers(config, self.folder.path, self.folder.rows)):
                    closing.callback(logger.close)
                    loggers.append(logger)
            while trainer.epochs < config.epochs and not has_stalled(self.folder.rows, config.patience):
                row = trainer.epoch(self.display.step, self.display.loss)
                started = time.perf_counter()
                predictions, validation = self.evaluator.predictions(), self.evaluator.validation_accuracy()
                row["stage_seconds"]["evaluation"] = time.perf_counter() - started
                row["accuracy"], row["validation"] = self.evaluator.accuracies(predictions), validation
                self._complete(row, predictions, trainer)
                self.display.epoch(row)
                _log.info(
                    "epoch %d/%d: loss %.4f, accuracy %s", row["epoch"], config.epochs, row["loss"], row["accuracy"]
                )
                for logger in loggers:
                    logger.write(row)

    def _fit(self, train: FeatureCache) -> None:
        """Train a method without steps."""
        batches = list(train.loader(BATCH, "sequential", device=self.setup.device))
        inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        started = time.perf_counter()
        with self.setup.precision.autocast():
            self.method.fit(inputs, labels)
        self.seconds_fit = time.perf_counter() - started
        self._complete(None, self._evaluate(), None)

    def _keep_best(self) -> None:
        """Return to the weights of the best epoch, and save them as those of the run."""
        if best_epoch(self.folder.rows) is None:
            return

        def load() -> bool:
            with interrupt_deferred():
                file = self.folder.keep_best()
                if file is not None:
                    self.weights.load(file)
            return file is not None

        if self.processes.from_first(load):
            self.processes.broadcast(self.method.state_dict().values())
            self._evaluate()

    def _complete(self, row: dict[str, Any] | None, predictions: dict[str, Tensor], trainer: Trainer | None) -> None:
        """Write the checkpoint and the row of an epoch, on the first process."""
        if self.validation is not None and row is not None:
            self.validation["tuned"] = row["validation"]
        if not self.processes.first:
            self.folder.rows += [] if row is None else [row]
            self.tuned = predictions
            return
        state = {"seconds": self._seconds(), "trainer": None if trainer is None else trainer.state_dict()}
        with interrupt_deferred():
            self.folder.complete_epoch(row, *self.weights.contents(), state)
            self.tuned = predictions
            if self.described is None:
                try:
                    self._describe()
                except Exception as error:  # any: the run continues without these files
                    warning = f"{CLASSIFIER} was not written ({type(error).__name__}: {first_line(error)})."
                    self.warnings += [warning] if warning not in self.warnings else []  # once, not in each epoch

    def _calibrate(self) -> None:
        """Fit the temperature on the validation images, with the final weights."""
        held = self.evaluator.validation
        logits = None if held is None else held.logits(self.method)
        if held is not None and logits is not None:
            self.temperature = fit_temperature(logits, held.labels), len(held.labels)

    def _describe(self) -> None:
        """Write the files by which the folder is used without its training data; needs a checkpoint."""
        setup, holds = self.setup, self.weights.holds
        self.described = describe(setup.config, setup.model, self.task, weights=self.folder.weights_file, holds=holds)
        if self.temperature is not None:
            temperature, images = self.temperature
            self.described = replace(self.described, temperature=temperature, calibration_images=images)
        self.folder.describe(self.described)
        if holds == MODEL:
            write_open_clip_config(self.folder.path, setup.model, setup.tokenizer)

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _forward_parts(self, train: FeatureCache) -> dict[str, float]:
        """Milliseconds of each part of `SkipCLIP.forward`; empty for other methods, and in several processes."""
        if not isinstance(self.method, Skip) or self.processes.size > 1:
            return {}
        images = range(min(self.config.batch_size or 1, len(train)))
        batch = [train[image] for image in images]  # features of the last epoch: a loader would read those of the first
        inputs, labels = torch.stack([features for features, _ in batch]), torch.tensor([label for _, label in batch])
        device = self.setup.device
        return forward_milliseconds(self.method.clip, inputs.to(device), labels.to(device), self.setup.precision)

    def _finish(self, status: Status, train: FeatureCache) -> dict[str, Any]:
        """Write the metrics, then the report. An error in the report becomes a warning."""
        metrics = {"status": status} | self._metrics()
        if status == "complete":
            weak = notes.weak_result(self.config, self.task, metrics["zero_shot"], metrics["tuned"])
            self.warnings += [] if weak is None else [weak]
        metrics["notes"] = self.warnings
        with interrupt_deferred():
            self.folder.finish(metrics)
        try:
            if status == "complete":
                metrics["cost"]["forward_milliseconds"] = self._forward_parts(train)
            with interrupt_deferred():
                if self.tuned is not None:
                    self._write_card(metrics)
                    tests = self._predictions(self.tuned)
                    self.folder.write_predictions(tests)
                    self.folder.write_report(report_html(self.config, metrics, self.folder.rows, tests))
                self.folder.finish(metrics)
        except Exception as error:  # any: the results are complete without the report
            self.warnings.append(f"{REPORT} was not written ({type(error).__name__}: {first_line(error)}).")
            self.folder.finish(metrics)
        except KeyboardInterrupt as error:
            if status == "complete" and not (self.folder.path / REPORT).exists():
                error.args = (f"the run in {self.folder.path} is {status}; {REPORT} is not written",)
            raise
        return metrics

    def _write_card(self, metrics: dict[str, Any]) -> None:
        """Write the model card, and classifier.json again, with what is known at the end."""
        self._describe()
        assert self.described is not None
        use = "open-clip" if (self.folder.path / OPEN_CLIP).exists() else "skipkernels"
        self.folder.write_card(model_card(self.config, self.described, metrics, use=use))

    def _metrics(self) -> dict[str, Any]:
        """Contents of metrics.json, from the complete epochs."""
        rows, config = self.folder.rows, self.config
        seconds, steps = [row["seconds"] for row in rows], sum(row["steps"] for row in rows)
        return {
            "command": self.command,
            "environment": environment(config.device, self.processes.size),
            "method": config.method,
            "protocol": config.protocol,
            "classes": {test.name: len(test.classes) for test in self.task.tests},
            "zero_shot": self.evaluator.accuracies(self.zero_shot),
            "tuned": None if self.tuned is None else self.evaluator.accuracies(self.tuned),
            "validation": self.validation,
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
            "checkpoint": self._checkpoint_size(),
            "cost": {
                "device": config.device,
                "forward_milliseconds": {},
                "seconds_total": self._seconds(),
                "seconds_tuning": sum(seconds) + self.seconds_fit,
                "baseline_memory_mib": _mib(self.baseline_memory),
                "peak_memory_mib": _mib(self.memory.read()),
                "seconds_per_epoch": sorted(seconds)[len(seconds) // 2] if rows else None,
                "milliseconds_per_step": 1000 * sum(seconds) / steps if rows else None,
            },
        }

    def _predictions(self, tuned: dict[str, Tensor]) -> list[TestPredictions]:
        """Predictions for all tests, with thumbnails of the images that the report shows."""
        found = []
        for test in self.task.tests:
            if test.name not in self.zero_shot_top:  # no test images
                continue
            after = consistent(self.evaluator.top, test.name, tuned[test.name]) if test.name in tuned else None
            before, labels = self.zero_shot_top[test.name], self.evaluator.labels(test.name)
            found.append(predictions_with_thumbnails(test, labels, before, after))
        return found

    def _trained(self) -> list[Tensor]:
        groups = self.method.parameter_groups(text_lr=0.0, image_lr=0.0)
        return [weight for group in groups for weight in group["params"]]

    def _parameters(self) -> dict[str, int]:
        """Number of parameters: trained, and all."""
        trained = {id(weight): weight for weight in self._trained()}
        every = trained | {id(weight): weight for weight in self.setup.model.parameters()}
        return {name: sum(w.numel() for w in by_id.values()) for name, by_id in (("trained", trained), ("all", every))}

    def _state_bytes(self) -> int:
        return sum(weight.nbytes for weight in self.method.state_dict().values())

    def _weights_bytes(self) -> int:
        """Estimated size of the weights file."""
        return sum(weight.nbytes for weight in self._trained()) if self.config.delta else self._state_bytes()

    def _checkpoint_bytes(self) -> int:
        """Estimated size of a checkpoint, with two optimizer values per trained weight."""
        return 2 * sum(weight.nbytes for weight in self._trained()) + self._weights_bytes()

    def _checkpoint_size(self) -> dict[str, Any]:
        file = self.folder.path / self.folder.weights_file
        size = file.stat().st_size if file.exists() else 0
        return {"file": file.name, "mib": _mib(size), "mib_of_all": _mib(self._state_bytes())}


@contextlib.contextmanager
def _seeded(config: TuneConfig) -> Iterator[None]:
    """Seed PyTorch's global generators, and restore their state at the end."""
    device = torch.device(config.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        yield


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """Convert out-of-memory errors of PyTorch and Python to a MemoryError of one line."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0] or "MemoryError"
        raise MemoryError(
            f'tune: out of memory ({reason}) Use memory="min", `fused_optimizer=True`, a smaller `batch_size`, a '
            "larger `skip_layers`, or `cache=…`."
        ) from error


def _print(console: Console, text: str) -> None:
    console.print(plain(text), soft_wrap=True)


def _mib(count: float) -> float:
    return round(count / 2**20, 1)

"""A training run: zero-shot evaluation, epochs of training, and writing of the results."""

from __future__ import annotations

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ...features import CacheError, FeatureCache
from ...formatting import escaped, first_line
from ...memory import PeakMemory, out_of_memory
from ..config import TuneConfig
from ..console import ignore_write_errors, plain
from ..data import InputError, SizedDataset, Source, save_few_shot
from ..data.check import unreadable_images
from ..data.files import format_names
from ..methods.skip import Skip
from ..report import report_html
from ..report.mistakes import predictions_with_thumbnails
from . import checkpoint, notes
from .calibration import calibrate
from .checkpoint import DELTA, MODEL, Checkpoint, best_epoch, has_stalled
from .class_metrics import VALIDATION
from .command_line import command_line
from .description import describe, write_open_clip_config
from .environment import environment
from .errors import argument_error
from .evaluation import Evaluation, Evaluator
from .loggers import Logger, open_loggers
from .model_card import CARD, model_card
from .own_dataset import check_no_parts, own_data
from .plain_config import OPEN_CLIP
from .processes import ALONE, Processes, join
from .progress import ProgressDisplay
from .run_folder import FEW_SHOT, REPORT, RunFolder, resumed
from .setup import BATCH, build_run
from .trainer import Trainer
from .weights import MODEL as WHOLE_MODEL
from .weights import WeightsFile

_log = logging.getLogger("skipkernels")
_log.addHandler(logging.NullHandler())  # silent, unless the program that uses the library configures logging


def tune(
    config: TuneConfig | None = None,
    console: Console | None = None,
    *,
    dataset: SizedDataset | None = None,
    test: SizedDataset | str | None = None,
    validation: SizedDataset | str | float | None = None,
    classes: Sequence[str] | None = None,
    name: str | None = None,
    identity: object = None,
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
        classes: Class names by label. Default: the `classes` of a dataset.
        name: Name of the dataset in the results. Default: its type.
        identity: Text or JSON value that identifies the datasets when a run is resumed. Default: digests of files and
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
        >>> metrics = sk.tune(dataset=Squares(16), test=Squares(8), model="pictogram-tiny", epochs=2, out=folder)
        >>> metrics["classes"], metrics["best_epoch"] in (1, 2)
        ({'all': 2}, True)
        >>> evaluate_run(folder, dataset=Squares(16), test=Squares(8)) == metrics["tuned"]
        True
    """
    changes: dict[str, Any] = {**settings}
    if validation is not None and isinstance(validation, (str, int, float)):
        changes["validation"], validation = validation, None
    if isinstance(test, str):
        changes["test"], test = test, None
    config = replace(config or TuneConfig(), **changes)
    open_data = None
    if dataset is not None:
        parts: Any = {"test": test, "validation": validation, "classes": classes, "name": name, "identity": identity}
        config, open_data = own_data(config, dataset, **parts)
    else:
        check_no_parts("tune", test, validation, classes)
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
    folder = RunFolder(config) if processes.first else None
    finished, found = processes.from_first(lambda: (folder.finished, folder.resumed) if folder is not None else None)
    if finished is not None:
        if folder is not None:
            checkpoint.remove(folder.path)  # a kill may have left it
        _print(console, f"{config.out}: the run is complete; there is nothing to resume.")
        return finished
    if folder is not None and config.resume and found is None:
        _print(console, f"note: there is no epoch to resume in {config.out}; the run starts from the beginning.")
    with ignore_write_errors(console), _memory_errors(), _seeded(config):
        return Run(config, console, folder, found, open_data, processes, command, loggers).run()


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
        folder = RunFolder(config)
        Run(config, Console(quiet=True), folder, folder.resumed, open_data)


class Run:
    """A run with its model and data; `folder` is None on processes other than the first."""

    def __init__(
        self,
        config: TuneConfig,
        console: Console,
        folder: RunFolder | None,
        resumed: Checkpoint | None,
        open_data: Callable[[], Source],
        processes: Processes = ALONE,
        command: str = "",
        loggers: Sequence[Logger] = (),
    ):
        self.config, self.console, self.folder, self.resumed = config, console, folder, resumed
        self.processes, self.command, self.loggers = processes, command, loggers
        self.started = time.perf_counter()
        self.memory = PeakMemory(torch.device(config.device))
        self.baseline_memory = self.memory.read()
        self.setup = build_run(config, open_data=open_data, processes=processes)
        self.method, self.task = self.setup.method, self.setup.task
        if config.patience is not None and self.task.validation is None:
            raise argument_error("patience", "there are no validation images to stop by; add some, or leave it out.")
        self.weights = WeightsFile(self.method, self.setup.model, delta=config.delta)
        file = DELTA if config.delta else MODEL
        self.described = describe(config, self.setup.model, self.task, weights=file, holds=self.weights.holds)
        for note in (*notes.setting_notes(config), *self.task.notes, *self.method.notes):
            _print(console, f"note: {note}")
            _log.info(escaped(note))
        title = f"{config.model} on {config.data}, {config.method}, {config.shots_text}"
        title += f", {processes.size} processes" if processes.size > 1 else ""
        self.display = ProgressDisplay(console, title=title, memory=self.memory)
        self.rows = [] if resumed is None else list(resumed.rows)  # of the complete epochs
        self.tuned: Evaluation | None = None  # after the last complete epoch, in the end of the best
        self.thresholds: list[dict[str, Any]] = []  # by accuracy on the validation images
        self.warnings: list[str] = []
        self.seconds_before = 0.0 if resumed is None else resumed.seconds  # of earlier processes
        self.seconds_fit = 0.0

    def run(self) -> dict[str, Any]:
        """Compute features, train, and write the results. Returns the metrics."""
        try:
            with self.display:
                advance = self.display.features(self.setup.images)
                test, held = self.setup.test_features(advance), self.setup.validation_features(advance)
                train = self.setup.train_features(advance)
                self.evaluator = Evaluator(self.setup, test, held)
                self.zero_shot = self.evaluator.evaluate(
                    self.setup.zero_shot, 'for the pretrained weights. Check `pretrained`, or use precision="fp32".'
                )
                arguments = self.config, self.method, self.setup.precision, train, self.task.tests[0].classes
                trainer = Trainer(*arguments, self.processes) if self.config.epochs else None
                if trainer is not None and trainer.not_graphed is not None:
                    _print(self.console, f"note: steps run without a CUDA graph: {trainer.not_graphed}")
                with contextlib.nullcontext() if self.folder is None else self.folder.lock():
                    self._begin(trainer)
                    self._train(trainer, train)
                    return self.processes.from_first(self._finish)
        except CacheError as error:
            if error.item is not None:
                self._list_unreadable()
            raise
        except KeyboardInterrupt as error:
            done = f"{len(self.rows)} of {self.config.epochs} epochs are" if self.rows else "no epoch is"
            how = f"; continue it with skipkernels tune --resume {self.config.out}" if self.rows else ""
            error.args = (f"{done} complete in {self.config.out}{how}",)
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
                f"{len(found)} of the images can't be read: {format_names(list(found))}. Replace or remove them, or "
                'leave them out with unreadable="skip".'
            )

    def _begin(self, trainer: Trainer | None) -> None:
        """Write the files that training does not change, and load the checkpoint to resume, if there is one."""
        if self.folder is not None:
            if self.weights.holds == WHOLE_MODEL:
                write_open_clip_config(self.folder.path, self.setup.model, self.setup.tokenizer)
            config, path = self.config, self.folder.path / FEW_SHOT
            known: dict[str, Any] = {"data": config.data, "shots": config.shots, "seed": config.seed}
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
            self.weights.load(file)
        self.processes.broadcast(self.method.state_dict().values())

    def _train(self, trainer: Trainer | None, train: FeatureCache) -> None:
        """Train, and return to the weights of the best epoch on the validation images."""
        self.memory.reset()
        if trainer is not None:
            self._epochs(trainer)
            if best_epoch(self.rows) not in (None, len(self.rows)):
                assert self.config.out is not None
                self._load(self.config.out / checkpoint.FOLDER / checkpoint.BEST)
                self.tuned = self.evaluator.evaluate(self.method)
        elif self.resumed is None:
            self._fit(train)
        self._calibrate()

    def _epochs(self, trainer: Trainer) -> None:
        config = self.config
        assert config.epochs
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

    def _fit(self, train: FeatureCache) -> None:
        """Train a method without steps."""
        batches = list(train.loader(BATCH, "sequential", device=self.setup.device))
        inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        started = time.perf_counter()
        with self.setup.precision.autocast():
            self.method.fit(inputs, labels)
        self.seconds_fit = time.perf_counter() - started
        self._complete(None, self.evaluator.evaluate(self.method), None)

    def _complete(self, row: dict[str, Any] | None, evaluation: Evaluation, trainer: Trainer | None) -> None:
        """Complete an epoch: write the checkpoint and the row. A method without epochs has no row."""
        rows = self.rows if row is None else [*self.rows, row]
        if self.folder is not None:
            state = None if trainer is None else trainer.state_dict()
            known: dict[str, Any] = {"settings": self.config.identity(), "rows": rows, "seconds": self._seconds()}
            checkpoint.save(self.folder.path, self.weights, self.described, state, **known)
            self.folder.write_rows(rows)
        self.rows, self.tuned = rows, evaluation

    def _calibrate(self) -> None:
        """Fit probabilities and find thresholds on the validation images, with the final weights."""
        found = self.evaluator.validation_logits(self.method)
        if found is not None:
            fitted, self.thresholds = calibrate(*found)
            self.described = replace(self.described, **fitted)

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _finish(self) -> dict[str, Any]:
        """Write the model, the report and the metrics, which complete the run.

        An error in the report becomes a warning.
        """
        assert self.folder is not None and self.tuned is not None
        self.folder.publish(self.described)
        metrics = {"status": "complete", "notes": self.warnings} | self._metrics(self.tuned)
        weak = notes.weak_result(self.config, metrics)
        self.warnings += [note for note in (weak, notes.optimistic_validation(metrics)) if note is not None]
        use = "open-clip" if (self.folder.path / OPEN_CLIP).exists() else "skipkernels"
        self.folder.write(CARD, model_card(self.config, self.described, metrics, use=use))
        try:
            before, after, labels = self.zero_shot.top, self.tuned.top, self.evaluator.labels
            tests = [
                predictions_with_thumbnails(test, labels[test.name], before[test.name], after.get(test.name))
                for test in self.task.tests
                if test.name in before  # it has images
            ]
            self.folder.write_predictions(tests)
            self.folder.write(REPORT, report_html(self.config, metrics, self.rows, tests))
        except Exception as error:  # any: the results are complete without the report
            self.warnings.append(f"{REPORT} was not written ({type(error).__name__}: {first_line(error)}).")
        self.folder.write_metrics(metrics)
        checkpoint.remove(self.folder.path)
        return metrics

    def _metrics(self, tuned: Evaluation) -> dict[str, Any]:
        """Contents of metrics.json."""
        rows, config = self.rows, self.config
        seconds, steps = [row["seconds"] for row in rows], sum(row["steps"] for row in rows)
        validation: dict[str, Any] | None = None
        if self.task.validation is not None:
            images = len(self.task.validation.images)
            validation = {"images": images, "zero_shot": self.zero_shot.validation, "tuned": tuned.validation}
            validation["thresholds"] = self.thresholds
            if config.class_weight is not None:
                validation["balanced"] = self.evaluator.by_class(tuned)[VALIDATION]["balanced_accuracy"]
        return {
            "command": self.command,
            "environment": environment(config.device, self.processes.size),
            "method": config.method,
            "protocol": config.protocol,
            "classes": {test.name: len(test.classes) for test in self.task.tests},
            "zero_shot": self.zero_shot.accuracies,
            "tuned": tuned.accuracies,
            "by_class": self.evaluator.by_class(tuned),
            "zero_shot_by_class": self.evaluator.by_class(self.zero_shot),
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
                "seconds_tuning": sum(seconds) + self.seconds_fit,
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
        """Name and size of the weights file, and the size that all weights would have."""
        file = Path(self.config.out or "", self.described.weights)
        whole = sum(weight.nbytes for weight in self.method.state_dict().values())
        return {"file": file.name, "mib": _mib(file.stat().st_size), "mib_of_all": _mib(whole)}


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

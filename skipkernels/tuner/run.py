"""The run: zero-shot, epochs of tuning, and what is written when."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from ..console import ignore_write_errors, plain
from ..data import Images, InputError, save_few_shot
from ..features import FeatureCache
from ..memory import PeakMemory, out_of_memory
from . import checkpoint, mistakes, notes
from .config import TuneConfig
from .evaluation import BATCH, Evaluator
from .forward_profile import forward_milliseconds
from .methods import Skip
from .model import load_model
from .progress import Display
from .report import report_html
from .run_folder import FEW_SHOT, REPORT, RunFolder, interrupt_deferred, resumed
from .tensorboard import open_board
from .trainer import Trainer
from .weights import Weights


def tune(config: TuneConfig, console: Console | None = None) -> dict[str, Any]:
    """Run a tuning and write its results.

    Everything is checked before anything is written. After each epoch the checkpoint and the metrics are replaced, so
    an interrupted run leaves its last complete epoch, and can be resumed there.

    Args:
        config: The run.
        console: Where progress is shown; nowhere by default.

    Returns:
        What metrics.json holds: accuracy zero-shot and tuned, kept classes, steps, and the cost in seconds and memory.

    Raises:
        InputError: If something in the configuration cannot be used, or the disk is full.
        MemoryError: If there is too little memory.
        FloatingPointError: If the loss is not finite; the checkpoint of the last good epoch stays.
        KeyboardInterrupt: After what was complete has been written; says what that is.
    """
    config, console = resumed(config).resolved(), console or Console(quiet=True)
    folder = RunFolder(config)
    if folder.finished is not None:
        _say(console, f"{folder.path}: the run is complete; there is nothing to resume.")
        return folder.finished
    with ignore_write_errors(console), _memory_errors(), _own_random_numbers(config):
        return _Run(config, console, folder).run()


def check(config: TuneConfig) -> None:
    """Refuse what `tune` would refuse before it begins, without beginning; errors as there."""
    config = resumed(config).resolved()
    with _memory_errors(), _own_random_numbers(config):
        _Run(config, Console(quiet=True), RunFolder(config))


class _Run:
    """One tuning, from a model that is loaded to metrics.json."""

    def __init__(self, config: TuneConfig, console: Console, folder: RunFolder):
        self.config, self.folder, self.console = config, folder, console
        self.started, device = time.perf_counter(), torch.device(config.device)
        self.memory = PeakMemory(device)
        self.baseline_memory = self.memory.read()
        self.model, transform, tokenizer = load_model(config.model, config.pretrained, device, seed=config.seed)
        self.evaluator = Evaluator.of(config, self.model, transform, tokenizer)
        self.method, self.task = self.evaluator.method, self.evaluator.task
        self.folder.check_room(self._checkpoint_bytes())
        self.weights = Weights(self.method, self.model, delta=config.delta)
        for note in (*notes.of_settings(config), *self.task.notes, *self.method.notes):
            _say(console, f"note: {note}")
        title = f"{config.model} on {config.data}, {config.method}, {config.shots} shots"
        self.display = Display(console, title=title, memory=self.memory)
        self.zero_shot: dict[str, Tensor] = {}
        self.tuned: dict[str, Tensor] | None = None  # of the last epoch that is complete
        self.seconds_before = self.seconds_fit = 0.0  # of processes that went before; of a method without steps

    def run(self) -> dict[str, Any]:
        """All of it."""
        try:
            with self.display:
                advance = self.display.features(self.evaluator.images)
                self.evaluator.prepare(advance)
                with self.evaluator.training_images(advance) as train:
                    self.zero_shot = self.evaluator.zero_shot()
                    trainer = self._trainer(train)
                    with self.folder.held():
                        self._save_few_shot()
                        stopped = self._tune(trainer, train)
                        metrics = self._finish(stopped, train)
            for note in metrics["notes"]:
                _say(self.console, f"warning: {note}")
            if stopped is not None:
                raise stopped
            return metrics
        except KeyboardInterrupt as error:  # also a second one, while the first is dealt with
            epochs = self.folder.epochs
            left = f"{epochs} of {self.config.epochs} epochs are" if epochs else "no epoch is"
            said = f"{left} complete in {self.folder.path}{'; --resume goes on' if epochs else ''}"
            error.args = error.args or (said,)
            raise

    def _save_few_shot(self) -> None:
        """Which images are trained on, where they are files or items of a dataset; of glyphs the seed says it."""
        if isinstance(self.task.train, Images):
            config, classes = self.config, self.task.tests[0].classes
            path = self.folder.path / FEW_SHOT
            save_few_shot(
                path, self.task.train, data=config.data, classes=classes, shots=config.shots, seed=config.seed
            )

    def _trainer(self, train: FeatureCache) -> Trainer | None:
        """None for a method without steps."""
        if not self.config.epochs:
            return None
        return Trainer(self.config, self.method, self.evaluator.arithmetic, train, self.task.tests[0].classes)

    def _tune(self, trainer: Trainer | None, train: FeatureCache) -> BaseException | None:
        """What is left to do; returns what stopped it, if it was not the end."""
        self._resume(trainer)
        self.memory.reset()
        try:
            if trainer is not None:
                self._epochs(trainer)
            elif self.folder.resumed is None:
                self._fit(train)
        except (KeyboardInterrupt, FloatingPointError) as error:
            return error
        return None

    def _resume(self, trainer: Trainer | None) -> None:
        """Go on where the folder's checkpoint is."""
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
                what = f"{self.folder.path / checkpoint.STATE}: not the state of this run: {str(error).splitlines()[0]}"
                raise InputError(f"{what}; tune again with --overwrite.") from error
        self.tuned = self.evaluator.predictions()

    def _epochs(self, trainer: Trainer) -> None:
        """Those that are left."""
        config = self.config
        assert config.epochs
        self.display.begin(
            epochs=config.epochs,
            steps_per_epoch=trainer.steps,
            zero_shot=self.evaluator.accuracies(self.zero_shot),
            batch_size=len(self.task.train) / trainer.steps,
            done=trainer.epochs,
        )
        board = open_board(self.folder.path)
        try:
            while trainer.epochs < config.epochs:
                row = trainer.epoch(self.display.step, self.display.loss)
                started = time.perf_counter()
                predictions = self.evaluator.predictions()
                row["budget"]["evaluation"] = time.perf_counter() - started
                row["accuracy"] = self.evaluator.accuracies(predictions)
                self._complete(row, predictions, trainer)
                self.display.epoch(row)
                if board is not None:
                    board.row(row)
        finally:
            if board is not None:
                board.close()

    def _fit(self, train: FeatureCache) -> None:
        """The whole of a method without steps."""
        batches = list(train.loader(BATCH, "sequential", device=self.evaluator.device))
        inputs, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
        started = time.perf_counter()
        with self.evaluator.arithmetic.autocast():
            self.method.fit(inputs, labels)
        self.seconds_fit = time.perf_counter() - started
        self._complete(None, self.evaluator.predictions(), None)

    def _complete(self, row: dict[str, Any] | None, predictions: dict[str, Tensor], trainer: Trainer | None) -> None:
        """Keep an epoch."""
        state = {"seconds": self._seconds(), "trainer": None if trainer is None else trainer.state_dict()}
        with interrupt_deferred():
            self.folder.complete_epoch(row, *self.weights.to_save(), state)
            self.tuned = predictions

    def _seconds(self) -> float:
        return self.seconds_before + time.perf_counter() - self.started

    def _forward_parts(self, train: FeatureCache) -> dict[str, float]:
        """Milliseconds of the parts of a forward, where it is SkipCLIP's."""
        if not isinstance(self.method, Skip):
            return {}
        images = range(min(self.config.batch_size or 1, len(train)))
        batch = [train[image] for image in images]  # as the last epoch had them: a loader would begin with the first
        inputs, labels = torch.stack([features for features, _ in batch]), torch.tensor([label for _, label in batch])
        device = self.evaluator.device
        return forward_milliseconds(self.method.clip, inputs.to(device), labels.to(device), self.evaluator.arithmetic)

    def _finish(self, stopped: BaseException | None, train: FeatureCache) -> dict[str, Any]:
        """Write the metrics, and then the report: if that fails, the run is complete nevertheless, with a note."""
        status = "diverged" if isinstance(stopped, FloatingPointError) else "interrupted" if stopped else "complete"
        metrics = {"status": status} | self._metrics()
        weak = None
        if stopped is None:
            weak = notes.weak_result(self.config, self.task, metrics["zero_shot"], metrics["tuned"])
        metrics["notes"] = [] if weak is None else [weak]
        with interrupt_deferred():
            self.folder.finish(metrics)
        try:
            if stopped is None:
                metrics["cost"]["forward_milliseconds"] = self._forward_parts(train)
            with interrupt_deferred():
                if self.tuned is not None:
                    page = report_html(self.config, metrics, self.folder.rows, *self._answers(self.tuned))
                    self.folder.write_report(page)
                self.folder.finish(metrics)
        except Exception as error:  # whatever it is: nothing that is only shown may end a run whose epochs are complete
            reason = (str(error).strip().splitlines() or [""])[0]
            metrics["notes"].append(f"{REPORT} was not written ({type(error).__name__}: {reason}).")
            self.folder.finish(metrics)
        except KeyboardInterrupt as error:
            if stopped is None and not (self.folder.path / REPORT).exists():
                error.args = (f"the run in {self.folder.path} is {status}; {REPORT} is not written",)
            raise
        return metrics

    def _metrics(self) -> dict[str, Any]:
        """What metrics.json holds, from the epochs that are complete."""
        rows, config = self.folder.rows, self.config
        seconds, steps = [row["seconds"] for row in rows], sum(row["steps"] for row in rows)
        return {
            "method": config.method,
            "protocol": config.protocol,
            "classes": {test.name: len(test.classes) for test in self.task.tests},
            "zero_shot": self.evaluator.accuracies(self.zero_shot),
            "tuned": None if self.tuned is None else self.evaluator.accuracies(self.tuned),
            "epochs": len(rows),
            "steps": steps,
            "kept_classes": rows[-1]["kept_classes"] if rows else None,
            "parameters": self._parameters(),
            "checkpoint": self._sizes(),
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

    def _answers(self, tuned: dict[str, Tensor]) -> tuple[list[mistakes.Example], list[mistakes.Confusion]]:
        """For the report, with images as the dataset has them."""
        examples, confusions = [], []
        for test in self.task.tests:
            if test.name in tuned:
                images = copy.copy(test.images)
                images.transform = None  # type: ignore[attr-defined]
                of = test.name, images, test.classes, self.evaluator.labels(test.name)
                examples += mistakes.examples(*of, self.zero_shot[test.name], tuned[test.name])
                confusions += mistakes.confusions(*of, tuned[test.name])
        return examples, confusions

    def _trained(self) -> list[Tensor]:
        groups = self.method.parameter_groups(text_lr=0.0, image_lr=0.0)
        return [weight for group in groups for weight in group["params"]]

    def _parameters(self) -> dict[str, int]:
        """How many train, and how many there are."""
        trained = {id(weight): weight for weight in self._trained()}
        every = trained | {id(weight): weight for weight in self.model.parameters()}
        return {name: sum(w.numel() for w in of.values()) for name, of in (("trained", trained), ("all", every))}

    def _whole_bytes(self) -> int:
        """Of all weights that the method keeps."""
        return sum(weight.nbytes for weight in self.method.state_dict().values())

    def _checkpoint_bytes(self) -> int:
        """Of a checkpoint, about: two numbers of an optimizer for each weight that trains."""
        trained = sum(weight.nbytes for weight in self._trained())
        return 2 * trained + (trained if self.config.delta else self._whole_bytes())

    def _sizes(self) -> dict[str, Any]:
        file = self.folder.path / self.folder.weights_file
        size = file.stat().st_size if file.exists() else 0
        return {"file": file.name, "mib": _mib(size), "mib_of_all": _mib(self._whole_bytes())}


@contextlib.contextmanager
def _own_random_numbers(config: TuneConfig) -> Iterator[None]:
    """What is drawn from PyTorch's own generators depends on the seed alone, and the caller's go on as they were."""
    device = torch.device(config.device)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(config.seed)
        yield


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """Too little memory is a MemoryError of one line, wherever PyTorch, its C++ or Python finds out."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        first = str(error).partition("\n")[0] or "MemoryError"
        raise MemoryError(
            f"tune: memory is used up ({first}) Use --memory min, --fused-optimizer, a smaller --batch-size, a larger "
            "--skip-layers, or --cache PATH."
        ) from error


def _say(console: Console, text: str) -> None:
    console.print(plain(text), soft_wrap=True)


def _mib(count: float) -> float:
    return round(count / 2**20, 1)

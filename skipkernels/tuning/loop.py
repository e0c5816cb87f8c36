"""The run: zero-shot, epochs of tuning, and what is written when."""

from __future__ import annotations

import json
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors.torch import save_file
from torch import Tensor, nn

from ..cache import FeatureCache
from ..clip import SkipCLIP
from ..data import BaseToNew, InputError
from ..memory import PeakMemory
from ..optimizer import FusedSGD
from ..store import replace_file
from .config import TuneConfig
from .evaluation import CHECKPOINT, CONFIG, Accuracy, Evaluator, load_task
from .model import load_model
from .report import Example, report_html

METRICS, EPOCHS, REPORT = "metrics.json", "metrics.jsonl", "report.html"
_FILES = (METRICS, EPOCHS, REPORT, CHECKPOINT, CONFIG)

_EXAMPLES = 12  # images shown of each split

Step = Callable[[Tensor, Tensor], tuple[Tensor, int]]  # (inputs, labels) → (loss, classes compared)


def skip_step(clip: SkipCLIP) -> Step:
    """The step of Skip Tuning, on features at the cut or on images."""

    def step(inputs: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        out = clip(inputs, labels)
        return out.loss, len(out.class_ids)

    return step


def full_step(model: Any, tokens: Tensor) -> Step:
    """The step of full fine-tuning, as one would write it: every layer, every class, every token, on images."""

    def step(images: Tensor, labels: Tensor) -> tuple[Tensor, int]:
        image = model.encode_image(images, normalize=True)
        text = model.encode_text(tokens, normalize=True)
        return F.cross_entropy(model.logit_scale.exp() * image @ text.T, labels), len(tokens)

    return step


def epoch_factor(epoch: int, config: TuneConfig, base_lr: float) -> float:
    """What a base learning rate is multiplied by in an epoch, counted from 0: constant warm-up, then a cosine."""
    assert config.epochs is not None and config.warmup_epochs is not None and config.warmup_lr is not None
    if epoch < config.warmup_epochs:
        return min(1.0, config.warmup_lr / base_lr) if base_lr > 0 else 1.0
    return 0.5 * (1 + math.cos(math.pi * epoch / config.epochs))


def tune(config: TuneConfig, console: Console | None = None) -> dict[str, Any]:
    """Run a tuning and write its results.

    Everything is checked before anything is written. After each epoch the checkpoint and the metrics are replaced, so
    an interrupted run leaves its last complete epoch.

    Args:
        config: The run.
        console: Where progress is shown; nowhere by default.

    Returns:
        What metrics.json holds: accuracy zero-shot and tuned, kept classes, steps, and the cost in seconds and memory.

    Raises:
        InputError: If something in the configuration cannot be used.
        FloatingPointError: If the loss is not finite; the checkpoint of the last good epoch stays.
        KeyboardInterrupt: After what was complete has been written.
    """
    config, console = config.resolved(), console or Console(quiet=True)
    assert config.out is not None and config.epochs is not None
    device, started = torch.device(config.device), time.perf_counter()
    run = _RunFolder(config)
    memory = PeakMemory(device)
    baseline_memory = memory.read()
    model, transform, tokenizer = load_model(config.model, config.pretrained, device, seed=config.seed)
    evaluator = Evaluator.of(config, model, transform, tokenizer)
    task = evaluator.task
    columns = (
        *Progress.get_default_columns()[:2],
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[state]}"),
    )
    with Progress(*columns, console=console) as progress:
        bar = progress.add_task("features", total=evaluator.images, state="")
        evaluator.prepare(lambda images: progress.advance(bar, images))
        train = evaluator.training_images(lambda images: progress.advance(bar, images))
        zero_shot_predictions = evaluator.predictions()
        zero_shot = evaluator.accuracy(zero_shot_predictions)
        progress.update(bar, state=_accuracy_text("zero-shot", zero_shot))

        run.begin()
        bar = progress.add_task("tuning", total=config.epochs * math.ceil(len(train) / config.batch_size), state="")
        trainer = _Trainer(config, model, evaluator, train)
        memory.reset()
        tuned_predictions, stopped = zero_shot_predictions, None
        try:
            for epoch in range(config.epochs):
                row = trainer.epoch(epoch, on_step=lambda: progress.advance(bar))
                predictions = evaluator.predictions()
                tuned = evaluator.accuracy(predictions)
                with _interrupt_deferred():
                    run.complete_epoch(model, row | {"accuracy": tuned.as_dict()})
                    tuned_predictions = predictions
                progress.update(bar, state=_accuracy_text(f"loss {row['loss']:.3f}", tuned))
        except (KeyboardInterrupt, FloatingPointError) as error:
            stopped = error
    cost = {
        "device": str(device),
        "seconds_total": time.perf_counter() - started,
        "baseline_memory_mib": _mib(baseline_memory),
        "peak_memory_mib": _mib(memory.read()),
    }
    status = {type(None): "complete", KeyboardInterrupt: "interrupted", FloatingPointError: "diverged"}[type(stopped)]
    metrics = {"status": status} | _summary(config, task, zero_shot, trainer.parameter_counts, run.rows, cost)
    with _interrupt_deferred():
        run.finish(metrics, _examples(load_task(config), evaluator, zero_shot_predictions, tuned_predictions))
    if stopped is not None:
        raise stopped
    return metrics


def _summary(
    config: TuneConfig,
    task: BaseToNew,
    zero_shot: Accuracy,
    parameters: dict[str, int],
    rows: list[dict[str, Any]],
    cost: dict[str, Any],
) -> dict[str, Any]:
    """What metrics.json holds, from the epochs that are complete."""
    seconds, steps = [row["seconds"] for row in rows], sum(row["steps"] for row in rows)
    return {
        "method": config.method,
        "classes": {"base": len(task.base.classes), "new": len(task.new.classes)},
        "zero_shot": zero_shot.as_dict(),
        "tuned": rows[-1]["accuracy"] if rows else None,
        "epochs": len(rows),
        "steps": steps,
        "kept_classes": rows[-1]["kept_classes"] if rows else None,
        "parameters": parameters,
        "cost": cost
        | {
            "seconds_per_epoch": sorted(seconds)[len(seconds) // 2] if rows else None,
            "milliseconds_per_step": 1000 * sum(seconds) / steps if rows else None,
        },
    }


class _Trainer:
    """Model, optimizer, order of images and schedule."""

    def __init__(self, config: TuneConfig, model: nn.Module, evaluator: Evaluator, train: FeatureCache):
        self.images = len(train)
        clip = evaluator.base
        self.step = skip_step(clip) if config.method == "skip" else full_step(model, evaluator.base_tokens)
        groups = clip.parameter_groups(text_lr=config.text_lr or 0.0, image_lr=config.image_lr or 0.0)
        sgd = FusedSGD if config.fused_optimizer else torch.optim.SGD
        self.optimizer = sgd(groups, momentum=config.momentum, weight_decay=config.weight_decay)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, [partial(epoch_factor, config=config, base_lr=group["lr"]) for group in groups]
        )
        order = torch.Generator().manual_seed(config.seed)
        self.batches = train.loader(config.batch_size, config.sampler, generator=order, device=evaluator.device)
        self.device = evaluator.device
        self.autocast = evaluator.autocast
        self.parameter_counts = {
            "trained": sum(p.numel() for group in groups for p in group["params"]),
            "all": sum(p.numel() for p in model.parameters()),
        }

    def epoch(self, number: int, on_step: Callable[[], None]) -> dict[str, Any]:
        """One pass over the training images."""
        started, compared = time.perf_counter(), 0
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        rates = {group["name"]: group["lr"] for group in self.optimizer.param_groups}
        waited = self.batches.seconds_waited
        for inputs, labels in self.batches:
            with self.autocast:
                loss, classes = self.step(inputs, labels)
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
            loss_sum += loss.detach() * len(labels)  # read once an epoch: reading waits for the device
            compared += classes
            on_step()
        self.schedule.step()
        loss_mean = loss_sum.item() / self.images
        if not math.isfinite(loss_mean):
            raise FloatingPointError(
                f"tune: the loss of epoch {number + 1} is {loss_mean}; lower --text-lr and --image-lr, or use "
                "--precision fp32. The checkpoint of the last good epoch, if any, is kept."
            )
        steps = len(self.batches)
        return {
            "epoch": number + 1,
            "loss": loss_mean,
            "lr": rates,
            "steps": steps,
            "kept_classes": compared / steps,
            "seconds": time.perf_counter() - started,
            "seconds_waiting_for_features": self.batches.seconds_waited - waited,
        }


class _RunFolder:
    """The files of a run. metrics.json appears last, and says whether the run is complete."""

    def __init__(self, config: TuneConfig):
        assert config.out is not None
        self.folder, self.config = config.out, config
        self.rows: list[dict[str, Any]] = []
        if self.folder.exists() and not self.folder.is_dir():
            raise InputError(f"--out: {self.folder} is a file; choose a folder.")
        parent = next(path for path in (self.folder, *self.folder.absolute().parents) if path.exists())
        if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
            raise InputError(f"--out: {self.folder} can't be made: {parent} is not a folder that can be written to.")
        earlier = [name for name in _FILES if (self.folder / name).exists()]
        if earlier and not config.overwrite:
            raise InputError(
                f"--out: {self.folder} holds an earlier run ({', '.join(earlier)}); choose another folder, or add "
                "--overwrite."
            )

    def begin(self) -> None:
        """Remove an earlier run's files and write the configuration."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            for name in _FILES:
                (self.folder / name).unlink(missing_ok=True)
            self._write(CONFIG, self.config.to_yaml())
        except OSError as error:
            raise InputError(f"--out: {self.folder} can't be written: {error.strerror}.") from error

    def _write(self, name: str, text: str) -> None:
        replace_file(self.folder / name, lambda temporary: temporary.write_text(text))

    def complete_epoch(self, model: nn.Module, row: dict[str, Any]) -> None:
        """Keep an epoch: its checkpoint, then its metrics."""
        state = {name: tensor.detach().contiguous() for name, tensor in model.state_dict().items()}
        replace_file(self.folder / CHECKPOINT, lambda temporary: save_file(state, temporary))
        self.rows.append(row)
        self._write(EPOCHS, "".join(json.dumps(row) + "\n" for row in self.rows))

    def finish(self, metrics: dict[str, Any], examples: list[Example]) -> None:
        """Write the report and then the metrics."""
        if self.rows:
            self._write(REPORT, report_html(self.config, metrics, self.rows, examples))
        self._write(METRICS, json.dumps(metrics, indent=2) + "\n")


@contextmanager
def _interrupt_deferred() -> Iterator[None]:
    """Ctrl-C or termination waits until the block is done. Outside the main thread there is none to wait for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, lambda number, frame: received.append(number)) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
    if received:  # again, now that it does no harm
        signal.raise_signal(received[0])


def _examples(
    task: BaseToNew, evaluator: Evaluator, zero_shot: dict[str, Tensor], tuned: dict[str, Tensor]
) -> list[Example]:
    """Test images that were right before and wrong after tuning, or the other way round: one of each class."""
    found = []
    for name, split in (("base", task.base), ("new", task.new)):
        labels = evaluator.labels(name)
        flipped = (zero_shot[name] == labels) != (tuned[name] == labels)
        of_class = {int(labels[index]): index for index in flipped.nonzero().squeeze(1).tolist()}
        for label, index in list(of_class.items())[:_EXAMPLES]:
            names = [split.classes[int(k)] for k in (label, zero_shot[name][index], tuned[name][index])]
            found.append(Example(name, split.test[index][0], *names))
    return found


def _accuracy_text(prefix: str, accuracy: Accuracy) -> str:
    return f"{prefix}  base {accuracy.base:.1f} %  new {accuracy.new:.1f} %"


def _mib(count: int) -> float:
    return round(count / 2**20, 1)

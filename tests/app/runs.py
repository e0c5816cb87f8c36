"""Small runs and their results."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from skipkernels.app.cli.main import main
from skipkernels.app.config import TuneConfig
from skipkernels.app.demo import pictogram_tiny
from skipkernels.app.methods import Method
from skipkernels.app.methods.skip import Skip
from skipkernels.app.train import tune
from skipkernels.digests import digest_tensors

SMALL = TuneConfig(method="skip", shots=2, max_classes=24, epochs=2, device="cpu")  # two epochs of six steps


@contextlib.contextmanager
def published_optimizer() -> Iterator[None]:
    """Train pictogram-tiny with SGD and batches of 4, as published: the optimizer that takes every option."""
    recipe = {"epochs": 8, "text_lr": 4e-3, "image_lr": 2e-3, "sampler": "random", "warmup_epochs": 0, "warmup_lr": 0.0}
    full = recipe | {"text_lr": 5e-4, "image_lr": 2e-4}
    with pytest.MonkeyPatch.context() as patch:
        for method, fields in (("skip", recipe), ("full", full)):
            patch.setitem(pictogram_tiny.RECIPES, method, fields)
        yield


def small(out: Path, **changes: Any) -> TuneConfig:
    return dataclasses.replace(SMALL, out=out, **changes)


@contextlib.contextmanager
def at_step(number: int, happen: Callable[..., Any], method: type[Method] = Skip) -> Iterator[None]:
    """Replace a step of a method, counted from 1, by a function."""
    step, calls = method.step, itertools.count(1)

    def replaced(self, inputs, labels):
        return happen(self, inputs, labels) if next(calls) == number else step(self, inputs, labels)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(method, "step", replaced)
        yield


def interrupt(*arguments: Any) -> None:
    raise KeyboardInterrupt


def stopped(folder: Path, step: int = 9, **changes: Any) -> None:
    """Start a run that is interrupted in a step, by default the third of the second epoch."""
    config = small(folder, **changes)
    with at_step(step, interrupt, config.method_class()), pytest.raises(KeyboardInterrupt):
        tune(config)


def rows(folder: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in rows(folder)]


def results(folder: Path) -> list[Any]:
    """Results of a run except times: metrics, rows, and digests of the weights."""
    metrics = json.loads((folder / "metrics.json").read_text())
    timed = ("seconds", "seconds_waiting_for_features")
    file = folder / metrics["checkpoint"]["file"]
    return [
        without_cost(metrics),
        [{name: value for name, value in row.items() if name not in timed} for row in rows(folder)],
        {name: digest_tensors([(name, tensor)]) for name, tensor in load_file(file).items()},
    ]


def without_cost(metrics: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in metrics.items() if name not in ("cost", "command", "environment")}


def files(folder: Path) -> set[str]:
    """Names of the files, except hidden ones."""
    return {file.name for file in folder.iterdir() if not file.name.startswith(".")}


def fails(arguments: list[Any], capsys) -> str:
    """Error line of a command with unusable input."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]  # after the progress
    assert error.startswith("error") and "Traceback" not in error
    return error

"""Contents of metrics.json."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
from collections.abc import Mapping
from typing import Any

import torch

import skipkernels

from ..data.tasks import VALIDATION
from ..report.words import name_of_run
from ..results.files import MODEL
from .checkpoint import best_epoch
from .evaluation import Trained
from .setup import RunSetup

_PACKAGES = ("torch", "open_clip_torch", "torchvision", "triton", "numpy")


def metrics_of(trained: Trained, command: str, cost: Mapping[str, Any]) -> dict[str, Any]:
    """Return the contents of metrics.json for a run that is complete, but for its notes; for `cost` see `cost_of`."""
    choice, rows, config, task = trained.choice, trained.rows, trained.setup.config, trained.setup.task
    weights = trained.setup.method.state_dict().values()
    before, after = (trained.evaluator.by_class(each) for each in (trained.zero_shot, trained.tuned))
    if choice is not None and choice.by_class:
        before[VALIDATION], after[VALIDATION] = choice.by_class
    return {
        "status": "complete",
        "notes": [],
        "command": command,
        "environment": environment(config.device),
        "method": config.method,
        "head": config.head,
        "classifier": name_of_run(config),
        "l2": trained.l2,
        "protocol": config.protocol,
        "classes": {test.name: len(test.classes) for test in task.tests},
        "zero_shot": trained.zero_shot.accuracies,
        "tuned": trained.tuned.accuracies,
        "by_class": after,
        "zero_shot_by_class": before,
        "candidates": None if choice is None else choice.candidates,
        "chosen_because": None if choice is None else choice.because,
        "validation": _validation(trained),
        "epochs": len(rows),
        "best_epoch": best_epoch(rows),
        "steps": sum(row["steps"] for row in rows),
        "images": {"train": len(task.train), "tests": {test.name: len(test.images) for test in task.tests}},
        "batch_size": config.batch_size,
        "kept_classes": rows[-1]["kept_classes"] if rows else None,
        "parameters": _parameters(trained.setup),
        "checkpoint": {"file": MODEL, "mib": _mib(sum(weight.nbytes for weight in weights))},
        "cost": cost,
    }


def environment(device: str) -> dict[str, Any]:
    """Return the date and time (UTC) as "finished", "versions", and the "machine"."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor()
    parts = [name or platform.machine(), f"{os.cpu_count()} CPU cores", f"{torch.get_num_threads()} threads"]
    return {
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": _versions(),
        "machine": ", ".join([*parts, f"{platform.system()} {platform.release()}"]),
    }


def _versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that compute, by name."""
    versions_by_name = {"skipkernels": skipkernels.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions_by_name[package] = importlib.metadata.version(package)
    return versions_by_name


def _validation(trained: Trained) -> dict[str, Any] | None:
    """Accuracies on the images that chose the epoch, or the candidate."""
    if trained.choice is not None:
        return trained.choice.validation
    held_out = trained.setup.task.validation
    if held_out is None:
        return None
    before, after = trained.zero_shot.validation, trained.tuned.validation
    accuracies = {"images": len(held_out.images), "zero_shot": before, "tuned": after}
    return accuracies | {"thresholds": trained.thresholds}


def _parameters(setup: RunSetup) -> dict[str, int]:
    """Number of parameters: trained by steps or fitted, and all."""
    method = setup.method
    weights = [] if method.fitted is None else [method.fitted.weight, method.fitted.bias]
    if setup.config.epochs:
        weights += setup.trained
    every = {*weights, *setup.model.parameters()}  # once each: LoRA's are in the model
    return {"trained": sum(weight.numel() for weight in weights), "all": sum(weight.numel() for weight in every)}


def cost_of(
    trained: Trained, *, total_seconds: float, fit_seconds: float, baseline_memory: float, peak_memory: float
) -> dict[str, Any]:
    """Return the cost of a run in metrics.json; `fit_seconds` are those of a method without steps."""
    seconds, steps = [row["seconds"] for row in trained.rows], sum(row["steps"] for row in trained.rows)
    choosing = 0.0 if trained.choice is None else trained.choice.seconds
    return {
        "device": trained.setup.config.device,
        "seconds_total": total_seconds,
        "seconds_tuning": choosing + sum(seconds) + fit_seconds,
        "baseline_memory_mib": _mib(baseline_memory),
        "peak_memory_mib": _mib(peak_memory),
        "seconds_per_epoch": sorted(seconds)[len(seconds) // 2] if seconds else None,
        "milliseconds_per_step": 1000 * sum(seconds) / steps if seconds else None,
    }


def _mib(count: float) -> float:
    return round(count / 2**20, 1)

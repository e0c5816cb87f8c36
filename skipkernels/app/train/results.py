"""Results of a run: the contents of metrics.json."""

from __future__ import annotations

import datetime
import os
import platform
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..report.words import name_of_run
from .checkpoint import MODEL, best_epoch
from .class_metrics import VALIDATION
from .description import versions

if TYPE_CHECKING:
    from .run import Run


def metrics_of(run: Run) -> dict[str, Any]:
    """Return the contents of metrics.json for a run that is complete, but for its notes."""
    assert run.tuned is not None
    config, task, choice, rows = run.config, run.task, run.choice, run.rows
    before, after = (run.evaluator.by_class(evaluation) for evaluation in (run.zero_shot, run.tuned))
    if choice is not None and choice.by_class:
        before[VALIDATION], after[VALIDATION] = choice.by_class
    return {
        "status": "complete",
        "notes": [],
        "command": run.command,
        "environment": environment(config.device),
        "method": config.method,
        "head": config.head,
        "classifier": name_of_run(config) if choice is None else choice.name,
        "l2": run.l2,
        "protocol": config.protocol,
        "classes": {test.name: len(test.classes) for test in task.tests},
        "zero_shot": run.zero_shot.accuracies,
        "tuned": run.tuned.accuracies,
        "by_class": after,
        "zero_shot_by_class": before,
        "candidates": None if choice is None else choice.candidates,
        "chosen_because": None if choice is None else choice.because,
        "validation": _validation(run),
        "epochs": len(rows),
        "best_epoch": best_epoch(rows),
        "steps": sum(row["steps"] for row in rows),
        "images": {"train": len(task.train), "tests": {test.name: len(test.images) for test in task.tests}},
        "batch_size": config.batch_size,
        "kept_classes": rows[-1]["kept_classes"] if rows else None,
        "parameters": _parameters(run),
        "checkpoint": weights_size(run.method.state_dict()),
        "cost": _cost(run),
    }


def environment(device: str) -> dict[str, Any]:
    """Return the date and time (UTC) as "finished", "versions", and the "machine"."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor()
    parts = [name or platform.machine(), f"{os.cpu_count()} CPU cores", f"{torch.get_num_threads()} threads"]
    return {
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": ", ".join([*parts, f"{platform.system()} {platform.release()}"]),
    }


def weights_size(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Name of the weights file, and the size of its weights."""
    return {"file": MODEL, "mib": _mib(sum(weight.nbytes for weight in weights.values()))}


def _validation(run: Run) -> dict[str, Any] | None:
    """Accuracies on the images that chose the epoch, or the candidate."""
    if run.choice is not None:
        return run.choice.validation
    if run.task.validation is None:
        return None
    assert run.tuned is not None
    images = len(run.task.validation.images)
    found = {"images": images, "zero_shot": run.zero_shot.validation, "tuned": run.tuned.validation}
    return found | {"thresholds": run.thresholds}


def _parameters(run: Run) -> dict[str, int]:
    """Number of parameters: trained by steps, and all."""
    groups = run.method.parameter_groups(text_lr=0.0, image_lr=0.0) if run.config.epochs else []
    trained = {id(weight): weight for group in groups for weight in group["params"]}
    every = trained | {id(weight): weight for weight in run.setup.model.parameters()}
    return {name: sum(w.numel() for w in by_id.values()) for name, by_id in (("trained", trained), ("all", every))}


def _cost(run: Run) -> dict[str, Any]:
    seconds, steps = [row["seconds"] for row in run.rows], sum(row["steps"] for row in run.rows)
    return {
        "device": run.config.device,
        "seconds_total": run.seconds,
        "seconds_tuning": (0.0 if run.choice is None else run.choice.seconds) + sum(seconds) + run.seconds_fit,
        "baseline_memory_mib": _mib(run.baseline_memory),
        "peak_memory_mib": _mib(run.memory.read()),
        "seconds_per_epoch": sorted(seconds)[len(seconds) // 2] if seconds else None,
        "milliseconds_per_step": 1000 * sum(seconds) / steps if seconds else None,
    }


def _mib(count: float) -> float:
    return round(count / 2**20, 1)

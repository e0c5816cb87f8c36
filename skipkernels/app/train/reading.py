"""Reading of a run folder: its settings, and its model, which may be that of the last epoch of a run in progress."""

from __future__ import annotations

import contextlib
import shlex
from pathlib import Path
from typing import Any

import yaml

from ...digests import digest_file
from ...folders import is_locked
from ..config import CONFIG, TuneConfig
from ..data import InputError
from ..data.registry import is_in_python
from ..results.files import CLASSIFIER, METRICS
from . import checkpoint
from .description import Description

_SETTINGS = {"data", "protocol", "method", "skip_layers", "out"}  # in the config.yaml of every run


def has_run(folder: Path) -> bool:
    """Return True if a folder has the config.yaml of a run."""
    try:
        settings = yaml.safe_load((folder / CONFIG).read_bytes())
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(settings, dict) and settings.keys() >= _SETTINGS


def check_settings(folder: Path, config: TuneConfig, before: dict[str, Any]) -> None:
    """Check that a run in a folder, with the settings `before`, has those of a configuration that change results."""
    for name, value in config.identity().items():
        if before.get(name) != value:
            raise InputError(
                f"{name} is {before.get(name)!r} in the run in {folder}, and {value!r} here; pass the same, or choose "
                "another folder.",
                function="tune",
            )


def read_model(run: Path) -> tuple[Description, Path]:
    """Return the contents of classifier.json, and the weights file that has its digest.

    They are those of the checkpoint until the run is complete. A run in progress may replace it between two reads: then
    both are read again.
    """
    for _ in range(3):
        complete = (run / METRICS).exists()
        folder = run if complete or not checkpoint.exists(run) else run / checkpoint.FOLDER
        described = Description.read(folder)
        path = folder / described.weights
        with contextlib.suppress(OSError):  # the run in progress has deleted it meanwhile
            if path.is_file() and described.weights_xxh3 == digest_file(path):
                return described, path
        if not is_locked(run):
            break
    raise InputError(
        f"{path}: missing or damaged: it does not match {CLASSIFIER}. Copy the whole folder, or tune "
        "again in another folder, or in this one with `overwrite=True`."
    )


def unfinished(run: Path) -> str | None:
    """Return a note on the model of a run before its end; None for a complete run, or another folder."""
    if (run / METRICS).exists() or not checkpoint.exists(run):
        return None
    model = "its model is that of the last epoch, without the head, the blend and the calibration of the end"
    if is_locked(run):
        return f"a run is in progress in {run}; {model}."
    data = TuneConfig.from_yaml(run / CONFIG, trust=True).data  # nothing is loaded
    return f"the run in {run} was stopped; {model}. Continue it with {how_to_resume(run, data)}"


def how_to_resume(run: Path, data: str) -> str:
    """Return the command that continues a run, or the call where the dataset was passed in Python."""
    if is_in_python(data):
        return f"tune(dataset=…, resume={str(run)!r})"
    return f"skipkernels tune --resume {shlex.quote(str(run))}"

"""Page of a run from the files in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..config import TuneConfig
from ..data import InputError
from ..train import predictions
from ..train.run_folder import CONFIG, EPOCHS, read_metrics
from ..untrusted import parse_object, read_regular
from .run_page import report_html

_LARGEST = 1 << 28  # bytes of metrics.jsonl


def run_report(folder: Path) -> str:
    """Return the page of a run that has ended; without predictions, it has neither classes nor images."""
    # Nothing that the file names is loaded.
    config, metrics = TuneConfig.from_yaml(folder / CONFIG, trust=True), read_metrics(folder)
    path = folder / predictions.PREDICTIONS
    tests = predictions.load(path) if path.exists() else []
    return report_html(config, metrics, _rows(folder / EPOCHS), tests)


def _rows(path: Path) -> list[dict[str, Any]]:
    try:
        return [parse_object(line, finite=False) for line in read_regular(path, _LARGEST).splitlines()]
    except FileNotFoundError:  # a method without epochs
        return []
    except (OSError, ValueError, RecursionError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: damaged ({error}).") from error

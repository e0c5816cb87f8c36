"""Evaluation of the model of a run, also on other data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from ..config import CONFIG, TuneConfig
from ..console import print_plain
from ..data import InputError
from ..data.files import format_names
from ..data.map_style import SizedDataset
from ..data.registry import IN_PYTHON, is_in_python
from ..results.files import existing_run
from .evaluation import Accuracies, Evaluator
from .own_dataset import OwnData
from .reading import read_model
from .setup import build_run
from .weights import load_run_method, load_run_model

REPLACEABLE = ("device", "data", "root", "protocol", "max_classes")
"""Settings of a run that `evaluate_run` can replace."""


def evaluate_run(
    folder: str | Path,
    *,
    dataset: SizedDataset | None = None,
    test: SizedDataset | None = None,
    classes: Sequence[str] | None = None,
    trust: bool = False,
    console: Console | None = None,
    **settings: Any,
) -> Accuracies:
    """Compute the accuracy of the model of a run. Writes nothing, and does not read the feature cache.

    Args:
        folder: Run folder of `tune`, which may be in progress.
        dataset: Training images that were passed to `tune`, or others of the same classes.
        test: Test images; see `tune`.
        classes: Class names by label; see `tune`.
        trust: Load what config.yaml names: models and datasets of the hub, models and weights in other folders.
        console: Console for notes, and the number of images and the classes of each test. Default: none.
        **settings: Fields of `TuneConfig` that replace those of the run: those in `REPLACEABLE`. None: that of the run;
            of other data, all classes.

    Raises:
        InputError: If the folder is not a run folder, its model is damaged, the run has no test images, or it is not
            trusted and names such a source.
        FloatingPointError: If a logit is not finite.
    """
    if unknown := settings.keys() - set(REPLACEABLE):
        raise TypeError(f"evaluate_run: settings must be among {', '.join(REPLACEABLE)}; got {min(unknown)}.")
    folder, console = existing_run(folder, "evaluate_run", "folder"), console or Console(quiet=True)
    given = {name: value for name, value in settings.items() if value is not None}
    own = OwnData(dataset, test, classes=classes)
    config = _config_of_run(folder, own, given, trust)
    config, open_data = own.applied(_for_tests(config, own, given), "evaluate_run")
    config = config.resolved(open_data)
    described, file = read_model(folder)
    loaded = load_run_model(folder, described, file, torch.device(config.device), trust=config.trust)
    setup = build_run(config, open_data=open_data, loaded=loaded, train=False)
    load_run_method(setup.method, described, file)
    for note in setup.task.notes:
        print_plain(console, f"note: {note}")
    for each in setup.task.tests:
        names = f"{len(each.classes)} classes: {format_names(each.classes)}"
        print_plain(console, f"{each.name}: {len(each.images)} images of {names}")
    return Evaluator(setup, setup.test_features()).evaluate(setup.method).accuracies


def _config_of_run(folder: Path, own: OwnData, given: dict[str, Any], trust: bool) -> TuneConfig:
    """Read the configuration of a run, which has test images, or gets others."""
    other_data = ["data"] if "data" in given or own.dataset is not None else []
    # The model is checked when it is loaded.
    config = TuneConfig.from_yaml(folder / CONFIG, trust=trust, given=["model", "pretrained", *other_data])
    if config.test == "none" and "data" not in given and own.test is None:
        raise InputError(f"must be given: all images of {config.data} trained or validated.", "data", "evaluate_run")
    return replace(config, trust=trust)


def _for_tests(config: TuneConfig, own: OwnData, given: dict[str, Any]) -> TuneConfig:
    """Return the configuration with other settings, for test images alone."""
    if own.dataset is not None and not is_in_python(config.data):
        given = {"data": f"{IN_PYTHON}:"} | given  # `OwnData.applied` adds the name of the dataset
    if given.get("data", config.data) != config.data:
        given = {"max_classes": None} | given
    unused = {"workers": 0, "cache": None, "refresh": "never", "validation": "none", "class_weight": None}
    return replace(config, test="split", **unused | given)

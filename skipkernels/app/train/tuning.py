"""`tune`: configuration, data, model and method, training, run folder."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console

from ...memory import out_of_memory
from ..config import CONFIG, TuneConfig
from ..console import print_plain
from ..data.map_style import SizedDataset
from ..devices import seeded
from ..results.files import existing_run
from . import checkpoint
from .model import check_model
from .own_dataset import OwnData
from .progress import Logger
from .run import Run
from .writing import RunFolder


def tune(
    config: TuneConfig | None = None,
    console: Console | None = None,
    *,
    dataset: SizedDataset | None = None,
    test: SizedDataset | str | None = None,
    validation: SizedDataset | str | float | None = None,
    classes: Sequence[str] | None = None,
    identity: object = None,
    loggers: Sequence[Logger] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Tune a model and write the results.

    Checks the configuration before writing anything. Each epoch replaces the checkpoint, so an interrupted run can be
    resumed from its last complete epoch.

    Args:
        config: Configuration of the run. Default: that of the run to `resume`, else `TuneConfig()`.
        console: Console for progress. Default: none; notes, epochs and warnings also go to the Python logger
            "skipkernels".
        dataset: Training images, instead of the setting `data`: a map-style dataset of (image, label), as
            `data.from_datasets` describes it. Images are Pillow's, or tensors that are preprocessed for the model.
        test: Test images. Default: those of `validation`, or else 30 % of the images of each class of `dataset`. Or the
            setting `test`, "none".
        validation: Validation images; or the setting `validation`, a text or a share.
        classes: Class names by label. Default: the `classes` of a dataset.
        identity: Text or JSON value that identifies the datasets when a run is resumed. Default: digests of files and
            labels; see `FeatureCache.build`.
        loggers: Loggers of the rows of the epochs; see `train.progress.Logger`. They are closed at the end, also
            after an error. A run without epochs writes no rows.
        **settings: Fields of `TuneConfig`, which replace those of `config`.

    Returns:
        Contents of metrics.json: zero-shot and tuned accuracy, kept classes, steps, and cost in seconds and memory.

    Raises:
        pydantic.ValidationError: If a setting is unknown, or has a wrong type. It is a ValueError, as the next.
        InputError: If a setting can't be used, or the disk is full.
        MemoryError: If the device or the host is out of memory.
        FloatingPointError: If the loss is not finite. The last good checkpoint is kept.
        KeyboardInterrupt: On Ctrl-C; the message says how many epochs are complete.

    Example:
        >>> import tempfile, skipkernels as sk
        >>> settings = {"data": "pictograms:food", "method": "skip", "shots": 1, "max_classes": 4, "epochs": 1}
        >>> metrics = sk.tune(**settings, out=tempfile.mkdtemp())
        >>> metrics["classes"], metrics["tuned"].keys()
        ({'base': 2, 'new': 2}, dict_keys(['base', 'new', 'harmonic']))
    """
    with contextlib.ExitStack() as closing:  # closes all loggers, also if one fails to
        for logger in loggers:
            closing.callback(logger.close)
        if isinstance(test, str):
            settings["test"], test = test, None
        if isinstance(validation, (str, int, float)):
            settings["validation"], validation = validation, None
        own = OwnData(dataset, test, validation, classes, identity)
        return _run(_configured(config, settings), own, console or Console(quiet=True), loggers)


def _configured(config: TuneConfig | None, settings: dict[str, Any]) -> TuneConfig:
    """Return the configuration with other settings; the default is that of the run to resume."""
    if config is None and (run := settings.get("resume")) is not None:
        file = existing_run(run, "tune", "resume") / CONFIG
        config = TuneConfig.from_yaml(file, trust=settings.get("trust", False), given=settings)
        settings = {"out": None, "overwrite": False} | settings
    return replace(config or TuneConfig(), **settings)


def _run(config: TuneConfig, own: OwnData, console: Console, loggers: Sequence[Logger]) -> dict[str, Any]:
    """Start or continue a run; return the contents of metrics.json."""
    config, open_data = own.applied(config, "tune")
    command = config.command("tune") if own.dataset is None else ""
    config = config.resolved(open_data)
    if config.resume is None:  # errors of data and model come before those of the run folder
        open_data()
        check_model(config.model, config.pretrained)
    folder = RunFolder(config)  # it is not written before its lock is held
    if folder.finished is not None:
        checkpoint.delete(folder.path)  # a kill may have left it
        print_plain(console, f"{folder.path}: the run is complete; there is nothing to resume.")
        return folder.finished
    with _memory_errors(), seeded(config.seed, torch.device(config.device)):
        return Run(config, folder, open_data, command=command, console=console, loggers=loggers).execute()


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """Convert out-of-memory errors of PyTorch and Python to a MemoryError of one line."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0].rstrip(".") or "MemoryError"
        raise MemoryError(
            f"tune: out of memory ({reason}). Use `memory=min`, a smaller `batch_size`, a larger `skip_layers`, "
            "or `cache=…`."
        ) from error

"""Writing of a run folder: checks before the work is done, the order in which files are written, and the lock.

metrics.json marks a complete run: it is deleted before anything else is changed, and written after all other files.
Without it, the model of a run is that of its checkpoint. config.yaml marks the files as those of a run: it is written
first and deleted last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...digests import digest_file
from ...folders import is_locked, locked, replace_tensors, replace_text, sweep
from ...formatting import first_line
from ..config import CONFIG, TuneConfig
from ..data import InputError
from ..data.files import absolute_path, format_names
from ..results.files import (
    CANDIDATES,
    CARD,
    EPOCHS,
    HEAD,
    METRICS,
    MODEL,
    PREDICTIONS,
    PREDICTIONS_CSV,
    REPORT,
    RUN_FILES,
    check_writable,
    read_metrics,
    writing,
)
from ..results.predictions import prediction_lines, save
from ..untrusted import OPEN_CLIP
from . import checkpoint
from .candidates import Choice
from .description import Description, describe
from .model_card import model_card
from .reading import check_settings, has_run

if TYPE_CHECKING:
    from torch import Tensor

    from ..heads import Head
    from .evaluation import Trained

_BEFORE_EPOCHS = {CONFIG, OPEN_CLIP, CANDIDATES}  # files of a run without results, which is replaced


# ---- checks of a folder to write -------------------------------------------------------------------------------------


def _check_run_folder(path: Path, *, resume: bool, overwrite: bool) -> None:
    """Check that a folder can be written, and has no run unless it is to be resumed or overwritten."""
    check_writable(path)
    if is_locked(path):
        raise InputError(f"{path}: in use by another run. Wait for it, or choose another folder.", "out", "tune")
    earlier = [file.name for file in _files(path)]
    if earlier and not has_run(path):
        raise InputError(
            f"{path} contains files with names of run files, but no {CONFIG} of a run: "
            f"{format_names(earlier)}; choose another folder, or move them.",
            "out",
            "tune",
        )
    if not (resume or overwrite or set(earlier) <= _BEFORE_EPOCHS):
        stopped = "" if METRICS in earlier else " It is not complete: `resume=RUN` continues it."
        raise InputError(
            f"{path} contains an earlier run; choose another folder, or use `overwrite=True`.{stopped}",
            "out",
            "tune",
        )


def _files(folder: Path) -> list[Path]:
    """Files of a run in a folder, config.yaml last."""
    names = (checkpoint.FOLDER, *RUN_FILES)
    return [path for path in (folder / name for name in names) if path.exists()]


def _check_apart(argument: str, folder: Path, config: TuneConfig) -> None:
    """Check that an output folder is outside the folders of images, where it would be read as a class."""
    written = folder.resolve()
    kind, _, path = config.data.partition(":")
    if kind == "imagefolder" and path and absolute_path(path).resolve() in (written, *written.parents):
        raise InputError(
            f"{folder} is in the folder of the images, {config.data}; choose another folder.",
            argument,
            "tune",
        )


# ---- writing ---------------------------------------------------------------------------------------------------------


class RunFolder:
    """Files of a run. Nothing is written before `lock`.

    Args:
        config: Settings of the run.

    Attributes:
        path: Path of the folder.
        choice: Choice of the run to resume between candidates, or None.
        checkpoint: Checkpoint from which the run continues, or None.
        finished: Metrics of the run to resume if it is complete, or None.
    """

    def __init__(self, config: TuneConfig):
        assert config.out is not None
        self.path = config.out
        self.choice: Choice | None = None
        self.checkpoint: checkpoint.Checkpoint | None = None
        self.finished: dict[str, Any] | None = None
        _check_apart("out", self.path, config)
        if config.cache is not None:
            _check_apart("cache", config.cache, config)
        _check_run_folder(self.path, resume=config.resume is not None, overwrite=config.overwrite)
        if config.resume is None:
            return
        earlier = TuneConfig.from_yaml(self.path / CONFIG, trust=True)  # nothing is loaded
        self.choice = Choice.read(self.path)
        if (self.path / METRICS).exists():
            self.finished = read_metrics(self.path)
        else:
            self.checkpoint = checkpoint.load(self.path)
        check_settings(self.path, config, earlier.identity() if self.checkpoint is None else self.checkpoint.settings)

    @contextlib.contextmanager
    def lock(self, config: TuneConfig) -> Iterator[None]:
        """Hold the lock of the folder during the run; delete what an earlier run or the resumed one left."""
        with contextlib.ExitStack() as stack:
            with writing(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.path))
                sweep(self.path)
                (self.path / METRICS).unlink(missing_ok=True)
                if self.checkpoint is None:
                    checkpoint.delete(self.path)
                    for path in _files(self.path):
                        path.unlink(missing_ok=True)
            self.write(CONFIG, config.to_yaml())
            if self.checkpoint is not None:
                self.write_rows(self.checkpoint.rows)
            yield

    def write(self, name: str, text: str) -> None:
        """Replace a text file."""
        with writing(self.path / name):
            replace_text(self.path / name, text)

    def write_rows(self, rows: list[dict[str, Any]]) -> None:
        """Write metrics.jsonl."""
        self.write(EPOCHS, "".join(json.dumps(row) + "\n" for row in rows))

    def write_results(self, trained: Trained, metrics: dict[str, Any]) -> None:
        """Write the model, its card, the predictions and the report; last the metrics, which complete the run.

        Predictions or a report that fail are a note in the metrics.
        """
        from ..report.run_page import report_html

        setup, config = trained.setup, trained.setup.config
        described = dataclasses.replace(describe(setup), classifier=metrics["classifier"], **trained.calibration)
        described = self._write_model(described, setup.method.state_dict(), setup.method.fitted)
        use = "open-clip" if (self.path / OPEN_CLIP).exists() else "skipkernels"
        self.write(CARD, model_card(config, described, metrics, use=use))
        try:
            tests = trained.evaluator.predictions(trained.zero_shot, trained.tuned)
            save(self.path / PREDICTIONS, tests)
            self.write(PREDICTIONS_CSV, "".join(prediction_lines(tests)))
            self.write(REPORT, report_html(config, metrics, trained.rows, tests))
        except Exception as error:  # any: the results are complete without these files
            missing = [x for x in (PREDICTIONS, PREDICTIONS_CSV) if not (self.path / x).exists()] + [REPORT]
            reason = f"{type(error).__name__}: {first_line(error)}"
            metrics["notes"].append(f"{', '.join(missing)} {'were' if missing[1:] else 'was'} not written ({reason}).")
        self.write(METRICS, json.dumps(metrics, indent=2) + "\n")
        checkpoint.delete(self.path)

    def _write_model(self, described: Description, weights: Mapping[str, Tensor], head: Head | None) -> Description:
        """Write the weights, the head, if there is one, and their description, which is returned."""
        with writing(self.path / MODEL):
            replace_tensors(self.path / MODEL, weights)
            described = dataclasses.replace(described, weights_xxh3=digest_file(self.path / MODEL))
            if head is not None:
                replace_tensors(self.path / HEAD, head.tensors())
                described = dataclasses.replace(described, head_xxh3=digest_file(self.path / HEAD))
            described.write(self.path)
        return described

"""Run folder: its files, the order in which they are written, and its lock.

metrics.json marks a complete run: it is deleted before anything else is changed, and written after all other files.
Without it, the model of a run is that of its checkpoint. config.yaml marks the files as those of a run: it is written
first and deleted last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ...digests import digest_file
from ...folders import (
    LOCK,
    delete_folder,
    is_locked,
    locked,
    replace_text,
    replaced_folder,
    restored,
    sweep,
)
from ..config import TuneConfig, read_settings
from ..data import InputError
from ..data.files import format_names
from ..untrusted import OPEN_CLIP, read_object
from . import checkpoint
from .checkpoint import MODEL
from .description import CLASSIFIER, HEAD, Description
from .model_card import CARD, model_card
from .predictions import PREDICTIONS, TestPredictions, load, prediction_lines, save

if TYPE_CHECKING:
    from torch import Tensor

    from ..heads import Head

METRICS, EPOCHS, REPORT, CONFIG = "metrics.json", "metrics.jsonl", "report.html", "config.yaml"
FEW_SHOT, CANDIDATES = "few_shot.json", "candidates.json"
PREDICTIONS_CSV = "predictions.csv"
_FILES = (
    *(METRICS, REPORT, PREDICTIONS, PREDICTIONS_CSV, CARD, CLASSIFIER, MODEL, HEAD),
    *(OPEN_CLIP, EPOCHS, FEW_SHOT, CANDIDATES, CONFIG),
)
_BEFORE_EPOCHS = {CONFIG, OPEN_CLIP, FEW_SHOT, CANDIDATES}  # files of a run before its first epoch is complete
_SETTINGS = {"data", "protocol", "method", "skip_layers", "out"}  # in the config.yaml of every run
_MAX_READS = 100  # attempts to read the model of a run in progress


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_metrics(folder: Path) -> dict[str, Any]:
    """Read the metrics.json of a complete run."""
    try:
        return read_object(folder / METRICS)
    except FileNotFoundError:
        raise InputError(
            f"{folder / METRICS}: no such file. A run has it when it is complete; continue one that was stopped with "
            "`resume=True`."
        ) from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise InputError(
            f"{folder / METRICS}: damaged ({reason}). Restore it from a copy, or tune again in another folder."
        ) from error


def run_report(folder: Path) -> str:
    """Return the page of a complete run, from its files; without predictions, it has neither classes nor images."""
    from ..report.run_page import report_html

    # Nothing that the file names is loaded.
    config, metrics = TuneConfig.from_yaml(folder / CONFIG, trust=True), read_metrics(folder)
    path = folder / EPOCHS
    try:
        rows = [json.loads(line) for line in path.read_bytes().splitlines()] if path.exists() else []
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: damaged ({error}).") from error
    tests = load(folder / PREDICTIONS) if (folder / PREDICTIONS).exists() else []
    try:
        return report_html(config, metrics, rows, tests)
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / METRICS}: written by another version ({error!r}). Tune again.") from error


def read_model(run: Path) -> tuple[Description, Path]:
    """Return the contents of classifier.json, and the weights file that has its digest.

    They are those of the checkpoint until the run is complete. A run in progress may replace it between two reads: then
    both are read again.
    """
    for _ in range(_MAX_READS):
        complete = (run / METRICS).exists()
        folder = run if complete or not restored(run / checkpoint.FOLDER).is_dir() else run / checkpoint.FOLDER
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
    if (run / METRICS).exists() or not restored(run / checkpoint.FOLDER).is_dir():
        return None
    model = "its model is that of the last epoch, without the head, the blend and the calibration of the end"
    if is_locked(run):
        return f"a run is in progress in {run}; {model}."
    return f"the run in {run} was stopped; {model}. Continue it with skipkernels tune --resume {run}"


def blended_folder(run: Path) -> Path:
    """Return the default folder of a blended run, beside that of the run."""
    return run.with_name(f"{run.resolve().name}-blend")


def has_run(folder: Path) -> bool:
    """Return True if a folder has the config.yaml of a run."""
    try:
        settings = read_settings(folder / CONFIG)
    except (OSError, ValueError, yaml.YAMLError):
        return False
    return isinstance(settings, dict) and settings.keys() >= _SETTINGS


def resumed(config: TuneConfig) -> TuneConfig:
    """Return the configuration of the run in the folder `resume`, with the non-default settings of `config`.

    Returns `config` itself if `resume` is not a folder.
    """
    if isinstance(config.resume, bool):
        return config
    if config.out is not None:
        raise InputError("the run is continued in its folder; leave out `out`.", "resume", "tune")
    names = [field.name for field in dataclasses.fields(TuneConfig)]
    given = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(TuneConfig, name)}
    given |= {"out": config.resume, "resume": True, "overwrite": config.overwrite}
    earlier = TuneConfig.from_yaml(config.resume / CONFIG, trust=config.trust, given=given)
    return dataclasses.replace(earlier, **given)


# ---- checks of a folder to write -------------------------------------------------------------------------------------


def check_writable(folder: Path, argument: str = "out", function: str = "tune") -> None:
    """Check that a folder can be created and written."""
    if os.path.exists(folder) and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose a folder.", argument, function)
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    try:
        with tempfile.TemporaryDirectory(prefix=".skipkernels-", dir=existing):  # os.access is wrong about /proc
            pass
    except OSError as error:
        raise InputError(
            f"{folder} can't be created: {existing} is not a writable folder; choose another.",
            argument,
            function,
        ) from error


def check_run_folder(path: Path, *, resume: bool = False, overwrite: bool) -> None:
    """Check that a folder can be written, and has no run unless it is to be resumed or overwritten."""
    check_writable(path)
    _check_free(path)
    earlier = [file.name for file in _files(path)]
    if earlier and not has_run(path):
        raise InputError(
            f"{path} contains files with names of run files, but no {CONFIG} of a run: "
            f"{format_names(earlier)}; choose another folder, or move them.",
            "out",
            "tune",
        )
    started = {CONFIG, OPEN_CLIP} <= set(earlier) <= _BEFORE_EPOCHS
    if earlier and not (resume or overwrite or started):
        stopped = "" if METRICS in earlier else " It is not complete: `resume=True` continues it."
        raise InputError(
            f"{path} contains an earlier run ({', '.join(earlier)}); choose another folder, or use "
            f"`overwrite=True`.{stopped}",
            "out",
            "tune",
        )


def _files(folder: Path) -> list[Path]:
    """Files of a run in a folder, config.yaml last."""
    names = (checkpoint.FOLDER, *_FILES)
    return [path for path in (folder / name for name in names) if path.exists()]


def _check_free(folder: Path) -> None:
    if is_locked(folder):
        raise InputError(f"{folder}: in use by another run. Wait for it, or choose another folder.", "out", "tune")


def check_apart(argument: str, folder: Path, config: TuneConfig) -> None:
    """Check that an output folder is outside the folders of images, where it would be read as a class."""
    written = folder.expanduser().resolve()
    kind, _, path = config.data.partition(":")
    if kind == "imagefolder" and path and Path(path).expanduser().resolve() in (written, *written.parents):
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
        config: The settings.
        path: Path of the folder.
        resumed: Checkpoint from which the run continues, or None.
        finished: Metrics of the run to resume if it is complete, or None.
    """

    def __init__(self, config: TuneConfig):
        assert config.out is not None
        self.path, self.config = config.out, config
        self.resumed: checkpoint.Checkpoint | None = None
        self.finished: dict[str, Any] | None = None
        check_apart("out", self.path, config)
        if config.cache is not None:
            check_apart("cache", config.cache, config)
        check_run_folder(self.path, resume=bool(config.resume), overwrite=config.overwrite)
        if config.resume and (self.path / METRICS).exists():
            self.finished = read_metrics(self.path)
            self._check_settings(TuneConfig.from_yaml(self.path / CONFIG, trust=True).identity())  # nothing is loaded
        elif config.resume and (saved := checkpoint.load(self.path)) is not None:
            self._check_settings(saved.settings)
            self.resumed = saved

    def _check_settings(self, before: dict[str, Any]) -> None:
        """Check that the run to resume has the settings that change results."""
        for name, value in self.config.identity().items():
            if before.get(name) != value:
                raise InputError(
                    f"{name} is {before.get(name)!r} in the run in {self.path}, and {value!r} here; "
                    "pass the same, or choose another folder.",
                    "resume",
                    "tune",
                )

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the lock of the folder during the run; delete what an earlier run or the resumed one left."""
        with contextlib.ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.path))
                sweep(self.path)
                (self.path / METRICS).unlink(missing_ok=True)
                if self.resumed is None:
                    self.delete_checkpoint()
                    for path in _files(self.path):
                        path.unlink(missing_ok=True)
            except OSError as error:
                raise InputError(f"{self.path} can't be used: {error.strerror}.", "out", "tune") from error
            self.write(CONFIG, self.config.to_yaml())
            if self.resumed is not None:
                self.write_rows(self.resumed.rows)
            yield

    @contextlib.contextmanager
    def replaced(self) -> Iterator[None]:
        """Write all files of a run in place of an earlier one; in the block, `path` is a new folder beside it."""
        _check_free(self.path)
        path = self.path
        with replaced_folder(path, (*_FILES, checkpoint.FOLDER, LOCK)) as self.path:
            try:
                self.write(CONFIG, self.config.to_yaml())
                yield
            finally:
                self.path = path

    def write(self, name: str, text: str) -> None:
        """Replace a text file."""
        with self.writing(name):
            replace_text(self.path / name, text)

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[None]:
        """Convert an OSError to the error for a file that can't be written."""
        try:
            yield
        except OSError as error:
            raise InputError(f"{self.path / name} can't be written: {error.strerror}.", "out", "tune") from error

    def write_rows(self, rows: list[dict[str, Any]]) -> None:
        """Write metrics.jsonl."""
        self.write(EPOCHS, "".join(json.dumps(row) + "\n" for row in rows))

    def write_card(self, described: Description, metrics: dict[str, Any]) -> None:
        """Write the model card."""
        use = "open-clip" if (self.path / OPEN_CLIP).exists() else "skipkernels"
        self.write(CARD, model_card(self.config, described, metrics, use=use))

    def write_report(
        self, metrics: dict[str, Any], tests: Sequence[TestPredictions], rows: list[dict[str, Any]]
    ) -> None:
        """Write the predictions for the tests, also as CSV, and the report with some of them."""
        from ..report.run_page import report_html

        save(self.path / PREDICTIONS, tests)
        self.write(PREDICTIONS_CSV, "".join(prediction_lines(tests)))
        self.write(REPORT, report_html(self.config, metrics, rows, tests))

    def write_metrics(self, metrics: dict[str, Any]) -> None:
        """Write metrics.json, which completes the run."""
        self.write(METRICS, json.dumps(metrics, indent=2) + "\n")

    def delete_checkpoint(self) -> None:
        """Delete the checkpoint of a run that is complete or starts again."""
        delete_folder(self.path / checkpoint.FOLDER)

    def write_model(self, described: Description, weights: Mapping[str, Tensor], head: Head | None) -> Description:
        """Write the weights, the head, if there is one, and their description, which is returned."""
        from .weights import save_head, save_weights

        path = self.path / MODEL
        with self.writing(MODEL):
            save_weights(path, weights)
            described = save_head(self.path, head, dataclasses.replace(described, weights_xxh3=digest_file(path)))
            described.write(self.path)
        return described

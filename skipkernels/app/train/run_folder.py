"""Run folder: its files, the order in which they are written, and its lock."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ...folders import LOCK, is_locked, locked, replace_text, replaced_folder
from ..config import TuneConfig, read_settings
from ..data import InputError
from ..data.files import format_names
from ..untrusted import read_object
from . import checkpoint
from .description import CLASSIFIER, Description
from .errors import argument_error
from .loggers import CSV
from .model_card import CARD
from .plain_config import OPEN_CLIP
from .predictions import PREDICTIONS, TestPredictions, save
from .signals import handled
from .state_checks import check_types
from .validation import best_epoch

METRICS, EPOCHS, REPORT, CONFIG = "metrics.json", "metrics.jsonl", "report.html", "config.yaml"
FEW_SHOT = "few_shot.json"
# In the order of deletion. metrics.json marks a run that has ended: deleted first, written after the last epoch.
# config.yaml marks the files as those of a run: deleted last, written first.
_WEIGHTS = (checkpoint.MODEL, checkpoint.DELTA, checkpoint.BEST)
_RESULTS = (METRICS, checkpoint.STATE, REPORT, PREDICTIONS, CARD, CLASSIFIER, OPEN_CLIP, CSV, EPOCHS)
_FILES = (*_RESULTS, *_WEIGHTS, FEW_SHOT, CONFIG)

_METRICS: dict[str, Any] = {  # fields of metrics.json that are read
    "status": "text",
    "classes": "numbers by name",
    "zero_shot": "numbers by name",
    "tuned": ("numbers by name", "null"),
    "epochs": "whole number",
    "steps": "whole number",
    "kept_classes": ("number", "null"),
    "parameters": {"trained": "whole number", "all": "whole number"},
    "checkpoint": {"file": "text", "mib": "number", "mib_of_all": "number"},
    "cost": {
        "device": "text",
        "seconds_total": "number",
        "seconds_tuning": "number",
        "baseline_memory_mib": "number",
        "peak_memory_mib": "number",
        "seconds_per_epoch": ("number", "null"),
        "milliseconds_per_step": ("number", "null"),
    },
}
_MAX_METRICS_BYTES = 1 << 24

_EVENTS = "events.out.tfevents.*"  # TensorBoard's
_SETTINGS = {"data", "protocol", "method", "skip_layers", "out"}  # in the config.yaml of every version


def read_metrics(folder: Path) -> dict[str, Any]:
    """Read the metrics.json of a run.

    Raises:
        InputError: If it can't be read, or is not that of a run.
    """
    metrics = _metrics_object(folder)
    try:
        check_types(metrics, _METRICS)
        kept = metrics["steps"] == 0 or metrics["kept_classes"] is not None
        if metrics["status"] == "complete" and not (
            kept and (metrics["tuned"] or {}).keys() == metrics["zero_shot"].keys()
        ):
            raise ValueError("status is complete, but tuned or kept_classes is incomplete")
    except ValueError as error:
        raise _damaged(folder, error) from error
    return metrics


def _metrics_object(folder: Path) -> dict[str, Any]:
    """Read a metrics.json without checks of its fields."""
    try:
        return read_object(folder / METRICS, _MAX_METRICS_BYTES)
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: OSError | ValueError) -> InputError:
    reason = error.strerror if isinstance(error, OSError) else error
    return InputError(f"{folder / METRICS}: damaged ({reason}); delete it, and run skipkernels tune --resume {folder}.")


def blended_folder(run: Path) -> Path:
    """Return the default folder of a blended run, beside that of the run."""
    return run.with_name(f"{run.resolve().name}-blend")


def check_writable(folder: Path, argument: str = "out", function: str = "tune") -> Path:
    """Check that a folder can be created and written; return it, or its closest existing parent.

    Raises:
        InputError: If it can't be created or written.
    """
    if os.path.exists(folder) and not folder.is_dir():
        raise InputError(f"{function}: {argument}: {folder} is a file; choose a folder.", argument)
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    try:
        with tempfile.TemporaryDirectory(prefix=".skipkernels-", dir=existing):  # os.access is wrong about /proc
            return existing
    except OSError as error:
        raise InputError(
            f"{function}: {argument}: {folder} can't be created: {existing} is not a writable folder; choose another.",
            argument,
        ) from error


def check_apart(argument: str, folder: Path, config: TuneConfig) -> None:
    """Check that an output folder is outside the folder of the images, where its files would be read as images.

    The images are those of `data` and `targets` of the form imagefolder:PATH. The argument is "out" or "cache".

    Raises:
        InputError: If the folder is the folder of the images, or in it; for "out" also if the images are in it.
    """
    written = folder.expanduser().resolve()
    for data in (config.data, *(config.targets or ())):
        kind, _, path = data.partition(":")
        if kind != "imagefolder" or not path:
            continue
        images = Path(path).expanduser().resolve()
        if written == images:
            relation = "is"
        elif images in written.parents:
            relation = "is in"
        elif written in images.parents and argument == "out":
            relation = "contains"
        else:
            continue
        raise argument_error(argument, f"{folder} {relation} the folder of the images, {data}; choose another folder.")


def resumed(config: TuneConfig) -> TuneConfig:
    """Return the configuration of the run in the folder `resume`, with the non-default settings of `config`.

    Returns `config` itself if `resume` is not a folder.

    Raises:
        InputError: If there is no run in the folder.
    """
    if isinstance(config.resume, bool):
        return config
    if config.out is not None:
        raise InputError("tune: resume=RUN continues in RUN; leave out `out`.", "resume")
    names = [field.name for field in dataclasses.fields(TuneConfig)]
    given = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(TuneConfig, name)}
    given |= {"out": config.resume, "resume": True, "overwrite": config.overwrite}
    found = TuneConfig.from_yaml(config.resume / CONFIG, trust=config.trust, given=given)
    return dataclasses.replace(found, **given)


def _files(folder: Path) -> list[Path]:
    """Files of a run in a folder, config.yaml last."""
    return [path for path in (*folder.glob(_EVENTS), *(folder / name for name in _FILES)) if path.exists()]


def has_run(folder: Path) -> bool:
    """Return True if a folder has the config.yaml of a run, of any version."""
    try:
        settings = read_settings(folder / CONFIG)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False
    return isinstance(settings, dict) and settings.keys() >= _SETTINGS


class RunFolder:
    """Files of a run. Nothing is written before `lock`.

    Attributes:
        path: Path of the folder.
        rows: Rows of the complete epochs.
        resumed: Checkpoint from which the run continues, or None.
        finished: Metrics of the run to resume if it is complete, or None.

    Raises:
        InputError: If the folder can't be written, or contains another run, a damaged checkpoint, or foreign files with
            the names of run files.
    """

    def __init__(self, config: TuneConfig):
        assert config.out is not None
        self.path, self._config = config.out, config
        self.rows: list[dict[str, Any]] = []
        self.resumed: checkpoint.Checkpoint | None = None
        self.finished: dict[str, Any] | None = None
        self._digest: str | None = None  # of the weights
        self._best: str | None = None  # of those of the best epoch
        check_apart("out", self.path, config)
        if config.cache is not None:
            check_apart("cache", config.cache, config)
        self._disk = check_writable(self.path)
        self._check_free()
        earlier = [path.name for path in _files(self.path)]
        if earlier and not has_run(self.path):
            raise argument_error(
                "out",
                f"{self.path} contains files with names of run files, but no {CONFIG} of a run: "
                f"{format_names(earlier)}; choose another folder, or move them.",
            )
        if config.resume:
            self._resume(earlier)
        elif earlier and not config.overwrite:
            raise argument_error(
                "out",
                f"{self.path} contains an earlier run ({', '.join(earlier)}); choose another folder, or use "
                "`overwrite=True` or `resume=True`.",
            )

    def _check_free(self) -> None:
        if is_locked(self.path):
            raise argument_error(
                "out", f"{self.path}: in use by another process. Wait for it, or choose another folder."
            )

    def _resume(self, earlier: list[str]) -> None:
        found = checkpoint.find(self.path)
        if found is None:
            if METRICS in earlier and _metrics_object(self.path).get("epochs"):
                raise argument_error(
                    "resume",
                    f"{self.path} contains a run without {checkpoint.STATE}; choose another folder, or "
                    "use `overwrite=True`.",
                )
            return
        before, now = found.state["config"], self._config.identity()
        for name in now:
            if before.get(name) != now[name]:
                raise argument_error(
                    "resume",
                    f"{name} is {before.get(name)!r} in the run in {self.path}, and {now[name]!r} here; "
                    "pass the same, or choose another folder.",
                )
        if found.state["best"] is not None:
            checkpoint.best_weights(self.path, found.state)
        if METRICS in earlier and _metrics_object(self.path).get("status") == "complete":
            self.finished = read_metrics(self.path)
        self.resumed = found

    def check_room(self, size: int, best: int = 0) -> None:
        """Raise an InputError unless the disk has room for two checkpoints of `size` bytes, and the best weights."""
        reused = sum(path.stat().st_size for name in _FILES if (path := self.path / name).is_file())
        free = shutil.disk_usage(self._disk).free + reused
        if free < 2 * size + best:
            kept = f" and the best weights of {best / 2**20:.0f} MiB" if best else ""
            raise argument_error(
                "out",
                f"{self.path} needs room for two checkpoints of {size / 2**20:.0f} MiB{kept}, and "
                f"{free / 2**20:.0f} MiB are free; free disk space, choose another disk, or use `delta=True`.",
            )

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the lock of the folder during the run, and prepare its files.

        Raises:
            InputError: If the folder can't be written, or another process uses it.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.path))
                self._begin()
            except OSError as error:
                raise argument_error("out", f"{self.path} can't be written: {error.strerror}.") from error
            yield

    @contextmanager
    def replaced(self) -> Iterator[None]:
        """Write all files of a run in place of an earlier one; in the block, `path` is a new folder beside it."""
        self._check_free()
        path = self.path
        with replaced_folder(path, (*_FILES, _EVENTS, LOCK)) as self.path:
            try:
                self._write(CONFIG, self._config.to_yaml())
                yield
            finally:
                self.path = path

    def _begin(self) -> None:
        """Delete files of an earlier run, or restore the resumed one, and write the configuration."""
        (self.path / METRICS).unlink(missing_ok=True)
        (self.path / REPORT).unlink(missing_ok=True)
        (self.path / PREDICTIONS).unlink(missing_ok=True)
        if self.resumed is not None:
            self.resumed = checkpoint.recover(self.path)
            self.rows = list(self.resumed.state["rows"]) if self.resumed is not None else []
            if self.resumed is not None:
                self._digest, self._best = self.resumed.state["weights"]["xxh3"], self.resumed.state["best"]
        else:
            for path in _files(self.path):
                path.unlink(missing_ok=True)
        checkpoint.remove_leftovers(self.path, _FILES)
        self._write(CONFIG, self._config.to_yaml())
        if self.rows:
            self._write_rows()

    def follow(self, epochs: int) -> None:
        """Do nothing: this process writes the folder itself."""

    def complete_epoch(self, row: dict[str, Any] | None, weights: dict, metadata: dict[str, str], state: dict) -> None:
        """Write the checkpoint of an epoch, then its row. A method without steps has no row."""
        rows = self.rows if row is None else [*self.rows, row]
        state = state | {"config": self._config.identity(), "rows": rows}
        is_best = row is not None and best_epoch(rows) == row["epoch"]
        arguments = self.path, self.weights_file, weights, metadata, state
        self._digest, self._best = checkpoint.save(*arguments, best=self._best, is_best=is_best)
        self.rows = rows
        self._write_rows()

    @property
    def epochs(self) -> int:
        """Number of completed epochs."""
        return len(self.rows or (self.resumed.state["rows"] if self.resumed is not None else ()))

    @property
    def weights_file(self) -> str:
        """Name of the weights file."""
        return checkpoint.DELTA if self._config.delta else checkpoint.MODEL

    def keep_best(self) -> Path | None:
        """Make the weights of the best epoch those of the run; return their file, or None if they are already."""
        if self._best is None or self._digest == self._best:
            return None
        self._digest = self._best
        return checkpoint.keep_best(self.path)

    def describe(self, described: Description) -> None:
        """Write classifier.json, with the digest of the weights."""
        dataclasses.replace(described, weights_xxh3=self._digest).write(self.path)

    def _write_rows(self) -> None:
        self._write(EPOCHS, "".join(json.dumps(row) + "\n" for row in self.rows))

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write the metrics, which ends the run."""
        self._write(METRICS, json.dumps(metrics, indent=2) + "\n")

    def write_predictions(self, tests: list[TestPredictions]) -> None:
        """Write predictions.safetensors."""
        try:
            save(self.path / PREDICTIONS, tests)
        except OSError as error:
            raise argument_error("out", f"{self.path / PREDICTIONS} can't be written: {error.strerror}.") from error

    def write_report(self, report: str) -> None:
        """Write report.html."""
        self._write(REPORT, report)

    def write_card(self, card: str) -> None:
        """Write README.md."""
        self._write(CARD, card)

    def _write(self, name: str, text: str) -> None:
        try:
            replace_text(self.path / name, text)
        except OSError as error:
            raise argument_error("out", f"{self.path / name} can't be written: {error.strerror}.") from error


class FollowedFolder(RunFolder):
    """Folder of a run that another process writes; nothing is written here, and no other error is raised."""

    def __init__(self, config: TuneConfig):
        assert config.out is not None
        self.path, self._config = config.out, config
        self.rows, self.resumed, self.finished = [], None, None

    def check_room(self, size: int, best: int = 0) -> None:
        """Do nothing."""

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold no lock."""
        yield

    def keep_best(self) -> None:
        """Do nothing."""

    def follow(self, epochs: int) -> None:
        """Read the checkpoint of `epochs` complete epochs that the other process has found.

        Raises:
            InputError: If it is not in the folder.
        """
        self.resumed = checkpoint.find(self.path) if epochs else None
        self.rows = [] if self.resumed is None else list(self.resumed.state["rows"])
        if len(self.rows) != epochs:
            raise argument_error(
                "resume",
                f"{self.path} has a checkpoint of {epochs} epochs on the first process, and of {len(self.rows)} here; "
                "all processes must share the folder.",
            )


@contextmanager
def interrupt_deferred() -> Iterator[None]:
    """Defer SIGINT, SIGTERM and SIGHUP to the end of the block. Does nothing outside the main thread."""
    received: list[int] = []
    with handled((signal.SIGINT, signal.SIGTERM, signal.SIGHUP), lambda number, frame: received.append(number)):
        yield
    if received:
        signal.raise_signal(received[0])

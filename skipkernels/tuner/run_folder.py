"""The folder of a run: what is written when, and what a process may be killed at."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from ..data import InputError
from ..data.files import format_names
from ..store import StoreError, absolute_folder, read_object, replace_text
from ..store.lock import OWNER, holder, locked
from . import checkpoint
from .config import TuneConfig, read_settings
from .state_checks import check_types

METRICS, EPOCHS, REPORT, CONFIG = "metrics.json", "metrics.jsonl", "report.html", "config.yaml"
FEW_SHOT = "few_shot.json"
# metrics.json says that a run is over: of an earlier one's files it goes first, and comes behind the last epoch.
# config.yaml says that the others are a run's: it comes first, and goes last.
_FILES = (
    METRICS,
    checkpoint.STATE,
    REPORT,
    EPOCHS,
    checkpoint.MODEL,
    checkpoint.DELTA,
    FEW_SHOT,
    CONFIG,
)

_METRICS: dict[str, Any] = {  # what is read of a metrics.json
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
_MOST_METRICS_BYTES = 1 << 24

_EVENTS = "events.out.tfevents.*"  # TensorBoard's
_SETTINGS = {"data", "protocol", "method", "skip_layers", "out"}  # some that every config.yaml of a run has


def read_metrics(folder: Path) -> dict[str, Any]:
    """The metrics.json of a run.

    Raises:
        InputError: If it can't be read, or is not one.
    """
    metrics = _metrics_object(folder)
    try:
        check_types(metrics, _METRICS)
        complete, timed = metrics["status"] == "complete", metrics["steps"] == 0 or metrics["kept_classes"] is not None
        if complete and not (timed and (metrics["tuned"] or {}).keys() == metrics["zero_shot"].keys()):
            raise ValueError("tuned or kept_classes is not that of a complete run")
    except ValueError as error:
        raise _damaged(folder, error) from error
    return metrics


def _metrics_object(folder: Path) -> dict[str, Any]:
    """What a metrics.json holds, be it that of a run or not."""
    try:
        return read_object(folder / METRICS, _MOST_METRICS_BYTES)
    except (OSError, ValueError) as error:
        raise _damaged(folder, error) from error


def _damaged(folder: Path, error: OSError | ValueError) -> InputError:
    what = error.strerror if isinstance(error, OSError) else error
    return InputError(f"{folder / METRICS}: damaged ({what}); remove it, and --resume again.")


def check_can_be_made(folder: Path) -> Path:
    """Refuse a folder of results that can't be made or written to; returns the folder above it that is there, or it.

    Raises:
        InputError: If so.
    """
    try:
        absolute_folder(folder)
    except StoreError as error:
        raise InputError(f"--out: {error}") from error
    if os.path.exists(folder) and not folder.is_dir():
        raise InputError(f"--out: {folder} is a file; choose a folder.")
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    try:
        with tempfile.TemporaryDirectory(prefix=".skipkernels-", dir=there):  # that /proc takes none shows only so
            return there
    except OSError as error:
        raise InputError(
            f"--out: {folder} can't be made: {there} is not a folder that can be written to; choose another."
        ) from error


def check_apart(option: str, folder: Path, config: TuneConfig) -> None:
    """Refuse to write where images are read: what a run writes would be taken for classes and images.

    Args:
        option: That names the folder: "--out" or "--cache".
        folder: Where is written.
        config: Whose data are looked at, as far as they are folders of images: imagefolder:PATH.

    Raises:
        InputError: If the folder is that of the images or in it; of "--out" also if the images are in it.
    """
    written = folder.expanduser().resolve()
    for data in (config.data, *(config.targets or ())):
        kind, _, path = data.partition(":")
        if kind != "imagefolder" or not path:
            continue
        images = Path(path).expanduser().resolve()
        if written == images:
            where = "is"
        elif images in written.parents:
            where = "is in"
        elif written in images.parents and option == "--out":
            where = "has"
        else:
            continue
        raise InputError(
            f"{option}: {folder} {where} the folder of the images, {data}; choose another folder with {option}."
        )


def resumed(config: TuneConfig) -> TuneConfig:
    """The run in the folder that `resume` names, with what is set otherwise; `config` itself where it names none.

    Raises:
        InputError: If there is no run.
    """
    if isinstance(config.resume, bool):
        return config
    if config.out is not None:
        raise InputError("--resume RUN goes on in RUN; leave out --out.")
    names = [field.name for field in dataclasses.fields(TuneConfig)]
    given = {name: getattr(config, name) for name in names if getattr(config, name) != getattr(TuneConfig, name)}
    given |= {"out": config.resume, "resume": True, "overwrite": config.overwrite}
    return dataclasses.replace(TuneConfig.from_yaml(config.resume / CONFIG), **given)


def _files(folder: Path) -> list[Path]:
    """Those of a run that are in a folder, config.yaml last."""
    return [path for path in (*folder.glob(_EVENTS), *(folder / name for name in _FILES)) if path.exists()]


def _is_a_runs(folder: Path) -> bool:
    """Whether a folder has the config.yaml of a run, of whatever version, and not somebody's own."""
    try:
        settings = read_settings(folder / CONFIG)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return False
    return isinstance(settings, dict) and settings.keys() >= _SETTINGS


class RunFolder:
    """The files of a run. metrics.json appears behind the last epoch, and says whether the run is complete.

    Args:
        config: The run. Nothing is written before `held`.

    Attributes:
        path: The folder.
        rows: Of the epochs that are complete.
        resumed: Where the run goes on, or None.
        finished: The metrics of a run that is complete and was to be resumed, or None.

    Raises:
        InputError: If the folder can't be written, or holds another run, one whose checkpoint is damaged, or files
            that have the names of a run's and are none.
    """

    def __init__(self, config: TuneConfig):
        assert config.out is not None
        self.path, self._config = config.out, config
        self.rows: list[dict[str, Any]] = []
        self.resumed: checkpoint.Checkpoint | None = None
        self.finished: dict[str, Any] | None = None
        check_apart("--out", self.path, config)
        if config.cache is not None:
            check_apart("--cache", config.cache, config)
        self._disk = check_can_be_made(self.path)
        at_work = holder(self.path)
        if at_work is not None:
            raise InputError(f"--out: {self.path}: {at_work}, is at work in it. Wait for it, or choose another folder.")
        earlier = [path.name for path in _files(self.path)]
        if earlier and not _is_a_runs(self.path):
            raise InputError(
                f"--out: {self.path} holds files that are called as a run's, and no {CONFIG} that a run wrote: "
                f"{format_names(earlier)}; choose another folder, or move them."
            )
        if config.resume:
            self._resume(earlier)
        elif earlier and not config.overwrite:
            raise InputError(
                f"--out: {self.path} holds an earlier run ({', '.join(earlier)}); choose another folder, or add "
                "--overwrite, or --resume."
            )

    def _resume(self, earlier: list[str]) -> None:
        found = checkpoint.find(self.path)
        if found is None:
            if METRICS in earlier and _metrics_object(self.path).get("epochs"):
                raise InputError(
                    f"--resume: {self.path} holds a run without {checkpoint.STATE}; choose another folder, or use "
                    "--overwrite."
                )
            return
        before, now = found.state["config"], self._config.identity()
        for name in now:
            if before.get(name) != now[name]:
                raise InputError(
                    f"--resume: {name} is {before.get(name)!r} in the run in {self.path}, and {now[name]!r} here; give "
                    "the same, or choose another folder."
                )
        if METRICS in earlier and _metrics_object(self.path).get("status") == "complete":
            self.finished = read_metrics(self.path)
        self.resumed = found

    def check_room(self, size: int) -> None:
        """Refuse a disk that two checkpoints of so many bytes, about, don't fit on: the old one stays until the new is.

        Raises:
            InputError: If so.
        """
        there = sum(path.stat().st_size for name in _FILES if (path := self.path / name).is_file())
        free = shutil.disk_usage(self._disk).free + there
        if free < 2 * size:
            raise InputError(
                f"--out: {self.path} needs room for two checkpoints of {size / 2**20:.0f} MiB, and {free / 2**20:.0f} "
                "MiB are free; make room, choose another disk, or add --delta."
            )

    @contextmanager
    def held(self) -> Iterator[None]:
        """Begin a run, and keep other processes out until its end.

        Raises:
            InputError: If the folder can't be written, or another process is at work there.
        """
        with contextlib.ExitStack() as stack:
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked(self.path))
                self._begin()
            except StoreError as error:
                raise InputError(f"--out: {error}") from error
            except OSError as error:
                raise InputError(f"--out: {self.path} can't be written: {error.strerror}.") from error
            yield

    def _begin(self) -> None:
        """Remove what does not go on, metrics first, and write the configuration."""
        (self.path / METRICS).unlink(missing_ok=True)
        (self.path / REPORT).unlink(missing_ok=True)
        if self.resumed is not None:
            self.resumed = checkpoint.settle(self.path)
            self.rows = list(self.resumed.state["rows"]) if self.resumed is not None else []
        else:
            for path in _files(self.path):
                path.unlink(missing_ok=True)
        checkpoint.remove_leftovers(self.path, (*_FILES, OWNER))
        self._write(CONFIG, self._config.to_yaml())
        if self.rows:
            self._write_rows()

    def complete_epoch(self, row: dict[str, Any] | None, weights: dict, notes: dict[str, str], state: dict) -> None:
        """Keep an epoch: its checkpoint, then its row. A method without steps has no row."""
        rows = self.rows if row is None else [*self.rows, row]
        state = state | {"config": self._config.identity(), "rows": rows}
        checkpoint.save(self.path, self.weights_file, weights, notes, state)
        self.rows = rows
        self._write_rows()

    @property
    def epochs(self) -> int:
        """Number of completed epochs."""
        return len(self.rows or (self.resumed.state["rows"] if self.resumed is not None else ()))

    @property
    def weights_file(self) -> str:
        """Name of the file of weights."""
        return checkpoint.DELTA if self._config.delta else checkpoint.MODEL

    def _write_rows(self) -> None:
        self._write(EPOCHS, "".join(json.dumps(row) + "\n" for row in self.rows))

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write the metrics: from here on the run is over."""
        self._write(METRICS, json.dumps(metrics, indent=2) + "\n")

    def write_report(self, report: str) -> None:
        """Write report.html, after the metrics: it is no part of the result."""
        self._write(REPORT, report)

    def _write(self, name: str, text: str) -> None:
        try:
            replace_text(self.path / name, text)
        except OSError as error:
            raise InputError(f"--out: {self.path / name} can't be written: {error.strerror}.") from error


@contextmanager
def interrupt_deferred() -> Iterator[None]:
    """Ctrl-C or termination waits until the block is done. Outside the main thread there is none to wait for."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    received: list[int] = []
    signals = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, lambda number, frame: received.append(number)) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)
    if received:  # again, now that it does no harm
        signal.raise_signal(received[0])

"""Progress of a run: a line per epoch, below which a terminal has a progress bar; and loggers of a caller."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..console import print_plain
from ..report.formats import finite
from ..report.words import HEADS
from ..results.class_metrics import BALANCED

if TYPE_CHECKING:
    from .search import Trial

_REFRESHES = 2  # per second, of the bars; each delays the training thread by 3 ms
_SPEED_SECONDS = 600.0  # over which the time left is estimated: most epochs are shorter, so tests are included


class Logger(Protocol):
    """Logger of a run, such as one that is passed to `tune`."""

    def write(self, row: Mapping[str, Any], /) -> None:
        """Write the row of an epoch: that of metrics.jsonl."""

    def close(self) -> None:
        """End, also after an error."""


class ProgressDisplay:
    """Context manager that displays the features and then the epochs of a run; bars only in a terminal.

    Example:
        >>> with ProgressDisplay(Console(width=80), title="letters") as display:
        ...     display.begin(epochs=1, steps_per_epoch=3, zero_shot={"new": 40.0})
        ...     display.epoch({"epoch": 1, "loss": 0.5, "accuracy": {"new": 50.0}})
        letters
        zero-shot  new 40.0 %
        epoch 1/1  loss 0.5000  new 50.0 % (+10.0)
    """

    def __init__(self, console: Console, *, title: str):
        self._console, self._title = console, title
        self._zero_shot: Mapping[str, float | None] = {}
        name, loss = TextColumn("{task.description}"), TextColumn("{task.fields[loss]}")
        self._bars = Progress(
            *(name, BarColumn(), MofNCompleteColumn(), loss, TimeRemainingColumn()),
            console=console,
            refresh_per_second=_REFRESHES,
            speed_estimate_period=_SPEED_SECONDS,
            disable=console.quiet or not console.is_interactive,
        )

    def __enter__(self) -> ProgressDisplay:
        self._line(self._title)
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    @contextlib.contextmanager
    def features(self, total: int) -> Iterator[Callable[[float], None]]:
        """Show a bar for the features of `total` images; yield a function that advances it by a number of images."""
        bar = self._bars.add_task("features", total=total, loss="")
        yield partial(self._bars.advance, bar)
        self._bars.update(bar, completed=total)  # features of a store are not counted

    def candidates(self, steps: int) -> Callable[[], None]:
        """Add a bar for the training steps of candidates; return a function that advances it by one."""
        return partial(self._bars.advance, self._bars.add_task("candidates", total=steps, loss=""))

    def trials(self, trials: Sequence[Trial]) -> None:
        """Show the accuracies of candidates that share a training."""
        for _, (first, *others) in itertools.groupby(trials, key=lambda trial: trial.candidate.blend):
            heads = [f"{HEADS[trial.candidate.head]} {trial.accuracy:.1f} %" for trial in others]
            self._line(f"{first.candidate.name} {first.accuracy:.1f} %", *heads)

    def begin(self, *, epochs: int, steps_per_epoch: int, zero_shot: Mapping[str, float | None], done: int = 0) -> None:
        """Begin the epochs, of which an earlier process completed `done`."""
        total, completed = epochs * steps_per_epoch, done * steps_per_epoch
        self._steps = self._bars.add_task("steps", total=total, completed=completed, loss="")
        if known := self._accuracies(zero_shot):
            self._line("zero-shot", *known)
        self._epochs, self._zero_shot = epochs, zero_shot

    def step(self) -> None:
        """Count a step, without output and without a host sync."""
        self._bars.advance(self._steps)

    def loss(self, value: float) -> None:
        """Update the displayed loss."""
        self._bars.update(self._steps, loss=f"loss {value:.4f}")

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Print the line of a complete epoch, from its row of metrics.jsonl."""
        parts = [f"loss {row['loss']:.4f}"] if finite(row.get("loss")) else []
        parts += self._accuracies(row["accuracy"])
        if finite(row.get("validation")):
            parts.append(f"validation {row['validation']:.1f} %")
        if finite(row.get(BALANCED)):
            parts.append(f"balanced {row[BALANCED]:.1f} %")
        self._line(f"epoch {row['epoch']}/{self._epochs}", *parts)

    def _line(self, *parts: str) -> None:
        print_plain(self._console, "  ".join(parts))

    def _accuracies(self, accuracy: Mapping[str, float | None]) -> list[str]:
        """Accuracies with their change since `begin`, which itself shows none."""
        parts = []
        for name, after in ((name, value) for name, value in accuracy.items() if finite(value)):
            before = self._zero_shot.get(name)
            change = f" ({after - before:+.1f})" if finite(before) else ""
            parts.append(f"{name} {after:.1f} %{change}")
        return parts

"""Progress of a run: a live display in a terminal, or a line per epoch elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.constrain import Constrain
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from ...formatting import escaped
from ...memory import PeakMemory
from ..console import plain
from ..report.plots import finite

_REFRESHES = 2  # per second, of the live display; each delays the training thread by 3 ms
_MAX_WIDTH = 88  # characters of a bar
_SMOOTHING = 0.8  # weight of previous losses in the displayed loss
_MAX_ACCURACIES = 4  # in a line
_SPEED_SECONDS = 600.0  # over which the time left is estimated: most epochs are shorter, so tests are included
_LOG_SECONDS = 60.0  # between two lines about features


class ProgressDisplay:
    """Context manager that displays the features and then the epochs of a run.

    In a terminal it is a live display, which remains after the context exits. Elsewhere it prints a line per epoch, or
    nothing on a quiet console.

    Args:
        console: Console.
        title: Title of the run.
        memory: Memory counter, to display peak use. Default: no display of memory.

    Example:
        >>> with ProgressDisplay(Console(width=80), title="letters") as display:
        ...     display.begin(epochs=1, steps_per_epoch=3, zero_shot={"new": 40.0}, batch_size=4)
        ...     display.epoch({"epoch": 1, "loss": 0.5, "accuracy": {"new": 50.0}})
        letters
        zero-shot  new 40.0 %
        epoch 1/1  loss 0.5000  new 50.0 % (+10.0)
    """

    def __init__(self, console: Console, *, title: str, memory: PeakMemory | None = None):
        self._console, self._title, self._memory = console, escaped(title), memory
        self._epochs, self._epoch, self._done, self._steps_per_epoch, self._batch_size = 0, 0, 0, 0, 0.0
        self._zero_shot: Mapping[str, float | None] = {}
        self._accuracy: Mapping[str, float | None] = {}
        self._loss: float | None = None
        self._last_line = time.monotonic()
        name, state = TextColumn("{task.description}"), TextColumn("{task.fields[state]}")
        columns = name, BarColumn(None), state, TimeElapsedColumn(), TimeRemainingColumn()
        self._bars = Progress(*columns, console=console, speed_estimate_period=_SPEED_SECONDS, expand=True)
        for stage in ("features", "tuning"):
            self._bars.add_task(stage, start=False, total=0, visible=False, state="")
        self._features, self._tuning = self._bars.tasks
        live = console.is_interactive and not console.quiet
        self._live = Live(console=console, refresh_per_second=_REFRESHES, get_renderable=self._view) if live else None

    def __enter__(self) -> ProgressDisplay:
        self._line(self._title)
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def features(self, total: int) -> Callable[[int], None]:
        """Add `total` images to the progress bar of the features.

        Returns:
            Function that advances the bar by a number of images.
        """
        task = self._features
        self._bars.start_task(task.id)
        self._bars.update(task.id, total=(task.total or 0) + total, visible=True)

        def advance(images: int) -> None:
            self._bars.advance(task.id, images)
            if task.finished or time.monotonic() - self._last_line > _LOG_SECONDS:
                state = f"{task.completed:.0f} of {task.total:.0f} images"
                self._line("features", state, str(timedelta(seconds=round(task.elapsed or 0))))

        return advance

    def begin(
        self,
        *,
        epochs: int,
        steps_per_epoch: int,
        zero_shot: Mapping[str, float | None],
        batch_size: float,
        done: int = 0,
    ) -> None:
        """Begin the epochs.

        Args:
            epochs: Number of epochs.
            steps_per_epoch: Calls of `step` per epoch.
            zero_shot: Accuracies before tuning, in per cent.
            batch_size: Mean number of images per step.
            done: Epochs that an earlier process completed.
        """
        self._bars.update(self._features.id, completed=self._features.total)  # features of a store were not counted
        self._epochs, self._epoch, self._done = epochs, done, done
        self._steps_per_epoch, self._batch_size, self._zero_shot = steps_per_epoch, batch_size, zero_shot
        self._bars.start_task(self._tuning.id)
        total, completed = epochs * steps_per_epoch, done * steps_per_epoch
        self._bars.update(self._tuning.id, total=total, completed=completed, visible=True)
        self._line("zero-shot", *self._accuracies(zero_shot))

    def step(self) -> None:
        """Count a step, without output and without a host sync."""
        self._bars.advance(self._tuning.id)

    def loss(self, value: float) -> None:
        """Update the displayed loss."""
        self._loss = value if self._loss is None else _SMOOTHING * self._loss + (1 - _SMOOTHING) * value

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Display a complete epoch from its row of metrics.jsonl."""
        self._epoch, self._accuracy = row["epoch"], row["accuracy"]
        parts = [f"loss {row['loss']:.4f}"] if finite(row.get("loss")) else []
        parts += self._accuracies(self._accuracy)
        if finite(row.get("validation")):
            parts.append(f"validation {row['validation']:.1f} %")
        if row.get("seconds"):
            parts.append(f"{row['steps'] * self._batch_size / row['seconds']:,.0f} images/s")
        if self._epoch < self._epochs:
            seconds = (self._tuning.elapsed or 0) / (self._epoch - self._done) * (self._epochs - self._epoch)
            parts.append(f"{timedelta(seconds=round(seconds))} left")
        self._line(f"epoch {self._epoch}/{self._epochs}", *parts, *self._memory_text())

    def _line(self, *parts: str) -> None:
        """Print a line, unless there is a live display."""
        if self._live is None:
            self._last_line = time.monotonic()
            self._console.print(plain("  ".join(parts)), soft_wrap=True)

    def _accuracies(self, accuracy: Mapping[str, float | None]) -> list[str]:
        """Accuracies with their change; of more than four, the first and the last, which is a mean of the others."""
        shown = [(name, value) for name, value in accuracy.items() if finite(value)]
        found = []
        for name, after in shown if len(shown) <= _MAX_ACCURACIES else (shown[0], shown[-1]):
            before = self._zero_shot.get(name)
            change = f" ({after - before:+.1f})" if accuracy is not self._zero_shot and finite(before) else ""
            found.append(f"{name} {after:.1f} %{change}")
        return found

    def _memory_text(self) -> list[str]:
        return [] if self._memory is None else [f"peak memory {self._memory.read() / 2**20:,.0f} MiB"]

    def _view(self) -> RenderableType:
        """Render the live display; called in its thread."""
        testing = self._epoch < self._epochs and self._tuning.completed >= (self._epoch + 1) * self._steps_per_epoch
        epoch = f"epoch {min(self._epoch + 1, self._epochs)} of {self._epochs}{', test' if testing else ''}"
        self._features.fields["state"], self._tuning.fields["state"] = f"{self._features.completed:,.0f} images", epoch
        speed = self._tuning.finished_speed or self._tuning.speed
        pace = [f"{speed * self._batch_size:,.0f} images/s"] if speed else []
        loss = [] if self._loss is None else [f"loss {self._loss:.4f}"]
        rates = Text("   ".join([*loss, *pace, *self._memory_text()]))
        parts = Text(self._title, style="bold"), Constrain(self._bars.get_renderable(), _MAX_WIDTH), rates
        return Group(*parts, self._table()) if self._zero_shot else Group(*parts)

    def _table(self) -> Table:
        """Table of the accuracies of the last epoch and of zero-shot."""
        table = Table(box=None, pad_edge=False, padding=(0, 3, 0, 0), header_style="dim")
        table.add_column("accuracy, %")
        for head in ("zero-shot", *([f"epoch {self._epoch}", "change"] if self._accuracy else [])):
            table.add_column(head, justify="right")
        for name, before in self._zero_shot.items():
            cells = [plain(name), Text(_percent(before))]
            if self._accuracy:
                after = self._accuracy.get(name)
                cells.append(Text(_percent(after)))
                if finite(before) and finite(after):
                    cells.append(Text(f"{after - before:+.2f}", style="green" if after >= before else "red"))
            table.add_row(*cells)
        return table


def _percent(value: float | None) -> str:
    return f"{value:.2f}" if finite(value) else "-"

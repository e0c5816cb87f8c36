"""Progress of a run: a live display in a terminal, or a line per epoch elsewhere."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
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
_MEMORY_SECONDS = 1.0  # between two reads of the memory
_LOG_SECONDS = 60.0  # between two lines about features
_STATM = Path("/proc/self/statm")  # Linux


class ProgressDisplay:
    """Context manager that displays the features and then the epochs of a run.

    In a terminal it is a live display, which remains after the context exits. Elsewhere it prints a line per epoch, or
    nothing on a quiet console.

    Args:
        console: Console.
        title: Title of the run.
        memory: Memory counter, to display current and peak use. Default: no display of memory.

    Example:
        >>> with ProgressDisplay(Console(width=80), title="letters") as display:
        ...     display.begin(epochs=1, steps_per_epoch=3, zero_shot={"new": 40.0}, batch_size=4)
        ...     display.epoch({"epoch": 1, "loss": 0.5, "accuracy": {"new": 50.0}})
        letters
        zero-shot  new 40.0 %
        epoch 1/1  loss 0.5000  new 50.0 % (+10.0)
    """

    def __init__(self, console: Console, *, title: str, memory: PeakMemory | None = None):
        self._console, self._title = console, escaped(title)
        self._memory = None if memory is None else _Memory(memory)
        self._features, self._tuning = _Stage("features"), _Stage("tuning")
        self._epochs, self._epoch, self._steps_per_epoch, self._batch_size = 0, 0, 0, 0.0
        self._epoch_began = self._last_step = self._last_line = time.perf_counter()
        self._zero_shot: Mapping[str, float | None] = {}
        self._accuracy: Mapping[str, float | None] = {}
        self._loss: float | None = None
        self._last_pace: list[str] = []
        live = console.is_interactive and not console.quiet
        self._live = Live(console=console, refresh_per_second=_REFRESHES, get_renderable=self._view) if live else None

    def __enter__(self) -> ProgressDisplay:
        if self._live is None:
            self._line(self._title)
        else:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._features.end()
        self._tuning.end()
        if self._live is not None:
            self._live.stop()

    def features(self, total: int) -> Callable[[int], None]:
        """Add `total` images to the progress bar of the features.

        Returns:
            Function that advances the bar by a number of images.
        """
        if not self._features.total:
            self._features = _Stage("features")
        stage = self._features
        stage.total += total

        def advance(images: int) -> None:
            stage.done += images
            now = time.perf_counter()
            if self._live is None and (stage.done >= stage.total or now - self._last_line > _LOG_SECONDS):
                self._line("features", f"{stage.done} of {stage.total} images", _clock(stage.seconds))

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
        self._features.done = self._features.total  # existing features of a store were not counted
        self._features.end()
        self._epochs, self._epoch, self._steps_per_epoch, self._batch_size = epochs, done, steps_per_epoch, batch_size
        self._zero_shot = zero_shot
        self._tuning = _Stage("tuning", total=epochs * steps_per_epoch, done=done * steps_per_epoch)
        self._tuning.before = self._tuning.done
        self._epoch_began = self._tuning.began
        if self._live is None:
            self._line("zero-shot", *self._accuracies(zero_shot))

    def step(self) -> None:
        """Count a step, without output and without a host sync."""
        self._tuning.done += 1
        self._last_step = time.perf_counter()

    def loss(self, value: float) -> None:
        """Update the displayed loss."""
        self._loss = value if self._loss is None else _SMOOTHING * self._loss + (1 - _SMOOTHING) * value

    def epoch(self, row: Mapping[str, Any]) -> None:
        """Display a complete epoch from its row of metrics.jsonl."""
        self._last_pace = pace = self._pace()
        self._epoch, self._accuracy = row["epoch"], row["accuracy"]
        self._tuning.done = self._epoch * self._steps_per_epoch
        if self._live is None:
            loss = [f"loss {row['loss']:.4f}"] if finite(row.get("loss")) else []
            accuracies, left = self._accuracies(self._accuracy), _left(self._tuning)
            if finite(row.get("validation")):
                accuracies.append(f"validation {row['validation']:.1f} %")
            self._line(f"epoch {self._epoch}/{self._epochs}", *loss, *accuracies, *pace, left, *self._memory_text())
        self._epoch_began = time.perf_counter()

    def _line(self, *parts: str) -> None:
        self._last_line = time.perf_counter()
        self._console.print(plain("  ".join(filter(None, parts))), soft_wrap=True)

    def _accuracies(self, accuracy: Mapping[str, float | None]) -> list[str]:
        """Accuracies with their change; of more than four, the first and the last, which is a mean of the others."""
        shown = [(name, value) for name, value in accuracy.items() if finite(value)]
        found = []
        for name, after in shown if len(shown) <= _MAX_ACCURACIES else (shown[0], shown[-1]):
            before = self._zero_shot.get(name)
            change = f" ({after - before:+.1f})" if accuracy is not self._zero_shot and finite(before) else ""
            found.append(f"{name} {after:.1f} %{change}")
        return found

    def _pace(self) -> list[str]:
        """Images per second in this epoch up to its latest step; before its first step, those of the previous epoch."""
        images = (self._tuning.done - self._epoch * self._steps_per_epoch) * self._batch_size
        seconds = self._last_step - self._epoch_began
        return [f"{images / seconds:,.0f} images/s"] if images > 0 and seconds > 0 else self._last_pace

    def _memory_text(self) -> list[str]:
        return [] if self._memory is None else [self._memory.text()]

    def _view(self) -> RenderableType:
        """Render the live display; called in the thread of the display."""
        bars = Table.grid(padding=(0, 1), expand=True)
        bars.width = min(self._console.width, _MAX_WIDTH)
        bars.add_column(no_wrap=True)
        bars.add_column(ratio=1)
        for _ in range(3):
            bars.add_column(no_wrap=True, justify="right")
        testing = self._epoch < self._epochs and self._tuning.done >= (self._epoch + 1) * self._steps_per_epoch
        epoch = f"epoch {min(self._epoch + 1, self._epochs)} of {self._epochs}{', test' if testing else ''}"
        for stage, state in ((self._features, f"{self._features.done:,} images"), (self._tuning, epoch)):
            if stage.total:
                bar = ProgressBar(total=stage.total, completed=stage.done)
                bars.add_row(stage.name, bar, state, _clock(stage.seconds), _left(stage))
        loss = [] if self._loss is None else [f"loss {self._loss:.4f}"]
        parts: list[RenderableType] = [Text(self._title, style="bold"), bars]
        parts.append(Text("   ".join([*loss, *self._pace(), *self._memory_text()])))
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


@dataclass
class _Stage:
    """Part of a run with a progress bar."""

    name: str
    total: int = 0
    done: int = 0
    before: int = 0  # part of `done` by an earlier process
    began: float = field(default_factory=time.perf_counter)
    ended: float | None = None

    def end(self) -> None:
        self.ended = self.ended or time.perf_counter()

    @property
    def seconds(self) -> float:
        return (self.ended or time.perf_counter()) - self.began

    @property
    def seconds_left(self) -> float | None:
        """Estimate from the mean time per step so far, including everything between steps."""
        here, left = self.done - self.before, self.total - self.done
        return self.seconds / here * left if here > 0 and left > 0 and self.ended is None else None


class _Memory:
    """Text of the memory use, read at most once per second."""

    def __init__(self, peak: PeakMemory):
        self._peak, self._read_at, self._text = peak, float("-inf"), ""

    def text(self) -> str:
        now = time.perf_counter()
        if now - self._read_at >= _MEMORY_SECONDS:
            self._read_at, used, peak = now, self._used(), self._peak.read()
            self._text = f"memory {used / 2**20:,.0f} MiB, peak {max(used, peak) / 2**20:,.0f} MiB"
        return self._text

    def _used(self) -> int:
        """Current use in bytes; 0 if unknown."""
        if self._peak.device.type == "cuda":
            return torch.cuda.memory_allocated(self._peak.device)
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if _STATM.exists() else 0


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _left(stage: _Stage) -> str:
    return "" if stage.seconds_left is None else f"{_clock(stage.seconds_left)} left"


def _percent(value: float | None) -> str:
    return f"{value:.2f}" if finite(value) else "-"

"""What a run shows while it goes on: a live view in a terminal, a line for each epoch where output is a file."""

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

from ..console import escaped, plain
from ..memory import PeakMemory
from .plots import finite

_REFRESHES = 2  # of the live view, a second: each takes 3 ms of the thread that trains
_WIDTH = 88  # of the bars at most, in characters
_SMOOTH = 0.8  # weight of the losses before, in the one that is shown
_FEW = 4  # accuracies that fit in a line
_MEMORY_SECONDS = 1.0  # between two looks at the memory
_LOG_SECONDS = 60.0  # between two lines on features
_STATM = Path("/proc/self/statm")  # Linux


class Display:
    """A live view of a run: of its features, then of its tuning. On what is no terminal, a line for each epoch.

    A context: leaving it, by Ctrl-C too, gives the terminal back with the last view on it. A quiet console shows
    nothing.

    Args:
        console: Where it is shown.
        title: Of the run.
        memory: Whose peak is shown, and what is held now on its device; by default neither.

    Example:
        >>> with Display(Console(width=80), title="letters") as display:
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

    def __enter__(self) -> Display:
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
        """Images of which features will be computed, besides those of earlier calls.

        Returns:
            To be called with the number of images, each time that some are done.
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
        """Features are there, and tuning begins.

        Args:
            epochs: Of the run.
            steps_per_epoch: Calls of `step` in each.
            zero_shot: Accuracies before tuning, in per cent.
            batch_size: Images in a step; their mean where it varies.
            done: Epochs that an earlier process completed.
        """
        self._features.done = self._features.total  # some may have been in a store already
        self._features.end()
        self._epochs, self._epoch, self._steps_per_epoch, self._batch_size = epochs, done, steps_per_epoch, batch_size
        self._zero_shot = zero_shot
        self._tuning = _Stage("tuning", total=epochs * steps_per_epoch, done=done * steps_per_epoch)
        self._tuning.before = self._tuning.done
        self._epoch_began = self._tuning.began
        if self._live is None:
            self._line("zero-shot", *self._accuracies(zero_shot))

    def step(self) -> None:
        """A step is done. Cheap: nothing is drawn, and no device is asked."""
        self._tuning.done += 1
        self._last_step = time.perf_counter()

    def loss(self, value: float) -> None:
        """The loss of a step, read now and then."""
        self._loss = value if self._loss is None else _SMOOTH * self._loss + (1 - _SMOOTH) * value

    def epoch(self, row: Mapping[str, Any]) -> None:
        """An epoch is complete; `row` is that of metrics.jsonl."""
        self._last_pace = pace = self._pace()
        self._epoch, self._accuracy = row["epoch"], row["accuracy"]
        self._tuning.done = self._epoch * self._steps_per_epoch
        if self._live is None:
            loss = [f"loss {row['loss']:.4f}"] if finite(row.get("loss")) else []
            accuracies, left = self._accuracies(self._accuracy), _left(self._tuning)
            self._line(f"epoch {self._epoch}/{self._epochs}", *loss, *accuracies, *pace, left, *self._held())
        self._epoch_began = time.perf_counter()

    def _line(self, *parts: str) -> None:
        self._last_line = time.perf_counter()
        self._console.print(plain("  ".join(filter(None, parts))), soft_wrap=True)

    def _accuracies(self, accuracy: Mapping[str, float | None]) -> list[str]:
        """Each with its change; of more than a line holds, the first and the last, which is a mean of the others."""
        shown = [(name, value) for name, value in accuracy.items() if finite(value)]
        found = []
        for name, after in shown if len(shown) <= _FEW else (shown[0], shown[-1]):
            before = self._zero_shot.get(name)
            change = f" ({after - before:+.1f})" if accuracy is not self._zero_shot and finite(before) else ""
            found.append(f"{name} {after:.1f} %{change}")
        return found

    def _pace(self) -> list[str]:
        """Images a second in this epoch, up to its last step; before its first, in the epoch before."""
        images = (self._tuning.done - self._epoch * self._steps_per_epoch) * self._batch_size
        seconds = self._last_step - self._epoch_began
        return [f"{images / seconds:,.0f} images/s"] if images > 0 and seconds > 0 else self._last_pace

    def _held(self) -> list[str]:
        return [] if self._memory is None else [self._memory.text()]

    def _view(self) -> RenderableType:
        """What the terminal shows; called in the thread of the live view."""
        bars = Table.grid(padding=(0, 1), expand=True)
        bars.width = min(self._console.width, _WIDTH)
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
        parts.append(Text("   ".join([*loss, *self._pace(), *self._held()])))
        return Group(*parts, self._table()) if self._zero_shot else Group(*parts)

    def _table(self) -> Table:
        """Accuracies of the last epoch against zero-shot."""
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
    """A part of a run that has a bar."""

    name: str
    total: int = 0
    done: int = 0
    before: int = 0  # what an earlier process did of `done`
    began: float = field(default_factory=time.perf_counter)
    ended: float | None = None

    def end(self) -> None:
        self.ended = self.ended or time.perf_counter()

    @property
    def seconds(self) -> float:
        return (self.ended or time.perf_counter()) - self.began

    @property
    def seconds_left(self) -> float | None:
        """At the pace so far, everything between the steps included."""
        here, left = self.done - self.before, self.total - self.done
        return self.seconds / here * left if here > 0 and left > 0 and self.ended is None else None


class _Memory:
    """What is held, as text; looked at once a second at most."""

    def __init__(self, peak: PeakMemory):
        self._peak, self._looked, self._text = peak, float("-inf"), ""

    def text(self) -> str:
        now = time.perf_counter()
        if now - self._looked >= _MEMORY_SECONDS:
            self._looked, held, peak = now, self._held(), self._peak.read()
            self._text = f"memory {held / 2**20:,.0f} MiB, peak {max(held, peak) / 2**20:,.0f} MiB"
        return self._text

    def _held(self) -> int:
        """In bytes, now; 0 where nobody says."""
        if self._peak.device.type == "cuda":
            return torch.cuda.memory_allocated(self._peak.device)
        return int(_STATM.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if _STATM.exists() else 0


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _left(stage: _Stage) -> str:
    return "" if stage.seconds_left is None else f"{_clock(stage.seconds_left)} left"


def _percent(value: float | None) -> str:
    return f"{value:.2f}" if finite(value) else "-"

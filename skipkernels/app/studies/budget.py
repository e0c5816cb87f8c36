"""Search of the method and its settings within a time budget.

Every candidate is a complete run. The best on the validation images becomes the run in the output folder; neither the
test images nor the seed take part in the choice.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console

from ...folders import link_or_copy
from ...formatting import duration
from ..config import TuneConfig
from ..console import plain
from ..data import InputError
from ..data.tasks import VALIDATION_SHARE
from ..report import run_report
from ..report.intervals import range_text, wilson
from ..report.rendering import number, plural
from ..train.command_line import command_line
from ..train.description import Description
from ..train.model_card import CARD, model_card
from ..train.plain_config import OPEN_CLIP
from ..train.run_folder import CONFIG, METRICS, REPORT, RunFolder, read_metrics
from ..train.setup import build_task
from .compare import MULTIPLIERS, rates_given, scaled_rates
from .runs import OutOfTime, Planned, Variant, execute, plan

CANDIDATES = "candidates"
"""Folder of the candidates in that of the run, with their reports; only the best keeps its weights."""
BASELINES = ("zero-shot", "linear-probe")
"""Methods that take seconds, in the order in which they are tried."""
SKIP_LAYERS, KEEP_RATIOS = (0.25, 0.75), (1.0, 0.25)
"""Values that are tried beside the default."""
_FEATURES = "features"  # folder of the features that the candidates share
_UNITS = {"s": 1, "m": 60, "h": 3600}
_WHOLE = 0.95  # share of the classes in a step, above which no other --keep-ratio is tried
_MARGIN = 0.9  # share of the time left that is planned for a run with fewer epochs


def seconds_of(text: str) -> float:
    """Return the seconds of a time such as 90s, 20m or 1.5h.

    >>> seconds_of("20m")
    1200.0
    """
    found = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)([smh])", text.strip())
    seconds = float(found[1]) * _UNITS[found[2]] if found else 0.0
    if not seconds:
        raise InputError(
            f"tune: time_budget must be a time above 0 such as 90s, 20m or 1h; got {text!r}.", "time_budget"
        )
    return seconds


class Tried(NamedTuple):
    """A candidate that was tried.

    Attributes:
        name: Name, with the settings that differ from those of the method.
        method: Method.
        settings: Values of the searched settings that the method has.
        status: "complete"; "diverged"; or "too long", with the epochs that are complete kept in its folder.
        accuracy: Accuracy on the validation images in per cent; None unless complete.
        interval: 95 % interval of the accuracy (Wilson), or None.
        seconds: Time of the run, with the start of its process unless it was complete before.
    """

    name: str
    method: str
    settings: dict[str, Any]
    status: str
    accuracy: float | None
    interval: tuple[float, float] | None
    seconds: float

    @property
    def settings_text(self) -> str:
        """Searched settings as text."""
        return ", ".join(f"{name} {value:g}" for name, value in self.settings.items())


def _settings(config: TuneConfig) -> dict[str, Any]:
    """Searched settings that a method uses."""
    known = {name: getattr(config, name) for name in ("epochs", "text_lr", "image_lr")}
    options = config.method_class().options()
    known |= {name: getattr(config, name) for name in ("skip_layers", "keep_ratio") if name in options}
    return {name: value for name, value in known.items() if value is not None and config.epochs}


class Search:
    """Search within a time budget.

    Candidates are tried in this order: zero-shot, linear probe, and the method of `config` (by default Skip Tuning)
    with its recipe; then, each from the best so far of that method: learning rates times 0.3, 3, 0.1 and 10, other
    numbers of skipped blocks, and other shares of classes in a step. A setting that is given is not searched. The
    search ends when the next candidate would not be complete in time, judged by the longest of its method so far.

    Args:
        config: Settings of every candidate; the best is written to its folder `out`.
        seconds: Time budget of this call. Complete candidates of an earlier call for the same folder are not run again.
        console: Console for progress.
        command: Command of the search, for the report.

    Attributes:
        tried: The candidates, in their order.
        sentences: How the search ended, and whether a cheap method is as good as the best.
    """

    def __init__(self, config: TuneConfig, seconds: float, console: Console, command: str = ""):
        if config.validation == "none":
            raise InputError(
                'tune: time_budget chooses by validation images; leave validation="none" out.', "time_budget"
            )
        if config.validation == "auto" and not config.own_data:
            config = dataclasses.replace(config, validation=VALIDATION_SHARE)
        assert config.out is not None
        self._out, self._folder = config.out, config.out / CANDIDATES
        overwrite = config.overwrite or self._holds_search()
        RunFolder(dataclasses.replace(config.resolved(), overwrite=overwrite), can_resume=False)
        if build_task(config.resolved()).validation is None:
            raise InputError(
                "tune: time_budget chooses by validation images, and no class has a second training image for them. "
                "Add images.",
                "time_budget",
            )
        self._config = dataclasses.replace(config, overwrite=False)
        self._fresh = config.overwrite
        self._console, self._command, self._seconds = console, command, seconds
        self._deadline = time.time() + seconds
        self._noted: set[str] = set()
        self._took: list[tuple[str, float]] = []  # method and seconds of each complete candidate
        self._per_epoch: float | None = None  # seconds, of a run that was too long
        self._setup = 0.0  # its seconds before the first epoch
        self._runs: dict[str, tuple[Planned, dict[str, Any]]] = {}  # complete ones by name
        self.tried: list[Tried] = []
        self.sentences: list[str] = []

    def run(self) -> tuple[TuneConfig, dict[str, Any]]:
        """Search, and write the best run. Returns its settings, and the contents of its metrics.json."""
        if self._fresh:
            shutil.rmtree(self._folder, ignore_errors=True)
        ended = self._search()
        shutil.rmtree(self._folder / _FEATURES, ignore_errors=True)
        best = self._best()
        if best is None:
            raise InputError(
                f"tune: time_budget: no candidate was complete in {duration(self._seconds)}: {ended} Give more time; "
                "what is complete is kept.",
                "time_budget",
            )
        self.sentences = [ended, *self._verdict(best)]
        return self._keep(best)

    def _holds_search(self) -> bool:
        """Return True if the run in the output folder, if any, is the result of an earlier search."""
        if not self._folder.is_dir():
            return False
        return not (self._out / CONFIG).exists() or (
            (self._out / METRICS).exists() and "time_budget" in read_metrics(self._out)
        )

    def _search(self) -> str:
        """Try the candidates. Returns a sentence on how the search ended."""
        for name, config in self._candidates():
            method, left = config.method, self._deadline - time.time()
            planned = plan(Variant(name, config), config.seed, self._folder)
            expected = max((took for of, took in self._took if of in (method, *BASELINES)), default=0.0)
            if planned.metrics is None and expected > left:
                return (
                    f"The next candidate, {name}, would take about {duration(expected)}, and {duration(max(left, 0))} "
                    "were left."
                )
            stopped = self._try(planned, left)
            if stopped is not None:
                return stopped
        return f"All {len(self.tried)} candidates were tried."

    def _candidates(self) -> Iterator[tuple[str, TuneConfig]]:
        """Yield names and settings of the candidates; later ones depend on the results of earlier ones."""
        config = self._config
        for method in dict.fromkeys((*BASELINES, config.method)):
            yield method, config.with_method(method) if method != config.method else self._cached(config)
        own = config.method
        if self._status(own) == "too long":
            config = dataclasses.replace(config, epochs=self._fewer_epochs())
            own = f"{own} epochs {config.epochs}"
            yield own, self._cached(config)
        if own not in self._runs:
            return
        stages: list[dict[str, dict[str, Any]]] = []
        if not rates_given(config):
            stages.append({f"x{multiplier:g}": scaled_rates(config, multiplier) for multiplier in MULTIPLIERS[1:]})
        if config.method == "skip":
            metrics = self._runs[own][1]
            every = metrics["kept_classes"] >= _WHOLE * next(iter(metrics["classes"].values()))
            for setting, values in (("skip_layers", SKIP_LAYERS), ("keep_ratio", () if every else KEEP_RATIOS)):
                if getattr(config, setting) == getattr(TuneConfig, setting):
                    stages.append({f"{setting} {value:g}": {setting: value} for value in values})
        for stage in stages:
            best = self._best(config.method)
            assert best is not None
            found = self._runs[best.name][0].config
            base = dataclasses.replace(
                found, resume=False, cache=self._config.cache, cache_dtype=self._config.cache_dtype
            )
            for label, changes in stage.items():
                if changes:
                    yield f"{best.name} {label}", self._cached(dataclasses.replace(base, **changes))

    def _cached(self, config: TuneConfig) -> TuneConfig:
        """Let candidates with the same skipped blocks share features, exact ones unless a cache is given."""
        if config.method != "skip" or config.skip_layers == 0:
            return config
        if config.cache is not None:
            return dataclasses.replace(config, cache=config.cache / f"skip-layers-{config.skip_layers:g}")
        cache = self._folder / _FEATURES / f"skip-layers-{config.skip_layers:g}"
        return dataclasses.replace(config, cache=cache, cache_dtype="fp32")

    def _own_cache(self, config: TuneConfig) -> dict[str, Any]:
        """Settings of the cache without the features that only candidates share, which are deleted."""
        if self._config.cache is not None:
            return {"cache": config.cache}
        return {"cache": None, "cache_dtype": self._config.cache_dtype}

    def _try(self, planned: Planned, left: float) -> str | None:
        """Run a candidate that is not complete. Returns why the search ends, if it does."""
        name, metrics, started = planned.name, planned.metrics, time.perf_counter()
        parts = name, planned.config.method, _settings(planned.config)
        done = metrics is not None
        if metrics is None:
            head = plain(f"candidate {len(self.tried) + 1}", "bold")
            self._console.print(head, plain(f" {name}, {duration(left)} left"), soft_wrap=True)
            try:
                notes = planned.config.method not in self._noted
                metrics = execute(planned, keep_diverged=True, notes=notes, deadline=self._deadline)
            except OutOfTime as error:
                self._per_epoch = pace = error.seconds_per_epoch
                took = time.perf_counter() - started
                self._setup = max(took - (pace or 0.0), 0.0)
                self.tried.append(Tried(*parts, "too long", None, None, took))
                if pace is None or name != self._config.method:
                    return f"The time was over in {name}."
                epochs = planned.config.epochs or 0
                whole = f"{epochs} epochs would take {duration(pace * epochs)}"
                self._console.print(plain(f"{name}: {whole}"), soft_wrap=True)
                return None if self._fewer_epochs() else f"{name}: {whole}, and none fits."
            self._noted.add(planned.config.method)
        seconds = metrics["cost"]["seconds_total"] if done else time.perf_counter() - started  # with the process start
        self._took.append((planned.config.method, seconds))
        held = metrics.get("validation") or {}
        accuracy = held.get("tuned")
        interval = None if accuracy is None else wilson(accuracy, held["images"])
        status = metrics["status"]
        self.tried.append(Tried(*parts, status, accuracy, interval, seconds))
        said = (
            status if accuracy is None or interval is None else f"validation {accuracy:.1f} % ({range_text(interval)})"
        )
        how = "complete before" if done else duration(seconds)
        self._console.print(plain(f"{name}: {said}, {how}"), soft_wrap=True)
        if accuracy is not None:
            self._runs[name] = planned, metrics
            self._prune()
        return None

    def _fewer_epochs(self) -> int | None:
        """Number of epochs that fit into the time left, after a first run that was too long; None if there is none."""
        if self._config.epochs is not None or self._per_epoch is None:
            return None
        left = self._deadline - time.time() - self._setup
        return max(int(_MARGIN * left / self._per_epoch), 0) or None

    def _status(self, name: str) -> str | None:
        return next((each.status for each in self.tried if each.name == name), None)

    def _best(self, method: str | None = None) -> Tried | None:
        """Candidate with the highest accuracy, of equal ones the first; None if none is complete."""
        known = [each for each in self.tried if each.name in self._runs and method in (None, each.method)]
        return max(known, key=lambda each: each.accuracy or 0.0, default=None)

    def _prune(self) -> None:
        """Delete the weights of the complete candidates that are not the best."""
        best = self._best()
        for name, (planned, metrics) in self._runs.items():
            if best is not None and name != best.name:
                assert planned.config.out is not None
                (planned.config.out / Path(metrics["checkpoint"]["file"]).name).unlink(missing_ok=True)

    def _verdict(self, best: Tried) -> list[str]:
        """Sentences on how the baselines compare with the best."""
        assert best.accuracy is not None and best.interval is not None
        images = self._runs[best.name][1]["validation"]["images"]
        found = f"{best.name} has the best accuracy, {best.accuracy:.1f} % of {plural(images, 'validation image')}"
        others = [each for each in self.tried if each.method not in BASELINES and each.accuracy is not None]
        if best.method in BASELINES:
            most = max((each.accuracy or 0.0 for each in others), default=0.0)
            rest = f"; {self._config.method} reached at most {number(most)} %" if others else ""
            if others and most >= best.accuracy:
                rest = f"; {self._config.method} reached the same, and the candidate that was tried first is kept"
            return [f"{found}{rest}."]
        near = [
            f"{each.name} ({each.accuracy:.1f} %)"
            for each in self.tried
            if each.method in BASELINES and each.accuracy is not None and each.accuracy >= best.interval[0]
        ]
        limits = f"95 % interval {range_text(best.interval)}"
        if not near:
            return [f"{found} ({limits}); zero-shot and linear probe are below the interval."]
        verb = "is" if len(near) == 1 else "are"
        return [
            f"{found} ({limits}). {' and '.join(near)} {verb} within this interval: these images don't tell them "
            "apart, and the cheaper method may be as good."
        ]

    def _keep(self, best: Tried) -> tuple[TuneConfig, dict[str, Any]]:
        """Write the run of the best candidate to the output folder."""
        planned, metrics = self._runs[best.name]
        source = planned.config.out
        assert source is not None
        config = dataclasses.replace(planned.config, out=self._out, resume=False, **self._own_cache(planned.config))
        rows = [each._asdict() | {"settings": each.settings_text, "chosen": each is best} for each in self.tried]
        search = {"command": self._command, "seconds": self._seconds, "sentences": self.sentences, "candidates": rows}
        metrics = {**metrics, "command": command_line("tune", config), "time_budget": search}
        folder = RunFolder(dataclasses.replace(config, overwrite=True))
        with folder.replaced():
            for path in source.iterdir():
                if (
                    path.is_file()
                    and path.name not in (CONFIG, METRICS, CARD, REPORT)
                    and not path.name.startswith(".")
                ):
                    link_or_copy(path, folder.path / path.name)
            use = "open-clip" if (source / OPEN_CLIP).exists() else "skipkernels"
            folder.write(CARD, model_card(config, Description.read(source), metrics, use=use))
            folder.write_metrics(metrics)
            folder.write(REPORT, run_report(folder.path))
        return config, metrics

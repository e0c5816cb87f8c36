"""Page of a run: the result on the first screen, then sections from images to cost."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..config import CONFIG, TuneConfig
from ..data import InputError
from ..data.tasks import VALIDATION
from ..results.files import METRICS, PREDICTIONS, read_epochs, read_metrics
from ..results.notes import demonstration_note
from ..results.predictions import TestPredictions, load
from . import page
from .formats import finite, number, plural
from .page import Section
from .parts import part
from .plots import COLOURS, Line, plot
from .predicted import classes, galleries
from .summary import (
    BEST,
    Metrics,
    accuracy_table,
    blend_table,
    candidate_table,
    capitalised,
    choice,
    cost_table,
    headline,
    kept_epoch,
)
from .table import Row, Table
from .words import before_text, name_of_test, title_of

_FIXED = (
    "Test images that only the tuned model classifies correctly, with the three most probable classes by each model. "
    "Probabilities are not calibrated."
)
_BROKEN = "Test images that only the zero-shot model classified correctly."
_INTERVALS = (
    "In brackets: 95 % intervals over the images (Wilson). Both models have the same images, so a change may be "
    "certain although intervals overlap."
)


def report_html(
    config: TuneConfig, metrics: Metrics, rows: list[dict[str, Any]], tests: Sequence[TestPredictions]
) -> str:
    """Return the page, from metrics.json, metrics.jsonl and the predictions."""
    return page.page_html(
        title_of(config, capitalised(metrics["classifier"])),
        metrics["environment"]["finished"],
        headline(metrics),
        [*_notes(config, metrics), accuracy_table(metrics).html, part("text", _INTERVALS), *_candidates(metrics)],
        [
            Section("fixed", "Fixed by tuning", galleries(tests, TestPredictions.fixed, _FIXED, "better")),
            Section("broken", "Broken by tuning", galleries(tests, TestPredictions.broken, _BROKEN, "worse")),
            Section("classes", "Classes", page.groups({name_of_test(test.name): classes(test) for test in tests})),
            Section("thresholds", "Thresholds", _thresholds(metrics["validation"])),
            Section("training", "Training", _curves(config, metrics, rows)),
            page.reproduction(metrics["command"], _data(config, metrics), metrics["environment"], config.to_yaml()),
            Section("cost", "Cost", [cost_table(config, metrics).html]),
        ],
    )


def run_report(folder: Path) -> str:
    """Return the page of a complete run, from its files; without predictions, it has neither classes nor images."""
    # Nothing that the file names is loaded.
    config, metrics = TuneConfig.from_yaml(folder / CONFIG, trust=True), read_metrics(folder)
    tests = load(folder / PREDICTIONS) if (folder / PREDICTIONS).exists() else []
    try:
        return report_html(config, metrics, read_epochs(folder), tests)
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / METRICS}: written by another version ({error!r}). Tune again.") from error


# ---- the first screen --------------------------------------------------------------------------------------------


def _notes(config: TuneConfig, metrics: Metrics) -> list[Markup]:
    """The epoch that is kept, and notes."""
    found = []
    if (kept := kept_epoch(config, metrics)) is not None:
        found.append(part("text", kept))
    if (demonstration := demonstration_note(config.model)) is not None:
        found.append(part("text", demonstration, "warning" if config.own_data else "quiet"))
    return found + [part("text", note, "warning") for note in metrics["notes"]]


def _candidates(metrics: Metrics) -> list[Markup]:
    """Table of the candidates of a run that chose its method, and why it chose."""
    if not metrics["candidates"]:
        return []
    found = [candidate_table(metrics, best=BEST).html, part("text", str(choice(metrics)), "")]
    if len(metrics["candidates"]) > BEST:
        found.append(
            part("group", f"All {len(metrics['candidates'])} candidates", [candidate_table(metrics).html], False)
        )
    return found


# ---- sections ----------------------------------------------------------------------------------------------------


def _thresholds(validation: Mapping[str, Any] | None) -> list[Markup]:
    """Table of thresholds on the validation images."""
    if validation is None or not validation["thresholds"]:
        return []
    rows = [
        Row.of(
            f"{number(each['target'], '.0f')} % {'right' if each['wanted'] == 'accuracy' else 'kept'}",
            number(each["threshold"], ".2f"),
            number(each["coverage"]),
            number(each["accuracy"]),
        )
        for each in validation["thresholds"]
    ]
    use = "With skipkernels predict --threshold, an image with a smaller probability gets the label “none of these”."
    measured = f"Measured on {plural(validation['images'], 'validation image')}. {use}"
    return [part("text", measured), Table("wanted", ["threshold", "kept, %", "right, %"], rows).html]


def _curves(config: TuneConfig, metrics: Metrics, rows: list[dict[str, Any]]) -> list[Markup]:
    """Plots of loss and accuracy over the epochs, and the table of a blend."""

    def line(name: str, colour: str, values: Iterable[tuple[float, float | None]]) -> Line:
        return Line(name, colour, [(epoch, value) for epoch, value in values if finite(value)])

    loss = line("mean over an epoch", COLOURS[0], ((row["epoch"], row["loss"]) for row in rows))
    accuracies = [(0, metrics["zero_shot"]), *((row["epoch"], row["accuracy"]) for row in rows)]
    tests = [
        line(name_of_test(test), colour, ((epoch, of.get(test)) for epoch, of in accuracies))
        for test, colour in zip(metrics["classes"], cycle(COLOURS), strict=False)
    ]
    validation = line(name_of_test(VALIDATION), "zero", ((row["epoch"], row.get("validation")) for row in rows))
    plots = [plot("training loss", [loss]), plot("accuracy, %", [*tests, validation])] if rows else []
    found = [part("plots", plots)] if any(plots) else []
    if rows and (before := before_text(config)):
        found.append(part("text", f"Epochs are those of the trained model{before}."))
    return [*found, *([blend_table(metrics).html] if "blend" in metrics else [])]


def _data(config: TuneConfig, metrics: Metrics) -> dict[str, Any]:
    """Data and seed, for the section that says how to reproduce the run."""
    images = metrics["images"]
    counts = [plural(images["train"], "training image")]
    counts += [f"{plural(count, 'image')} of {name_of_test(name)}" for name, count in images["tests"].items()]
    return {"data": f"{config.data}; {metrics['protocol']}; {', '.join(counts)}", "seed": config.seed}

"""Results of a run, from its metrics.json, in sentences and tables: for its page and the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from ..config import TuneConfig
from ..data.tasks import VALIDATION
from .formats import finite, number, percent, plural
from .intervals import range_text, wilson
from .table import Cell, Row, Table, change_cell, facts_table
from .words import before_text, name_of_test

BEST = 5
"""Candidates that are shown at first."""
Metrics = Mapping[str, Any]
"""Contents of metrics.json."""


class Accuracy(NamedTuple):
    """Accuracy before and after tuning, in per cent."""

    measure: str  # "accuracy", or "balanced accuracy", the mean over the classes
    before: float | None
    after: float | None
    images: int | None = None  # None for a summary of the protocol, and for the balanced accuracy

    @property
    def change(self) -> float | None:
        """Difference of both; None if one is not a number."""
        return self.after - self.before if finite(self.before) and finite(self.after) else None


def accuracies(metrics: Metrics, test: str) -> list[Accuracy]:
    """Return the accuracy of a test, of a summary of the protocol, or on the validation images.

    The balanced accuracy follows if the classes have different numbers of images.
    """
    held_out, images = metrics["validation"], metrics["images"]["tests"].get(test)
    if test == VALIDATION and held_out is not None:
        found = [Accuracy("accuracy", held_out["zero_shot"], held_out["tuned"], held_out["images"])]
    else:
        found = [Accuracy("accuracy", metrics["zero_shot"].get(test), metrics["tuned"].get(test), images)]
    before, after = (metrics[part].get(test) for part in ("zero_shot_by_class", "by_class"))
    if before and len({each["images"] for each in before["classes"]}) > 1:
        tuned = None if after is None else after["balanced_accuracy"]
        found.append(Accuracy("balanced accuracy", before["balanced_accuracy"], tuned))
    return found


# ---- sentences -------------------------------------------------------------------------------------------------------


def headline(metrics: Metrics) -> str:
    """Return the accuracies before and after tuning on each test, or, without one, on the validation images."""
    found = [_sentence(metrics, test, counted(metrics, test)) for test in metrics["classes"]]
    if any(found):
        return " ".join(filter(None, found))
    if metrics["validation"] is None:
        return "All images trained, none were kept for a test: there is no accuracy."
    sentence = _sentence(metrics, VALIDATION, plural(metrics["validation"]["images"], "validation image"))
    if not metrics["candidates"] and metrics["best_epoch"] is None:  # they chose nothing
        return f"{sentence} No images were kept for a test."
    chose = "the candidate, and then trained" if metrics["candidates"] else "the epoch"
    return f"{sentence} They chose {chose}. No images were kept for a test: expect less on others."


def _sentence(metrics: Metrics, test: str, of: str) -> str:
    """Return the change of the accuracies of a test, of which `of` is the name; "" without an accuracy."""
    changes = []
    for each in accuracies(metrics, test):
        if finite(each.before) and finite(each.after):
            interval = f" (95 % interval {range_text(wilson(each.after, each.images))})" if each.images else ""
            changes.append(f"the {each.measure} went from {percent(each.before)} to {percent(each.after)}{interval}")
    return f"On the {of}, {' and '.join(changes)}." if changes else ""


def kept_epoch(config: TuneConfig, metrics: Metrics) -> str | None:
    """Return which epoch is kept, and why; None for a run without validation images, or a blend."""
    best, validation = metrics["best_epoch"], metrics["validation"]
    if best is None or "alpha" in metrics:
        return None
    name = "balanced accuracy" if config.balances else "accuracy"
    images = plural(validation["images"], "validation image")
    return f"Epoch {best} of {metrics['epochs']} is kept, the best on {images} by {name}{before_text(config)}."


def choice(metrics: Metrics) -> str | None:
    """Return which candidate was chosen, and why; None if none was."""
    if not metrics["candidates"]:
        return None
    because = f": {metrics['chosen_because']}" if metrics["chosen_because"] else ""
    repeated = "was trained again, on" if metrics["steps"] else "was fitted again, to"
    name = next(each["name"] for each in metrics["candidates"] if each["chosen"])  # before `skipkernels blend`
    again = "" if name == "zero-shot" else f" Then it {repeated} all images."
    return f"{capitalised(name)} was chosen{because}.{again}"


# ---- tables, also of the terminal ------------------------------------------------------------------------------------


def accuracy_cell(accuracy: float | None, images: int | None) -> Cell:
    """Cell with an accuracy, and its interval if the number of images is known.

    >>> print(accuracy_cell(50.0, 100), accuracy_cell(50.0, None), accuracy_cell(None, 100))
    50.0 (40.4–59.6) 50.0 –
    """
    return Cell(number(accuracy), range_text(wilson(accuracy, images)) if images and finite(accuracy) else "")


def accuracy_table(metrics: Metrics) -> Table:
    """Table of the accuracies before and after tuning, without tests that have no images."""
    tests = [*metrics["zero_shot"], *([] if metrics["validation"] is None else [VALIDATION])]
    rows = []
    for test in tests:
        for each in accuracies(metrics, test):
            if each.images == 0 or (test == VALIDATION and not finite(each.before)):
                continue
            name = counted(metrics, test) + (", balanced" if each.measure == "balanced accuracy" else "")
            count = "" if each.images is None else f"{each.images:,}"
            before, after = (accuracy_cell(accuracy, each.images) for accuracy in (each.before, each.after))
            style = "" if test in (*metrics["classes"], VALIDATION) else "summary"
            rows.append(Row.of(name, count, before, after, change_cell(each.change), style=style))
    return Table("accuracy, %", ["images", "zero-shot", "tuned", "change"], rows)


def candidate_table(metrics: Metrics, best: int | None = None) -> Table:
    """Table of the candidates of a run that chose its method, or of the `best`; the chosen one is the first."""
    found = metrics["candidates"][:best]
    balanced = any(number(each["balanced_accuracy"]) != number(each["accuracy"]) for each in found)
    rows = []
    for each in found:
        cells = [accuracy_cell(each["accuracy"], each["images"])]
        cells += [Cell(number(each["balanced_accuracy"]))] if balanced else []
        cells += [Cell(number(each["loss"], ".4f")), Cell("yes" if each["new_names"] else "no")]
        name, style = (f"✓ {each['name']}", "summary") if each["chosen"] else (each["name"], "")
        rows.append(Row.of(name, *cells, style=style))
    columns = ["accuracy, %", *(["balanced accuracy, %"] if balanced else []), "loss", "takes new names"]
    shown = f"the best {len(found)} of " if len(found) < len(metrics["candidates"]) else ""
    count = plural(len(metrics["candidates"]), "candidate")
    return Table(f"{shown}{count}, on {plural(found[0]['images'], 'held-out image')}", columns, rows)


def blend_table(metrics: Metrics) -> Table:
    """Table of the accuracies of weights between zero-shot (alpha 0) and tuned (1)."""
    curve = metrics["blend"]
    rows = [
        Row.of(f"{alpha:g}", *map(number, values), style="summary" if alpha == curve["chosen"] else "")
        for alpha, *values in zip(curve["alphas"], *curve["accuracy"].values(), strict=True)
    ]
    fitted = "" if metrics["head"] in (None, "none") else ", with the head fitted to each"
    return Table(f"alpha{fitted}; accuracy, %", list(map(name_of_test, curve["accuracy"])), rows)


def cost_table(config: TuneConfig, metrics: Metrics) -> Table:
    """Table of times and sizes."""
    cost, parameters, kept = metrics["cost"], metrics["parameters"], metrics["kept_classes"]
    trained_on, spec = next(iter(metrics["classes"].values())), ",.1f" if kept and kept % 1 else ",.0f"
    return facts_table(
        {
            "run": number(cost["seconds_total"], ",.1f", " s"),
            "epoch": number(cost["seconds_per_epoch"], ",.2f", " s"),
            "step": number(cost["milliseconds_per_step"], ",.2f", " ms"),
            "peak memory": number(cost["peak_memory_mib"], ",.0f", " MiB"),
            "memory before loading the model": number(cost["baseline_memory_mib"], ",.0f", " MiB"),
            "kept classes per step": number(kept, spec, f" of {trained_on:,}"),
            "trained parameters": f"{parameters['trained']:,} of {parameters['all']:,}",
            "checkpoint": number(metrics["checkpoint"]["mib"], ",.1f", " MiB"),
            "device": f"{cost['device']}, {config.precision}",
        }
    )


# ---- names, also for the tables of the page --------------------------------------------------------------------------


def counted(metrics: Metrics, test: str) -> str:
    """Name of a test with the number of its classes, or of a summary."""
    count = metrics["classes"].get(test)
    if count is None:
        trained = test == VALIDATION and metrics["candidates"]  # in the end; these accuracies are of the trial without
        return name_of_test(test) + (", before they train" if trained else "")
    kind = "trained " if test == next(iter(metrics["classes"])) else "new " if test == "new" else ""
    classes = plural(count, f"{kind}class", f"{kind}classes")
    return classes if test in ("base", "new", "all") else f"{classes} of {test}"


def capitalised(name: str) -> str:
    """Name of what classifies, for the beginning of a sentence."""
    return name[:1].upper() + name[1:]

"""Results of a run, from its metrics.json, in sentences and tables: for its page and the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..config import TuneConfig
from ..data.tasks import VALIDATION
from .formats import finite, number, percent, plural
from .intervals import range_text, wilson
from .page import Cell, Table, change_cell, facts, row
from .words import name_of_test, title_of

BEST = 5
"""Candidates that are shown at first."""
Metrics = Mapping[str, Any]
"""Contents of metrics.json."""


class AccuracyRow(NamedTuple):
    """Row of a table of accuracies, in per cent."""

    test: str  # Name of the test, of a summary of the protocol, or of validation
    kind: str  # "" for the accuracy; "balanced" for the mean over classes; "always CLASS" for always one answer
    before: float | None  # Accuracy before tuning
    after: float | None  # Accuracy after it
    images: int | None = None  # Images of the accuracy; None for a summary, and for other kinds

    @property
    def known(self) -> bool:
        """True if both accuracies are numbers."""
        return finite(self.before) and finite(self.after)

    @property
    def measure(self) -> str:
        """Name of the accuracy in a sentence."""
        return f"{self.kind} accuracy".lstrip()


def accuracy_rows(metrics: Metrics) -> list[AccuracyRow]:
    """Return the accuracies of each test, of the summaries, and on the validation images.

    If the classes of a test have different numbers of images, its balanced accuracy and that of always answering the
    largest class come first: an accuracy near the latter says little.
    """
    before_of, after_of = (dict(metrics[part]) for part in ("zero_shot", "tuned"))
    if (held := metrics["validation"]) is not None:
        before_of[VALIDATION], after_of[VALIDATION] = held["zero_shot"], held["tuned"]
    found = []
    for test, before in before_of.items():
        by_class = metrics["zero_shot_by_class"].get(test), metrics["by_class"].get(test)
        if (largest := _largest_class(by_class[0])) is not None:
            name, share = largest
            balanced = [None if part is None else part["balanced_accuracy"] for part in by_class]
            found.append(AccuracyRow(test, "balanced", *balanced))
            found.append(AccuracyRow(test, f"always {name}", share, share))
        images = held["images"] if test == VALIDATION else metrics["images"]["tests"].get(test)
        found.append(AccuracyRow(test, "", before, after_of.get(test), images))
    return found


def held_out_accuracy(metrics: Metrics, *, balanced: bool) -> tuple[str, float]:
    """Name and value of the accuracy on the validation images by which epochs and learning rates are compared."""
    if balanced:
        return "balanced accuracy", metrics["by_class"][VALIDATION]["balanced_accuracy"]
    return "accuracy", metrics["validation"]["tuned"]


def _largest_class(of_test: Mapping[str, Any] | None) -> tuple[str, float] | None:
    """Name of the largest class of a test, and its share of the images in per cent; None for classes of one size."""
    sizes = {each["name"]: each["images"] for each in of_test["classes"]} if of_test else {}
    if len(set(sizes.values())) < 2:
        return None
    name = max(sizes, key=lambda each: sizes[each])
    return name, round(100 * sizes[name] / sum(sizes.values()), 4)


# ---- title and sentence ----------------------------------------------------------------------------------------------


def title(config: TuneConfig, metrics: Metrics) -> str:
    """Return the title: model, data, what classifies, and training images."""
    blended = [f"blended at {metrics['alpha']:g}"] if "alpha" in metrics else []
    return title_of(config, classifier(metrics), *blended)


def headline(metrics: Metrics) -> str:
    """Return the change of the accuracy on the trained classes, and on the new ones."""
    trained, *others = metrics["classes"]
    found = _of_test(metrics, trained)
    if not found[-1].images:
        return _without_test(metrics)
    if not found[-1].known:
        return f"No accuracy after tuning; zero-shot {percent(found[-1].before)} on the {counted(metrics, trained)}."
    tuning = "Tuning and blending" if "alpha" in metrics else "Tuning"
    subject = classifier(metrics) if metrics["candidates"] else tuning
    verb = _verb(found[0], "raised", "kept", "lowered")
    text = f"{subject} {verb} the {found[0].measure} on the {counted(metrics, trained)} {_change(found)}."
    if len(others) == 1 and (other := _of_test(metrics, others[0])[-1]).known:
        verb = _verb(other, "rose", "stayed", "fell")
        text += f" On the {counted(metrics, other.test)} it {verb} {_from_to(other)}{_interval(other)}."
    return text


def _without_test(metrics: Metrics) -> str:
    found = _of_test(metrics, VALIDATION)
    if not found or not found[-1].known:
        return "All images trained, none were kept for a test: there is no accuracy."
    what = "the candidate and then train" if metrics["candidates"] else "the epoch"
    images = plural(metrics["validation"]["images"], "validation image")
    return (
        f"No images were kept for a test. On {images}, which choose {what}, the {found[0].measure} went "
        f"{_change(found)}; expect less on other images."
    )


def _of_test(metrics: Metrics, test: str) -> list[AccuracyRow]:
    """Rows of a test: the accuracy, and before it two more if its classes differ in size; see `accuracy_rows`."""
    return [each for each in accuracy_rows(metrics) if each.test == test]


def _change(found: Sequence[AccuracyRow]) -> str:
    """Change of the first accuracy of a test, and that of the last with its interval."""
    first, *always, last = found[0], *found[1:-1], found[-1]
    text = _from_to(first)
    for each in always:
        text += f". The accuracy, which is {percent(each.before)} if the answer is {each.kind}, went {_from_to(last)}"
    return text + _interval(last, "95 % interval ")


def _verb(of: AccuracyRow, more: str, equal: str, less: str) -> str:
    assert of.before is not None and of.after is not None
    return equal if of.after == of.before else more if of.after > of.before else less


def _from_to(of: AccuracyRow) -> str:
    same = of.after == of.before
    return f"at {percent(of.after)}" if same else f"from {percent(of.before)} to {percent(of.after)}"


def _interval(of: AccuracyRow, name: str = "") -> str:
    return f" ({name}{range_text(wilson(of.after, of.images))})" if of.images and finite(of.after) else ""


def kept_epoch(config: TuneConfig, metrics: Metrics) -> str | None:
    """Return which epoch is kept, and why; None for a run without validation images, or a blend."""
    best, validation = metrics["best_epoch"], metrics["validation"]
    if best is None or "alpha" in metrics:
        return None
    name, accuracy = held_out_accuracy(metrics, balanced=config.balances)
    images = plural(validation["images"], "validation image")
    return f"Epoch {best} of {metrics['epochs']} is kept, the best on {images} ({name} {percent(accuracy)})."


def choice(metrics: Metrics) -> str | None:
    """Return which candidate was chosen, and why; None if none was."""
    if not metrics["candidates"]:
        return None
    because = f": {metrics['chosen_because']}" if metrics["chosen_because"] else ""
    first = metrics["candidates"][0]  # zero-shot, which is not trained
    repeated = "was trained again, on" if metrics["steps"] else "was fitted again, to"
    again = "" if first["chosen"] else f" Then it {repeated} all images."
    return f"{classifier(metrics)} was chosen{because}.{again}"


# ---- tables, also of the terminal ------------------------------------------------------------------------------------


def accuracy_cell(accuracy: float | None, images: int | None) -> Cell:
    """Cell with an accuracy, and its interval if the number of images is known.

    >>> print(accuracy_cell(50.0, 100), accuracy_cell(50.0, None), accuracy_cell(None, 100))
    50.0 (40.4–59.6) 50.0 –
    """
    return Cell(number(accuracy), range_text(wilson(accuracy, images)) if images and finite(accuracy) else "")


def accuracy_table(metrics: Metrics) -> Table:
    """Table of the accuracies before and after tuning."""
    rows = []
    for each in accuracy_rows(metrics):
        if each.images == 0 or (each.test == VALIDATION and (each.kind or not finite(each.before))):
            continue
        before, after = (accuracy_cell(accuracy, each.images) for accuracy in (each.before, each.after))
        change = each.after - each.before if finite(each.before) and finite(each.after) else None
        name = ", ".join(filter(None, [counted(metrics, each.test), each.kind]))
        style = "" if each.test in (*metrics["classes"], VALIDATION) else "summary"
        count = "" if each.images is None else f"{each.images:,}"
        rows.append(row(name, count, before, after, change_cell(change), style=style))
    return Table("accuracy, %", ["images", "zero-shot", "tuned", "change"], rows)


def candidate_table(metrics: Metrics, best: int | None = None) -> Table:
    """Table of the candidates of a run that chose its method; of the first `best`, the chosen one before others."""
    found = metrics["candidates"]
    if best is not None and len(found) > best:
        found = sorted(found, key=lambda each: (each["chosen"], each["accuracy"], -each["loss"]), reverse=True)[:best]
    balanced = any(number(each["balanced_accuracy"]) != number(each["accuracy"]) for each in found)
    rows = []
    for each in found:
        cells = [accuracy_cell(each["accuracy"], each["images"])]
        cells += [Cell(number(each["balanced_accuracy"]))] if balanced else []
        cells += [Cell(number(each["loss"], ".4f")), Cell("yes" if each["new_names"] else "no")]
        name, style = (f"✓ {each['name']}", "summary") if each["chosen"] else (each["name"], "")
        rows.append(row(name, *cells, style=style))
    columns = ["accuracy, %", *(["balanced accuracy, %"] if balanced else []), "loss", "takes new names"]
    shown = f"the best {len(found)} of " if len(found) < len(metrics["candidates"]) else ""
    count = plural(len(metrics["candidates"]), "candidate")
    return Table(f"{shown}{count}, on {plural(found[0]['images'], 'held-out image')}", columns, rows)


def blend_table(metrics: Metrics) -> Table:
    """Table of the accuracies of weights between zero-shot (alpha 0) and tuned (1)."""
    curve = metrics["blend"]
    rows = [
        row(f"{alpha:g}", *map(number, values), style="summary" if alpha == curve["chosen"] else "")
        for alpha, *values in zip(curve["alphas"], *curve["accuracy"].values(), strict=True)
    ]
    fitted = "" if metrics["head"] in (None, "none") else ", with the head fitted to each"
    return Table(f"alpha{fitted}; accuracy, %", list(map(name_of_test, curve["accuracy"])), rows)


def cost_table(config: TuneConfig, metrics: Metrics) -> Table:
    """Table of times and sizes."""
    cost, parameters, kept = metrics["cost"], metrics["parameters"], metrics["kept_classes"]
    trained_on, spec = next(iter(metrics["classes"].values())), ",.1f" if kept and kept % 1 else ",.0f"
    return facts(
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


def classifier(metrics: Metrics) -> str:
    """Name of what classifies, for the beginning of a sentence."""
    name = metrics["classifier"]
    return name[:1].upper() + name[1:]

"""The accuracies of a run, from its metrics.json: the rows of its table, and the title and sentence of its page."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..config import TuneConfig
from ..data.tasks import VALIDATION
from .formats import finite, percent, plural
from .intervals import range_text, wilson
from .words import name_of_test, title_of

Metrics = Mapping[str, Any]
"""Contents of metrics.json."""


class AccuracyRow(NamedTuple):
    """Row of a table of accuracies, in per cent."""

    test: str  # Name of the test, of a summary of the protocol, or of validation
    kind: str  # "" for the accuracy; "balanced" for the mean over classes; "always CLASS" for always one answer
    before: float | None  # Accuracy before tuning
    after: float | None  # Accuracy after it

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
        found.append(AccuracyRow(test, "", before, after_of.get(test)))
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
    if not images_of(metrics, trained):
        return _without_test(metrics)
    found = _of_test(metrics, trained)
    if not found[-1].known:
        return f"No accuracy after tuning; zero-shot {percent(found[-1].before)} on the {counted(metrics, trained)}."
    tuning = "Tuning and blending" if "alpha" in metrics else "Tuning"
    subject = classifier(metrics) if metrics["candidates"] else tuning
    verb = _verb(found[0], "raised", "kept", "lowered")
    text = f"{subject} {verb} the {found[0].measure} on the {counted(metrics, trained)} {_change(metrics, found)}."
    if len(others) == 1 and (other := _of_test(metrics, others[0])[-1]).known:
        verb = _verb(other, "rose", "stayed", "fell")
        text += f" On the {counted(metrics, other.test)} it {verb} {_from_to(other)}{_interval(metrics, other)}."
    return text


def _without_test(metrics: Metrics) -> str:
    found = _of_test(metrics, VALIDATION)
    if not found or not found[-1].known:
        return "All images trained, none were kept for a test: there is no accuracy."
    what = "the candidate" if metrics["candidates"] else "the epoch"
    images = plural(metrics["validation"]["images"], "validation image")
    return (
        f"No images were kept for a test. On {images}, which choose {what}, the {found[0].measure} went "
        f"{_change(metrics, found)}; expect less on other images."
    )


def _of_test(metrics: Metrics, test: str) -> list[AccuracyRow]:
    """Rows of a test: the accuracy, and before it two more if its classes differ in size; see `accuracy_rows`."""
    return [each for each in accuracy_rows(metrics) if each.test == test]


def _change(metrics: Metrics, found: Sequence[AccuracyRow]) -> str:
    """Change of the first accuracy of a test, and that of the last with its interval."""
    first, *always, last = found[0], *found[1:-1], found[-1]
    text = _from_to(first)
    for each in always:
        text += f". The accuracy, which is {percent(each.before)} if the answer is {each.kind}, went {_from_to(last)}"
    return text + _interval(metrics, last, "95 % interval ")


def _verb(of: AccuracyRow, more: str, equal: str, less: str) -> str:
    assert of.before is not None and of.after is not None
    return equal if of.after == of.before else more if of.after > of.before else less


def _from_to(of: AccuracyRow) -> str:
    same = of.after == of.before
    return f"at {percent(of.after)}" if same else f"from {percent(of.before)} to {percent(of.after)}"


def _interval(metrics: Metrics, of: AccuracyRow, name: str = "") -> str:
    images = images_of(metrics, of.test)
    return f" ({name}{range_text(wilson(of.after, images))})" if images and finite(of.after) else ""


# ---- names, also for the tables of the page --------------------------------------------------------------------------


def images_of(metrics: Metrics, test: str) -> int | None:
    """Number of images of a test, or of validation; None of a summary."""
    return metrics["validation"]["images"] if test == VALIDATION else metrics["images"]["tests"].get(test)


def counted(metrics: Metrics, test: str) -> str:
    """Name of a test with the number of its classes, or of a summary."""
    count = metrics["classes"].get(test)
    if count is None:
        return name_of_test(test)
    kind = "trained " if test == next(iter(metrics["classes"])) else "new " if test == "new" else ""
    classes = plural(count, f"{kind}class", f"{kind}classes")
    return classes if test in ("base", "new", "all") else f"{classes} of {test}"


def classifier(metrics: Metrics) -> str:
    """Name of what classifies, for the beginning of a sentence."""
    name = metrics["classifier"]
    return name[:1].upper() + name[1:]

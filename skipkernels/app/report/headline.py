"""The title of the page of a run, and its result in a sentence, from metrics.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..config import TuneConfig
from ..train.class_metrics import VALIDATION
from .accuracies import largest_class
from .intervals import range_text, wilson
from .plots import finite
from .rendering import percent, plural
from .words import name_of_test, title_of


def title(config: TuneConfig, metrics: Mapping[str, Any]) -> str:
    """Return the title: model, data, what classifies, and training images."""
    blended = [f"blended at {metrics['alpha']:g}"] if "alpha" in metrics else []
    return title_of(config, classifier(metrics), *blended)


def headline(metrics: Mapping[str, Any]) -> str:
    """Return the change of the accuracy on the trained classes, and on the new ones."""
    zero_shot, tuned, (first, *others) = metrics["zero_shot"], metrics["tuned"], metrics["classes"]
    if not images_of(metrics, first):
        return _without_test(metrics)
    classes = counted(metrics, first)
    if not (finite(zero_shot[first]) and finite(tuned[first])):
        return f"No accuracy after tuning; zero-shot {percent(zero_shot[first])} on the {classes}."
    tuning = "Tuning and blending" if "alpha" in metrics else "Tuning"
    subject = classifier(metrics) if metrics["candidates"] else tuning
    kind, before, after, rest = _leading(metrics, first, zero_shot[first], tuned[first])
    verb = "kept" if after == before else "raised" if after > before else "lowered"
    text = f"{subject} {verb} the {kind} on the {classes} {_from_to(before, after)}{rest}"
    if len(others) == 1 and finite(zero_shot[others[0]]) and finite(tuned[others[0]]):
        before, after = zero_shot[others[0]], tuned[others[0]]
        verb = "stayed" if after == before else "rose" if after > before else "fell"
        text += f". On the {counted(metrics, others[0])} it {verb} {_from_to(before, after)}"
        text += _interval(metrics, others[0], after)
    return f"{text}."


def _without_test(metrics: Mapping[str, Any]) -> str:
    held = metrics["validation"]
    if held is None or not (finite(held["zero_shot"]) and finite(held["tuned"])):
        return "All images trained, none were kept for a test: there is no accuracy."
    kind, before, after, rest = _leading(metrics, VALIDATION, held["zero_shot"], held["tuned"])
    what = "the candidate" if metrics["candidates"] else "the epoch"
    return (
        f"No images were kept for a test. On {plural(held['images'], 'validation image')}, which choose {what}, the "
        f"{kind} went {_from_to(before, after)}{rest}; expect less on other images."
    )


def _leading(metrics: Mapping[str, Any], test: str, before: float, after: float) -> tuple[str, float, float, str]:
    """Kind of accuracy that leads, with its values and the rest of the sentence: the interval of the accuracy.

    If classes differ in size, the balanced accuracy leads, and the rest has the accuracy.
    """
    interval = _interval(metrics, test, after, "95 % interval ")
    found = [metrics[part].get(test) for part in ("zero_shot_by_class", "by_class")]
    largest = largest_class(found[0])
    if largest is None or not all(of and finite(of["balanced_accuracy"]) for of in found):
        return "accuracy", before, after, interval
    name, share = largest
    rest = f". The accuracy, which is {percent(share)} if the answer is always {name}, went {_from_to(before, after)}"
    return "balanced accuracy", *(of["balanced_accuracy"] for of in found), rest + interval


def _from_to(before: float, after: float) -> str:
    return f"at {percent(after)}" if after == before else f"from {percent(before)} to {percent(after)}"


def _interval(metrics: Mapping[str, Any], test: str, accuracy: float, name: str = "") -> str:
    images = images_of(metrics, test)
    return f" ({name}{range_text(wilson(accuracy, images))})" if images else ""


# ---- names, also for the tables of the page --------------------------------------------------------------------------


def images_of(metrics: Mapping[str, Any], test: str) -> int | None:
    """Number of images of a test, or of validation; None of a summary."""
    return metrics["validation"]["images"] if test == VALIDATION else metrics["images"]["tests"].get(test)


def counted(metrics: Mapping[str, Any], test: str) -> str:
    """Name of a test with the number of its classes, or of a summary."""
    count = metrics["classes"].get(test)
    if count is None:
        return name_of_test(test)
    kind = "trained " if test == next(iter(metrics["classes"])) else "new " if test == "new" else ""
    classes = plural(count, f"{kind}class", f"{kind}classes")
    return classes if test in ("base", "new", "all") else f"{classes} of {test}"


def classifier(metrics: Mapping[str, Any]) -> str:
    """Name of what classifies, for the beginning of a sentence."""
    name = metrics["classifier"]
    return name[:1].upper() + name[1:]

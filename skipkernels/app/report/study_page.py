"""Page of a study of many runs: accuracies with intervals, also over the time of tuning, and its other tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from . import page
from .dot_plot import DotRow, dot_plot
from .intervals import LEAST_RUNS, half_interval, range_text, wilson
from .page import Cell, Section, Table, accuracy_cell, row
from .plots import TimedAccuracy, coloured, pareto_svg, shots_svg
from .rendering import MISSING, number, part, plural
from .words import name_of_method, name_of_test, shots_text

_ACCURACY, _COST, _TIME = "accuracy, %", "cost", "tuning, s"
_SUMMARIES = ("harmonic", "targets")  # the accuracy that a protocol is judged by, if it has several
_BEFORE, _AFTER = "zero-shot", "tuned"

_OVER_SEEDS = "and bars: 95 % interval of the mean over seeds (Student's t)"

Summary = Sequence[float | None]  # mean and deviation


def study_html(study: Mapping[str, Any]) -> str:
    """Return the page of a study, from the contents of its JSON file."""
    accuracies, *others = tables(study)
    seeds = ", ".join(map(str, study["seeds"]))
    return page.page_html(
        study["title"],
        str(study.get("finished", "")),
        headline(study),
        [accuracies.html, part("text", explained(study)), *_plots(study)],
        [
            Section("more", "Classes" if study.get("layout") == "folds" else "Cost", [table.html for table in others]),
            page.reproduction(study.get("command", ""), {"seeds": seeds}, study, ""),
        ],
    )


def primary(columns: Iterable[str]) -> str:
    """Return the accuracy that decides: the summary of a protocol, or else the first."""
    columns = list(columns)
    return next((name for name in _SUMMARIES if name in columns), columns[0])


def _variant(study: Mapping[str, Any], name: str) -> str:
    """Name of a variant in words."""
    return shots_text(int(name.split()[0])) if study.get("layout") == "shots" else name_of_method(name)


def headline(study: Mapping[str, Any]) -> str:
    """Return the result in a sentence."""
    summary, seeds = study["summary"], len(study["seeds"])
    if study.get("layout") == "folds":
        return _folds_headline(study["pooled"])

    def text(of: Summary) -> str:
        half = half_interval(of[1], seeds)
        return f"{number(of[0])}{f' ± {half:.1f}' if half else ''} %"

    if study.get("layout") == "tests":
        (groups,) = summary.values()
        name = primary(list(groups[_AFTER]))
        before, after = groups[_BEFORE].get(name), groups[_AFTER].get(name)
        if not (before and after):
            return study["title"]
        return f"Tuning takes the {_measure(name)} from {text(before)} to {text(after)}."
    found, best = _best(study)
    if best is None:
        return study["title"]
    comparison = study.get("comparison") or {}
    others = comparison.get("others", {})
    equal = [_variant(study, name) for name, of in others.items() if not of["worse"]]
    certain = comparison.get("best") == best and not equal
    name = _deciding(study)
    sentence = f"The {'best' if certain else 'highest'} {_measure(name)} is that of {_variant(study, best)}, "
    sentence += text(found[best])
    if (time := _time(summary[best])) is not None:
        sentence += f", after {number(time, ',.3g')} s of tuning"
    images = _images(study).get(name)
    counts = [plural(seeds, "seed"), *([plural(images, "test image")] if images else [])]
    sentence += f" ({', '.join(counts)})"
    if equal:
        listed = " and ".join(filter(None, (", ".join(equal[:-1]), equal[-1])))
        listed = "any other" if len(equal) == len(others) > 1 else listed
        sentence += f", but these images and seeds don't tell it apart from {listed}"
    return f"{sentence}."


def _folds_headline(pooled: Mapping[str, Any]) -> str:
    tuned, images = pooled["tuned"], plural(pooled["images"], "image")
    return (
        f"Accuracy is {number(tuned['accuracy'])} % (95 % interval {range_text(tuned['interval'])}) on {images}, each "
        f"classified by a model that did not see it; zero-shot {number(pooled['zero_shot']['accuracy'])} %."
    )


def _deciding(study: Mapping[str, Any]) -> str:
    """Column of the accuracy that decides."""
    names = list(next(iter(study["summary"].values()))[_ACCURACY])
    return _AFTER if study.get("layout") == "shots" else primary(names)


def _best(study: Mapping[str, Any]) -> tuple[dict[str, Summary], str | None]:
    """Accuracies that decide, by variant, and the variant with the highest."""
    name = _deciding(study)
    found = {variant: of for variant, groups in study["summary"].items() if (of := groups[_ACCURACY].get(name))}
    return found, max(found, key=lambda variant: found[variant][0] or 0.0, default=None)


def _measure(name: str) -> str:
    if name in _SUMMARIES:
        return f"{name_of_test(name)} accuracy"
    return "accuracy" if name in (_AFTER, "all") else f"accuracy on {name_of_test(name)}"


def _images(study: Mapping[str, Any]) -> dict[str, int]:
    """Number of test images by column of accuracies."""
    runs: list[dict[str, Any]] = study.get("runs") or [{"metrics": {}}]
    found = (runs[0]["metrics"].get("images") or {}).get("tests") or {}
    if study.get("layout") == "shots":
        return dict.fromkeys((_BEFORE, _AFTER), next(iter(found.values()), 0))
    return dict(found)


def explained(study: Mapping[str, Any]) -> str:
    """Return what the intervals in the tables are, and what "best" means."""
    seeds, layout = len(study["seeds"]), study.get("layout", "variants")
    if layout == "folds":
        return (
            "In brackets: 95 % interval over the images (Wilson). It treats the images as independent; the folds share "
            "training images, so it is approximate."
        )
    text = f"Means of {seeds} seeds" if seeds > 1 else "One seed"
    text += f"; ± {_OVER_SEEDS}" if seeds >= LEAST_RUNS else ", too few for an interval over seeds"
    if layout != "tests" and _images(study):
        text += "; in brackets the 95 % interval over the test images (Wilson)"
    if study.get("comparison"):
        text += (
            ". All variants have the same test images, so a difference may be certain although intervals overlap: one "
            "is best if it is ahead of each other one in every seed, and by a permutation test of the two (5 % for "
            "all tests together)"
        )
    return f"{text}."


def _time(groups: Mapping[str, Any]) -> float | None:
    found = groups.get(_COST, {}).get(_TIME)
    return found[0] if found else None


def _plots(study: Mapping[str, Any]) -> list[Markup]:
    """Plots of the first screen, by layout."""
    summary, seeds, layout = study["summary"], len(study["seeds"]), study.get("layout", "variants")
    if layout == "tests":
        return [_test_plot(summary, seeds)]
    if layout == "shots":
        found = {int(name.split()[0]): groups[_ACCURACY] for name, groups in summary.items()}
        before, after = ({shots: of.get(name) for shots, of in found.items()} for name in (_BEFORE, _AFTER))
        svg = shots_svg(before, after, seeds)
        return [part("figures", [("accuracy over the training images of each class, %", svg, {})])]
    names = {variant: _variant(study, variant) for variant in summary}
    figures: list[tuple[str, str, dict[str, str]]] = []
    for column in next(iter(summary.values()))[_ACCURACY]:
        points = {
            names[variant]: TimedAccuracy(time, of[0], half_interval(of[1], seeds))
            for variant, groups in summary.items()
            if (of := groups[_ACCURACY].get(column)) and (time := _time(groups)) is not None and time > 0
        }
        if len(points) > 1:
            svg = pareto_svg(column, points, coloured(names.values()))
            figures.append((f"{_measure(column)}, %, over the time of tuning", svg, {}))
    if not figures:
        return []
    text = "The line joins those that no other beats in both accuracy and time. Dotted: those that train nothing."
    return [part("figures", figures), part("text", text)]


def _test_plot(summary: Mapping[str, Any], seeds: int) -> Markup:
    (groups,) = summary.values()

    def interval(of: Summary | None) -> tuple[float, float] | None:
        mean, deviation = of or (None, None)
        half = half_interval(deviation, seeds)
        return (mean - half, mean + half) if half and mean is not None else None

    rows = [
        DotRow(name_of_test(name), before[0], after[0] if after else None, "", interval(before), interval(after))
        for name, before in groups[_BEFORE].items()
        if before
        for after in (groups[_AFTER].get(name),)
    ]
    return part("dots", dot_plot("accuracy of each test, %", rows))


def tables(study: Mapping[str, Any]) -> list[Table]:
    """Return a table per group of columns with a row per variant; with layout "tests" one with a row per test."""
    summary, seeds, images = study["summary"], len(study["seeds"]), _images(study)

    def cell(of: Summary | None, digits: int = 1, interval: bool = True, count: int | None = None) -> Cell:
        if not of:
            return Cell(MISSING)
        half = half_interval(of[1], seeds) if interval else 0.0
        text = number(of[0], f",.{digits}f") + (f" ± {half:,.{digits}f}" if half else "")
        return Cell(text, range_text(wilson(of[0], count)) if count and of[0] is not None else "")

    if study.get("layout") == "folds":
        return _fold_tables(study)
    if study.get("layout") == "tests":
        (groups,) = summary.values()
        rows = [
            row(name_of_test(name), *(cell(groups[group].get(name)) for group in groups)) for name in groups[_BEFORE]
        ]
        return [Table(_ACCURACY, list(groups), rows)]
    _, best = _best(study)
    found = []
    for group, columns in next(iter(summary.values())).items():
        rows = []
        for variant, groups in summary.items():
            cells = []
            for name in columns:
                digits = 0 if name in ("peak, MiB", "parameters") else 1
                accuracy = group == _ACCURACY
                cells.append(cell(groups[group].get(name), digits, accuracy, images.get(name) if accuracy else None))
            rows.append(row(_variant(study, variant), *cells, style="summary" if variant == best else ""))
        found.append(Table(group, [name_of_test(name) for name in columns], rows))
    return found


def _fold_tables(study: Mapping[str, Any]) -> list[Table]:
    """Tables of the folds, and of the classes over the images of all folds."""
    pooled = study["pooled"]
    both, images = (pooled["zero_shot"], pooled["tuned"]), pooled["images"]
    rows = []
    for fold, groups in study["summary"].items():
        of = groups[_ACCURACY]
        rows.append(row(fold, f"{of['test images'][0]:,.0f}", *(number(of[when][0]) for when in (_BEFORE, _AFTER))))
    means = [f"{number(of['over_folds'][0])} ± {number(of['over_folds'][1])}" for of in both]
    whole = [accuracy_cell(of["accuracy"], images) for of in both]
    rows.append(row("mean ± standard deviation", "", *means))
    rows.append(row("all images", f"{images:,}", *whole, style="summary"))
    if any(number(of["balanced_accuracy"]) != number(of["accuracy"]) for of in both):
        rows.append(row("balanced accuracy", "", *(number(of["balanced_accuracy"]) for of in both)))
    before = {each["name"]: each["recall"] for each in both[0]["classes"]}
    classes = []
    for each in both[1]["classes"]:
        shares = before[each["name"]], each["recall"], each["precision"], each["f1"]
        classes.append(row(each["name"], f"{each['images']:,}", *map(number, shares)))
    columns = ["images", "zero-shot recall, %", "recall, %", "precision, %", "F1, %"]
    return [
        Table(_ACCURACY, ["test images", _BEFORE, _AFTER], rows),
        Table("class", columns, classes, searched=True),
    ]

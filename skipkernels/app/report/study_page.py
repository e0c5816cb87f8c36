"""Page of a study of many runs: accuracy against time with intervals, and its tables."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .dot_plot import DotRow, dot_plot
from .intervals import LEAST_RUNS, half_interval, range_text, wilson
from .plots import COLOURS, GREY, coloured, panels_svg, within_per_cent
from .rendering import MISSING, facts, number, plural, render, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ACCURACY, _COST, _TIME = "accuracy, %", "cost", "tuning, s"
_SUMMARIES = ("harmonic", "targets")  # the accuracy that a protocol is judged by, if it has several
_BEFORE, _AFTER = "zero-shot", "tuned"
_INSTANT = 1e-3  # a variant that takes less than this share of the longest time trains nothing

_OVER_SEEDS = "and bars: 95 % interval of the mean over seeds (Student's t)"
_TIMED = ("variants", "shots")  # layouts with a plot over time
_MOST_CLASSES = 2000  # in a table

Figure = Sequence[float | None]  # mean and deviation


def study_html(study: Mapping[str, Any]) -> str:
    """Return the page of a study, from the contents of its JSON file."""
    summary, seeds, layout = study["summary"], len(study["seeds"]), study.get("layout", "variants")
    return render(
        "study.html.j2",
        title=study["title"],
        date=str(study.get("finished", ""))[:10],
        headline=headline(study),
        explained=explained(study),
        plots=[_test_plot(summary, seeds)] if layout == "tests" else [],
        shots=_shots_svg(summary, seeds) if layout == "shots" else None,
        pareto=_pareto_plots(summary, seeds) if layout in _TIMED else [],
        legend=list(coloured(summary).items()) if layout in _TIMED else [],
        tables=tables(study),
        command=study.get("command", ""),
        environment=facts(
            {
                "seeds": ", ".join(map(str, study["seeds"])),
                "versions": ", ".join(f"{name} {version}" for name, version in (study.get("versions") or {}).items()),
                "machine": study.get("machine"),
                "date": study.get("finished"),
            }
        ),
        settings="",
    )


def pareto(points: Mapping[str, tuple[float, float]]) -> list[str]:
    """Return the names of the points (time, accuracy) on the Pareto front, by time: no other is as good in both.

    >>> pareto({"slow": (9.0, 80.0), "fast": (1.0, 60.0), "bad": (5.0, 50.0)})
    ['fast', 'slow']
    """
    found: list[str] = []
    for name in sorted(points, key=lambda name: (points[name][0], -points[name][1])):
        if not found or points[name][1] > points[found[-1]][1]:
            found.append(name)
    return found


def primary(columns: Iterable[str]) -> str:
    """Return the accuracy that decides: the summary of a protocol, or else the first."""
    columns = list(columns)
    return next((name for name in _SUMMARIES if name in columns), columns[0])


def headline(study: Mapping[str, Any]) -> str:
    """Return the result in a sentence."""
    summary, seeds = study["summary"], len(study["seeds"])
    if study.get("layout") == "folds":
        return _folds_headline(study["pooled"])

    def text(figure: Figure) -> str:
        half = half_interval(figure[1], seeds)
        return f"{number(figure[0])}{f' ± {half:.1f}' if half else ''} %"

    if study.get("layout") == "tests":
        (groups,) = summary.values()
        name = primary(list(groups[_AFTER]))
        before, after = groups[_BEFORE].get(name), groups[_AFTER].get(name)
        if not (before and after):
            return study["title"]
        return f"Tuning takes the {name} accuracy from {text(before)} to {text(after)}."
    names = list(next(iter(summary.values()))[_ACCURACY])
    name = _AFTER if study.get("layout") == "shots" else primary(names)
    found = {variant: figure for variant, groups in summary.items() if (figure := groups[_ACCURACY].get(name))}
    if not found:
        return study["title"]
    best = max(found, key=lambda variant: found[variant][0] or 0.0)
    measure = "accuracy" if name in (_AFTER, "all") else f"{name} accuracy"
    comparison = study.get("comparison") or {}
    equal = [other for other, of in comparison.get("others", {}).items() if not of["worse"]]
    certain = comparison.get("best") == best and not equal
    sentence = f"{'Best' if certain else 'Highest'} is {best} with {text(found[best])} {measure}"
    times = {variant: _time(groups) for variant, groups in summary.items()}
    if times[best] is not None:
        sentence += f" after {number(times[best], ',.3g')} s of tuning"
    images = _images(study).get(name)
    counts = [plural(seeds, "seed"), *([plural(images, "test image")] if images else [])]
    sentence += f" ({', '.join(counts)})"
    if equal:
        listed = " and ".join([*([", ".join(equal[:-1])] if len(equal) > 1 else []), equal[-1]])
        sentence += f", but these images and seeds don't tell it apart from {listed}"
    return f"{sentence}."


def _folds_headline(pooled: Mapping[str, Any]) -> str:
    tuned, images = pooled["tuned"], plural(pooled["images"], "image")
    return (
        f"Accuracy is {number(tuned['accuracy'])} % (95 % interval {range_text(tuned['interval'])}) on {images}, each "
        f"classified by a model that did not see it; zero-shot {number(pooled['zero_shot']['accuracy'])} %."
    )


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
    figure = groups.get(_COST, {}).get(_TIME)
    return figure[0] if figure else None


def _test_plot(summary: Mapping[str, Any], seeds: int) -> Any:
    (groups,) = summary.values()

    def interval(figure: Figure) -> tuple[float, float] | None:
        assert figure[0] is not None
        half = half_interval(figure[1], seeds)
        return (figure[0] - half, figure[0] + half) if half else None

    rows = [
        DotRow(
            name,
            before[0],
            after[0] if after else None,
            before_interval=interval(before),
            after_interval=interval(after) if after else None,
        )
        for name, before in groups[_BEFORE].items()
        if before
        for after in (groups[_AFTER].get(name),)
    ]
    return dot_plot("accuracy of each test", rows, by_change=False)


def _shots_svg(summary: Mapping[str, Any], seeds: int) -> Any:
    """Plot the accuracy over the number of training images per class; zero-shot is a dotted line."""
    figures = {int(name.split()[0]): groups[_ACCURACY] for name, groups in summary.items()}

    def draw(axes: Axes) -> None:
        tuned = {shots: figure for shots, row in figures.items() if (figure := row[_AFTER])}
        halves = [half_interval(deviation, seeds) for _, deviation in tuned.values()]
        means = [mean for mean, _ in tuned.values()]
        axes.errorbar(list(tuned), means, yerr=halves, color=COLOURS[0], marker="o", capsize=3, label=_AFTER)
        for mean in {figure[0] for row in figures.values() if (figure := row[_BEFORE])}:
            axes.axhline(mean, color=GREY, linestyle=":", linewidth=1, label=_BEFORE)
        within_per_cent(axes)
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(figures), list(map(str, figures)))
        axes.minorticks_off()
        axes.set_xlabel("training images per class")
        axes.set_ylabel(_ACCURACY)
        axes.legend(frameon=False, labelcolor=GREY, fontsize=8)

    return svg(panels_svg("shots", "accuracy over the training images per class", [draw], size=(5.2, 3.2)))


def _pareto_plots(summary: Mapping[str, Any], seeds: int) -> list[dict[str, Any]]:
    """Plots of each accuracy against the time of tuning, with the line of the variants that no other beats."""
    colours = coloured(summary)
    plots = []
    for column in next(iter(summary.values()))[_ACCURACY]:
        if column == _BEFORE:
            continue
        figures = {
            variant: (time, figure)
            for variant, groups in summary.items()
            if (figure := groups[_ACCURACY].get(column)) and (time := _time(groups)) is not None and time > 0
        }
        if len(figures) > 1:
            title = "accuracy, %" if column == _AFTER else f"{column} accuracy, %"
            plots.append(
                {"title": f"{title}, over the time of tuning", "svg": _pareto_svg(column, figures, seeds, colours)}
            )
    return plots


def _pareto_svg(
    column: str, figures: Mapping[str, tuple[float, Figure]], seeds: int, colours: Mapping[str, str]
) -> Any:
    points = {name: (time, figure[0] or 0.0) for name, (time, figure) in figures.items()}
    longest = max(time for time, _ in points.values())
    instant = {name: accuracy for name, (time, accuracy) in points.items() if time < _INSTANT * longest}
    timed = {name: point for name, point in points.items() if name not in instant}
    line = [timed[name] for name in pareto(timed)]
    line.append((longest, line[-1][1]))

    def draw(axes: Axes) -> None:
        from matplotlib.ticker import LogLocator

        axes.step([x for x, _ in line], [y for _, y in line], where="post", color=GREY, linewidth=1)
        for name, accuracy in instant.items():
            axes.axhline(accuracy, color=colours[name], linestyle=":", linewidth=1.2)
            place = (0, accuracy), (2, 3), ("axes fraction", "data"), "offset points"
            axes.annotate(name, *place, color=GREY, fontsize=8, parse_math=False)
        for name, (time, accuracy) in timed.items():
            half = half_interval(figures[name][1][1], seeds)
            axes.errorbar(
                [time], [accuracy], yerr=[half], color=colours[name], marker="o", markersize=6, capsize=3, linewidth=1.2
            )
            axes.annotate(
                name, (time, accuracy), (6, 5), textcoords="offset points", color=GREY, fontsize=8, parse_math=False
            )
        values = [accuracy for _, accuracy in points.values()]
        spread = max(max(values) - min(values), 5.0)
        axes.set_ylim(max(0.0, min(values) - 0.6 * spread), max(values) + 0.6 * spread)
        within_per_cent(axes)
        axes.set_xscale("log")
        axes.margins(x=0.2)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=6))
        axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
        axes.minorticks_off()
        axes.set_xlabel("tuning, s (logarithmic)")
        axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.8)

    label = f"{column} accuracy over the time of tuning, with the line of the best at each time"
    return svg(panels_svg(f"pareto-{column}", label, [draw], size=(5.2, 3.4)))


def tables(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a table per group of columns with a row per variant; with layout "tests" one with a row per test."""
    summary, seeds = study["summary"], len(study["seeds"])

    def cell(figure: Figure | None, digits: int, with_interval: bool = True) -> str:
        if not figure:
            return MISSING
        half = half_interval(figure[1], seeds) if with_interval else 0.0
        return number(figure[0], f",.{digits}f") + (f" ± {half:,.{digits}f}" if half else "")

    if study.get("layout") == "folds":
        return _fold_tables(study)
    if study.get("layout") == "tests":
        (groups,) = summary.values()
        rows = [(name, [cell(groups[group].get(name), 1) for group in groups]) for name in groups[_BEFORE]]
        return [{"corner": _ACCURACY, "columns": list(groups), "rows": rows}]
    tables, images = [], _images(study)

    def of_images(figure: Figure | None, count: int | None) -> str:
        return f" ({range_text(wilson(figure[0], count))})" if count and figure and figure[0] is not None else ""

    for group, columns in next(iter(summary.values())).items():
        digits = {name: 0 if name in ("peak, MiB", "parameters") else 1 for name in columns}
        rows = [
            (
                variant,
                [
                    cell(groups[group].get(name), digits[name], group == _ACCURACY)
                    + (of_images(groups[group].get(name), images.get(name)) if group == _ACCURACY else "")
                    for name in columns
                ],
            )
            for variant, groups in summary.items()
        ]
        tables.append({"corner": group, "columns": list(columns), "rows": rows})
    return tables


def _fold_tables(study: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Tables of the folds, and of the classes over the images of all folds."""
    pooled = study["pooled"]
    rows = []
    for fold, groups in study["summary"].items():
        of_fold = groups[_ACCURACY]
        rows.append((fold, [f"{of_fold['test images'][0]:,.0f}", *(number(of_fold[w][0]) for w in (_BEFORE, _AFTER))]))
    both = pooled["zero_shot"], pooled["tuned"]
    means = [f"{number(of['over_folds'][0])} ± {number(of['over_folds'][1])}" for of in both]
    rows.append(("mean ± standard deviation", ["", *means]))
    whole = [f"{number(of['accuracy'])} ({range_text(of['interval'])})" for of in both]
    rows.append(("all images", [f"{pooled['images']:,}", *whole]))
    rows.append(("balanced accuracy", ["", *(number(of["balanced_accuracy"]) for of in both)]))
    before = {each["name"]: each["recall"] for each in both[0]["classes"]}
    classes = [
        (
            each["name"],
            [
                f"{each['images']:,}",
                *map(number, (before[each["name"]], each["recall"], each["precision"], each["f1"])),
            ],
        )
        for each in both[1]["classes"][:_MOST_CLASSES]
    ]
    columns = ["images", "zero-shot recall, %", "recall, %", "precision, %", "F1, %"]
    return [
        {"corner": _ACCURACY, "columns": ["test images", _BEFORE, _AFTER], "rows": rows},
        {"corner": "classes", "columns": columns, "rows": classes},
    ]

"""Plot of a study, in the style of the report of a run."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import cycle

from matplotlib.axes import Axes

from ..report.plots import COLOURS, GREY, panels_svg
from .study import ACCURACY, Study

_PANELS = ("tuning, s", "step, ms", "peak, MiB")
_TICKS = 4  # largest number of labels on the axis of a panel
_LOGARITHMIC = ("tuning, s", "step, ms")  # columns with values of different orders of magnitude


def study_svg(study: Study) -> str:
    """Plot a study by its layout: accuracy over shots, accuracy of each test, or a panel of bars for each column."""
    return {"shots": _over_shots, "tests": _by_test, "variants": _by_variant}[study.layout](study)


def _over_shots(study: Study) -> str:
    """Accuracy over the number of training images per class; zero-shot as a dotted line."""
    figures = {int(name.split()[0]): groups[ACCURACY] for name, groups in study.summary().items()}

    def draw(axes: Axes) -> None:
        tuned = {count: found for count, row in figures.items() if (found := row["tuned"]) is not None}
        deviations = [found.deviation or 0.0 for found in tuned.values()]
        means = [found.mean for found in tuned.values()]
        axes.errorbar(list(tuned), means, yerr=deviations, color=COLOURS[0], marker="o", capsize=3, label="tuned")
        for zero_shot in {found.mean for row in figures.values() if (found := row["zero-shot"]) is not None}:
            axes.axhline(zero_shot, color=GREY, linestyle=":", linewidth=1, label="zero-shot")
        axes.set_xscale("log", base=2)
        axes.set_xticks(list(figures), list(map(str, figures)))
        axes.minorticks_off()
        axes.set_xlabel("training images per class")
        axes.set_ylabel(ACCURACY)
        axes.legend(frameon=False, labelcolor=GREY, fontsize=8)

    return panels_svg(study.name, study.title, [draw], size=(5.2, 3.2))


def _by_test(study: Study) -> str:
    """Bars of each test of a protocol, zero-shot beside tuned."""
    (groups,) = study.summary().values()
    names = list(groups["tuned"])

    def draw(axes: Axes) -> None:
        for offset, (when, figures), colour in zip((-0.2, 0.2), groups.items(), (GREY, COLOURS[0]), strict=True):
            found = {place + offset: f for place, name in enumerate(names) if (f := figures[name]) is not None}
            heights = [figure.mean for figure in found.values()]
            errors = [figure.deviation or 0.0 for figure in found.values()]
            axes.bar(list(found), heights, width=0.38, yerr=errors, color=colour, ecolor=GREY, capsize=3, label=when)
        axes.set_xticks(range(len(names)), names, rotation=25 if len(names) > 4 else 0, parse_math=False)
        axes.set_ylabel(ACCURACY)
        axes.legend(frameon=False, labelcolor=GREY, fontsize=8)

    return panels_svg(study.name, study.title, [draw], size=(max(4.0, 1.1 * len(names)), 3.2))


def _by_variant(study: Study) -> str:
    """One panel per accuracy, time and memory, with a bar for each variant."""
    summary = study.summary()
    names = list(summary)
    shown = [(c.group, c.name) for c in study.columns if c.group == ACCURACY or c.name in _PANELS]

    def panel(group: str, column: str) -> Callable[[Axes], None]:
        def draw(axes: Axes) -> None:
            for place, (name, colour) in enumerate(zip(names, cycle(COLOURS), strict=False)):
                found = summary[name][group][column]
                if found is not None:
                    error = found.deviation or 0.0
                    axes.barh(place, found.mean, xerr=error, color=colour, ecolor=GREY, capsize=3, height=0.7)
            first = (group, column) == shown[0]
            axes.set_yticks(range(len(names)), names if first else [""] * len(names), parse_math=False)
            axes.set_ylim(len(names) - 0.5, -0.5)  # first variant on top; a variant without a value has an empty row
            axes.set_xlabel(f"{column}, %" if group == ACCURACY else column, parse_math=False)
            values = [f.mean for name in names if (f := summary[name][group][column]) is not None and f.mean > 0]
            if column in _LOGARITHMIC and values:
                ticks = _log_ticks(min(values), max(values))
                axes.set_xscale("log")
                axes.set_xlim(0.8 * ticks[0], 1.1 * ticks[-1])
                axes.set_xticks(ticks, [f"{tick:,.10g}" for tick in ticks])
                axes.minorticks_off()

        return draw

    size = 1.0 + 2.0 * len(shown), 1.0 + 0.32 * len(names)
    return panels_svg(study.name, study.title, [panel(*column) for column in shown], size=size)


def _log_ticks(least: float, most: float) -> Sequence[float]:
    """Return at most `_TICKS` round tick values of a logarithmic axis that includes `least` and `most`.

    >>> _log_ticks(21.5, 58.2), _log_ticks(1.3, 15.2), _log_ticks(0.5, 1e6)
    ([20.0, 50.0, 100.0], [1.0, 10.0, 100.0], [0.1, 100.0, 100000.0, 100000000.0])
    """
    decades = range(math.floor(math.log10(least)), math.ceil(math.log10(most)) + 1)
    fine = [round_ * 10.0**decade for decade in decades for round_ in (1, 2, 5)]
    first, last = max(tick for tick in fine if tick <= least), min(tick for tick in fine if tick >= most)
    ticks = [tick for tick in fine if first <= tick <= last]
    if len(ticks) <= _TICKS:
        return ticks
    stride = math.ceil((len(decades) - 1) / (_TICKS - 1))
    return [10.0 ** (decades[0] + stride * place) for place in range(math.ceil((len(decades) - 1) / stride) + 1)]

"""FS and GD as SVG, in the manner of the plots of a run's report."""

from __future__ import annotations

from matplotlib.axes import Axes

from ...tuner.plots import COLOURS, GREY, figure_svg
from .advice import ENOUGH, STILL, Advice
from .feature_sensitivity import FeatureShift
from .gradient_dependence import GradientSpread

_LEAST = 1e-5  # of the gradient; where less is left, no rank is drawn: those would press the rest to the edge


def shift_svg(shift: FeatureShift, advice: Advice) -> str:
    """FS over the blocks of both towers, that of what a block adds dashed, and where the advised cuts are."""

    def draw(axes: Axes) -> None:
        for name, values, added, skip, colour in (
            ("image", shift.image, shift.image_added, advice.advised.skip_layers[0], COLOURS[0]),
            ("text", shift.text, shift.text_added, advice.advised.skip_layers[1], COLOURS[1]),
        ):
            blocks = range(1, len(values) + 1)
            axes.plot(blocks, values, marker="o", markersize=4, color=colour, label=f"{name}: output")
            axes.plot(blocks, added, linestyle="--", linewidth=1, color=colour, label=f"{name}: added by the block")
            axes.axhline(STILL * max(values), color=colour, linestyle=":", linewidth=1)
            if skip:
                axes.axvline(skip + 0.5, color=colour, linewidth=4, alpha=0.25)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("relative change")
        _legend(axes)

    over = f"block (bars: advised cuts; dotted: {100 * STILL:.0f} % of the largest)"
    return figure_svg("shift", "relative change of each block's output in full fine-tuning", draw, over=over)


def spread_svg(spread: GradientSpread, advice: Advice) -> str:
    """What share of the gradient is left to the classes behind each rank, and what stays, advised and compared."""
    left = [1 - share for share in spread.cumulative.tolist()]
    settings = (("advised", advice.advised, COLOURS[2]), ("compared with", advice.other, COLOURS[3]))
    points = [(rank, share) for rank, share in enumerate(left, 1) if rank == 1 or share >= _LEAST]

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*points, strict=True), color=COLOURS[0], marker="o" if len(points) < 40 else None, markersize=3)
        axes.set_yscale("log")
        axes.tick_params(axis="y", which="minor", left=False)
        axes.axhline(1 - ENOUGH, color=GREY, linestyle=":", linewidth=1)
        for name, setting, colour in settings:
            label = f"{name}: {setting.kept.always} always stay"
            axes.axvline(setting.kept.always, color=colour, linewidth=2, alpha=0.7, label=label)
        axes.set_ylabel("share of the gradient left")
        _legend(axes)

    label = "share of the gradient that is left to the classes behind a rank"
    over = f"first ranks, of {len(left)} classes (dotted: {100 * (1 - ENOUGH):.1g} %)"
    return figure_svg("spread", label, draw, over=over)


def _legend(axes: Axes) -> None:
    """Above the axes, where it covers no line."""
    axes.figure.legend(loc="outside upper center", ncols=2, frameon=False, labelcolor=GREY, fontsize=8)

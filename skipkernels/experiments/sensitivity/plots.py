"""SVG plots of FS and GD, in the style of the report of a run."""

from __future__ import annotations

from matplotlib.axes import Axes

from ...tuner.plots import COLOURS, GREY, figure_svg
from .advice import GRADIENT_SHARE, INSENSITIVE_BELOW, Advice
from .feature_sensitivity import FeatureSensitivity
from .gradient_dependence import GradientDependence

_LEAST = 1e-5  # ranks with less of the gradient beyond them are not drawn: they would compress the rest of the plot


def feature_sensitivity_svg(sensitivity: FeatureSensitivity, advice: Advice) -> str:
    """Plot FS of the blocks of both towers (dashed: of the residual branches), and the suggested cuts."""

    def draw(axes: Axes) -> None:
        for name, values, added, skip, colour in (
            ("image", sensitivity.image, sensitivity.image_added, advice.advised.skip_layers[0], COLOURS[0]),
            ("text", sensitivity.text, sensitivity.text_added, advice.advised.skip_layers[1], COLOURS[1]),
        ):
            blocks = range(1, len(values) + 1)
            axes.plot(blocks, values, marker="o", markersize=4, color=colour, label=f"{name}: output")
            axes.plot(blocks, added, linestyle="--", linewidth=1, color=colour, label=f"{name}: added by the block")
            axes.axhline(INSENSITIVE_BELOW * max(values), color=colour, linestyle=":", linewidth=1)
            if skip:
                axes.axvline(skip + 0.5, color=colour, linewidth=4, alpha=0.25)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("relative change")
        _legend(axes)

    over = f"block (bars: advised cuts; dotted: {100 * INSENSITIVE_BELOW:.0f} % of the largest)"
    return figure_svg(
        "feature_sensitivity", "relative change of each block's output in full fine-tuning", draw, over=over
    )


def gradient_dependence_svg(dependence: GradientDependence, advice: Advice) -> str:
    """Plot the share of the gradient beyond each rank, with the kept classes of both settings."""
    beyond = [1 - share for share in dependence.cumulative.tolist()]
    settings = (("advised", advice.advised, COLOURS[2]), ("compared with", advice.other, COLOURS[3]))
    points = [(rank, share) for rank, share in enumerate(beyond, 1) if rank == 1 or share >= _LEAST]

    def draw(axes: Axes) -> None:
        axes.plot(*zip(*points, strict=True), color=COLOURS[0], marker="o" if len(points) < 40 else None, markersize=3)
        axes.set_yscale("log")
        axes.tick_params(axis="y", which="minor", left=False)
        axes.axhline(1 - GRADIENT_SHARE, color=GREY, linestyle=":", linewidth=1)
        for name, setting, colour in settings:
            label = f"{name}: {setting.kept.always} always kept"
            axes.axvline(setting.kept.always, color=colour, linewidth=2, alpha=0.7, label=label)
        axes.set_ylabel("share of the gradient beyond the rank")
        _legend(axes)

    label = "share of the gradient of the classes beyond a rank"
    over = f"first ranks, of {len(beyond)} classes (dotted: {100 * (1 - GRADIENT_SHARE):.1g} %)"
    return figure_svg("gradient_dependence", label, draw, over=over)


def _legend(axes: Axes) -> None:
    """Put the legend above the axes, where it covers no line."""
    axes.figure.legend(loc="outside upper center", ncols=2, frameon=False, labelcolor=GREY, fontsize=8)

"""Files and tables of an analysis."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from ...console import plain
from ...data import InputError
from ...folders import replaced_folder
from ...tuner.run_folder import check_writable
from .advice import GRADIENT_SHARE, INSENSITIVE_BELOW, Advice
from .analysis import Analysis
from .plots import feature_sensitivity_svg, gradient_dependence_svg

ANALYSIS, FS_PLOT, GD_PLOT = "analysis.json", "feature_sensitivity.svg", "gradient_dependence.svg"
_RANKS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


def check_folder(folder: Path, overwrite: bool) -> None:
    """Check that an analysis can be written to a folder.

    Raises:
        InputError: If the folder can't be created, or contains an earlier analysis and `overwrite` is False.
    """
    check_writable(folder)
    earlier = [name for name in (ANALYSIS, FS_PLOT, GD_PLOT) if (folder / name).exists()]
    if earlier and not overwrite:
        raise InputError(
            f"analyze: {folder} holds an earlier analysis ({', '.join(earlier)}). Choose another folder, or add "
            "`overwrite=True`.",
            "out",
        )


def write(folder: Path, analysis: Analysis, settings: dict[str, Any]) -> tuple[str, ...]:
    """Write the files of an analysis, in place of an earlier one, and return their names.

    Raises:
        InputError: If the folder is not writable.
    """
    settings = {name: value for name, value in settings.items() if name not in ("out", "overwrite")}
    settings["root"] = settings["root"] and str(settings["root"])
    texts = {
        FS_PLOT: feature_sensitivity_svg(analysis.sensitivity, analysis.advice),
        GD_PLOT: gradient_dependence_svg(analysis.dependence, analysis.advice),
        ANALYSIS: json.dumps({"settings": settings} | analysis.as_dict(), indent=2) + "\n",
    }
    try:
        with replaced_folder(folder, texts) as new:
            for name, text in texts.items():
                (new / name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise InputError(f"analyze: {folder} can't be written: {error.strerror}.", "out") from error
    return ANALYSIS, FS_PLOT, GD_PLOT


def tables(analysis: Analysis, title: str) -> list[Table]:
    """Tables of FS, GD and the suggested setting for the terminal."""
    return [_sensitivity_table(analysis, title), _dependence_table(analysis), _advice_table(analysis)]


def command(advice: Advice) -> str:
    """Line that shows the command to tune with the suggested setting."""
    advised = advice.advised
    return (
        f"to try: skipkernels tune --skip-layers {advice.skip_share:g} --keep-ratio {advised.keep_ratio:g} "
        f"--max-keep {advised.max_keep}"
    )


def _sensitivity_table(analysis: Analysis, title: str) -> Table:
    sensitivity = analysis.sensitivity
    columns = {
        "image: output": (sensitivity.image, 0),
        "added by the block": (sensitivity.image_added, 0),
        "text: output": (sensitivity.text, 1),
        "added by the block ": (sensitivity.text_added, 1),
    }
    table = Table("block", title=f"FS, relative change of each block ({title})")
    for name in columns:
        table.add_column(name, justify="right")
    table.add_row("embedding", _percent(sensitivity.image_entered), "", _percent(sensitivity.text_entered), "")
    for block in range(max(len(sensitivity.image), len(sensitivity.text))):
        cells = []
        for values, tower in columns.values():
            style = "dim" if block < analysis.advice.advised.skip_layers[tower] else "bold"
            cells.append(plain(_percent(values[block]) if block < len(values) else "", style=style))
        table.add_row(str(block + 1), *cells)
    return table


def _dependence_table(analysis: Analysis) -> Table:
    dependence, advice = analysis.dependence, analysis.advice
    classes, cumulative = len(dependence.share), dependence.cumulative.tolist()
    marks = {advice.advised.kept.always: "advised", advice.other.kept.always: "compared with"}
    if len(marks) == 1:
        marks = {advice.advised.kept.always: "advised, and compared with"}
    table = Table("first ranks", title=f"GD, share of the gradient ({dependence.images} images, {classes} classes)")
    for name in ("of all classes", "share of the gradient"):
        table.add_column(name, justify="right")
    table.add_column("")
    for rank in sorted({*(rank for rank in _RANKS if rank < classes), classes, *marks}):
        table.add_row(str(rank), f"{100 * rank / classes:.1f} %", _percent(cumulative[rank - 1]), marks.get(rank, ""))
    return table


def _advice_table(analysis: Analysis) -> Table:
    classes = len(analysis.dependence.share)
    table = Table("rule of thumb", title="advice")
    columns = []
    for name, setting in (("advised", analysis.advice.advised), ("compared with", analysis.advice.other)):
        table.add_column(name, justify="right")
        columns.append(
            (
                f"{setting.skip_layers[0]} and {setting.skip_layers[1]}",
                f"{100 * setting.sensitivity[0]:.0f} % and {100 * setting.sensitivity[1]:.0f} %",
                f"{setting.keep_ratio:.4g}",
                f"{setting.kept.always} of {classes}",
                str(setting.kept.expected),
                f"{100 * setting.kept.share:.1f} %",
            )
        )
    rows = (
        "blocks to skip, image and text",
        f"FS of the last of them, of the largest (below {100 * INSENSITIVE_BELOW:.0f} %)",
        "keep ratio",
        f"classes always kept (first ranks with {100 * GRADIENT_SHARE:g} %)",
        "classes per step",
        "their share of the gradient",
    )
    for name, *cells in zip(rows, *columns, strict=True):
        table.add_row(name, *cells)
    return table


def _percent(value: float) -> str:
    return f"{100 * value:.2f} %"

"""`skipkernels analyze`: FS and GD of a model on a task, with their plots, and which ω and keep ratio they advise."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table

from skipkernels.console import Terminal, plain
from skipkernels.data import InputError
from skipkernels.experiments.sensitivity import (
    Advice,
    Analysis,
    Setting,
    analyze,
    feature_sensitivity_svg,
    gradient_dependence_svg,
)
from skipkernels.experiments.sensitivity.advice import GRADIENT_SHARE, INSENSITIVE_BELOW
from skipkernels.features import SamplerKind
from skipkernels.store import replace_text
from skipkernels.tuner import TuneConfig
from skipkernels.tuner.model import load_model
from skipkernels.tuner.run_folder import check_apart, check_writable
from skipkernels.tuner.setup import build_task

ANALYSIS, FS_PLOT, GD_PLOT = "analysis.json", "feature_sensitivity.svg", "gradient_dependence.svg"
_RANKS = (1, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)


@dataclasses.dataclass(frozen=True)
class AnalyzeConfig:
    """Measure how much each block moves in full fine-tuning (FS) and over how many classes the gradient is spread (GD).

    They tell which --skip-layers and --keep-ratio to begin with. GD is measured on the model as it is, then every layer
    is fine-tuned for some epochs, then FS is measured on test images of the same classes.
    """

    data: str = TuneConfig.data
    """As for tune."""
    root: Path | None = TuneConfig.root
    """As for tune."""
    download: bool = TuneConfig.download
    """As for tune."""
    protocol: Literal["base-to-new", "few-shot"] | None = None
    """few-shot: of all classes, the default of imagefolder:. base-to-new: of the first half, on which it trains."""
    template: tuple[str, ...] | None = TuneConfig.template
    """As for tune; the first is measured."""
    model: str = TuneConfig.model
    """As for tune; an open_clip model whose towers are transformers."""
    pretrained: str | None = TuneConfig.pretrained
    """As for tune."""
    shots: int = TuneConfig.shots
    """Training images of each class."""
    classes: int | None = TuneConfig.classes
    """As for tune."""
    images: int = 256
    """Most images that each of both is measured on."""
    epochs: int = 3
    """Passes of the fine-tuning over the training images."""
    batch_size: int | None = TuneConfig.batch_size
    """Images in a step; by default as for tune."""
    sampler: SamplerKind | None = TuneConfig.sampler
    """As for tune."""
    text_lr: float | None = TuneConfig.text_lr
    """Learning rate of the text tower; by default that of tune --method full."""
    image_lr: float | None = TuneConfig.image_lr
    """Learning rate of the image tower; by default that of tune --method full."""
    skip_layers: int | float = TuneConfig.skip_layers
    """To compare the advice with, as for tune."""
    keep_ratio: float = TuneConfig.keep_ratio
    """To compare the advice with, as for tune."""
    max_keep: int = TuneConfig.max_keep
    """To compare the advice with, as for tune."""
    decay: float = TuneConfig.decay
    """As for tune."""
    workers: int = TuneConfig.workers
    """Processes that load images."""
    device: str = TuneConfig.device
    """cpu, cuda, cuda:1, …; auto is cuda where there is one."""
    seed: int = TuneConfig.seed
    """Chooses training images and their order."""
    out: Path | None = None
    """Folder for the results; by default runs/DATA-analysis."""
    overwrite: bool = False
    """Replace the results of an earlier analysis in that folder."""


def run(action: AnalyzeConfig, out: Terminal, err: Terminal) -> int:
    """Run the command. Returns 0.

    Raises:
        InputError: For what can't be used.
        FloatingPointError: If the fine-tuning diverged.
    """
    if action.images < 1:
        raise InputError(f"--images must be at least 1; got {action.images}.")
    same = {field.name for field in dataclasses.fields(TuneConfig)} - {"out", "overwrite"}
    values = {name: value for name, value in vars(action).items() if name in same}
    compared = TuneConfig(precision="fp32", **values)
    config = compared.with_method("full").resolved()
    folder = action.out or Path("runs", f"{action.data.replace(':', '-').replace('/', '-')}-analysis")
    check_apart("out", folder, config)
    _check_folder(folder, action.overwrite)
    model, transform, tokenizer = load_model(
        config.model, config.pretrained, torch.device(config.device), seed=config.seed
    )
    task = build_task(config, transform)
    for note in task.notes:
        err.print(f"note: {note}", soft_wrap=True)
    analysis = analyze(model, tokenizer, task, config, compared, images=action.images, console=err)
    resolved = {name: getattr(config, name) for name, value in values.items() if value in (None, "auto")}
    settings = vars(action) | resolved
    _write(folder, analysis, settings)
    _print(analysis, f"{config.model} on {task.name}, {config.shots} shots, {config.epochs} epochs", out)
    out.print(f"{folder}: {ANALYSIS} {FS_PLOT} {GD_PLOT}", soft_wrap=True)
    return 0


def _check_folder(folder: Path, overwrite: bool) -> None:
    check_writable(folder)
    earlier = [name for name in (ANALYSIS, FS_PLOT, GD_PLOT) if (folder / name).exists()]
    if earlier and not overwrite:
        raise InputError(
            f"--out: {folder} holds an earlier analysis ({', '.join(earlier)}); choose another folder, or add "
            "--overwrite."
        )


def _write(folder: Path, analysis: Analysis, settings: dict[str, Any]) -> None:
    """The files, each as a whole; analysis.json appears last."""
    settings = {name: value for name, value in settings.items() if name not in ("out", "overwrite")}
    settings["root"] = settings["root"] and str(settings["root"])
    texts = {
        FS_PLOT: feature_sensitivity_svg(analysis.sensitivity, analysis.advice),
        GD_PLOT: gradient_dependence_svg(analysis.dependence, analysis.advice),
        ANALYSIS: json.dumps({"settings": settings} | analysis.as_dict(), indent=2) + "\n",
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ANALYSIS).unlink(missing_ok=True)
        for name, text in texts.items():
            replace_text(folder / name, text)
    except OSError as error:
        raise InputError(f"--out: {folder} can't be written: {error.strerror}.") from error


def _print(analysis: Analysis, title: str, out: Terminal) -> None:
    sensitivity, dependence, advice = analysis.sensitivity, analysis.dependence, analysis.advice
    columns = {
        "image: output": (sensitivity.image, 0),
        "added by the block": (sensitivity.image_added, 0),
        "text: output": (sensitivity.text, 1),
        "added by the block ": (sensitivity.text_added, 1),
    }
    moved = Table("block", title=f"FS, relative change of each block ({title})")
    for name in columns:
        moved.add_column(name, justify="right")
    moved.add_row(
        "embedding", f"{100 * sensitivity.image_entered:.2f} %", "", f"{100 * sensitivity.text_entered:.2f} %", ""
    )
    for block in range(max(len(sensitivity.image), len(sensitivity.text))):
        cells = []
        for values, tower in columns.values():
            style = "dim" if block < advice.advised.skip_layers[tower] else "bold"
            cells.append(plain(f"{100 * values[block]:.2f} %" if block < len(values) else "", style=style))
        moved.add_row(str(block + 1), *cells)
    out.print(moved)

    classes, cumulative = len(dependence.share), dependence.cumulative.tolist()
    marks = {advice.advised.kept.always: "advised", advice.other.kept.always: "compared with"}
    if advice.advised.kept.always == advice.other.kept.always:
        marks = {advice.advised.kept.always: "advised, and compared with"}
    spreads = Table("first ranks", title=f"GD, share of the gradient ({dependence.images} images, {classes} classes)")
    for name in ("of all classes", "share of the gradient"):
        spreads.add_column(name, justify="right")
    spreads.add_column("")
    for rank in sorted({*(rank for rank in _RANKS if rank < classes), classes, *marks}):
        spreads.add_row(
            str(rank), f"{100 * rank / classes:.1f} %", f"{100 * cumulative[rank - 1]:.2f} %", marks.get(rank, "")
        )
    out.print(spreads)
    _print_advice(advice, classes, out)


def _print_advice(advice: Advice, classes: int, out: Terminal) -> None:
    table = Table("rule of thumb", title="advice")
    for name in ("advised", "compared with"):
        table.add_column(name, justify="right")

    def row(name: str, of: dict[str, str]) -> None:
        table.add_row(name, of["advised"], of["other"])

    settings: dict[str, Setting] = {"advised": advice.advised, "other": advice.other}
    row(
        "blocks to skip, image and text",
        {which: f"{s.skip_layers[0]} and {s.skip_layers[1]}" for which, s in settings.items()},
    )
    row(
        f"FS there, of the largest (below {100 * INSENSITIVE_BELOW:.0f} %)",
        {which: f"{100 * s.sensitivity[0]:.0f} % and {100 * s.sensitivity[1]:.0f} %" for which, s in settings.items()},
    )
    row(
        "keep ratio",
        {which: f"{s.keep_ratio:.4g}" for which, s in settings.items()},
    )
    row(
        f"classes that always stay (first ranks with {100 * GRADIENT_SHARE:g} %)",
        {which: f"{s.kept.always} of {classes}" for which, s in settings.items()},
    )
    row("classes in a step", {which: str(s.kept.expected) for which, s in settings.items()})
    row("their share of the gradient", {which: f"{100 * s.kept.share:.1f} %" for which, s in settings.items()})
    out.print(table)
    for note in advice.notes:
        out.print(note, soft_wrap=True)
    advised = advice.advised
    out.print(
        f"to try: skipkernels tune --skip-layers {advice.skip_share:g} --keep-ratio {advised.keep_ratio:g} "
        f"--max-keep {advised.max_keep}",
        soft_wrap=True,
    )

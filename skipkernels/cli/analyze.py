"""`skipkernels analyze`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from skipkernels.console import Terminal
from skipkernels.options import SamplerKind
from skipkernels.tuner.option_groups import DataOptions, ModelOptions, RunOptions, SkipOptions

from .options import settings, tune_config


@dataclasses.dataclass(frozen=True)
class ComparedOptions(SkipOptions):
    """Setting of Skip Tuning that the suggested setting is compared with."""


@dataclasses.dataclass(frozen=True)
class FineTuningOptions:
    """Full fine-tuning, before FS is measured. Except for the epochs, the defaults are those of tune --method full."""

    epochs: int = 3
    """Passes over the training images."""
    batch_size: int | None = None
    """Images per step."""
    sampler: SamplerKind | None = None
    """class_pure: batches of a single class if it has enough images. random: mixed batches. sequential: in order."""
    text_lr: float | None = None
    """Learning rate of the text tower."""
    image_lr: float | None = None
    """Learning rate of the image tower."""


@dataclasses.dataclass(frozen=True)
class AnalysisOptions:
    """Gradient dependence (GD) is the distribution of the gradient over classes before tuning. Feature sensitivity (FS)
    is how much full fine-tuning changes the output of each block.
    """

    protocol: Literal["base-to-new", "few-shot"] | None = None
    """few-shot: use all classes. base-to-new: use the first half, as tune does for training. By default few-shot for
    own data, else base-to-new."""
    images: int = 256
    """Maximum number of images for each of the two measurements."""
    out: Path | None = None
    """Folder of the results. By default runs/DATA-analysis."""
    overwrite: bool = False
    """Replace an earlier analysis in the folder."""


@dataclasses.dataclass(frozen=True)
class AnalyzeCommand:
    """Suggest --skip-layers and --keep-ratio for an open_clip model with transformer towers."""

    data: DataOptions = DataOptions()
    model: ModelOptions = ModelOptions()
    compared: ComparedOptions = ComparedOptions()
    training: FineTuningOptions = FineTuningOptions()
    run: RunOptions = RunOptions()
    analysis: AnalysisOptions = AnalysisOptions()

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Measure, write the files and print the tables. Returns 0.

        Raises:
            InputError: If an option is invalid.
            FloatingPointError: If the fine-tuning diverges.
        """
        import torch

        from skipkernels.data import InputError
        from skipkernels.experiments.sensitivity import analyze, report
        from skipkernels.tuner.model import load_model
        from skipkernels.tuner.run_folder import check_apart
        from skipkernels.tuner.setup import build_task

        images, data = self.analysis.images, self.data.data
        if images < 1:
            raise InputError(f"--images must be at least 1; got {images}.")
        compared = tune_config(self, precision="fp32", out=None, overwrite=False)
        config = compared.with_method("full").resolved()
        folder = self.analysis.out or Path("runs", f"{data.replace(':', '-').replace('/', '-')}-analysis")
        check_apart("out", folder, config)
        report.check_folder(folder, self.analysis.overwrite)
        model, transform, tokenizer = load_model(
            config.model, config.pretrained, torch.device(config.device), seed=config.seed, trust=config.trust
        )
        task = build_task(config, transform)
        for note in task.notes:
            err.print(f"note: {note}", soft_wrap=True)
        analysis = analyze(model, tokenizer, task, config, compared, images=images, console=err)
        given = settings(self)
        resolved = {name: getattr(config, name) for name, value in given.items() if value in (None, "auto")}
        files = report.write(folder, analysis, given | resolved)
        for table in report.tables(
            analysis, f"{config.model} on {task.name}, {config.shots_text}, {config.epochs} epochs"
        ):
            out.print(table)
        for line in (*analysis.advice.notes, report.command(analysis.advice), f"{folder}: {' '.join(files)}"):
            out.print(line, soft_wrap=True)
        return 0

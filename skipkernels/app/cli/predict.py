"""`skipkernels predict`."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from skipkernels._progress import progress
from skipkernels.app.console import Terminal

from .options import Device, PrecisionOption, Run, Threshold, Top, Trust, check_run, import_torch

if TYPE_CHECKING:
    from torch import Tensor

    from skipkernels.app.serve import Classifier, Predictions
    from skipkernels.app.serve.output import Row


@dataclasses.dataclass
class _Results:
    """Rows and embeddings [B, D] of the batches that are classified, and the number of files that could not be read."""

    rows: list[Row] = dataclasses.field(default_factory=list)
    embeddings: list[Tensor] = dataclasses.field(default_factory=list)
    unreadable: int = 0


@dataclasses.dataclass(frozen=True)
class PredictCommand:
    """Classify images with a tuned model. The exit code is 1 if a file could not be read; the others are classified."""

    run: Run
    """Folder of the run."""
    images: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGES", help_behavior_hint="(required)")
    ]
    """Images, or folders of images, which are searched with their subfolders."""
    top: Top = 5
    threshold: Threshold = None
    classes: str | None = None
    """Other classes, recognised by their names alone: at least two names with commas between them, or a file with a
    name in each line, which may have commas. By default the trained classes."""
    template: tuple[str, ...] | None = None
    """Prompts of the classes, such as "a photo of a {}.". By default the prompts of the run."""
    out: Path | None = None
    """File of the results, .csv. By default they are printed. An interrupted command writes the images
    that are done."""
    embeddings: Path | None = None
    """File of the embeddings of the images, .npy: float32 [images, width] of unit norm, in the order of the results."""
    device: Device = None
    precision: PrecisionOption = "auto"
    trust: Trust = False
    batch_size: int = 64
    """Images per forward pass."""

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Classify the images. Returns 0, or 1 if a file could not be read."""
        from skipkernels.app.data.files import format_others
        from skipkernels.app.serve.output import check_file

        if self.out is not None:
            check_file(self.out, "predict")
        if self.embeddings is not None:
            check_file(self.embeddings, "predict", "embeddings", ".npy")
        images, others = _find_images(self.images)
        check_run(self.run, "predict", err)
        import_torch(err)
        from skipkernels.app.serve import Classifier

        classifier = Classifier.load(
            self.run,
            classes=None if self.classes is None else _names(self.classes),
            templates=self.template,
            device=self.device,
            precision=self.precision,
            trust=self.trust,
        )
        batches = classifier.predict_batches(
            images, top=self.top, threshold=self.threshold, batch_size=self.batch_size, unreadable="skip"
        )
        results = _Results()
        try:
            self._collect(batches, len(images), results, err)
        except BaseException:
            err.print(f"{len(results.rows):,} of {len(images):,} images are classified", soft_wrap=True)
            if results.rows:  # otherwise the files of an earlier command are kept
                self._write(results, out)
            raise
        self._write(results, out)
        if others:
            err.print(format_others(others), soft_wrap=True)
        self._print_summary(classifier, results, err)
        return 1 if results.unreadable else 0

    def _collect(self, batches: Iterable[Predictions], count: int, results: _Results, err: Terminal) -> None:
        """Append the predictions of all batches, and print the files that could not be read."""
        from skipkernels.app.serve.output import rows_of

        with progress("images", count) as advance:
            for batch in batches:
                for name, reason in batch.unreadable.items():
                    err.print(f"skipped {name}: {reason}", soft_wrap=True)
                results.unreadable += len(batch.unreadable)
                results.rows.extend(rows_of(batch))
                results.embeddings.append(batch.embeddings)
                advance(len(batch) + len(batch.unreadable))

    def _write(self, results: _Results, out: Terminal) -> None:
        """Write or print the results."""
        from skipkernels.app.serve.output import csv_lines, write_embeddings, write_lines

        lines = csv_lines(results.rows, threshold=self.threshold is not None)
        if self.out is not None:
            write_lines(self.out, lines)
        elif out.is_terminal:  # literally, as in a file
            out.print("".join(lines), end="", soft_wrap=True)
        else:
            out.file.writelines(lines)
        if self.embeddings is not None:  # last: they are large, and an error must not cost the predictions
            write_embeddings(self.embeddings, results.embeddings)

    def _print_summary(self, classifier: Classifier, results: _Results, err: Terminal) -> None:
        from skipkernels.app.report.formats import plural
        from skipkernels.app.serve.output import NONE

        parts = [f"{plural(len(results.rows), 'image')} classified"]
        if self.threshold is not None:
            parts.append(f"{sum(not row.known for row in results.rows):,} as {NONE}")
        if results.unreadable:
            parts.append(f"{results.unreadable:,} skipped")
        if self.out is not None:
            parts.append(f"in {self.out}")
        probabilities = f"; probabilities are {self._calibration(classifier)}" if results.rows else ""
        err.print(", ".join(parts) + probabilities, soft_wrap=True)

    def _calibration(self, classifier: Classifier) -> str:
        """Words on the calibration of probabilities."""
        from skipkernels.app.serve.output import NONE
        from skipkernels.app.train.description import CALIBRATED, NOT_CALIBRATED

        if classifier.calibrated:
            one_more = self.threshold is not None and classifier.none_logit is not None
            return CALIBRATED + (f", with {NONE} as one more class" if one_more else "")
        changed = [f"--{name}" for name in ("classes", "template") if getattr(self, name) is not None]
        return f"not calibrated: {' and '.join(changed)} replace those of the run" if changed else NOT_CALIBRATED


def _names(text: str) -> list[str]:
    """Names of classes in a file, or in a list with commas."""
    from skipkernels.app.data import InputError
    from skipkernels.app.data.files import read_text

    is_file = os.path.isfile(text)  # Path.is_file raises an error for a list that is longer than a file name
    words = read_text(Path(text)).splitlines() if is_file else text.split(",")
    names = [word.strip() for word in words if word.strip()]
    if len(names) < 2 or (not is_file and text.lower().endswith(".txt")):  # one name is most often a mistyped file
        got = f"{text}, which has {len(names)}" if is_file else f"{text!r}, and there is no such file"
        raise InputError(
            f"must be at least two names with commas between them, or a file with a name in each line; got {got}.",
            "classes",
            "predict",
        )
    return names


def _find_images(paths: Iterable[Path]) -> tuple[list[str], Counter[str]]:
    """Paths of the images that are named, or in the folders that are, and the number of other files by extension."""
    from skipkernels.app.data import InputError
    from skipkernels.app.data.files import find_images, format_others

    images: list[str] = []
    others: Counter[str] = Counter()
    for path in paths:
        if path.is_dir():
            inside, skipped = find_images(path, {"": 0})
            if not inside:
                none = f"has none{f' ({format_others(skipped)})' if skipped else ''}"
                raise InputError(f"must be files or folders of images; {path} {none}.", "images", "predict")
            images += [str(path / name) for name, _ in inside]
            others += skipped
        elif not os.path.lexists(path):
            raise InputError(f"must be files or folders of images; there is no {path}.", "images", "predict")
        else:
            images.append(str(path))
    if not images:
        raise InputError("must be files or folders of images; got none.", "images", "predict")
    return list(dict.fromkeys(images)), others

"""`skipkernels predict`."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from skipkernels._progress import progress
from skipkernels.app.console import Terminal
from skipkernels.options import Precision

from .options import Run, Trust

if TYPE_CHECKING:
    from skipkernels.app.serve import Classifier, Predictions
    from skipkernels.app.serve.output import Row


@dataclasses.dataclass(frozen=True)
class PredictOptions:
    """Classes and results."""

    top: int = 5
    """Number of classes for each image, best first."""
    classes: str | None = None
    """Other classes, recognised by their names alone: at least two names with commas between them, or a file with a
    name in each line, which may have commas. By default the trained classes."""
    template: tuple[str, ...] | None = None
    """Prompts of the classes, such as "a photo of a {}.". By default the prompts of the run."""
    out: Path | None = None
    """File of the results. By default they are printed. An interrupted command writes the images that are done."""
    format: Literal["csv", "json"] | None = None
    """Format of the results. By default that of the ending of --out, else csv."""
    sort_into: Path | None = None
    """New folder into which each image is copied, in a folder named after its label."""
    link: bool = False
    """With --sort-into, make symbolic links in place of copies."""
    contact_sheet: Path | None = None
    """HTML file with a thumbnail of each image, by label."""


@dataclasses.dataclass(frozen=True)
class PredictComputeOptions:
    """Device and speed."""

    device: str | None = None
    """cpu, cuda, cuda:1, …. By default cuda if there is one, else cpu."""
    precision: Precision = "auto"
    """auto is bf16 on a GPU that has it, else fp32."""
    trust: Trust = False
    batch_size: int = 64
    """Images per forward pass."""
    workers: int | None = None
    """Threads that decode images. By default one for each core, at most 8."""


@dataclasses.dataclass(frozen=True)
class PredictCommand:
    """Classify images with a tuned model. The exit code is 1 if a file could not be read; the others are classified."""

    run: Run
    """Folder of the run."""
    images: Annotated[
        tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="IMAGES", help_behavior_hint="(required)")
    ]
    """Images, or folders of images, which are searched with their subfolders."""
    results: PredictOptions = PredictOptions()
    compute: PredictComputeOptions = PredictComputeOptions()

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Classify the images. Returns 0, or 1 if a file could not be read."""
        from skipkernels.app.data.files import format_others
        from skipkernels.app.serve.output import SortedFolders, contact_sheet, lines, write_rows
        from skipkernels.folders import replace_text

        results, form = self.results, self._checked_format()
        images, others = self._images()
        classifier = self._load()
        top = min(results.top, len(classifier.classes))
        folders = None
        if results.sort_into is not None:
            folders = SortedFolders(results.sort_into, classifier.classes, link=results.link)
        rows: list[Row] = []
        unreadable = 0

        def parts(advance: Callable[[int], object]) -> Iterator[Predictions]:
            nonlocal unreadable
            options: dict[str, Any] = {"batch_size": self.compute.batch_size, "workers": self.compute.workers}
            for part in classifier.predict_batches(images, top=top, unreadable="skip", **options):
                for name, reason in part.unreadable.items():
                    err.print(f"skipped {name}: {reason}", soft_wrap=True)
                unreadable += len(part.unreadable)
                rows.extend(part)
                if folders is not None:
                    for name, labels in part:
                        folders.add(name, labels[0][0])
                yield part
                advance(len(part) + len(part.unreadable))

        try:
            with progress("images", len(images)) as advance:
                if results.out is not None:
                    deque(parts(advance), maxlen=0)
                else:
                    for text in lines(parts(advance), form, top):
                        if out.is_terminal:  # shows names literally; a file gets them as they are
                            out.print(text, end="", soft_wrap=True)
                        else:
                            out.file.write(text)
        except BaseException:
            err.print(f"{len(rows):,} of {len(images):,} images are classified", soft_wrap=True)
            raise
        finally:
            if results.out is not None:
                write_rows(results.out, rows, form, top)
        if results.contact_sheet is not None:
            best = [(name, *labels[0]) for name, labels in rows]
            replace_text(results.contact_sheet, contact_sheet(best, f"Predictions of {self.run.resolve().name}"))
        if others:
            err.print(format_others(others), soft_wrap=True)
        skipped = f", {unreadable:,} skipped" if unreadable else ""
        calibration = self._calibration(classifier)
        err.print(f"{len(rows):,} images classified{skipped}; probabilities are {calibration}", soft_wrap=True)
        return 1 if unreadable else 0

    def _checked_format(self) -> Literal["csv", "json"]:
        """Check the options, and return the format of the results."""
        from skipkernels.app.data import InputError
        from skipkernels.app.serve.classifier import check_counts
        from skipkernels.app.serve.output import check_file

        results, compute = self.results, self.compute
        if results.link and results.sort_into is None:
            raise InputError("predict: link has no effect without `sort_into`; leave it out.", "link")
        for name in ("out", "contact_sheet"):
            path = getattr(results, name)
            if path is not None:
                check_file(path, name)
        check_counts(top=results.top, batch_size=compute.batch_size, workers=compute.workers)
        ending = ".csv" if results.out is None else results.out.suffix.lower()
        if results.format is None and ending not in (".csv", ".json"):
            message = f"predict: out must end in .csv or .json; got {results.out}. Or choose a --format."
            raise InputError(message, "out")
        return results.format or ("json" if ending == ".json" else "csv")

    def _load(self) -> Classifier:
        from skipkernels.app.serve import Classifier

        return Classifier.load(
            self.run,
            classes=None if self.results.classes is None else _names(self.results.classes),
            templates=self.results.template,
            device=self.compute.device,
            precision=self.compute.precision,
            trust=self.compute.trust,
        )

    def _calibration(self, classifier: Classifier) -> str:
        from skipkernels.app.train.description import NOT_CALIBRATED

        if classifier.calibrated:
            return "calibrated on held-out images"
        if self.results.classes is not None or self.results.template is not None:
            return "not calibrated: only those of the run's own classes and prompts are"
        return NOT_CALIBRATED

    def _images(self) -> tuple[list[str], Counter[str]]:
        """Paths of the images, and the number of other files by extension."""
        from skipkernels.app.data import InputError
        from skipkernels.app.data.files import find_images, format_others

        found: list[str] = []
        others: Counter[str] = Counter()
        for path in self.images:
            if path.is_dir():
                inside, skipped = find_images(path, {"": 0})
                if not inside:
                    none = f"has none{f' ({format_others(skipped)})' if skipped else ''}"
                    raise InputError(f"predict: images must be files or folders of images; {path} {none}.", "images")
                found += [str(path / name) for name, _ in inside]
                others += skipped
            elif not os.path.lexists(path):
                raise InputError(f"predict: images must be files or folders of images; there is no {path}.", "images")
            else:
                found.append(str(path))
        if not found:
            raise InputError("predict: images must be files or folders of images; got none.", "images")
        return list(dict.fromkeys(found)), others


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
            f"predict: classes must be at least two names with commas between them, or a file with a name in each "
            f"line; got {got}.",
            "classes",
        )
    return names

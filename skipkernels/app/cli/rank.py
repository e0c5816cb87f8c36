"""`skipkernels rank`."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import tyro

from skipkernels._progress import progress
from skipkernels.app.console import Terminal

from .options import Device, InferencePrecision, Run, Trust
from .predict import classify, find_paths, print_lines, print_skipped

if TYPE_CHECKING:
    from skipkernels.app.serve import Classifier, Predictions
    from skipkernels.app.serve.embedded_images import EmbeddedImages

_EXPLANATIONS = {
    "uncertainty": "The score is 1 − (p₁ − p₂), of the probabilities of the two best classes: 1 if they are equal.",
    "diversity": "The score is the distance, 1 − cosine of embeddings, to the nearest {known}image before in the list.",
    "suspects": "The score is 1 − the probability of the label, by the labels of all other training images: each votes "
    "with exp(10 · cosine of centred embeddings), averaged over the images of a class.",
}


class Ranked(NamedTuple):
    """Image in the list."""

    path: str
    score: float  # NaN if it has none
    label: str  # Most probable class
    probability: float
    given: str | None  # Class of a training image
    thumbnail: bytes  # Empty without a contact sheet


@dataclasses.dataclass(frozen=True)
class RankOptions:
    """Order and results."""

    by: Literal["uncertainty", "diversity", "suspects"] = "uncertainty"
    """uncertainty: images with two classes of nearly equal probability. diversity: images far from the training images
    and from each other. suspects: training images that resemble those of another class, and may have a wrong label."""
    count: int = 20
    """Number of images to list."""
    out: Path | None = None
    """CSV file of the list. By default it is printed."""
    sheet: Path | None = None
    """Page with the images of the list, .html."""


@dataclasses.dataclass(frozen=True)
class RankCommand:
    """List the images to label next, or training images with a doubtful label. The exit code is 1 if a file could not
    be read; the others are ranked.
    """

    run: Run
    """Folder of the run."""
    images: tyro.conf.Positional[tuple[Path, ...]] = ()
    """Images, or folders of images, which are searched with their subfolders. Not with suspects, which are training
    images of the run."""
    results: RankOptions = RankOptions()
    device: Device = None
    precision: InferencePrecision = "auto"
    trust: Trust = False

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Rank the images, and print or write the list. Returns 0, or 1 if a file could not be read."""
        from skipkernels.app.data import InputError
        from skipkernels.app.data.files import format_others
        from skipkernels.app.serve.output import check_file, write_lines
        from skipkernels.folders import replace_text
        from skipkernels.formatting import csv_line

        results = self.results
        for name, path, suffix in (("out", results.out, ".csv"), ("sheet", results.sheet, ".html")):
            if path is not None:
                check_file(path, "rank", name, [suffix])
        from skipkernels.app.serve.classifier import Classifier, check_counts  # imports torch

        check_counts(count=results.count)
        if results.by == "suspects" and self.images:
            raise InputError("rank: images must be left out with --by suspects, which ranks training images.", "images")
        paths, others = ([], None) if results.by == "suspects" else find_paths("rank", self.images)
        classifier = Classifier.load(self.run, device=self.device, precision=self.precision, trust=self.trust)
        rank = {"uncertainty": self._uncertain, "diversity": self._diverse}.get(results.by)
        ranked, unreadable, notes = self._suspects(classifier, err) if rank is None else rank(classifier, paths, err)
        columns = ["rank", "path", "score", "label", "probability", *(["given"] if rank is None else [])]
        lines = [csv_line(columns)]
        for number, each in enumerate(ranked, 1):
            score = "" if math.isnan(each.score) else f"{each.score:.6g}"
            cells = [number, each.path, score, each.label, f"{each.probability:.6g}", each.given]
            lines.append(csv_line(cells[: len(columns)]))
        if results.out is None:
            print_lines(lines, out)
        else:
            write_lines(results.out, lines)
        if results.sheet is not None:
            replace_text(results.sheet, self._sheet(ranked, notes))
        if others:
            err.print(format_others(others), soft_wrap=True)
        err.print("; ".join([f"{len(ranked):,} {notes[0]} listed, by {results.by}", *notes[1:]]), soft_wrap=True)
        return 1 if unreadable else 0

    def _uncertain(
        self, classifier: Classifier, paths: list[str], err: Terminal
    ) -> tuple[list[Ranked], int, list[str]]:
        """Rank images by the margin between the two best classes."""
        from skipkernels.app.serve.ranking import margin_scores
        from skipkernels.app.train.description import CALIBRATED, NOT_CALIBRATED

        found: list[tuple[float, str, str, float]] = []

        def use(part: Predictions) -> None:
            scores = margin_scores(part.probabilities).tolist()
            found.extend((score, name, *best[0]) for score, (name, best) in zip(scores, part, strict=True))

        unreadable = classify(classifier, paths, err, use, top=2)
        best = sorted(found, key=lambda each: (-each[0], each[1]))[: self.results.count]
        ranked = [Ranked(name, score, label, p, None, self._thumbnail(name)) for score, name, label, p in best]
        note = f"probabilities are {CALIBRATED if classifier.calibrated else NOT_CALIBRATED}"
        return ranked, unreadable, [f"of {len(found):,} images", note]

    def _diverse(self, classifier: Classifier, paths: list[str], err: Terminal) -> tuple[list[Ranked], int, list[str]]:
        """Choose images that are far from the training images, if they are found, and from each other."""
        from skipkernels.app.data import InputError
        from skipkernels.app.data.images import LabelledImages
        from skipkernels.app.serve.ranking import farthest_first

        try:
            known, note = self._training(classifier, err).embeddings, "starting from the training images"
        except InputError as error:
            known, note = None, f"without the training images: {error}"
        found = self._embedded(classifier, LabelledImages("", paths, [0] * len(paths)), [""], "images", err)
        chosen, distances = farthest_first(found.embeddings, known, self.results.count)
        best = classifier.predict([found.names[index] for index in chosen], top=1)
        ranked = [
            Ranked(name, distance, *labels[0], None, found.thumbnails[index])
            for index, distance, (name, labels) in zip(chosen, distances, best, strict=True)
        ]
        return ranked, len(found.unreadable), [f"of {len(found):,} images", note]

    def _suspects(self, classifier: Classifier, err: Terminal) -> tuple[list[Ranked], int, list[str]]:
        """Rank training images by the probability of their label."""
        from skipkernels.app.serve.ranking import leave_one_out

        found = self._training(classifier, err)
        probabilities = leave_one_out(found.embeddings, found.labels, len(found.classes))
        of_label = probabilities.gather(1, found.labels[:, None])[:, 0]
        order = [index for index in of_label.argsort(stable=True).tolist() if not of_label[index].isnan()]
        ranked = []
        for index in order[: self.results.count]:
            probability, label = probabilities[index].max(dim=0)
            given, doubt = found.classes[int(found.labels[index])], 1 - of_label[index].item()
            best = found.classes[int(label)], probability.item()
            ranked.append(Ranked(found.names[index], doubt, *best, given, found.thumbnails[index]))
        alone = len(found) - len(order)
        notes = [f"of {len(found):,} training images", f"not ranked, as the only ones of their class: {alone}"]
        return ranked, len(found.unreadable), notes if alone else notes[:1]

    def _training(self, classifier: Classifier, err: Terminal) -> EmbeddedImages:
        from skipkernels.app.serve.embedded_images import find_training_images

        images, classes = find_training_images(self.run, trust=self.trust)
        return self._embedded(classifier, images, classes, "training images", err)

    def _embedded(
        self, classifier: Classifier, images: Any, classes: list[str], title: str, err: Terminal
    ) -> EmbeddedImages:
        from skipkernels.app.serve.embedded_images import embed_images

        with progress(title, len(images)) as advance:
            found = embed_images(classifier, images, classes, advance)
        print_skipped(found.unreadable, err)
        return found

    def _thumbnail(self, path: str) -> bytes:
        from skipkernels.app.data.images import read_image
        from skipkernels.app.report.mistakes import encoded

        return b"" if self.results.sheet is None else encoded(read_image(path))

    def _sheet(self, ranked: list[Ranked], notes: list[str]) -> str:
        from skipkernels.app.report.rendering import render
        from skipkernels.app.train.command_line import command_line

        by = self.results.by
        known = "training image, or " if "starting from the training images" in notes else ""
        return render(
            "rank.html.j2",
            title=str(self.run.resolve().name),
            date="",
            headline=f"{len(ranked)} images to {'check' if by == 'suspects' else 'label next'}, {notes[0]}",
            explanation=_EXPLANATIONS[by].format(known=known),
            ranked=ranked,
            command=command_line("rank", self, ("run", "images")),
            environment=[("run", str(self.run)), ("by", by), ("notes", "; ".join(notes))],
            settings="",
        )

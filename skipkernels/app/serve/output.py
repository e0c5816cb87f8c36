"""Output of predictions: CSV, JSON, folders of images by label, and a contact sheet."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

from ...folders import replaced_file
from ...formatting import csv_line
from ..data import InputError
from ..data.images import read_image
from ..report.mistakes import encoded
from ..report.rendering import render
from ..train.run_folder import check_writable

Format = Literal["csv", "json"]
Row = tuple[str, list[tuple[str, float]]]
"""Name of an image, and its labels with their probabilities, best first."""

_LONGEST = 100  # characters of a folder name
_THUMBNAIL = 160  # pixels
_MOST = 2000  # images on a contact sheet: about 10 MB


def check_file(path: Path, argument: str) -> None:
    """Check that a file can be written, before the work is done."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise InputError(f"predict: {argument} must be a file in an existing folder; got {path}.", argument)
    parent = path.absolute().parent
    try:
        with tempfile.TemporaryDirectory(prefix=".skipkernels-", dir=parent):
            pass
    except OSError as error:
        raise InputError(
            f"predict: {argument}: {path} can't be written: {parent} is not a writable folder; choose another.",
            argument,
        ) from error


def lines(parts: Iterable[Iterable[Row]], form: Format, top: int) -> Iterator[str]:
    """Format predictions as the lines of a CSV or JSON file, while they are computed.

    CSV has a header and a row for each image: path, label, probability, label_2, probability_2, … up to `top`. JSON is
    a list of objects {"path": …, "predictions": [{"label": …, "probability": …}, …]}.
    """
    rows = (row for part in parts for row in part)
    yield from _csv(rows, top) if form == "csv" else _json(rows)


def _csv(rows: Iterable[Row], top: int) -> Iterator[str]:
    numbers = ["", *(f"_{n}" for n in range(2, top + 1))]
    yield csv_line(["path", *(f"{name}{number}" for number in numbers for name in ("label", "probability"))])
    for name, found in rows:
        yield csv_line([name, *(cell for label, p in found for cell in (label, f"{p:.6g}"))])


def _json(rows: Iterable[Row]) -> Iterator[str]:
    first = True
    for name, found in rows:
        predictions = [{"label": label, "probability": float(f"{p:.6g}")} for label, p in found]
        yield ("[\n" if first else ",\n") + json.dumps({"path": name, "predictions": predictions})
        first = False
    yield "[]\n" if first else "\n]\n"


def write_rows(path: Path, rows: Iterable[Row], form: Format, top: int) -> None:
    """Write predictions to a file; see `lines`."""
    # surrogateescape: the bytes of a file name that is not in UTF-8
    with replaced_file(path) as new, new.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
        file.writelines(lines([rows], form, top))


def folder_names(classes: Sequence[str]) -> list[str]:
    r"""Return a folder name for each class: names without separators, distinct also where case is ignored.

    >>> folder_names(["a/b", "A_b", "..", "cat"])
    ['a_b', 'A_b (2)', '_', 'cat']
    """
    names: list[str] = []
    used: set[str] = set()
    numbers: dict[str, int] = {}  # of the next folder with this base; counting from 2 each time would be quadratic
    for name in classes:
        base = re.sub(r'[\\/:*?"<>|\x00-\x1f]', "_", name).strip(". ")[:_LONGEST] or "_"
        chosen, number = base, numbers.get(base.casefold(), 2)
        while chosen.casefold() in used:
            chosen, number = f"{base} ({number})", number + 1
        numbers[base.casefold()] = number
        used.add(chosen.casefold())
        names.append(chosen)
    return names


class SortedFolders:
    """Folders named after labels, into which images are copied or linked."""

    def __init__(self, folder: Path, classes: Sequence[str], *, link: bool = False):
        if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
            raise InputError(f"predict: sort_into must be a new or an empty folder; got {folder}.", "sort_into")
        check_writable(folder, "sort_into", "predict")
        self._folder, self._link = folder, link
        self._names = dict(zip(classes, folder_names(classes), strict=True))
        self._next: dict[Path, int] = {}  # number of the next image with this path

    def add(self, path: str, label: str) -> None:
        """Copy or link an image into the folder of its label; equal file names are numbered."""
        image = Path(path)
        first = target = self._folder / self._names[label] / image.name
        number = self._next.get(first, 2)
        while os.path.lexists(target):
            target, number = first.with_name(f"{image.stem}-{number}{image.suffix}"), number + 1
        self._next[first] = number
        target.parent.mkdir(parents=True, exist_ok=True)
        if self._link:
            target.symlink_to(image.absolute())
        else:
            shutil.copyfile(image, target)


def contact_sheet(rows: Sequence[tuple[str, str, float]], title: str) -> str:
    """Return an HTML page with a thumbnail of each image (path, label, probability), by label, most probable first."""
    by_label = defaultdict(list)
    for path, label, probability in rows[:_MOST]:
        by_label[label].append((probability, path))
    note = f"{len(rows):,} images.{f' The first {_MOST:,} of them are shown.' if len(rows) > _MOST else ''}"
    labels = [
        (
            label,
            [(p, Path(path).name, encoded(read_image(path), _THUMBNAIL)) for p, path in sorted(found, reverse=True)],
        )
        for label, found in sorted(by_label.items())
    ]
    return render("contact_sheet.html.j2", title=title, note=note, labels=labels)

"""Output of predictions: CSV, JSON, folders of images by label, and a contact sheet."""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

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


class PartialRows:
    """Rows of predictions in OUT.partial, appended as they are computed, for a command that is interrupted and resumed.

    The first line is `identity`, all that the rows depend on; to `resume`, it must be the same. Then a row per line.
    """

    def __init__(self, out: Path, identity: Any, *, resume: bool = False):
        self.out, self._path = out, out.with_name(f"{out.name}.partial")
        self.done: set[str] = set()  # Names of the images with a row
        header = json.dumps(identity).encode() + b"\n"
        if resume and self._path.exists():
            with self._path.open("rb") as file:
                if file.readline() != header:
                    raise InputError(
                        f"predict: resume: {self._path} has rows of another run or other options. Give the same ones, "
                        "or leave out `resume` to start again.",
                        "resume",
                    )
            os.truncate(self._path, len(header) + sum(map(len, self._complete_lines())))
            self.done = {name for name, _ in self}
        else:
            self._path.write_bytes(header)

    def _complete_lines(self) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            file.readline()
            yield from (line for line in file if line.endswith(b"\n"))  # a kill may have cut the last line

    def __iter__(self) -> Iterator[Row]:
        try:
            for line in self._complete_lines():
                name, found = json.loads(line)
                yield name, [(label, probability) for label, probability in found]
        except (ValueError, TypeError) as error:
            raise InputError(f"predict: {self._path} is damaged ({error}). Delete it, and start again.") from error

    def add(self, part: Iterable[Row]) -> None:
        """Append rows."""
        rows = list(part)
        with self._path.open("ab") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        self.done.update(name for name, _ in rows)

    def write(self, form: Format, top: int, *, complete: bool) -> None:
        """Write the results, and delete OUT.partial if they are complete."""
        # surrogateescape: the bytes of a file name that is not in UTF-8
        encoded = (text.encode(errors="surrogateescape") for text in lines([self], form, top))
        with replaced_file(self.out) as new, new.open("wb") as file:
            file.writelines(encoded)
        if complete:
            self._path.unlink()


class SortedFolders:
    """Folders named after labels, into which images are copied or linked; with `resume`, an image in one is kept."""

    def __init__(self, folder: Path, classes: Sequence[str], *, link: bool = False, resume: bool = False):
        if os.path.lexists(folder) and not (folder.is_dir() and (resume or not any(folder.iterdir()))):
            raise InputError(
                f"predict: sort_into must be a new or an empty folder, or that of a command to `resume`; got {folder}.",
                "sort_into",
            )
        check_writable(folder, "sort_into", "predict")
        self._folder, self._link = folder, link
        self._next: dict[tuple[str, str], int] = {}  # number of the next image of a label with this file name
        self._added: set[str] = set()
        self._names = dict(zip(classes, folder_names(classes), strict=True))

    def add(self, path: str, label: str) -> None:
        """Copy or link an image into the folder of its label. Equal file names are numbered, in the order of calls."""
        folder, image = self._folder / self._names[label], Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        number = self._next.get((label, image.name), 1)
        while True:
            target = folder / (image.name if number == 1 else f"{image.stem}-{number}{image.suffix}")
            number += 1
            added = str(target).casefold() in self._added
            exists = os.path.lexists(target)
            if not added and (not exists or self._is_copy(target, path)):
                break
        self._next[label, image.name] = number
        self._added.add(str(target).casefold())
        if exists:
            return
        if self._link:
            os.symlink(os.path.abspath(path), target)
        else:
            partial = folder / ".skipkernels-partial"  # a kill leaves no half of an image under its name
            shutil.copyfile(path, partial)
            os.replace(partial, target)

    def _is_copy(self, target: Path, path: str) -> bool:
        if self._link or target.is_symlink():
            return self._link and target.is_symlink() and os.readlink(target) == os.path.abspath(path)
        return target.is_file() and filecmp.cmp(path, target, shallow=False)


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

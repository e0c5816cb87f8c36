"""Tables of images: `csv:PATH`, a file with a line of column names and a line for each image.

Columns are found by their names, in upper or lower case and in any order: the path of the image (`path`, `file`,
`filepath`, `filename`, `image`, `image_path`), its class (`class_name`, `category`, `class`, `label`, `target`; or
`caption` or `text`, where each different caption is a class and its own prompt), and, if there is one, its split
(`split`, `set`, `subset`: train, val or test). Other columns are ignored. Columns are separated by commas, tabs or
semicolons.

Paths are relative to `root`, by default the folder of the table, and may not lead out of it. A path with two classes or
in two splits is refused; a repeated line is skipped. Of a cell that begins with an apostrophe and =, +, - or @, as
`skipkernels predict` writes it for spreadsheets, the apostrophe is removed.
"""

from __future__ import annotations

import csv
import io
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ...formatting import csv_text
from .base import InputError, open_error
from .files import absolute_path, check_inside, format_names, missing_files, read_text
from .images import LabelledImages
from .source import Split, SplitSource
from .splits import CAPTIONS, LABEL_NAMES, SPLIT_NAMES, labels_by_name, listed_source
from .templates import Templates

_PATH_NAMES = ("path", "filepath", "file_path", "filename", "file_name", "file", "image", "image_path", "img")
_SPLIT_COLUMNS = ("split", "set", "subset")
_DELIMITERS = ",\t;"


def open_csv(path: str, root: str | Path | None = None, templates: Templates = None) -> SplitSource:
    """Open a table of images; `root` is the folder that paths are relative to, by default that of the table."""
    name, file = f"csv:{path}", absolute_path(path)
    if not path or not file.is_file():
        raise open_error(f"{name}: no file {file if path else 'given'}; it must be a table with a line for each image.")
    base = file.parent if root is None else absolute_path(root)
    header, lines = _read(file)
    at_path, at_label = (
        _column(file, header, _PATH_NAMES, "path"),
        _column(file, header, LABEL_NAMES, "label", first="label"),
    )
    at_split = next((header.index(each) for each in _SPLIT_COLUMNS if each in header), None)
    label_name = header[at_label]
    rows: dict[str, tuple[str, Split | None]] = {}
    repeated = 0
    for number, line in lines:
        where = f"{file}: line {number}"
        if len(line) != len(header):
            columns = f"{len(line)} {'column' if len(line) == 1 else 'columns'}"
            remedy = "Add the missing value" if len(line) < len(header) else "Put text with a separator in quotes"
            raise InputError(f"{where} has {columns}, and the first line has {len(header)}. {remedy}.")
        image, label = _relative(line[at_path].strip(), base, where), line[at_label].strip()
        if not image or not label:
            raise InputError(f"{where} has no {'path' if not image else label_name}. Fill it in, or remove the line.")
        split = None if at_split is None else SPLIT_NAMES.get(line[at_split].strip().lower())
        if at_split is not None and split is None:
            raise InputError(f"{where}: {header[at_split]} must be train, val or test; got {line[at_split]!a:.80}.")
        if rows.setdefault(image, (label, split)) != (label, split):
            other = " and ".join(str(each) for each in rows[image] if each is not None)
            raise InputError(
                f"{where}: {image} is listed before as {other}, and here as another class or split. Remove one."
            )
        repeated += 1
    repeated -= len(rows)
    if not rows:
        raise open_error(f"{name}: has no images. Add a line for each.")
    missing = missing_files(base, list(rows))
    if missing:
        raise open_error(
            f"{name}: no file {format_names(missing)} in {base}. Correct the paths, or name their folder as `root`.",
            "data" if root is None else "root",
        )
    labels, classes = labels_by_name(
        name, label_name, [label for label, _ in rows.values()], "name them in a column class_name"
    )
    splits = [split for _, split in rows.values() if split is not None]
    notes = [f"{name}: skipped repeated lines: {repeated}."] if repeated else []
    if templates is None and label_name in CAPTIONS:
        templates = "{}"
    return listed_source(
        name,
        LabelledImages(base, list(rows), labels),
        classes,
        splits or None,
        templates,
        notes=notes,
        how="no test images" if splits else "no column split",
        remedy="add a column split with train and test",
    )


def _read(file: Path) -> tuple[list[str], list[tuple[int, list[str]]]]:
    """Return the column names in lower case, and the other lines with their numbers."""
    text = read_text(file)
    first = text.partition("\n")[0]
    delimiter = max(_DELIMITERS, key=first.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        lines = [(reader.line_num, list(map(csv_text, line))) for line in reader if any(cell.strip() for cell in line)]
    except csv.Error as error:
        raise InputError(f"{file}: line {reader.line_num} is not readable as CSV ({error}). Correct it.") from error
    header = [cell.strip().lower() for cell in lines[0][1]] if lines else []
    repeated = sorted(cell for cell, count in Counter(header).items() if cell and count > 1)
    if repeated:
        raise InputError(f"{file}: two columns are named {format_names(repeated)}. Rename one.")
    return header, lines[1:]


def _column(file: Path, header: Sequence[str], names: Sequence[str], kind: str, first: str | None = None) -> int:
    """Position of the column with the best of some names; the error message lists `first` before the others."""
    for each in names:
        if each in header:
            return header.index(each)
    listed = sorted(names, key=lambda name: name != first)[:4]
    raise InputError(
        f"{file}: the first line must name a column with the {kind} of each image, such as {', '.join(listed)}; got "
        f"{', '.join(header)[:200] or 'nothing'}. Add the line, or rename a column."
    )


def _relative(path: str, base: Path, where: str) -> str:
    """Return a path relative to the base, with "/"; an absolute one must be in it."""
    if os.path.isabs(path):
        try:
            path = Path(path).relative_to(base).as_posix()
        except ValueError:
            raise InputError(
                f"{where}: {path} is not in {base}. Name a folder with all images as `root`.", "root"
            ) from None
    path = os.path.normpath(path).replace(os.sep, "/") if path and ".." not in path else path
    check_inside(path, where)
    return path

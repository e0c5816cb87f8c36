"""Tables of images: `csv:PATH`, a file with a line of column names and a line for each image.

Columns are found by their names, in upper or lower case and in any order: the path of the image (`path`, `file`,
`filepath`, `filename`, `image`, `image_path`), its class (`class_name`, `category`, `class`, `label`, `target`; or
`caption` or `text`, where each different caption is a class and its own prompt), and, if there is one, its split
(`split`, `set`, `subset`: train, val or test). Other columns are ignored. Columns are separated by commas, tabs or
semicolons.

Paths are relative to `root`, by default the folder of the table, and may not lead out of it. Each is listed once. The
apostrophe that `skipkernels predict` writes before =, +, - or @, for spreadsheets, is removed.
"""

from __future__ import annotations

import csv
import io
import itertools
import os
from collections.abc import Sequence
from pathlib import Path

from ...formatting import csv_text
from .base import InputError, open_error
from .class_names import labels_by_name
from .files import absolute_path, format_names, path_inside, read_text
from .images import Images
from .source import Source, Split
from .splits import SPLIT_NAMES, listed_source
from .templates import Templates

_PATH_NAMES = ("path", "filepath", "file_path", "filename", "file_name", "file", "image", "image_path", "img")
_LABEL_NAMES = ("class_name", "classname", "label_name", "category", "class", "label", "target", "caption", "text")
_SPLIT_COLUMNS = ("split", "set", "subset")
_DELIMITERS = ",\t;"


def open_csv(path: str, root: str | Path | None = None, templates: Templates = None) -> Source:
    """Open a table of images; `root` is the folder that paths are relative to, by default that of the table."""
    name, file = f"csv:{path}", absolute_path(path)
    if not file.is_file():
        raise open_error(f"{name}: no file {file}; it must be a table with a line for each image.")
    base = absolute_path(file.parent if root is None else root)
    columns, rows = _read(file)
    path_column = _column(file, columns, _PATH_NAMES, "path")
    label_column = _column(file, columns, _LABEL_NAMES, "label")
    split_column = _column(file, columns, _SPLIT_COLUMNS, "split") if {*_SPLIT_COLUMNS} & {*columns} else None
    class_of: dict[str, str] = {}  # by image
    splits: list[Split] = []
    for number, row in rows.items():
        where = f"{file}: row {number}"
        if not row[path_column] or not row[label_column]:
            raise InputError(f"{where} needs a {path_column} and a {label_column}. Fill them in, or remove the row.")
        image = path_inside(base, row[path_column])
        if image is None:
            raise InputError(f"{where}: {row[path_column]} is not in {base}. Name a folder of all as `root`.", "root")
        if image in class_of:
            raise InputError(f"{where}: {image} is listed before. Remove one row.")
        class_of[image] = row[label_column]
        if split_column is not None:
            splits.append(_split(where, split_column, row[split_column]))
    if not class_of:
        raise open_error(f"{name}: has no images. Add a line for each image.")
    if missing := [image for image in class_of if not os.path.isfile(base / image)]:
        problem = f"no file {format_names(missing)} in {base}"
        remedy = "Correct the paths, or name their folder as `root`."
        raise open_error(f"{name}: {problem}. {remedy}", "data" if root is None else "root")
    labels, classes = labels_by_name(
        f"open_source: {name}", list(class_of.values()), "name them in a column class_name"
    )
    images = Images.of_files(base, list(class_of), labels)
    return listed_source(name, images, classes, splits or None, templates, column=label_column)


def _split(where: str, column: str, name: str) -> Split:
    """Return a split by the name in its column."""
    if name.lower() not in SPLIT_NAMES:
        raise InputError(f"{where}: {column} must be train, val or test; got {name!a:.80}.")
    return SPLIT_NAMES[name.lower()]


def _read(file: Path) -> tuple[list[str], dict[int, dict[str, str]]]:
    """Return the column names in lower case, and the cells of the rows by number and column, without blank rows."""
    text = read_text(file)
    delimiter = max(_DELIMITERS, key=text.partition("\n")[0].count)
    try:
        table = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    except csv.Error as error:
        raise InputError(f"{file}: not readable as CSV ({error}). Correct it.") from error
    columns = [cell.strip().lower() for cell in table[0]] if table else []
    rows = {}
    for number, cells in enumerate(table[1:], 2):
        if len(cells) > len(columns):
            raise InputError(f"{file}: row {number} has more columns than row 1. Put text with a separator in quotes.")
        values = [csv_text(cell).strip() for cell in cells]
        if any(values):
            rows[number] = dict(itertools.zip_longest(columns, values, fillvalue=""))
    return columns, rows


def _column(file: Path, columns: Sequence[str], names: Sequence[str], kind: str) -> str:
    """Return the first of some names that is a column."""
    found = next((name for name in names if name in columns), None)
    if found is None or columns.count(found) > 1:
        raise InputError(
            f"{file}: row 1 must name one column with the {kind} of each image, such as {', '.join(names[:4])}; "
            f"got {', '.join(columns)[:200] or 'nothing'}. Add the row, or rename a column."
        )
    return found

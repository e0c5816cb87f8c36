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
    path_column = _column(file, header, _PATH_NAMES, "path")
    label_column = _column(file, header, LABEL_NAMES, "label")
    split_column = next((name for name in _SPLIT_COLUMNS if name in header), None)
    images: dict[str, tuple[str, Split | None]] = {}
    for number, row in lines:
        where = f"{file}: line {number}"
        image, label = _relative(row[path_column], base, where), row[label_column]
        if not image or not label:
            raise InputError(f"{where} has no {'path' if not image else label_column}. Fill it in, or remove the line.")
        split = None if split_column is None else SPLIT_NAMES.get(row[split_column].lower())
        if split_column is not None and split is None:
            raise InputError(f"{where}: {split_column} must be train, val or test; got {row[split_column]!a:.80}.")
        if images.setdefault(image, (label, split)) != (label, split):
            raise InputError(f"{where}: {image} is listed before with another class or split. Remove one.")
    if not images:
        raise open_error(f"{name}: has no images. Add a line for each.")
    missing = missing_files(base, list(images))
    if missing:
        raise open_error(
            f"{name}: no file {format_names(missing)} in {base}. Correct the paths, or name their folder as `root`.",
            "data" if root is None else "root",
        )
    labels, classes = labels_by_name(
        name, label_column, [label for label, _ in images.values()], "name them in a column class_name"
    )
    splits = [split for _, split in images.values() if split is not None]
    repeated = len(lines) - len(images)
    return listed_source(
        name,
        LabelledImages(base, list(images), labels),
        classes,
        splits or None,
        "{}" if templates is None and label_column in CAPTIONS else templates,
        notes=[f"{name}: skipped repeated lines: {repeated}."] if repeated else [],
        how="no test images" if splits else "no column split",
        remedy="add a column split with train and test",
    )


def _read(file: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Return the column names in lower case, and the other lines as dictionaries, with their numbers."""
    text = read_text(file)
    delimiter = max(_DELIMITERS, key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: list[tuple[int, dict[str, str]]] = []
    try:
        header = [cell.strip().lower() for cell in next(reader, [])]
        for cells in reader:
            if any(map(str.strip, cells)):
                if len(cells) != len(header):
                    raise InputError(
                        f"{file}: line {reader.line_num} has {len(cells)} columns, and the first line has "
                        f"{len(header)}. Put text with a separator in quotes."
                    )
                texts = (csv_text(cell).strip() for cell in cells)
                rows.append((reader.line_num, dict(zip(header, texts, strict=True))))
    except csv.Error as error:
        raise InputError(f"{file}: line {reader.line_num} is not readable as CSV ({error}). Correct it.") from error
    return header, rows


def _column(file: Path, header: Sequence[str], names: Sequence[str], kind: str) -> str:
    """Return the first of some names that is a column."""
    found = next((name for name in names if name in header), None)
    if found is None:
        raise InputError(
            f"{file}: the first line must name a column with the {kind} of each image, such as {', '.join(names[:4])}; "
            f"got {', '.join(header)[:200] or 'nothing'}. Add the line, or rename a column."
        )
    if header.count(found) > 1:
        raise InputError(f"{file}: two columns are named {found}. Rename one.")
    return found


def _relative(path: str, base: Path, where: str) -> str:
    """Return a path relative to the base, with "/"; an absolute one must be in it."""
    if os.path.isabs(path):
        try:
            path = Path(path).relative_to(base).as_posix()
        except ValueError:
            raise InputError(
                f"{where}: {path} is not in {base}. Name a folder with all images as `root`.", "root"
            ) from None
    check_inside(path, where)
    return os.path.normpath(path).replace(os.sep, "/") if path else path

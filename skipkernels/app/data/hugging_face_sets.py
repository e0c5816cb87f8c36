"""Datasets that the package `datasets` of Hugging Face reads; it runs no code of a dataset.

`hf:PATH` is a folder that `save_to_disk` wrote, and `hf:NAME` a dataset of the hub, which is downloaded. The column
with the images is the only one of the type Image, and the one with the classes the only one of the type ClassLabel.
Where there are several or none, a column is named, `hf:food101?image=image&label=label`; that of the classes may have
text. Also after the "?": `config=NAME` and `revision=TAG` of a dataset by name.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

from .base import open_error
from .class_names import class_names, labels_by_name
from .files import absolute_path, format_names
from .images import Images
from .reading import decode, read_image
from .source import Source, Split
from .splits import SPLIT_NAMES, listed_source
from .templates import Templates

_OPTIONS = ("image", "label", "config", "revision")
_TYPES = {"image": "Image", "label": "ClassLabel"}  # of the columns, by their option
_ON_DISK = ("dataset_dict.json", "dataset_info.json", "state.json")  # files of `save_to_disk`


class _Columns(NamedTuple):
    """Names of the columns that are read, and the class names of that of the labels; None if it has text or numbers."""

    image: str
    label: str
    classes: Sequence[str] | None


def open_hugging_face(spec: str, templates: Templates = None) -> Source:
    """Open a dataset of Hugging Face, PATH or NAME with options after "?"; see the docstring of this module."""
    where, _, query = spec.partition("?")
    name, options = f"hf:{where}", dict(parse_qsl(query, keep_blank_values=True))
    if not options.keys() <= set(_OPTIONS):
        raise open_error(f"hf:{spec}: options must be {', '.join(f'{each}=…' for each in _OPTIONS)}, joined by &.")
    notes: list[str] = []
    parts = _named_splits(name, _load(name, where, options), notes)
    features = parts.get("train", next(iter(parts.values()))).features
    image, label = (_column(name, features, option, options.get(option)) for option in _TYPES)
    columns = _Columns(image, label, getattr(features[label], "names", None))
    parts = _labelled_splits(name, parts, columns, notes)
    rows = [f"{split}/{index}" for split, part in parts.items() for index in range(len(part))]
    splits: list[Split] = [split for split, part in parts.items() for _ in range(len(part))]
    values = [value for part in parts.values() for value in part[columns.label]]
    labels, classes = _labels(name, columns, dict(zip(rows, values, strict=True)))
    dataset = RowDataset(list(parts.values()), columns.image, labels, [f"{name}: {row}" for row in rows])
    images = Images(dataset, labels, rows)
    return listed_source(name, images, classes, splits, templates, column=columns.label, notes=notes)


def _load(name: str, where: str, options: Mapping[str, str]) -> dict[str, Any]:
    """Return the dataset of each split, from the disk or the hub."""
    folder = absolute_path(where)
    on_disk = any((folder / file).is_file() for file in _ON_DISK)
    if not on_disk and (folder.exists() or Path(where).is_absolute()):
        raise open_error(f"{name}: must be a folder that save_to_disk wrote, with {' or '.join(_ON_DISK[:2])}.")
    try:
        import datasets
    except ImportError as error:
        raise open_error(f"{name} needs the package datasets: pip install 'skipkernels[datasets]'.") from error
    try:
        if on_disk:
            loaded = datasets.load_from_disk(str(folder))
        else:
            loaded = datasets.load_dataset(where, options.get("config"), revision=options.get("revision"))
    except Exception as error:  # any error of the network, the hub, or a format
        why = " ".join(f"{type(error).__name__}: {error.__cause__ or error}".split())[:300]
        raise open_error(f"{name}: can't be loaded ({why}). Is the name correct, and the network available?") from error
    return dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}


def _named_splits(name: str, loaded: Mapping[str, Any], notes: list[str]) -> dict[Split, Any]:
    """Return the dataset of each split with the name of one; append notes on the others."""
    named: dict[Split, Any] = {}
    for key, part in loaded.items():
        split = SPLIT_NAMES.get(key.lower())
        if split is None or split in named:
            notes.append(f"{name}: the split {key} is not used.")
        else:
            named[split] = part
    if not named:
        raise open_error(f"{name}: has the splits {format_names(list(loaded))}, none of which is train or test.")
    return named


def _column(name: str, features: Mapping[str, Any], option: str, given: str | None) -> str:
    """Return the given column, or the only one of the type; a column of images has this type in any case."""
    of_type = [column for column in features if type(features[column]).__name__ == _TYPES[option]]
    found = of_type if given is None else [given]
    if len(found) == 1 and found[0] in (of_type if option == "image" else features):
        return found[0]
    got = f"{' and '.join(found) or 'none'} among {', '.join(features)}"
    raise open_error(f"{name}: which column has the {option}s? Got {got}. Name it by ?{option}=NAME.")


def _labelled_splits(name: str, named: Mapping[Split, Any], columns: _Columns, notes: list[str]) -> dict[Split, Any]:
    """Return the splits of which all images have labels; append notes on the others."""
    image, label, classes = columns
    parts: dict[Split, Any] = {}
    for split, part in named.items():
        if type(part.features.get(image)).__name__ != "Image" or label not in part.features:
            notes.append(f"{name}: {split} does not have the columns {image} and {label}, so it is not used.")
        elif getattr(part.features[label], "names", None) != classes:
            raise open_error(f"{name}: {label} must have the same classes in each split; those of {split} differ.")
        elif split != "train" and any(value in (None, -1) for value in part[label]):
            notes.append(f"{name}: {split} has images without a label, so it is not used.")
        else:
            parts[split] = part
    if not parts:
        raise open_error(f"{name}: no split has images that all have a label. Add them.")
    return parts


def _labels(name: str, columns: _Columns, values: Mapping[str, Any]) -> tuple[list[int], tuple[str, ...]]:
    """Return the labels and class names by the values of the label column, which have the names of their rows."""
    for of_row, value in values.items():
        if value in ("", None, -1):
            raise open_error(
                f"{name}: {of_row} has no label; {columns.label} is {value!a}. Add it, or remove the sample."
            )
        if type(value) not in (int, str):
            raise open_error(
                f"{name}: {columns.label} must be text or a whole number; got {value!a:.80} for {of_row}. Correct it, "
                "or remove the sample."
            )
    location, remedy = f"open_source: {name}", "use another label=…"
    if columns.classes is not None:
        return list(values.values()), class_names(location, columns.classes, remedy)
    return labels_by_name(location, list(map(str, values.values())), remedy)


class RowDataset:
    """Images of datasets of Hugging Face, one after the other; item i is (image, label).

    Attributes:
        labels: Label of each image.
        identity: Identity of the images, for a feature cache.
    """

    def __init__(self, parts: list[Any], column: str, labels: list[int], names: Sequence[str]):
        import datasets

        self.labels, self._names, self._column = labels, names, column
        self.identity = " ".join([*(part._fingerprint for part in parts), column])
        # As bytes: the decoder of `datasets` takes any format, and ignores the orientation of photos.
        as_bytes = datasets.Image(decode=False)
        # One column of each part: the others may differ in type, which concatenate_datasets refuses.
        images = [part.select_columns([column]).cast_column(column, as_bytes) for part in parts]
        self._rows = datasets.concatenate_datasets(images)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, name = self._rows[index][self._column] or {}, self._names[index]
        if image.get("bytes") is None and image.get("path"):
            return read_image(image["path"]), self.labels[index]
        return decode(io.BytesIO(image.get("bytes") or b""), name), self.labels[index]

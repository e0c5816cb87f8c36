"""Datasets that the package `datasets` of Hugging Face reads; it runs no code of a dataset.

`hf:PATH` is a folder that `save_to_disk` wrote, and `hf:NAME` a dataset of the hub, which is downloaded. The column
with the images is the one of the type Image; the one with the classes has the type ClassLabel, or a name such as
`label` or `class_name`. Where there are several, or none, they are named: `hf:food101?image=image&label=label`. Also
after the "?": `config=NAME` and `revision=TAG` of a dataset by name.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from .base import open_error
from .class_names import class_names, labels_by_name
from .files import absolute_path, format_names
from .images import Images
from .reading import decode, read_image
from .source import Source, Split
from .splits import LABEL_NAMES, SPLIT_NAMES, listed_source
from .templates import Templates

_OPTIONS = ("image", "label", "config", "revision")
_ON_DISK = ("dataset_dict.json", "dataset_info.json", "state.json")  # files of `save_to_disk`


class RowDataset:
    """Images of a dataset of Hugging Face; item i is (image, label).

    Attributes:
        labels: Label of each image.
        identity: Identity of the images, for a feature cache.
    """

    def __init__(self, parts: list[Any], column: str, labels: list[int], names: Sequence[str]):
        import datasets

        rows = datasets.concatenate_datasets(parts)
        self.labels, self._names, self._column = labels, names, column
        self.identity = f"{rows._fingerprint} {column}"
        # As bytes: the decoder of `datasets` takes any format, and ignores the orientation of photos.
        self._rows = rows.select_columns([column]).cast_column(column, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, name = self._rows[index][self._column] or {}, self._names[index]
        if image.get("bytes") is None and image.get("path"):
            return read_image(image["path"]), self.labels[index]
        return decode(io.BytesIO(image.get("bytes") or b""), name), self.labels[index]


def open_hugging_face(spec: str, templates: Templates = None) -> Source:
    """Open a dataset of Hugging Face, PATH or NAME with options after "?"; see the docstring of this module."""
    where, _, query = spec.partition("?")
    name, options = f"hf:{where}", dict(parse_qsl(query, keep_blank_values=True))
    if not options.keys() <= set(_OPTIONS):
        raise open_error(f"hf:{spec}: options must be {', '.join(f'{each}=…' for each in _OPTIONS)}, joined by &.")
    loaded = _load(name, where, options)
    features = next(iter(loaded.values())).features
    of_images, of_classes = (
        [column for column in features if type(features[column]).__name__ == kind] for kind in ("Image", "ClassLabel")
    )
    image_column = _column(name, features, "image", of_images, options.get("image"))
    others = {column.lower(): column for column in features if column != image_column}
    named = [others[label] for label in LABEL_NAMES if label in others]
    label_column = _column(name, features, "label", of_classes or named[:1], options.get("label"))
    parts, notes = _used_splits(name, loaded, label_column)
    names = [f"{split}/{index}" for split, part in parts.items() for index in range(len(part))]
    values = [value for part in parts.values() for value in part[label_column]]
    for value, of_row in zip(values, names, strict=True):
        if type(value) not in (int, str) or value in ("", -1):
            raise open_error(
                f"{name}: {label_column} must be text or a whole number; got {value!a:.80} for {of_row}. Correct it, "
                "or remove the sample."
            )
    location, remedy = f"open_source: {name}", "use another label=…"
    if label_column in of_classes:
        labels, classes = values, class_names(location, features[label_column].names, remedy)
    else:
        labels, classes = labels_by_name(location, list(map(str, values)), remedy)
    try:
        images = RowDataset(list(parts.values()), image_column, labels, [f"{name}: {of_row}" for of_row in names])
    except (TypeError, ValueError, NotImplementedError) as error:
        raise open_error(f"{name}: {image_column} must be a column of images ({error}). Use image=….") from error
    return listed_source(
        name,
        Images(images, labels, names),
        classes,
        [split for split, part in parts.items() for _ in range(len(part))],
        templates,
        column=label_column,
        notes=notes,
    )


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


def _used_splits(name: str, loaded: Mapping[str, Any], label_column: str) -> tuple[dict[Split, Any], list[str]]:
    """Return the dataset of each split that is used, and notes on the others."""
    parts: dict[Split, Any] = {}
    notes: list[str] = []
    for key, part in loaded.items():
        split = SPLIT_NAMES.get(key.lower())
        if split is None or split in parts:
            notes.append(f"{name}: the split {key} is not used.")
        elif split != "train" and any(value in (None, -1) for value in part[label_column]):
            notes.append(f"{name}: {key} has images without a label, so it is not used.")
        else:
            parts[split] = part
    if not parts:
        raise open_error(f"{name}: has the splits {format_names(list(loaded))}, none of which is train or test.")
    return parts, notes


def _column(name: str, features: Any, kind: str, candidates: list[str], given: str | None = None) -> str:
    """Return the given column, or the only candidate."""
    found = candidates if given is None else [given]
    if len(found) == 1 and found[0] in features:
        return found[0]
    got = f"{' and '.join(found) or 'none'} among {', '.join(features)}"
    raise open_error(f"{name}: which column has the {kind}s? Got {got}. Name it by ?{kind}=NAME.")

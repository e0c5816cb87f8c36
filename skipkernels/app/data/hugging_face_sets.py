"""Datasets that the package `datasets` of Hugging Face reads; it runs no code of a dataset.

`hf:PATH` is a folder that `save_to_disk` wrote, and `hf:NAME` a dataset of the hub, which is downloaded. The column
with the images is the one of the type Image; the one with the classes has the type ClassLabel, or a name such as
`label` or `class_name`. Where there are several, or none, they are named: `hf:food101?image=image&label=label`. Also
after the "?": `config=NAME` and `revision=TAG` of a dataset by name.

`wds:SHARDS` are uncompressed tar files of webdataset on this machine: a path with braces, such as
`shards/{000..012}.tar` or `{train,test}-{00..03}.tar`, or a folder of shards. A sample is an image and its class in
`.cls`, `.json` or `.txt`; a `.json` has it in the field `class_name`, `class`, `label` or `caption`, among others.
Numbers are named by the file `classes.txt` beside the shards, with a name in each line. A shard is of a split if its
file name begins with train, val or test, or if it is in a folder of that name. `datasets` copies the shards to its
cache, and takes the type of the images and of the classes from the first samples.
"""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from .base import open_error
from .decoder import decode
from .files import absolute_path, format_names, read_text
from .images import DatasetImages, read_image
from .source import Source, Split, normalize_class_names
from .splits import CAPTIONS, LABEL_NAMES, SPLIT_NAMES, is_number, labels_by_name, listed_source
from .templates import Templates

_OPTIONS = ("image", "label", "config", "revision")
_ON_DISK = ("dataset_dict.json", "dataset_info.json", "state.json")  # files of `save_to_disk`
_LABEL_FILES = ("cls", "json", "txt")
_TAR_END = 1024  # zero bytes
_SPLIT_PREFIX = re.compile(rf"({'|'.join(sorted(SPLIT_NAMES, key=len, reverse=True))})(?![a-z])", re.IGNORECASE)


class RowDataset:
    """Images of a dataset of Hugging Face; item i is (image, label).

    Attributes:
        labels: Label of each image.
        identity: Identity of the images, for a feature cache.
    """

    def __init__(self, rows: Any, column: str, labels: list[int], names: Sequence[str]):
        self.labels, self._names, self._column = labels, names, column
        self.identity = f"{rows._fingerprint} {column}"
        # As bytes: the decoder of `datasets` takes any format, and ignores the orientation of photos.
        encoded = importlib.import_module("datasets").Image(decode=False)
        self._rows = rows.select_columns([column]).cast_column(column, encoded)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, name = self._rows[index][self._column] or {}, self._names[index]
        if image.get("bytes") is None and image.get("path"):
            return read_image(image["path"]), self.labels[index]
        return decode(image.get("bytes") or b"", name), self.labels[index]


def open_hugging_face(spec: str, templates: Templates = None) -> Source:
    """Open a dataset of Hugging Face, PATH or NAME with options after "?"; see the docstring of this module."""
    where, _, query = spec.partition("?")
    name, options = f"hf:{where}", dict(parse_qsl(query, keep_blank_values=True))
    if not where:
        raise open_error("hf: needs a folder or a name, such as hf:food101.")
    if not options.keys() <= set(_OPTIONS):
        raise open_error(f"hf:{spec}: options must be {', '.join(f'{each}=…' for each in _OPTIONS)}, joined by &.")
    folder = absolute_path(where)
    on_disk = any((folder / file).is_file() for file in _ON_DISK)
    if on_disk:
        loaded = _load(name, "load_from_disk", str(folder))
    elif folder.exists() or Path(where).is_absolute():
        raise open_error(f"{name}: must be a folder that save_to_disk wrote, with {' or '.join(_ON_DISK[:2])}.")
    else:
        loaded = _load(name, "load_dataset", where, options.get("config"), revision=options.get("revision"))
    features = next(iter(loaded.values())).features
    image_column = _column(name, features, "image", _of_type("Image", features), options.get("image"))
    of_classes = _of_type("ClassLabel", features)
    others = {column.lower(): column for column in features if column != image_column}
    named = [others[label] for label in LABEL_NAMES if label in others]
    label_column = _column(name, features, "label", of_classes or named[:1], options.get("label"))
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
    values = [value for part in parts.values() for value in part[label_column]]
    names = [f"{split}/{index}" for split, part in parts.items() for index in range(len(part))]
    known = features[label_column].names if label_column in of_classes else None
    return _source(name, parts, image_column, label_column, values, names, known, templates, notes)


def open_shards(pattern: str, templates: Templates = None) -> Source:
    """Open the shards SHARDS of webdataset; see the docstring of this module."""
    name = f"wds:{pattern}"
    shards = _shards(name, pattern)
    files: dict[Split | None, list[str]] = {}
    for shard in shards:
        files.setdefault(_split_of(shard), []).append(str(shard))
    if None in files:
        if len(files) > 1:
            raise open_error(
                f"{name}: some shards are named after a split, and {Path(files[None][0]).name} is not. Begin its name "
                "with train, val or test, or name only the other splits."
            )
        files = {"train": files[None]}
    parts: Any = _load(name, "load_dataset", "webdataset", data_files=files)
    features = next(iter(parts.values())).features
    image_column = _column(name, features, "image", _of_type("Image", features))
    label_column = _column(name, features, "label", [one for one in _LABEL_FILES if one in features][:1])
    field = label_column
    values = [value for part in parts.values() for value in part[label_column]]
    if label_column == "json":
        named = {key.lower(): key for key in values[0]} if isinstance(values[0], Mapping) else {}
        field = next((label for label in LABEL_NAMES if label in named), "")
        if not field:
            raise open_error(f"{name}: a .json has no field {', '.join(LABEL_NAMES)}. Rename the one with the class.")
        values = [value and value[named[field]] for value in values]
    values = [value.strip() if isinstance(value, str) else value for value in values]
    names = [
        f"{Path(shard).parent.name}/{Path(shard).name}/{key}.{image_column}"
        for part in parts.values()
        for shard, key in zip(part["__url__"], part["__key__"], strict=True)
    ]
    file, known = shards[0].parent / "classes.txt", None
    if file.is_file() and all(isinstance(value, int) or is_number(value or "") for value in values):
        known, values = read_text(file).rstrip().splitlines(), list(map(int, values))
        if max(values) >= len(known):
            raise open_error(
                f"{name}: {file} has {len(known)} names, and a sample has the class {max(values)}. Add it."
            )
    return _source(name, parts, image_column, field, values, names, known, templates, [])


def _source(
    name: str,
    parts: Mapping[Split, Any],
    image_column: str,
    label_column: str,
    values: list[Any],
    names: list[str],
    known: Sequence[str] | None,
    templates: Templates,
    notes: list[str],
) -> Source:
    """Return a source of the rows of some splits; `values` and `names` have the class and the name of each row.

    `known` are the names of the classes, if `values` are their numbers.
    """
    for value, of_row in zip(values, names, strict=True):
        if type(value) not in (int, str) or value in ("", -1):
            raise open_error(
                f"{name}: {label_column} must be text or a whole number; got {value!a:.80} for {of_row}. Correct it, "
                "or remove the sample."
            )
    if known is None:
        labels, classes = labels_by_name(name, label_column, list(map(str, values)), "use another label=…")
    else:
        labels, ids = values, range(len(known))
        classes = normalize_class_names(f"open_source: {name}", "data", "class", ids, known, "use another label=…")
    try:
        rows = importlib.import_module("datasets").concatenate_datasets(list(parts.values()))
        images = RowDataset(rows, image_column, labels, [f"{name}: {of_row}" for of_row in names])
    except (TypeError, ValueError, NotImplementedError) as error:
        raise open_error(f"{name}: {image_column} must be a column of images ({error}). Use image=….") from error
    return listed_source(
        name,
        DatasetImages(images, labels, names),
        classes,
        [split for split, part in parts.items() for _ in range(len(part))],
        "{}" if templates is None and label_column.lower() in CAPTIONS else templates,
        notes=notes,
        how="no test split",
        remedy="add a test split",
    )


def _load(name: str, function: str, *arguments: Any, **options: Any) -> dict[str, Any]:
    """Call a function of the package `datasets`; return the dataset of each split."""
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise open_error(f"{name} needs the package datasets: pip install 'skipkernels[datasets]'.") from error
    try:
        loaded = getattr(datasets, function)(*arguments, **options)
    except Exception as error:  # any error of the network, the hub, or a format
        why = " ".join(f"{type(error).__name__}: {error.__cause__ or error}".split())[:300]
        remedy = (
            "Is the name correct, and the network available" if name.startswith("hf:") else "Are the files complete"
        )
        raise open_error(f"{name}: can't be loaded ({why}). {remedy}?") from error
    return dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}


def _of_type(kind: str, features: Any) -> list[str]:
    return [column for column in features if type(features[column]).__name__ == kind]


def _column(name: str, features: Any, kind: str, candidates: list[str], given: str | None = None) -> str:
    """Return the given column, or the only candidate."""
    found = candidates if given is None else [given]
    if len(found) == 1 and found[0] in features:
        return found[0]
    got = f"{' and '.join(found) or 'none'} among {', '.join(features)}"
    remedy = f"Name it by ?{kind}=NAME" if name.startswith("hf:") else "Give each sample one image and one class"
    raise open_error(f"{name}: which column has the {kind}s? Got {got}. {remedy}.")


def _shards(name: str, pattern: str) -> list[Path]:
    """Return the paths of the shards, which must exist."""
    folder = absolute_path(pattern)
    if pattern and folder.is_dir():
        shards = sorted(folder.glob("*.tar")) or sorted(folder.glob("*/*.tar"))
    else:
        shards = []
        for shard in map(absolute_path, _expanded(pattern)):
            if not shard.is_file():
                raise open_error(f"{name}: no file {shard} on this machine. Correct the range, or download the shard.")
            shards.append(shard)
    for shard in shards:
        with shard.open("rb") as file:  # `datasets` takes a shard that was cut between two samples for a whole one
            file.seek(-min(_TAR_END, shard.stat().st_size), os.SEEK_END)
            if file.read() != bytes(_TAR_END):
                raise open_error(f"{name}: {shard} ends without the mark of the end of a tar file. Get it again.")
    if not shards:
        raise open_error(f"{name}: no .tar files. Name shards, such as wds:shards/{{000..012}}.tar, or their folder.")
    return shards


def _expanded(pattern: str) -> Iterator[str]:
    """Expand braces as a shell does: {a,b} and {000..012}.

    >>> list(_expanded("{train,test}-{08..10}.tar"))[:4]
    ['train-08.tar', 'train-09.tar', 'train-10.tar', 'test-08.tar']
    """
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        yield pattern
        return
    numbers = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if numbers:
        width = len(numbers[1])
        choices: Any = (str(number).zfill(width) for number in range(int(numbers[1]), int(numbers[2]) + 1))
    else:
        choices = found[1].split(",")
    for choice in choices:
        yield from _expanded(pattern[: found.start()] + choice + pattern[found.end() :])


def _split_of(shard: Path) -> Split | None:
    """Return the split in the name of a shard or of its folder.

    >>> _split_of(Path("a/train-001.tar")), _split_of(Path("val/0.tar")), _split_of(Path("a/trains.tar"))
    ('train', 'val', None)
    """
    found = _SPLIT_PREFIX.match(shard.name)
    return SPLIT_NAMES.get(found[1].lower() if found else shard.parent.name.lower())

"""Datasets of Hugging Face: `hf:PATH`, a folder that `save_to_disk` wrote, or `hf:NAME`, which is downloaded.

The column with the images is the one of the type Image; the one with the classes has the type ClassLabel, or a name
such as `label` or `class_name`. Where there are several, or none, they are named: `hf:food101?image=image&label=label`.
Also after the "?": `config=NAME` and `revision=TAG` of a dataset by name. The package `datasets` reads them; it runs no
code of the dataset.
"""

from __future__ import annotations

import importlib
import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from PIL import Image
from torch.utils.data import ConcatDataset, Dataset

from .base import InputError, open_error
from .files import absolute_path, format_names
from .images import DatasetImages, decode_image, read_image
from .source import Split, SplitSource, normalize_class_names
from .splits import CAPTIONS, LABEL_NAMES, SPLIT_NAMES, labels_by_name, listed_source
from .templates import Templates

_OPTIONS = ("image", "label", "config", "revision")
_TYPES = ("Image", "ClassLabel")
_DISK = ("dataset_dict.json", "dataset_info.json", "state.json")  # files of `save_to_disk`


class RowDataset(Dataset):
    """Images of a dataset of Hugging Face; item i is (image, label).

    Its images are read as bytes and decoded here: the decoder of `datasets` takes any format and any path.

    Attributes:
        labels: Label of each image.
        fingerprint: Fingerprint of the dataset, for a feature cache.
    """

    def __init__(self, rows: Any, column: str, labels: list[int], name: str, folders: Sequence[Path]):
        self.labels, self._name, self._column = labels, name, column
        self._folders = [os.path.join(os.path.realpath(folder), "") for folder in folders]
        self.fingerprint = f"{rows._fingerprint} {column}"
        encoded = importlib.import_module("datasets").Image(decode=False)
        self._rows = rows.select_columns([column]).cast_column(column, encoded)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        name = f"{self._name}: image {index}"
        found = self._rows[index][self._column] or {}
        content, path = found.get("bytes"), found.get("path")
        if content is not None:
            return decode_image(io.BytesIO(content), name), self.labels[index]
        file = os.path.realpath(path or "")
        if not file.startswith(tuple(self._folders)):
            got = f"{path}, outside of {self._folders[0]}" if path else "neither"
            raise InputError(f"{name}: must have its bytes, or a file of the dataset; got {got}. Remove the row.")
        return read_image(file, listed=True), self.labels[index]


def open_hugging_face(spec: str, templates: Templates = None) -> SplitSource:
    """Open a dataset of Hugging Face; see the docstring of this module.

    Args:
        spec: PATH or NAME, and options after "?".
        templates: See `open_source`. The default for captions is "{}".

    Raises:
        InputError: If the dataset can't be loaded, or its columns are not clear.
    """
    where, _, query = spec.partition("?")
    name, options = f"hf:{where}", dict(parse_qsl(query, keep_blank_values=True))
    if not where:
        raise open_error("hf: needs a folder or a name, such as hf:food101.")
    if not options.keys() <= set(_OPTIONS):
        raise open_error(f"hf:{spec}: options must be {', '.join(f'{each}=…' for each in _OPTIONS)}, joined by &.")
    parts, folders = _load(name, where, options)
    features = next(iter(parts.values())).features
    typed = {kind: [each for each in features if type(features[each]).__name__ == kind] for kind in _TYPES}
    column = _column(name, features, options, "image", typed["Image"])
    named = sorted(
        (each for each in features if each.lower() in LABEL_NAMES and each != column),
        key=lambda each: LABEL_NAMES.index(each.lower()),
    )
    of_class = _column(name, features, options, "label", typed["ClassLabel"] or named[:1])
    values: list[Any] = []
    rows: dict[Split, Any] = {}
    notes: list[str] = []
    for key, part in parts.items():
        split = SPLIT_NAMES.get(key.lower())
        if split is None or split in rows:
            notes.append(f"{name}: the split {key} is not used.")
            continue
        found = list(part[of_class])
        if any(value is None or value == -1 for value in found):
            if split == "train":
                raise open_error(f"{name}: a training image has no {of_class}. Remove it.")
            notes.append(f"{name}: {key} has images without a label, so it is not used.")
            continue
        values += found
        rows[split] = part
    if not rows:
        raise open_error(f"{name}: has the splits {format_names(list(parts))}, and none of train and test with labels.")
    if of_class in typed["ClassLabel"]:
        ids = list(features[of_class].names)
        classes = normalize_class_names(f"open_source: {name}", "data", "class", ids, ids, "use another label=…")
        labels = list(map(int, values))
    else:
        wrong = next((value for value in values if isinstance(value, bool) or not isinstance(value, (int, str))), None)
        if wrong is not None:
            raise open_error(f"{name}: {of_class} must be text or whole numbers; got {wrong!a:.80}. Use label=….")
        labels, classes = labels_by_name(name, of_class, list(map(str, values)), "use another label=…")
        if templates is None and of_class.lower() in CAPTIONS:
            templates = "{}"
    datasets: list[RowDataset] = []
    names: list[str] = []
    splits: list[Split] = []
    for split, part in rows.items():
        own = labels[len(names) : len(names) + len(part)]
        try:
            datasets.append(RowDataset(part, column, own, f"{name}, {split}", folders))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise open_error(f"{name}: {column} must be a column of images ({error}). Use image=….") from error
        names += [f"{split}/{index}" for index in range(len(part))]
        splits += [split] * len(part)
    images = DatasetImages(ConcatDataset(datasets), labels, names)
    return listed_source(
        name, images, classes, splits, templates, notes=notes, how="no test split", remedy="add a test split"
    )


def _load(name: str, where: str, options: Mapping[str, str]) -> tuple[dict[str, Any], list[Path]]:
    """Return the dataset of each split, and the folders with its files."""
    try:
        import datasets
        from huggingface_hub.constants import HF_HUB_CACHE
    except ImportError as error:
        raise open_error(f"{name} needs the package datasets: pip install 'skipkernels[datasets]'.") from error
    folder = absolute_path(where)
    on_disk = any((folder / file).is_file() for file in _DISK)
    if not on_disk and (folder.exists() or Path(where).is_absolute()):
        raise open_error(f"{name}: must be a folder that save_to_disk wrote, with {' or '.join(_DISK[:2])}.")
    try:
        if on_disk:
            loaded: Any = datasets.load_from_disk(str(folder))
        else:
            loaded = datasets.load_dataset(where, options.get("config"), revision=options.get("revision"))
    except Exception as error:  # any error of the network, the hub, or a format
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise open_error(f"{name}: can't be loaded ({why}). Is the name correct, and the network available?") from error
    folders = [folder] if on_disk else [Path(HF_HUB_CACHE), Path(datasets.config.HF_DATASETS_CACHE)]
    return dict(loaded) if isinstance(loaded, Mapping) else {"train": loaded}, folders


def _column(name: str, features: Any, options: Mapping[str, str], kind: str, candidates: list[str]) -> str:
    """Return the column that the options name, or the only candidate."""
    given = options.get(kind)
    found = candidates if given is None else [given]
    if len(found) == 1 and found[0] in features:
        return found[0]
    raise open_error(
        f"{name}: which column has the {kind}s? The columns are {', '.join(features)}; got "
        f"{' and '.join(found) or 'none'}. Add ?{kind}=NAME."
    )

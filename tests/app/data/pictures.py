"""Small images on the disk, in folders of datasets. The red channel of an image encodes its class."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch.utils.data import Dataset

from skipkernels.app.data import InputError
from skipkernels.app.data.coop import DATASETS
from skipkernels.app.data.source import Source, Split

SPLITS = {"train": 4, "val": 1, "test": 2}  # images of each class
RED = 20  # difference between two classes


def draw_image(path: Path, label: int = 0) -> None:
    """Draw an image of a class."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (5, 4), (RED * label, 9, 9)).save(path)


class Listed(Dataset):
    """Map-style dataset of (image, label), made of labels, with further attributes; `loaded` are the items read."""

    def __init__(self, own: Sequence[Any], make: Callable[[Any], Any] = lambda label: None, **attributes: Any):
        self._own, self._make, self.loaded = list(own), make, []
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(self._own)

    def __getitem__(self, item: int) -> tuple[Any, Any]:
        self.loaded.append(item)
        return self._make(self._own[item]), self._own[item]


def encoded(image: Image.Image, kind: str = "png", **options: Any) -> bytes:
    """Return an image as the bytes of a file."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def class_of(image: Image.Image) -> int:
    """Return the class of an image."""
    return round(image.getpixel((2, 2))[0] / RED)


def contents(source: Source, split: Split) -> dict[str, list[str]]:
    """Image names by class name, after a check that every image is of its class."""
    images, found = source.images(split), {}
    for index, (name, label) in enumerate(zip(images.names, images.labels, strict=True)):
        image, itself = images[index]
        assert class_of(image) == label == itself
        found.setdefault(source.classes[label], []).append(name)
    return found


def make_folders(root: Path, counts: dict[str, int], extension: str = ".png") -> Path:
    """Make folders of images; the class of an image is the rank of its folder's name."""
    names = sorted({folder.rpartition("/")[2] for folder in counts})
    for folder, count in counts.items():
        for number in range(count):
            draw_image(root / folder / f"{number:02d}{extension}", names.index(folder.rpartition("/")[2]))
    return root


@contextmanager
def raises_input_error(*words: str | Path, argument: Any = ...) -> Iterator[None]:
    """Expect an InputError with a message of one line that contains the words, and, if given, about an argument."""
    with pytest.raises(InputError) as caught:
        yield
    text = str(caught.value)
    assert len(text.splitlines()) == 1 and text.isprintable() and text.endswith((".", "?"))
    for word in words:
        assert str(word) in text
    assert argument in (..., caught.value.argument)


# ---- CoOp's layout ---------------------------------------------------------------------------------------------------

NAMES = ["apple_pie", "baby back ribs", "crème brûlée"]
WNIDS = ["n01440764", "n01443537", "n01484850", "n01491361"]
IMAGENET_NAMES = ["tench", "goldfish", "great white shark", "tiger shark"]
# Class folders of ImageNet and its variants.
_FOLDERS = {"imagenet": WNIDS, "imagenetv2": ["0", "1", "2", "3"], "imagenet_sketch": WNIDS}
_FOLDERS |= {"imagenet_a": [WNIDS[1], WNIDS[3]], "imagenet_r": WNIDS[:3]}


def make_coop(root: Path, name: str) -> Path:
    """Make a dataset in CoOp's layout, of the three classes of NAMES, or the four of IMAGENET_NAMES; return `root`."""
    folder, images = root / DATASETS[name].folder, root / DATASETS[name].folder / DATASETS[name].images
    if name in _FOLDERS:
        _make_imagenet(name, folder, images)
    else:
        _make_lists(folder, images, DATASETS[name].split_file)
    return root


def _make_imagenet(name: str, folder: Path, images: Path) -> None:
    for part, count in {"train": 4, "val": 2}.items() if name == "imagenet" else [("", 2)]:
        for label, of_class in enumerate(_FOLDERS[name]):
            for number in range(count):
                draw_image(images / part / of_class / f"{number}.JPEG", label)
    (images / "scripts").mkdir()
    (images / "README.txt").write_text("cite us")
    lines = [f"{wnid} {of_class}\n" for wnid, of_class in zip(WNIDS, IMAGENET_NAMES, strict=True)]
    (folder / "classnames.txt").write_text("".join(reversed(lines)))  # not in the order of the labels


def _make_lists(folder: Path, images: Path, split_file: str) -> None:
    """Make images with a JSON file of all splits, or with the text files of Aircraft."""
    listed: dict[str, list[tuple[str, int, str]]] = {
        split: [(f"{split}_{label}{number}.jpg", label, NAMES[label]) for label in range(3) for number in range(count)]
        for split, count in SPLITS.items()
    }
    for split, items in listed.items():
        for path, label, _ in items:
            draw_image(images / path, label)
        if not split_file:
            lines = [f"{path.removesuffix('.jpg')} {of_class}\n" for path, _, of_class in items]
            (folder / f"images_variant_{split}.txt").write_text("".join(lines))
    if split_file:
        (folder / split_file).write_text(json.dumps(listed))
    else:
        (folder / "variants.txt").write_text("\n".join(NAMES))

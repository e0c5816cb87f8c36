"""Small images on the disk, in folders of datasets. The red channel of an image encodes its class."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from torch.utils.data import Dataset

from skipkernels.app.data import InputError

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


def decoders(parent: int | None = None) -> list[int]:
    """Return the processes that decode images for a process, by default for this one."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, parent_of_it = path.read_text().rpartition(")")[2].split()[:2]
            command = path.with_name("cmdline").read_bytes()
            if int(parent_of_it) == (parent or os.getpid()) and state != "Z" and b".decoder import answer" in command:
                found.append(int(path.parent.name))
    return found


def slow_picture() -> bytes:
    """Return a pixmap that Pillow decodes in a loop of Python, for several seconds."""
    return b"P6\n2500 2500\n254\n" + bytes(3 * 2500 * 2500)


def class_of(image: Image.Image) -> int:
    """Return the class of an image."""
    return round(image.getpixel((2, 2))[0] / RED)


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

# Folder, root of its paths, split file, and a path as in the published split files.
JSON_SETS = {
    "caltech101": ("caltech-101", "101_ObjectCategories", "split_zhou_Caltech101.json", "{}/image_{:04d}.jpg"),
    "oxford_pets": ("oxford_pets", "images", "split_zhou_OxfordPets.json", "{}_{}.jpg"),
    "stanford_cars": ("stanford_cars", ".", "split_zhou_StanfordCars.json", "cars_train/{}{:05d}.jpg"),
    "oxford_flowers": ("oxford_flowers", "jpg", "split_zhou_OxfordFlowers.json", "image_{}{:05d}.jpg"),
    "food101": ("food-101", "images", "split_zhou_Food101.json", "{}/{}.jpg"),
    "sun397": ("sun397", "SUN397", "split_zhou_SUN397.json", "a/{}/sun_{}.jpg"),
    "dtd": ("dtd", "images", "split_zhou_DescribableTextures.json", "{0}/{0}_{1:04d}.jpg"),
    "eurosat": ("eurosat", "2750", "split_zhou_EuroSAT.json", "{0}/{0}_{1}.jpg"),
    "ucf101": ("ucf101", "UCF-101-midframes", "split_zhou_UCF101.json", "{0}/v_{0}_g01_c{1:02d}.jpg"),
}
NAMES = ["apple_pie", "baby back ribs", "crème brûlée"]
WNIDS = ["n01440764", "n01443537", "n01484850", "n01491361"]
IMAGENET_NAMES = ["tench", "goldfish", "great white shark", "tiger shark"]


def make_coop(root: Path, name: str) -> Path:
    """Make a dataset in CoOp's layout, of the three classes of NAMES, or the four of IMAGENET_NAMES."""
    if name in JSON_SETS:
        folder, start, split_file, pattern = JSON_SETS[name]
        content: dict[str, list[Any]] = {split: [] for split in SPLITS}
        number = 0
        for split, count in SPLITS.items():
            for label, of_class in enumerate(NAMES):
                for _ in range(count):
                    number += 1
                    path = pattern.format(of_class.replace(" ", "_"), number)
                    draw_image(root / folder / start / path, label)
                    content[split].append([path, label, of_class])
        (root / folder / split_file).write_text(json.dumps(content))
    elif name == "fgvc_aircraft":
        folder = root / "fgvc_aircraft"
        number = 0
        for split, count in SPLITS.items():
            lines = []
            for label, of_class in enumerate(NAMES):
                for _ in range(count):
                    number += 1
                    draw_image(folder / "images" / f"{number:07d}.jpg", label)
                    lines.append(f"{number:07d} {of_class}\n")
            (folder / f"images_variant_{split}.txt").write_text("".join(lines))
        (folder / "variants.txt").write_text("".join(f"{of_class}\n" for of_class in NAMES))
    elif name == "imagenet":
        for label, wnid in enumerate(WNIDS):
            for number in range(4):
                draw_image(root / "imagenet/images/train" / wnid / f"{wnid}_{number}.JPEG", label)
            for number in range(2):
                draw_image(root / "imagenet/images/val" / wnid / f"ILSVRC2012_val_{number:08d}.JPEG", label)
        (root / "imagenet/images/train/scripts").mkdir()
        classnames(root / "imagenet")
    else:
        inside, of_classes = {
            "imagenetv2": ("imagenetv2/imagenetv2-matched-frequency-format-val", ["0", "1", "2", "3"]),
            "imagenet_sketch": ("imagenet-sketch/images", WNIDS),
            "imagenet_a": ("imagenet-adversarial/imagenet-a", [WNIDS[1], WNIDS[3]]),
            "imagenet_r": ("imagenet-rendition/imagenet-r", WNIDS[:3]),
        }[name]
        for label, folder in enumerate(of_classes):
            for number in range(2):
                draw_image(root / inside / folder / f"{number}.jpg", label)
        (root / inside / "README.txt").write_text("cite us")
        classnames(root / inside.partition("/")[0])
    return root


def classnames(folder: Path) -> None:
    """Write the class names of ImageNet, not in the order of the labels."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{wnid} {name}\n" for wnid, name in zip(WNIDS, IMAGENET_NAMES, strict=True)]
    (folder / "classnames.txt").write_text("".join(reversed(lines)))

"""A few images of each class: the same ones wherever they are drawn, and kept as a list of paths."""

from __future__ import annotations

import hashlib
import heapq
import json
import reprlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path

from ..store import replace_text
from .base import InputError
from .files import read_json, shown
from .images import Images


def place(purpose: str, seed: int, name: str) -> tuple[bytes, str]:
    """Where a name comes in an order by chance that depends on nothing but the purpose, the seed and the name."""
    text = f"{purpose}/{seed}/{name}".encode("utf-8", "surrogateescape")  # a name need not be a text on Linux
    return hashlib.sha256(text).digest(), name


def few_shot(labels: Sequence[int], names: Sequence[str], shots: int, seed: int) -> list[int]:
    """Choose images of each class by chance.

    The choice depends on the seed, the names and the labels, and not on the order of the images, the process or the
    machine. It is nested: what is chosen of a class for 4 shots comes first in what is chosen for 8. An image that is
    added or removed changes the choice by one image of its class at most.

    Args:
        labels: Of the images.
        names: Of the images, such as paths from the root.
        shots: Images of each class; a class that has fewer gives all it has (see `shortfall`).
        seed: Chooses.

    Returns:
        Numbers of the images, class by class in the order of the labels.

    Raises:
        InputError: If shots is below 1.

    Example:
        >>> names = [f"{animal}/{n}.jpg" for animal in ("cat", "dog") for n in range(10)]
        >>> [names[i] for i in few_shot([0] * 10 + [1] * 10, names, shots=2, seed=1)]
        ['cat/6.jpg', 'cat/5.jpg', 'dog/0.jpg', 'dog/9.jpg']
    """
    if shots < 1:
        raise InputError(f"--shots must be at least 1; got {shots}: every class needs a training image.")
    images: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        images[label].append(index)
    return [
        index
        for label in sorted(images)
        for index in heapq.nsmallest(shots, images[label], key=lambda index: place("few-shot", seed, names[index]))
    ]


def shortfall(labels: Sequence[int], classes: Sequence[str], shots: int) -> str | None:
    """What to tell a user if some classes have fewer images than were asked for, else None.

    Args:
        labels: Of the images that there are, or that were chosen.
        classes: Names, by label.
        shots: Images of each class that were asked for.

    Example:
        >>> shortfall([0, 0, 1], ["cat", "dog"], shots=2)
        'fewer than 2 training images, and so all there are, of 1 of 2 classes: dog (1).'
    """
    counts = Counter(labels)
    short = [f"{name} ({counts[label]})" for label, name in enumerate(classes) if counts[label] < shots]
    if not short:
        return None
    return (
        f"fewer than {shots} training images, and so all there are, of {len(short)} of {len(classes)} classes: "
        f"{shown(short)}."
    )


def save_few_shot(
    path: str | Path, images: Images, *, data: str, classes: Sequence[str], shots: int, seed: int
) -> None:
    """Write which images were chosen: a JSON file with lists of path, label and class name, as CoOp's split files.

    Args:
        path: The file, which is replaced as a whole or not at all.
        images: Those that were chosen. Their paths are written from the root, so that the root may move.
        data: Of what dataset, for who reads the file.
        classes: Names, by label.
        shots: Images of each class that were asked for.
        seed: That chose.
    """
    chosen = [[name, label, classes[label]] for name, label in zip(images.names, images.labels, strict=True)]
    head = {"data": data, "shots": shots, "seed": seed}
    lines = ",\n".join(f"    {json.dumps(item)}" for item in chosen)  # one image a line, to be read and compared
    text = json.dumps(head, indent=2).removesuffix("\n}") + f',\n  "train": [\n{lines}\n  ]\n}}\n'
    replace_text(Path(path), text)


def load_few_shot(path: str | Path, images: Images, classes: Sequence[str]) -> list[int]:
    """Numbers of the images that a file of `save_few_shot` lists, for `images.subset`.

    Args:
        path: The file.
        images: All training images. What is listed must be among them, with the same label and class.
        classes: Names, by label.

    Raises:
        InputError: If the file can't be read, or lists something else or something twice; names the first.

    Example:
        >>> import tempfile
        >>> from skipkernels.data import PickedImages
        >>> file, images = Path(tempfile.mkdtemp(), "few_shot.json"), PickedImages([("a", 0), ("b", 1), ("c", 0)])
        >>> save_few_shot(file, images.subset([2, 1]), data="letters", classes=["x", "y"], shots=1, seed=0)
        >>> load_few_shot(file, images, ["x", "y"])
        [2, 1]
    """
    content = read_json(Path(path))
    listed = content.get("train") if isinstance(content, dict) else None
    if not isinstance(listed, list):
        raise InputError(f'{path}: expected {{"train": [[path, label, class name], …]}}, as save_few_shot writes it.')
    numbers = {(name, label): i for i, (name, label) in enumerate(zip(images.names, images.labels, strict=True))}
    chosen: dict[int, None] = {}
    for item in listed:
        if not (isinstance(item, list) and len(item) == 3 and isinstance(item[0], str) and type(item[1]) is int):
            raise InputError(f"{path}: every entry must be [path, label, class name]; got {reprlib.repr(item)}.")
        name, label, of_class = item
        number = numbers.get((name, label))
        if number is None:
            raise InputError(
                f"{path}: {name!r} with label {label} is not among the training images here. Give the dataset and "
                "the classes that the file was written for."
            )
        if classes[label] != of_class:
            raise InputError(
                f"{path}: class {label} is {of_class!r} there, and {classes[label]!r} here. Give the dataset and the "
                "classes that the file was written for."
            )
        if number in chosen:
            raise InputError(f"{path}: {name!r} is listed twice. Remove one.")
        chosen[number] = None
    return list(chosen)

"""What a model answers wrongly, in pictures: images that tuning mended or broke, and classes taken for others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from ..data import SizedDataset

_SIDE = 128  # of a picture at most, in pixels


@dataclass(frozen=True)
class Example:
    """A test image, its class, and the classes that came first before and after tuning."""

    test: str
    image: Image.Image
    label: str
    zero_shot: str
    tuned: str


@dataclass(frozen=True)
class Confusion:
    """A class that is often taken for another.

    Attributes:
        test: Whose classes they are.
        image: A test image of the class, taken for the other one.
        label: The class.
        taken_for: The other one.
        taken_image: A test image of the other one, if there is any.
        count: Images of the class that are taken for the other one.
        of: Test images of the class.
    """

    test: str
    image: Image.Image
    label: str
    taken_for: str
    taken_image: Image.Image | None
    count: int
    of: int


def examples(
    test: str,
    images: SizedDataset,
    classes: Sequence[str],
    labels: Tensor | Sequence[int],
    zero_shot: Tensor,
    tuned: Tensor,
    *,
    limit: int = 12,
) -> list[Example]:
    """Test images that were wrong before tuning and are right after it, or the other way round: one of a class.

    Args:
        test: Name of the test.
        images: Items are (image, label): images of Pillow, or tensors [3, H, W].
        classes: Names by label.
        labels: [n], of the images.
        zero_shot: [n], the classes that came first before tuning.
        tuned: [n], the classes that come first after it.
        limit: Images at most, of classes from all over.

    Example:
        >>> letters = [(Image.new("L", (8, 8)), 0), (Image.new("L", (8, 8)), 1)]
        >>> example, = examples("new", letters, ["a", "b"], [0, 1], torch.tensor([1, 1]), torch.tensor([0, 1]))
        >>> example.label, example.zero_shot, example.tuned
        ('a', 'b', 'a')
    """
    labels = torch.as_tensor(labels)
    flipped = ((zero_shot == labels) != (tuned == labels)).nonzero().flatten().tolist()
    first_of = {int(labels[index]): index for index in reversed(flipped)}
    found = [first_of[label] for label in sorted(first_of)]
    shown = min(limit, len(found))
    chosen = [found[place * len(found) // shown] for place in range(shown)]
    return [
        Example(test, picture(images[index][0]), *(classes[int(of[index])] for of in (labels, zero_shot, tuned)))
        for index in chosen
    ]


def confusions(
    test: str,
    images: SizedDataset,
    classes: Sequence[str],
    labels: Tensor | Sequence[int],
    predictions: Tensor,
    *,
    limit: int = 8,
) -> list[Confusion]:
    """The classes with the most errors, each with the class that it is taken for most often.

    Where two classes have as many errors, or are answered as often, the first of them in `classes` comes first.

    Args:
        test: Name of the test.
        images: Items are (image, label): images of Pillow, or tensors [3, H, W].
        classes: Names by label.
        labels: [n], of the images.
        predictions: [n], the classes that come first.
        limit: Classes at most.

    Example:
        >>> letters = [(Image.new("L", (8, 8)), label) for label in (0, 0, 1)]
        >>> confusion, = confusions("base", letters, ["a", "b"], [0, 0, 1], torch.tensor([0, 1, 1]))
        >>> confusion.label, confusion.taken_for, confusion.count, confusion.of
        ('a', 'b', 1, 2)
    """
    true, said = torch.as_tensor(labels).tolist(), predictions.tolist()
    places: dict[int, dict[int, list[int]]] = {}  # of the errors, by label and answer
    for index, (label, answer) in enumerate(zip(true, said, strict=True)):
        if label != answer:
            places.setdefault(label, {}).setdefault(answer, []).append(index)
    size = Counter(true)
    found = []
    for label in sorted(places, key=lambda label: (-sum(map(len, places[label].values())), label))[:limit]:
        answer = min(places[label], key=lambda answer: (-len(places[label][answer]), answer))
        mistaken = places[label][answer]
        found.append(
            Confusion(
                test,
                picture(images[mistaken[0]][0]),
                classes[label],
                classes[answer],
                picture(images[true.index(answer)][0]) if answer in size else None,
                count=len(mistaken),
                of=size[label],
            )
        )
    return found


def picture(image: Any) -> Image.Image:
    """An image of Pillow or a tensor as RGB, small enough to be shown: 128 pixels a side at most.

    A tensor was normalised somehow: its smallest value becomes black and its largest white.

    >>> picture(Image.new("RGB", (4000, 3000))).size
    (128, 96)
    >>> picture(torch.randn(3, 32, 32)).size
    (32, 32)
    """
    if isinstance(image, Tensor):
        least, most = image.aminmax()
        return picture(to_pil_image(((image - least) / (most - least).clamp(min=1e-12)).float().cpu()))
    small = image.convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    return small

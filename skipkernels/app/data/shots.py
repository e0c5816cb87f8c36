"""Choice of a few images of each class, which depends only on labels, names and a seed; sizes of the classes."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from operator import itemgetter

_UNEVEN = 3  # times as many images in the largest class as in the smallest, of which a note is made


def shuffled_by_class(labels: Sequence[int], names: Sequence[str], purpose: str, seed: int = 0) -> list[list[int]]:
    """Return the indices of the images of each class, in a pseudorandom order of their names.

    The order depends only on the purpose, the seed and the names, so another image does not change it.
    """

    def key(index: int) -> tuple[bytes, str]:
        # File names on Linux may not be UTF-8.
        text = f"{purpose}/{seed}/{names[index]}".encode("utf-8", "surrogateescape")
        return hashlib.sha256(text).digest(), names[index]

    images: dict[int, list[int]] = defaultdict(list)
    for index, label in enumerate(labels):
        images[label].append(index)
    return [sorted(images[label], key=key) for label in sorted(images)]


def few_shot(labels: Sequence[int], names: Sequence[str], shots: int, seed: int) -> list[int]:
    """Choose images of each class pseudorandomly.

    The choice depends on the seed, the names and the labels only, not on the order of the images. It is nested: the
    images of a class for 4 shots are the first 4 of those for 8. Adding or removing an image changes at most one.

    Args:
        labels: Label of each image.
        names: Name of each image, such as its path from the root.
        shots: Images of each class, at least 1; all images of a class that has fewer.
        seed: Seed of the choice.

    Returns:
        Indices of the images, class by class in the order of the labels.

    Example:
        >>> names = [f"{animal}/{n}.jpg" for animal in ("cat", "dog") for n in range(10)]
        >>> [names[i] for i in few_shot([0] * 10 + [1] * 10, names, shots=2, seed=1)]
        ['cat/6.jpg', 'cat/5.jpg', 'dog/0.jpg', 'dog/9.jpg']
    """
    return [index for order in shuffled_by_class(labels, names, "few-shot", seed) for index in order[:shots]]


def hold_out(
    labels: Sequence[int], names: Sequence[str], shots: int, seed: int, share: float
) -> tuple[list[int], list[int]]:
    """Choose training images as `few_shot` does, and validation images that are not among them; return indices of both.

    Of each class, `share` (0 to 1) of all its images is held out, at least one: of the images that `few_shot` leaves,
    or, if it leaves none, of its choice, of which at least one stays.

    >>> names = [f"{n}.jpg" for n in range(10)]
    >>> [len(part) for part in hold_out([0] * 10, names, shots=4, seed=1, share=0.2)]
    [4, 2]
    >>> [len(part) for part in hold_out([0] * 10, names, shots=16, seed=1, share=0.2)]
    [8, 2]
    """
    train: list[int] = []
    held: list[int] = []
    for order in shuffled_by_class(labels, names, "few-shot", seed):
        left = len(order) - shots if len(order) > shots else len(order) - 1
        count = min(left, max(1, math.floor(share * len(order) + 0.5)))
        train += order[: min(shots, len(order) - count)]
        held += order[len(order) - count :]
    return train, held


def class_sizes_note(labels: Mapping[str, Sequence[int]], classes: Sequence[str]) -> str | None:
    """Return a note on classes of different size, by the labels of each kind of images; None if they differ little.

    A class with three times the images of another can make the accuracy high although that of most classes is low.

    >>> class_sizes_note({"training": [0, 0, 0, 1], "validation": [], "test": [0, 1]}, ["cat", "dog"])
    'classes differ in size: of 4 training images cat has 3 and dog 1.'
    """
    parts = []
    for kind, of_kind in labels.items():
        counts = Counter(of_kind)
        sizes = [(counts[label], name) for label, name in enumerate(classes)]
        (most, largest), (least, smallest) = (choose(sizes, key=itemgetter(0)) for choose in (max, min))
        if of_kind and most >= _UNEVEN * least:
            parts.append(f"of {len(of_kind)} {kind} images {largest} has {most} and {smallest} {least}")
    return f"classes differ in size: {', '.join(parts)}." if parts else None

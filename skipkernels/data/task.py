"""A task: some classes with prompts, a few training images of each, and images to test on."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from . import glyphs

_TEST_IMAGES = 12  # of each glyph class: three in each of four fonts
_TEST_SEED = 2**31  # training seeds are below it, so that no image is in both sets


class SizedDataset(Protocol):
    """A map-style dataset of (image, label) with a length."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Any, int]: ...


class InputError(ValueError):
    """Something a user gave cannot be used; the message is one line that says what, and how to mend it."""


@dataclass(frozen=True)
class ClassSplit:
    """Some classes of a dataset, labelled from 0 in this order.

    Attributes:
        prompts: One for each class.
        test: Images to test on. Items are (image, label).
    """

    classes: list[str]
    prompts: list[str]
    test: SizedDataset


@dataclass(frozen=True)
class BaseToNew:
    """Tune on some images of the base classes, `train`; test on them and on classes never seen in tuning."""

    name: str
    train: SizedDataset
    base: ClassSplit
    new: ClassSplit


def split_base_new(classes: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    """CoOp's rule: of the classes in order, the first half is base (the larger one if the number is odd).

    >>> split_base_new(["a", "b", "c"])
    (['a', 'b'], ['c'])
    """
    middle = math.ceil(len(classes) / 2)
    return list(classes[:middle]), list(classes[middle:])


def load_base_to_new(
    data: str,
    *,
    shots: int,
    classes: int,
    seed: int,
    transform: Callable | None = None,
    train_transform: Callable | None = None,
) -> BaseToNew:
    """The base-to-new task of a dataset.

    Args:
        data: "glyphs", or "glyphs:BLOCK[+BLOCK…]" with blocks of `glyphs.BLOCKS`. Plain "glyphs" is the block
            "latin-extended-additional". Images are drawn in the fonts held out of `glyph-tiny`'s pre-training.
        shots: Training images of each base class.
        classes: Most classes, base and new together; evenly spaced ones of the dataset are taken.
        seed: Chooses the training images.
        transform: Applied to every image.
        train_transform: Applied to training images in its place.

    Raises:
        InputError: If there is no such dataset, or too little of it.

    Example:
        >>> task = load_base_to_new("glyphs:greek", shots=4, classes=20, seed=1)
        >>> len(task.base.classes), len(task.train), task.new.prompts[0]
        (10, 40, 'the character greek small letter zeta.')
    """
    name, _, selection = data.partition(":")
    if name != "glyphs":
        raise InputError(f"--data: no dataset {data!r}; choose glyphs or glyphs:BLOCK, such as glyphs:greek.")
    if not 1 <= shots <= 1000:
        raise InputError(f"--shots must be from 1 to 1000; got {shots}: every base class needs a training image.")
    if not 0 <= seed < _TEST_SEED:
        raise InputError(f"--seed must be from 0 to {_TEST_SEED - 1}; got {seed}.")
    if classes < 2:
        raise InputError(f"--classes must be at least 2, one base and one new; got {classes}.")
    blocks = selection.split("+") if selection else ["latin-extended-additional"]
    unknown = [block for block in blocks if block not in glyphs.BLOCKS]
    if unknown:
        raise InputError(f"--data: no block {unknown[0]!r}; choose from {', '.join(glyphs.BLOCKS)}.")
    codepoints = glyphs.block_characters(blocks, glyphs.HELD_OUT_FONTS)
    if len(codepoints) < 2:
        raise InputError(
            f"--data: the fonts {', '.join(glyphs.HELD_OUT_FONTS)} draw only {len(codepoints)} distinct characters of "
            f"{'+'.join(blocks)}; choose another block."
        )
    count = min(classes, len(codepoints))
    codepoints = [codepoints[position * len(codepoints) // count] for position in range(count)]

    base, new = split_base_new(codepoints)

    def draw(chosen: list[int], per_class: int, seed: int, how: Callable | None = transform) -> glyphs.GlyphDataset:
        return glyphs.GlyphDataset(chosen, glyphs.HELD_OUT_FONTS, per_class=per_class, seed=seed, transform=how)

    def split(chosen: list[int]) -> ClassSplit:
        test = draw(chosen, _TEST_IMAGES, _TEST_SEED)
        return ClassSplit(test.classes, [glyphs.TEMPLATE.format(name) for name in test.classes], test)

    return BaseToNew(
        f"glyphs:{'+'.join(blocks)}", draw(base, shots, seed, train_transform or transform), split(base), split(new)
    )

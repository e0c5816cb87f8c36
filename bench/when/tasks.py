"""Tasks of the study: classes, styles and what differs from the pre-training of glyph-tiny.

The characters of a task are divided once into two disjoint halves: one for the search of learning rates, one for the
reported runs. A seed then draws base and new classes from its half, and the poses of all images.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset

from skipkernels.app.data import InputError
from skipkernels.app.data.tasks import Task, TestSet
from skipkernels.app.demo import glyphs

Phase = Literal["search", "report"]

_NEW_SCRIPTS = glyphs.HELD_OUT_BLOCKS
_KNOWN_SCRIPTS = ("latin-extended-a", "latin-extended-b", "ipa-extensions", "cyrillic", "arrows", "geometric-shapes")
_KNOWN_FONTS = ("sans", "sans-bold", "sans-oblique", "sans-bold-oblique")
_NEW_FONTS = glyphs.HELD_OUT_FONTS

_TEST_IMAGES = 10  # of each class
_TEST_SEED = 2**31  # training images have smaller seeds
_SIZE = 32  # side of the images of glyph-tiny, in pixels

EMOJI_FONT = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
"""The path of Debian's package fonts-noto-color-emoji (SIL Open Font Licence)."""
# Pictographs, transport, and their supplements; faces are left out, since glyph-tiny was trained on their block.
_EMOJI_RANGES = ((0x1F300, 0x1F5FF), (0x1F680, 0x1F6FF), (0x1F900, 0x1F9FF), (0x1FA70, 0x1FAFF))
_EMOJI_PIXELS = 109  # the only size of the font's bitmaps


@dataclass(frozen=True)
class Shift:
    """A task.

    Attributes:
        name: Name in the tables.
        about: What differs from the pre-training.
        blocks: Blocks of characters; empty for emoji.
        fonts: Fonts of the images.
        noise: See `glyphs.draw_glyph`.
        classes: Number of base classes, and of new classes.
        shots: Training images of each base class.
        settings_of: Task with the search that chooses the settings, if there is none for this task.
    """

    name: str
    about: str
    blocks: tuple[str, ...] = _NEW_SCRIPTS
    fonts: tuple[str, ...] = _NEW_FONTS
    noise: float = 0.0
    classes: int = 20
    shots: int = 8
    settings_of: str | None = None


SHIFTS = (
    Shift("new scripts", "new characters in known fonts", fonts=_KNOWN_FONTS),
    Shift("new fonts", "known characters in new fonts", blocks=_KNOWN_SCRIPTS),
    Shift("both", "new characters in new fonts"),
    Shift("noise", "known characters in known fonts, with noise", _KNOWN_SCRIPTS, _KNOWN_FONTS, noise=0.5),
    Shift("few classes", "as both, 5 base classes", classes=5),
    Shift("many classes", "as both, 50 base classes, 4 shots", classes=50, shots=4, settings_of="both"),
    Shift("16 shots", "as both", shots=16, settings_of="both"),
    Shift("1 shot", "as both", shots=1),
    Shift("emoji", "drawings in colour with new names", blocks=(), fonts=()),
)


@functools.cache
def characters(shift: Shift, phase: Phase, emoji_font: Path = EMOJI_FONT) -> tuple[int, ...]:
    """The characters of a task for a phase, in a fixed random order."""
    found = glyphs.block_characters(shift.blocks, shift.fonts) if shift.blocks else _emoji(emoji_font)
    shuffled = np.random.default_rng(0).permutation(found).tolist()
    half = len(shuffled) // 2
    return tuple(shuffled[:half] if phase == "search" else shuffled[half:])


def load(shift: Shift, phase: Phase, seed: int, transform: Callable[[Image.Image], Any], emoji_font: Path) -> Task:
    """Make the base-to-new task of a seed. The tests of the search are validation images with seeds of their own."""
    pool, count = characters(shift, phase, emoji_font), 2 * shift.classes
    if len(pool) < count:
        raise InputError(f"bench.when: {shift.name} must have {count} characters for {phase}; got {len(pool)}.")
    drawn = np.random.default_rng(seed).choice(len(pool), count, replace=False)
    codepoints = [pool[number] for number in drawn]
    parts = {"base": codepoints[: shift.classes], "new": codepoints[shift.classes :]}

    def images(part: str, per_class: int, image_seed: int) -> Dataset:
        if shift.blocks:
            of_glyphs = {"per_class": per_class, "seed": image_seed, "noise": shift.noise, "transform": transform}
            return glyphs.GlyphDataset(parts[part], shift.fonts, **of_glyphs)
        return Emoji(parts[part], emoji_font, per_class=per_class, seed=image_seed, transform=transform)

    tests = []
    for part, members in parts.items():
        names = [glyphs.character_name(codepoint) for codepoint in members]
        prompts = ([glyphs.TEMPLATE.format(name) for name in names],)
        tests.append(TestSet(part, names, prompts, images(part, _TEST_IMAGES, _TEST_SEED + seed)))
    return Task(shift.name, "base-to-new", images("base", shift.shots, seed), tuple(tests))


class Emoji(Dataset):
    """Emoji in colour: rotated by up to 12°, scaled, moved, and on a light background of random colour.

    Args:
        codepoints: The characters, one class each.
        font: The font, which has bitmaps in colour.
        per_class: Number of images of each class.
        seed: Seed of the poses and backgrounds.
        transform: Applied to every image.
    """

    def __init__(
        self, codepoints: Sequence[int], font: Path, *, per_class: int, seed: int, transform: Callable[..., Any]
    ):
        self.codepoints, self.font = list(codepoints), font
        self.per_class, self.seed, self.transform = per_class, seed, transform
        self.labels = [label for label in range(len(self.codepoints)) for _ in range(per_class)]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        label, number = divmod(index, self.per_class)
        rng = np.random.default_rng([self.seed, self.codepoints[label], number])
        drawing = _drawing(self.codepoints[label], self.font).rotate(
            rng.uniform(-12, 12), Image.Resampling.BILINEAR, expand=True
        )
        side = round(_SIZE * rng.uniform(0.7, 1.0))
        drawing = drawing.resize((side, side), Image.Resampling.BILINEAR)
        image = Image.new("RGB", (_SIZE, _SIZE), tuple(rng.integers(160, 256, 3).tolist()))
        room = _SIZE - side
        image.paste(drawing, (int(rng.integers(room + 1)), int(rng.integers(room + 1))), drawing)
        return self.transform(image), label


def _emoji(font: Path) -> list[int]:
    """The emoji of the font that are single characters with a name, without skin tones."""
    if not font.exists():
        raise InputError(
            f"bench.when: the task emoji needs the font {font}, which doesn't exist. Install Debian's "
            "fonts-noto-color-emoji, give --emoji-font, or leave the task out."
        )
    with TTFont(font, lazy=True) as opened:
        covered = set(opened.getBestCmap())
    candidates = [codepoint for first, last in _EMOJI_RANGES for codepoint in range(first, last + 1)]
    return [
        c for c in candidates if c in covered and unicodedata.category(chr(c)) == "So" and unicodedata.name(chr(c), "")
    ]


@functools.lru_cache(maxsize=1024)
def _drawing(codepoint: int, font: Path) -> Image.Image:
    """An emoji, cropped, on a transparent background."""
    image = Image.new("RGBA", (2 * _EMOJI_PIXELS, 2 * _EMOJI_PIXELS))
    face = ImageFont.truetype(str(font), _EMOJI_PIXELS, layout_engine=ImageFont.Layout.BASIC)
    ImageDraw.Draw(image).text((20, 20), chr(codepoint), font=face, embedded_color=True)
    return image.crop(image.getbbox())

"""Glyphs: a dataset of images with text that needs no download.

A class is a Unicode character, its text is the character's name in the Unicode standard ("latin small letter e with
acute"), and an image is the character drawn in one of matplotlib's fonts at a random scale, angle and offset. Fonts are
domains, blocks of the standard are datasets, and characters held out of training are new classes: all protocols of CLIP
fine-tuning are possible. `open_source("glyphs:greek")` opens them.
"""

from __future__ import annotations

import functools
import math
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import get_data_path
from matplotlib.ft2font import FT2Font
from PIL import Image, ImageDraw, ImageFont
from torch.utils.data import Dataset

from ..data import InputError, Protocol, Source, Split
from ..data.base import open_error
from ..data.images import Transform
from ..data.templates import Templates, resolve_templates

TEMPLATE = "the character {}."

FONTS = {
    "sans": "DejaVuSans.ttf",
    "sans-bold": "DejaVuSans-Bold.ttf",
    "sans-oblique": "DejaVuSans-Oblique.ttf",
    "sans-bold-oblique": "DejaVuSans-BoldOblique.ttf",
    "mono": "DejaVuSansMono.ttf",
    "mono-bold": "DejaVuSansMono-Bold.ttf",
    "mono-oblique": "DejaVuSansMono-Oblique.ttf",
    "mono-bold-oblique": "DejaVuSansMono-BoldOblique.ttf",
    "serif": "DejaVuSerif.ttf",
    "serif-bold": "DejaVuSerif-Bold.ttf",
    "serif-italic": "DejaVuSerif-Italic.ttf",
    "serif-bold-italic": "DejaVuSerif-BoldItalic.ttf",
    "stix": "STIXGeneral.ttf",
    "stix-bold": "STIXGeneralBol.ttf",
    "stix-italic": "STIXGeneralItalic.ttf",
    "stix-bold-italic": "STIXGeneralBolIta.ttf",
}

# First and last code point of each block, from the Unicode standard.
BLOCKS = {
    "basic-latin": (0x0021, 0x007E),
    "latin-1-supplement": (0x00A1, 0x00FF),
    "latin-extended-a": (0x0100, 0x017F),
    "latin-extended-b": (0x0180, 0x024F),
    "ipa-extensions": (0x0250, 0x02AF),
    "spacing-modifier-letters": (0x02B0, 0x02FF),
    "greek": (0x0370, 0x03FF),
    "cyrillic": (0x0400, 0x04FF),
    "cyrillic-supplement": (0x0500, 0x052F),
    "armenian": (0x0530, 0x058F),
    "hebrew": (0x0590, 0x05FF),
    "arabic": (0x0600, 0x06FF),
    "nko": (0x07C0, 0x07FF),
    "lao": (0x0E80, 0x0EFF),
    "georgian": (0x10A0, 0x10FF),
    "canadian-aboriginal": (0x1400, 0x167F),
    "ogham": (0x1680, 0x169F),
    "phonetic-extensions": (0x1D00, 0x1DBF),
    "latin-extended-additional": (0x1E00, 0x1EFF),
    "greek-extended": (0x1F00, 0x1FFF),
    "general-punctuation": (0x2010, 0x206F),
    "superscripts-and-subscripts": (0x2070, 0x209F),
    "currency": (0x20A0, 0x20CF),
    "letterlike": (0x2100, 0x214F),
    "number-forms": (0x2150, 0x218F),
    "arrows": (0x2190, 0x21FF),
    "mathematical-operators": (0x2200, 0x22FF),
    "technical": (0x2300, 0x23FF),
    "enclosed-alphanumerics": (0x2460, 0x24FF),
    "box-drawing": (0x2500, 0x257F),
    "block-elements": (0x2580, 0x259F),
    "geometric-shapes": (0x25A0, 0x25FF),
    "symbols": (0x2600, 0x26FF),
    "dingbats": (0x2700, 0x27BF),
    "mathematical-symbols-a": (0x27C0, 0x27EF),
    "arrows-a": (0x27F0, 0x27FF),
    "braille": (0x2800, 0x28FF),
    "arrows-b": (0x2900, 0x297F),
    "mathematical-symbols-b": (0x2980, 0x29FF),
    "mathematical-operators-supplement": (0x2A00, 0x2AFF),
    "symbols-and-arrows": (0x2B00, 0x2BFF),
    "latin-extended-c": (0x2C60, 0x2C7F),
    "georgian-supplement": (0x2D00, 0x2D2F),
    "tifinagh": (0x2D30, 0x2D7F),
    "yijing-hexagrams": (0x4DC0, 0x4DFF),
    "lisu": (0xA4D0, 0xA4FF),
    "cyrillic-extended-b": (0xA640, 0xA69F),
    "modifier-tone-letters": (0xA700, 0xA71F),
    "latin-extended-d": (0xA720, 0xA7FF),
    "alphabetic-presentation-forms": (0xFB00, 0xFB4F),
    "arabic-presentation-forms-a": (0xFB50, 0xFDFF),
    "arabic-presentation-forms-b": (0xFE70, 0xFEFF),
    "tai-xuan-jing": (0x1D300, 0x1D35F),
    "mathematical-alphanumerics": (0x1D400, 0x1D7FF),
    "dominoes": (0x1F030, 0x1F09F),
    "playing-cards": (0x1F0A0, 0x1F0FF),
    "emoticons": (0x1F600, 0x1F64F),
}

# Held out of `glyph-tiny`'s pre-training: whole scripts, one block of a script in the training set, and a font family.
HELD_OUT_BLOCKS = (
    "latin-extended-additional",
    "greek",
    "greek-extended",
    "armenian",
    "georgian",
    "georgian-supplement",
)
HELD_OUT_FONTS = ("serif", "serif-bold", "serif-italic", "serif-bold-italic")

_CANVAS = 64  # side of the upright master image, in pixels
_EM = 38  # font size, in pixels: an accented capital fits above the baseline, a descender below
_BASELINE = 45  # distance from the top, in pixels


def character_name(codepoint: int) -> str:
    """Return the name of a character in the Unicode standard in lower case; empty if it has none.

    >>> character_name(0x00E9)
    'latin small letter e with acute'
    """
    return unicodedata.name(chr(codepoint), "").lower()


@functools.cache
def _font(font: str) -> ImageFont.FreeTypeFont:
    # Basic layout: complex layout joins Arabic letters, and depends on how Pillow is built.
    return ImageFont.truetype(_font_path(font), _EM, layout_engine=ImageFont.Layout.BASIC)


def _font_path(font: str) -> str:
    if font not in FONTS:
        raise ValueError(f"glyphs: no font {font!r}; choose from {', '.join(FONTS)}.")
    return str(Path(get_data_path(), "fonts", "ttf", FONTS[font]))


@functools.cache
def _coverage(font: str) -> frozenset[int]:
    return frozenset(FT2Font(_font_path(font)).get_charmap())


@functools.lru_cache(maxsize=8192)  # 4 KiB each
def master(codepoint: int, font: str) -> Image.Image:
    """Draw a character upright in black on a white image of 64 by 64 pixels, shrunk if it does not fit."""
    image = Image.new("L", (_CANVAS, _CANVAS), 255)
    draw = ImageDraw.Draw(image)
    face, text, anchor = _font(font), chr(codepoint), (_CANVAS // 2, _BASELINE)
    left, top, right, bottom = draw.textbbox(anchor, text, font=face, anchor="ms")
    if min(left, top) >= 0 and max(right, bottom) <= _CANVAS:
        draw.text(anchor, text, fill=0, font=face, anchor="ms")
        return image
    shrink = (_CANVAS - 2) / max(right - left, bottom - top)
    face, middle = face.font_variant(size=_EM * min(shrink, 1.0)), _CANVAS // 2
    draw.text((middle, middle), text, fill=0, font=face, anchor="mm")
    return image


def distinct_characters(codepoints: Iterable[int], font: str) -> list[int]:
    """Return the characters that a font draws distinctly.

    These are the named characters of the font, without combining marks, blank ones, and those with the same image as an
    earlier one (Cyrillic "A" after Latin "A").
    """
    kept: list[int] = []
    seen: set[bytes] = set()
    covered = _coverage(font)
    for codepoint in sorted(set(codepoints) & covered):
        if not character_name(codepoint) or unicodedata.category(chr(codepoint)).startswith("M"):
            continue
        image = master(codepoint, font)
        pixels = image.tobytes()
        if image.getextrema() != (255, 255) and pixels not in seen:
            kept.append(codepoint)
        seen.add(pixels)
    return kept


def block_characters(blocks: Sequence[str], fonts: Sequence[str]) -> list[int]:
    """Return the sorted characters of `blocks` that every font of `fonts` draws distinctly."""
    candidates: list[int] = []
    for block in blocks:
        if block not in BLOCKS:
            raise ValueError(f"glyphs: no block {block!r}; choose from {', '.join(BLOCKS)}.")
        first, last = BLOCKS[block]
        candidates.extend(range(first, last + 1))
    kept = [set(distinct_characters(candidates, font)) for font in fonts]
    return sorted(set.intersection(*kept)) if kept else []


def draw_glyph(
    codepoint: int, font: str, rng: np.random.Generator, *, size: int = 32, noise: float = 0.0
) -> Image.Image:
    """Draw a character: its master image rotated by up to 12°, scaled by 0.75 to 1.1, moved by up to 9 %.

    `font` is a key of `FONTS`; `noise` is the standard deviation of Gaussian noise, in units of full contrast.
    """
    angle = math.radians(rng.uniform(-12.0, 12.0))
    zoom = rng.uniform(0.75, 1.1) * size / _CANVAS
    shift_x, shift_y = rng.uniform(-0.09, 0.09, size=2) * size
    # An output pixel (x, y) is read from the master at centre + R(angle) · ((x, y) − size / 2 − shift) / zoom.
    cos, sin, middle = math.cos(angle) / zoom, math.sin(angle) / zoom, size / 2
    x, y = -middle - shift_x, -middle - shift_y
    source = _CANVAS / 2
    affine = (cos, sin, source + cos * x + sin * y, -sin, cos, source - sin * x + cos * y)
    image = master(codepoint, font).transform(
        (size, size), Image.Transform.AFFINE, affine, resample=Image.Resampling.BILINEAR, fillcolor=255
    )
    if noise > 0:
        pixels = np.asarray(image, dtype=np.float32) + rng.normal(0.0, 255.0 * noise, (size, size))
        image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    return image


class GlyphDataset(Dataset):
    """Images of characters, drawn on demand: item i is (image, label), with the label an index of `codepoints`.

    An image depends only on the seed, the character, the font, and the number of the image within its class. The images
    of a class use `fonts`, keys of `FONTS`, in turn. Datasets with different seeds share no image.

    Example:
        >>> dataset = GlyphDataset([ord("a"), ord("b")], ["serif"], per_class=3, seed=1)
        >>> len(dataset), dataset.classes[0]
        (6, 'latin small letter a')
        >>> image, label = dataset[4]
        >>> image.size, label
        ((32, 32), 1)
    """

    def __init__(
        self,
        codepoints: Sequence[int],
        fonts: Sequence[str],
        *,
        per_class: int,
        seed: int,
        size: int = 32,
        noise: float = 0.0,
        transform: Callable[[Image.Image], Any] | None = None,
    ):
        self.codepoints, self.fonts = list(codepoints), list(fonts)
        self.per_class, self.seed, self.size, self.noise = per_class, seed, size, noise
        self.transform = transform

    @property
    def classes(self) -> list[str]:
        """Names by label."""
        return [character_name(codepoint) for codepoint in self.codepoints]

    @property
    def labels(self) -> list[int]:
        """Label of every item, without drawing any image."""
        return [index // self.per_class for index in range(len(self))]

    def __len__(self) -> int:
        return len(self.codepoints) * self.per_class

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"GlyphDataset: index {index} is outside 0…{len(self) - 1}.")
        label, number = divmod(index, self.per_class)
        codepoint, font = self.codepoints[label], self.fonts[number % len(self.fonts)]
        rng = np.random.default_rng([self.seed, codepoint, list(FONTS).index(font), number])
        image = draw_glyph(codepoint, font, rng, size=self.size, noise=self.noise)
        return image if self.transform is None else self.transform(image), label


_TEST_IMAGES = 12  # per class: three in each of four fonts
_TEST_SEED = 2**31  # training seeds are smaller, so that no image is in both sets
_TARGET_CHARACTERS = 100  # minimum number of characters of a default target: the default number of classes of glyphs


@dataclass(frozen=True)
class GlyphSource(Source):
    """Characters drawn in the fonts held out of `glyph-tiny`'s pre-training. Each font is a domain.

    The number of training images is unlimited: `few_shot` draws them, and `images("train")` is 16 of each class with
    seed 0. The splits "val" and "test" have seeds that training cannot use, so that no image is in two sets.
    """

    codepoints: tuple[int, ...] = field(repr=False)  # The characters, by label
    fonts: tuple[str, ...] = HELD_OUT_FONTS

    @property
    def domains(self) -> Mapping[str, GlyphSource]:
        """The same characters in each font; see `Source`."""
        return {font: replace(self, fonts=(font,)) for font in self.fonts}

    def default_targets(self, protocol: Protocol) -> Sequence[str]:
        """The other blocks, or the other fonts; see `Source`."""
        if protocol == "domain-generalization":
            return super().default_targets(protocol)
        blocks = {block: block_characters([block], self.fonts) for block in BLOCKS}
        return [
            f"glyphs:{block}"
            for block, characters in blocks.items()
            if len(characters) >= _TARGET_CHARACTERS and not set(characters) & set(self.codepoints)
        ]

    def images(self, split: Split, transform: Transform | None = None) -> GlyphDataset:
        """Return the images of a split; see `GlyphSource`."""
        drawn = {"train": (16, 0), "val": (_TEST_IMAGES, _TEST_SEED + 1), "test": (_TEST_IMAGES, _TEST_SEED)}
        if split not in drawn:
            raise InputError(f"{self.name} has no {split} images: it has {', '.join(drawn)} images.", "data")
        return self._draw(*drawn[split], transform)

    def few_shot(self, shots: int, seed: int, transform: Transform | None = None) -> GlyphDataset:
        """Draw training images of each class with a seed; see `Source`."""
        if not 1 <= shots <= 1000:
            raise InputError(
                f"few_shot: shots must be from 1 to 1000; got {shots}: every class needs a training image.", "shots"
            )
        if not 0 <= seed < _TEST_SEED:
            raise InputError(f"few_shot: seed must be from 0 to {_TEST_SEED - 1}; got {seed}.", "seed")
        return self._draw(shots, seed, transform)

    def _draw(self, per_class: int, seed: int, transform: Transform | None) -> GlyphDataset:
        return GlyphDataset(self.codepoints, self.fonts, per_class=per_class, seed=seed, transform=transform)

    def subset_classes(self, labels: Sequence[int]) -> GlyphSource:
        """Return the source of some of the classes; see `Source`."""
        chosen = tuple(self.codepoints[label] for label in labels)
        return replace(self, classes=tuple(self.classes[label] for label in labels), codepoints=chosen)


def open_glyphs(name: str, templates: Templates = None) -> GlyphSource:
    """Open blocks "BLOCK[+BLOCK…]", keys of `BLOCKS`, as a source; if empty, "latin-extended-additional"."""
    blocks = name.split("+") if name else ["latin-extended-additional"]
    unknown = [block for block in blocks if block not in BLOCKS]
    if unknown:
        raise open_error(f"no block {unknown[0]!r}; choose from {', '.join(BLOCKS)}.")
    codepoints = tuple(block_characters(blocks, HELD_OUT_FONTS))
    if len(codepoints) < 2:
        raise open_error(
            f"the fonts {', '.join(HELD_OUT_FONTS)} draw only {len(codepoints)} distinct characters of "
            f"{'+'.join(blocks)}; choose another block."
        )
    return GlyphSource(
        f"glyphs:{'+'.join(blocks)}",
        tuple(character_name(codepoint) for codepoint in codepoints),
        resolve_templates(None, templates, TEMPLATE),
        codepoints,
    )

"""Decoding of image files by Pillow: formats, limits, and conversion to RGB. Imports no torch; decoders start fast."""

from __future__ import annotations

import functools
import math
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .base import InputError

# Raised by Pillow's decoders for truncated or invalid files; RuntimeError by libavif.
_UNREADABLE: tuple[type[Exception], ...] = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError)
_UNREADABLE += (ArithmeticError, AttributeError, RuntimeError, struct.error, zlib.error)
_UNREADABLE += (Image.DecompressionBombError, MemoryError)
# Under any extension: six .jpg files of Oxford-IIIT Pet are GIFs. Others are excluded: Pillow runs Ghostscript on EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF")
_TILE_SIZE = 322, 323  # tags of a TIFF: width and height of a tile
_MAX_RATIO = 500  # of the sides: a transform that resizes a line of 8000 x 2 pixels to 224 makes 200 million of them


class TooLarge(InputError):
    """Error for an image with more pixels than a limit."""


class UnknownFormat(InputError):
    """Error for a file in none of the `FORMATS`."""


def open_image(file: BinaryIO, name: str | Path, max_pixels: int) -> Image.Image:
    """Open an image file, and refuse what its header shows to be too large; `name` is its name in error messages."""
    try:
        image = Image.open(file, formats=_formats())
        tile = [int(getattr(image, "tag_v2", {}).get(tag, 0)) for tag in _TILE_SIZE]
    except UnidentifiedImageError as error:
        heif = "" if "HEIF" in _formats() else "; HEIC needs: pip install 'skipkernels[heif]'"
        known = f"not {', '.join(_formats())} of up to four channels{heif}"
        raise unreadable(name, known, UnknownFormat) from error
    except _UNREADABLE as error:
        raise unreadable(name, error) from error
    if max(math.prod(image.size), math.prod(tile)) > max_pixels:
        raise TooLarge(f"{name}: must have at most {max_pixels:,} pixels. Make it smaller.")
    return image


@functools.cache
def _formats() -> list[str]:
    """Return the `FORMATS` that are installed."""
    Image.init()
    try:
        from pillow_heif import register_heif_opener

        register_heif_opener()
    except ImportError:
        pass
    return [name for name in FORMATS if name in Image.OPEN]


def to_rgb(image: Image.Image, name: str | Path) -> Image.Image:
    """Convert an image to RGB, upright by its EXIF orientation; `name` is its name in error messages.

    Transparency is dropped, and 16-bit values keep their upper 8 bits.
    """
    width, height = image.size
    if max(width, height) > _MAX_RATIO * min(width, height):
        raise InputError(
            f"{name}: a side must be at most {_MAX_RATIO} times the other; got {width:,} × {height:,}. Crop it."
        )
    if image.mode in ("I", "F") and image.format not in ("PNG", "PPM"):  # Pillow reads 16 bits of these as I
        raise InputError(
            f"{name}: has 32 bits per channel (mode {image.mode}), without a defined white. Convert it to 8 or 16 bits."
        )
    try:
        image.load()  # PNG has its EXIF data behind the pixels
        image = _upright(image)
        if image.mode[0] == "I":
            image = image.convert("I").point([value >> 8 for value in range(1 << 16)], "L")
        if isinstance(image.info.get("transparency"), bytes):  # Pillow warns otherwise
            image = image.convert("RGBA")
        return image if image.mode == "RGB" else image.convert("RGB")
    except _UNREADABLE as error:
        raise unreadable(name, error) from error


def _upright(image: Image.Image) -> Image.Image:
    """Return an image rotated and mirrored by its EXIF orientation; the same image if it has none."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    except _UNREADABLE:  # invalid EXIF data
        return image
    return ImageOps.exif_transpose(image) if turned else image


def unreadable(name: str | Path, error: Exception | str, kind: type[InputError] = InputError) -> InputError:
    """Return the error for a file that can't be decoded."""
    why = error if isinstance(error, str) else f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    return kind(f"{name}: can't be read as an image ({why}). Replace or remove it.")

"""Conversion of image files, images of Pillow and arrays of pixels to upright RGB."""

from __future__ import annotations

import functools
import math
import struct
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from .base import InputError

if TYPE_CHECKING:
    from torch import Tensor

# Under any extension: six .jpg files of Oxford-IIIT Pet are GIFs. Others are excluded: Pillow runs Ghostscript on EPS.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "HEIF")
PIXELS = 178_956_970
"""Most pixels of an image, as in Pillow: 0.5 GiB of RGB."""
_TILE_SIZE = 322, 323  # tags of a TIFF: width and height of a tile
_MAX_RATIO = 500  # of the sides: a transform that resizes a line of 8000 x 2 pixels to 224 makes 200 million of them
# Raised by Pillow's decoders for truncated or invalid files; RuntimeError by libavif.
_UNREADABLE: tuple[type[Exception], ...] = (OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError)
_UNREADABLE += (ArithmeticError, AttributeError, RuntimeError, MemoryError, struct.error, zlib.error)


class TooLarge(InputError):
    """Error for an image with more pixels than a limit."""


class UnknownFormat(InputError):
    """Error for a file in none of the `FORMATS`."""


def read_image(path: str | Path) -> Image.Image:
    """Read an image file as RGB, upright by its EXIF orientation; of an animation, the first frame.

    Transparency is dropped, and 16-bit values keep their upper 8 bits.

    Raises:
        InputError: If the file is missing, is not an image, is damaged, or has too many pixels.
    """
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise InputError(f"{path}: no such file. Was it removed, or is it a broken link?") from None
    except OSError as error:
        raise InputError(f"{path}: can't be read ({error.strerror}). Replace or remove the file.") from None
    with file:
        return decode(file, path)


def decode(file: BinaryIO, name: str | Path, *, max_pixels: int = PIXELS) -> Image.Image:
    """Decode the contents of an image file as `read_image` does; `name` is its name in error messages.

    Of an image of more than `max_pixels` only the header is read.
    """
    too_large = TooLarge(f"{name}: must have at most {max_pixels:,} pixels. Make it smaller.")
    try:
        image = Image.open(file, formats=_formats())
        tile = [int(getattr(image, "tag_v2", {}).get(tag, 0)) for tag in _TILE_SIZE]
    except UnidentifiedImageError as error:
        heif = "" if "HEIF" in _formats() else "; HEIC needs: pip install 'skipkernels[heif]'"
        known = f"not {', '.join(_formats())} of up to four channels{heif}"
        raise _unreadable(name, known, UnknownFormat) from error
    except Image.DecompressionBombError:
        raise too_large from None
    except _UNREADABLE as error:
        raise _unreadable(name, error) from error
    with image:
        if max(math.prod(image.size), math.prod(tile)) > max_pixels:
            raise too_large
        return to_rgb(image, name)


def to_rgb(image: Image.Image, name: str | Path) -> Image.Image:
    """Convert an image of Pillow as `read_image` does; `name` is its name in error messages."""
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
        raise _unreadable(name, error) from error


def from_pixels(pixels: np.ndarray | Tensor, name: str) -> Image.Image:
    """Convert a uint8 array [H, W], [H, W, 3] or [H, W, 4], or a tensor [3, H, W], to an RGB image.

    >>> image = from_pixels(np.zeros((2, 5, 4), np.uint8), "black")
    >>> image.mode, image.size
    ('RGB', (5, 2))
    """
    if not isinstance(pixels, np.ndarray):
        expected, is_image = "a tensor [3, H, W]", pixels.ndim == 3 and pixels.shape[0] == 3
    else:
        expected = "an array [H, W], [H, W, 3] (RGB) or [H, W, 4] (RGBA)"
        is_image = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (3, 4))
    dtype = str(pixels.dtype).removeprefix("torch.")
    if dtype != "uint8" or not is_image or 0 in pixels.shape:
        hint = " From 0 to 1? Multiply by 255, round, and convert to uint8." if is_image and "float" in dtype else ""
        raise InputError(f"{name}: pixels must be {expected} of uint8; got {dtype} {list(pixels.shape)}.{hint}")
    values = pixels if isinstance(pixels, np.ndarray) else pixels.permute(1, 2, 0).cpu().numpy()
    return to_rgb(Image.fromarray(np.ascontiguousarray(values)), name)


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


def _upright(image: Image.Image) -> Image.Image:
    """Return an image rotated and mirrored by its EXIF orientation; the same image if it has none."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation) in range(2, 9)
    except _UNREADABLE:  # invalid EXIF data
        return image
    return ImageOps.exif_transpose(image) if turned else image


def _unreadable(name: str | Path, error: Exception | str, kind: type[InputError] = InputError) -> InputError:
    why = error if isinstance(error, str) else f"{type(error).__name__}: {' '.join(str(error).split())}".rstrip(": ")
    return kind(f"{name}: can't be read as an image ({why}). Replace or remove it.")

"""Download the package, draw its icons and write the table (`table.py`)."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import time
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import sets
from .table import BLANK, icons, read_rows, write_rows

SIZE = 40  # px
_CHUNK = 2000  # icons between two writes


def download(folder: Path) -> Path:
    """Return the package's archive in a folder, after downloading it if it is missing."""
    archive = folder / f"iconify-json-{sets.PACKAGE.rsplit('@', 1)[1]}.tgz"
    if not archive.exists():
        folder.mkdir(parents=True, exist_ok=True)
        print(f"npm pack {sets.PACKAGE} ({folder})", flush=True)
        partial = folder / "partial"
        partial.mkdir(exist_ok=True)
        subprocess.run([shutil.which("npm") or "npm", "pack", "--silent", sets.PACKAGE], cwd=partial, check=True)
        (partial / archive.name).replace(archive)
    return archive


def read_sets(archive: Path) -> dict[str, dict[str, Any]]:
    """Read every set of the package: its information, icons and categories."""
    with tarfile.open(archive) as package:
        return {
            Path(member.name).stem: json.load(package.extractfile(member))  # type: ignore[arg-type]
            for member in package
            if member.name.startswith("package/json/")
        }


def svg(data: dict[str, Any], raw: str) -> str:
    """The SVG of an icon of a set."""
    icon = data["icons"][raw]
    place = {"left": 0, "top": 0, "width": 16, "height": 16}
    left, top, width, height = (icon.get(key, data.get(key, default)) for key, default in place.items())
    box = f'viewBox="{left} {top} {width} {height}"'
    size = f'width="{width}" height="{height}"'
    space = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
    return f"<svg {space} {size} {box}>{icon['body']}</svg>"


def draw(source: str, size: int = SIZE) -> np.ndarray | None:
    """Draw an SVG on a transparent square, uint8 [size, size, 4] with premultiplied alpha; None if it has no ink."""
    import resvg_py  # here: no other part of the recipe needs it

    width, height = (float(source.split(f'{key}="', 1)[1].split('"', 1)[0]) for key in ("width", "height"))
    scale = size / max(width, height)
    extent = {"width": max(1, round(width * scale)), "height": max(1, round(height * scale))}
    try:
        png = resvg_py.svg_to_bytes(svg_string=source, skip_system_fonts=True, **extent)
    except ValueError:
        return None
    pixels = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA"))[:size, :size]
    if int(pixels[..., 3].max()) < 64:
        return None
    canvas = np.zeros((size, size, 4), np.uint8)
    top, left = (size - pixels.shape[0]) // 2, (size - pixels.shape[1]) // 2
    alpha = pixels[..., 3:].astype(np.uint16)
    color = ((pixels[..., :3] * alpha + 127) // 255).astype(np.uint8)
    place = canvas[top : top + pixels.shape[0], left : left + pixels.shape[1]]
    place[..., :3], place[..., 3] = color, pixels[..., 3]
    return canvas


def digest(image: np.ndarray | None) -> int:
    """Digest of a drawing, equal for equal images; `BLANK` for none."""
    if image is None:
        return BLANK
    return max(2, int.from_bytes(hashlib.blake2b(image.tobytes(), digest_size=8).digest(), "little"))


def build(folder: Path, jobs: int = 2) -> None:
    """Write the table and draw the icons; continue where an earlier run was interrupted."""
    data = read_sets(download(folder))
    rows = list(icons(data))
    if (folder / "icons.csv").exists() and [row[:4] for row in read_rows(folder)] != [row[:4] for row in rows]:
        for stale in ("images.npy", "digests.npy"):  # drawn for other icons
            (folder / stale).unlink(missing_ok=True)
    write_rows(folder / "icons.csv", rows)
    used = {row.set for row in rows}
    (folder / "sets.json").write_text(json.dumps({p: data[p]["info"] for p in sorted(used)}, indent=1))
    images = open_array(folder / "images.npy", (len(rows), SIZE, SIZE, 4), np.uint8)
    digests = open_array(folder / "digests.npy", (len(rows),), np.uint64)
    missing = np.flatnonzero(digests == 0)
    start = time.perf_counter()
    with Pool(jobs) as pool:
        for first in range(0, len(missing), _CHUNK):
            chunk = missing[first : first + _CHUNK]
            drawn = pool.map(draw, [svg(data[rows[i].set], rows[i].raw) for i in chunk], chunksize=50)
            images[chunk] = [image if image is not None else np.zeros(images.shape[1:], np.uint8) for image in drawn]
            images.flush()
            digests[chunk] = [digest(image) for image in drawn]  # after the images: marks them as drawn
            digests.flush()
            done = first + len(chunk)
            seconds = (time.perf_counter() - start) / done * (len(missing) - done)
            print(
                f"\r{len(rows) - len(missing) + done:,} of {len(rows):,} icons, {seconds:.0f} s left ",
                end="",
                flush=True,
            )
    print()


def open_array(path: Path, shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """Open an array file for writing; a missing one, or one of another shape, is made of zeros."""
    if path.exists():
        array = np.load(path, mmap_mode="r+")
        if array.shape == shape and array.dtype == dtype:
            return array
        del array
    return np.lib.format.open_memmap(path, "w+", dtype, shape)

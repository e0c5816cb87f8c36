"""Write the drawings that are packaged with `pictogram-tiny`, one zip file of small PNG files.

    python -m recipes.pictograms.drawings

It has the concrete names that four sets of emoji share (`pool.concrete_names`), as three of the sets draw them. The
licence of the fourth, OpenMoji, is share-alike. `classes.csv` has the task of each name, and `LICENSES` the author and
the licence of each set.
"""

from __future__ import annotations

import argparse
import io
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from . import count, draw, pool, sets
from .table import FOLDER, Icon, read_rows

SETS = [prefix for prefix in pool.TEST_SETS if prefix not in sets.TEST_ONLY]
SIZE, COLORS = 64, 64  # side of a drawing in pixels, and its colors
TITLE = f"Drawings of {SIZE} by {SIZE} pixels on white with {COLORS} colors of icons from"
FILE = Path(__file__).parents[2] / "skipkernels" / "app" / "data" / "pictograms.zip"


def on_white(drawing: np.ndarray) -> np.ndarray:
    """A drawing, uint8 [S, S, 4] with premultiplied alpha, on white, uint8 [S, S, 3]."""
    return drawing[..., :3] + (255 - drawing[..., 3:])


def png(drawing: np.ndarray) -> bytes:
    """A drawing on white as a PNG file with a palette."""
    file = io.BytesIO()
    Image.fromarray(on_white(drawing)).quantize(COLORS, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return file.getvalue()


def write(
    path: Path, drawings: Iterable[tuple[Icon, np.ndarray]], tasks: Mapping[str, str], info: dict[str, Any]
) -> None:
    """Write the zip file; equal drawings give equal bytes."""
    drawn = sorted(drawings, key=lambda item: (item[0].set, item[0].name))
    lines = ["name,task", *(f"{name},{task}" for name, task in sorted(tasks.items()))]
    licences = count.licences(TITLE, (icon for icon, _ in drawn), info)
    files = {"classes.csv": "\n".join(lines) + "\n", "LICENSES": licences}
    with zipfile.ZipFile(path, "w") as archive:  # stored: PNG files are compressed
        for name, text in files.items():
            archive.writestr(zipfile.ZipInfo(name), text)
        for icon, drawing in drawn:
            archive.writestr(zipfile.ZipInfo(f"{icon.set}/{icon.name}.png"), png(drawing))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    data = draw.read_sets(draw.download(folder))
    rows = read_rows(folder)
    tasks = pool.concrete_names(rows)
    drawings = []
    for icon in rows:
        if icon.set in SETS and icon.name in tasks:
            drawing = draw.draw(draw.svg(data[icon.set], icon.raw), SIZE)
            if drawing is None:
                raise SystemExit(f"{icon.set}: {icon.raw} is blank")
            drawings.append((icon, drawing))
    write(FILE, drawings, tasks, {prefix: data[prefix]["info"] for prefix in SETS})
    print(f"wrote {FILE}: {len(drawings):,} drawings of {len(tasks):,} names, {FILE.stat().st_size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()

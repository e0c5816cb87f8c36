"""Picture of the method: two towers, what is frozen and what trains, and the classes that a step drops.

    python -m bench.method_picture            # writes docs/pictures/method.svg
    python -m bench.method_picture --check

It has a background of its own, light or dark as the browser prefers, so that it is readable on any page. Text has at
least 17 units of 800, so that it is readable in a column of 400 pixels.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

TARGET = Path(__file__).parents[1] / "docs" / "pictures" / "method.svg"
TITLE = (
    "Skip Tuning: the first blocks of the image tower and of the text tower are frozen, and run once for all images "
    "and classes. In every step the other blocks train, on the features of a batch of images and of the kept classes."
)

WIDTH, HEIGHT = 800, 492
BLOCKS = 6  # below the cut, and above it
BLOCK_WIDTH, BLOCK_STEP = 15, 22
# Classes of the picture, and whether the step keeps them.
CLASSES = {"cat": True, "dog": True, "wolf": True, "tulip": False, "car": False, "boat": True, "piano": False}
IMAGE_ROWS = [136 + 38 * i for i in range(3)]
CLASS_ROWS = [298 + 22 * i for i in range(len(CLASSES))]
IMAGE_MARGIN, CLASS_MARGIN = 17, 8  # of the blocks above the first row and below the last
CELL = 30  # of the matrix of similarities
MATRIX = (646, 184)

STYLE = """
  svg { --card: #fff; --line: #d5dbe3; --once: #f1f3f5; --step: #e8f1fd; --text: #1d2733; --muted: #5a6675;
        --frozen: #a3acb8; --trained: #2b6cd4; --soft: #a9c8f5; --tile: #dfe3e8; --dropped: #98a2ae; }
  @media (prefers-color-scheme: dark) {
    svg { --card: #14171c; --line: #323941; --once: #1f242b; --step: #14263f; --text: #e7eaef; --muted: #a5afbc;
          --frozen: #737d8a; --trained: #5a9bff; --soft: #2a4a7a; --tile: #343b45; --dropped: #6d7783; }
  }
  .card { fill: var(--card); stroke: var(--line); }
  .once { fill: var(--once); }
  .step { fill: var(--step); }
  text { font: 18px system-ui, -apple-system, "Segoe UI", Helvetica, Arial, sans-serif; fill: var(--text); }
  .title { font-size: 23px; font-weight: 650; }
  .small { font-size: 17px; }
  .muted { fill: var(--muted); }
  .frozen { fill: var(--frozen); }
  .trained { fill: var(--trained); }
  .soft { fill: var(--soft); }
  .tile { fill: var(--tile); }
  .face { fill: var(--muted); }
  .dropped { fill: none; stroke: var(--dropped); stroke-width: 1.5; }
  .strike { fill: var(--dropped); text-decoration: line-through; }
  .flow { fill: none; stroke: var(--frozen); stroke-width: 2; }
  .used { fill: none; stroke: var(--trained); stroke-width: 2; }
  .gradient { stroke-dasharray: 6 5; }
  .stop { stroke: var(--trained); stroke-width: 4; stroke-linecap: round; }
"""


def rectangle(x: float, y: float, width: float, height: float, kind: str, radius: float = 3) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}" class="{kind}"/>'


def line(kind: str, *points: tuple[float, float], head: bool = False) -> str:
    path = "M" + " L".join(f"{x:g} {y:g}" for x, y in points)
    marker = f' marker-end="url(#{kind.split()[0]})"' if head else ""
    return f'<path d="{path}" class="{kind}"{marker}/>'


def curve(start: tuple[float, float], end: tuple[float, float], kind: str, *, upwards: bool = False) -> str:
    """Draw a curve that leaves to the right and arrives from the left, or from below."""
    (x0, y0), (x1, y1) = start, end
    control = f"{x1:g} {y0:g} {x1:g} {y0:g}" if upwards else f"{(x0 + x1) / 2:g} {y0:g} {(x0 + x1) / 2:g} {y1:g}"
    return f'<path d="M{x0:g} {y0:g} C{control} {x1:g} {y1:g}" class="{kind}"/>'


def label(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{text}</text>'


def blocks(x: float, top: float, bottom: float, kind: str) -> list[str]:
    return [rectangle(x + i * BLOCK_STEP, top, BLOCK_WIDTH, bottom - top, kind, 4) for i in range(BLOCKS)]


def features(y: float, kind: str) -> list[str]:
    """A row of cells: the cached features of an image or of a class."""
    return [rectangle(304 + 11 * i, y - 5, 9, 10, kind, 2) for i in range(6)]


def cat(x: float, y: float, size: float) -> list[str]:
    """A tile with the head of a cat, [size, size], around (x, y)."""
    r = 0.27 * size  # of the head
    ears = " ".join(
        f"M{x + r_side * 0.95:g} {y - 0.1 * r:g} l{-r_side * 0.1:g} {-1.15 * r:g} l{-r_side * 0.75:g} {0.5 * r:g} Z"
        for r_side in (-r, r)
    )
    head = f'<circle cx="{x:g}" cy="{y + 0.15 * r:g}" r="{r:g}" class="face"/><path d="{ears}" class="face"/>'
    return [rectangle(x - size / 2, y - size / 2, size, size, "tile", 5), head]


def lower() -> list[str]:
    """Everything that runs once: images and prompts, the frozen blocks, the cached features."""
    parts = [label(34, 47, "Once", "title"), label(34, 73, "blocks 1 … ω, frozen", "muted")]
    parts += [
        label(34, 108, "images"),
        label(126, 108, "image tower", "muted"),
        label(304, 108, "cached"),
        label(34, 276, "classes"),
        label(126, 276, "text tower", "muted"),
        label(304, 276, "cached"),
    ]
    parts += [label(34, 468, "✕ dropped: far classes, except a few", "small muted")]
    for rows, margin in ((IMAGE_ROWS, IMAGE_MARGIN), (CLASS_ROWS, CLASS_MARGIN)):
        middle = (rows[0] + rows[-1]) / 2
        parts += [line("flow", (x, middle), (x + 31, middle), head=True) for x in (84, 263)]
        parts += blocks(126, rows[0] - margin, rows[-1] + margin, "frozen")
    for y in IMAGE_ROWS:
        parts += [*cat(51, y, 34), *features(y, "frozen")]
    for y, (name, kept) in zip(CLASS_ROWS, CLASSES.items(), strict=True):
        kinds = ("small", "frozen") if kept else ("small strike", "dropped")
        parts += [label(34, y + 6, name, kinds[0]), *features(y, kinds[1])]
    return parts


def upper() -> list[str]:
    """Everything that runs in a step: the trained blocks, the similarities, the gradients."""
    parts = [label(430, 47, "Every step", "title"), label(430, 73, "blocks ω + 1 … N, trained", "muted")]
    parts += [label(582, 118, "B images", "small")]
    parts += [label(582, 393, "K of C classes", "small"), label(582, 468, "gradients stop at ω", "small")]
    for rows, margin in ((IMAGE_ROWS, IMAGE_MARGIN), (CLASS_ROWS, CLASS_MARGIN)):
        parts += blocks(440, rows[0] - margin, rows[-1] + margin, "trained")
        end = rows[-1] + margin + 16
        parts += [
            line("used gradient", (572, end), (424, end), head=True),
            line("stop", (414, end - 9), (414, end + 9)),
        ]

    x, y = MATRIX
    kept = [row for row, is_kept in zip(CLASS_ROWS, CLASSES.values(), strict=True) if is_kept]
    parts += [line("used", (374, row), (430, row), head=True) for row in (*IMAGE_ROWS, *kept)]
    parts += [curve((574, row), (x - 6, y + (i + 0.5) * CELL), "used") for i, row in enumerate(IMAGE_ROWS)]
    bottom = y + len(IMAGE_ROWS) * CELL + 6
    parts += [curve((574, row), (x + (k + 0.5) * CELL, bottom), "used", upwards=True) for k, row in enumerate(kept)]
    for row in sorted({*CLASS_ROWS} - {*kept}):
        parts += [line("dropped", (374, row), (388, row))]
        parts += [line("dropped", (388, row - 5 * side), (398, row + 5 * side)) for side in (1, -1)]
    for i in range(len(IMAGE_ROWS)):
        for k in range(len(kept)):  # every image is of the first class
            kind = "soft" if k else "trained"
            parts += [rectangle(x + k * CELL + 1.5, y + i * CELL + 1.5, CELL - 3, CELL - 3, kind, 4)]
    parts += [label(x + len(kept) * CELL / 2, y - 14, "similarity → loss", "small", "middle")]
    return parts


def method_svg() -> str:
    """The picture as SVG."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{TITLE}">'
    markers = [
        f'<marker id="{kind}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="9" markerHeight="9" '
        f'markerUnits="userSpaceOnUse" orient="auto"><path d="M0 0 L8 4 L0 8 Z" class="{fill}"/></marker>'
        for kind, fill in (("flow", "frozen"), ("used", "trained"))
    ]
    card = rectangle(0.5, 0.5, WIDTH - 1, HEIGHT - 1, "card", 14)
    panels = [
        rectangle(x, 14, width, HEIGHT - 28, kind, 8) for x, width, kind in ((14, 372, "once"), (410, 376, "step"))
    ]
    parts = [f"<style>{STYLE}</style>", "<defs>", *markers, "</defs>", card, *panels, *lower(), *upper()]
    return "\n".join([head, *parts, "</svg>", ""])


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="fail if the file is out of date")
    if parser.parse_args(arguments).check:
        return int(TARGET.read_text(encoding="utf-8") != method_svg())
    TARGET.parent.mkdir(exist_ok=True)
    TARGET.write_text(method_svg(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The table of icons: which icons of @iconify/json are used, with their names, families and licences.

A folder has:

    icons.csv    one line per icon: set, family, licence, raw (its name in the set), name, style, mono, category
    images.npy   uint8 [icons, size, size, 4], RGBA with premultiplied alpha; monochrome icons are black
    digests.npy  uint64 [icons], of the drawing; 0: not drawn yet, 1: blank or refused by the renderer
    sets.json    the package's information on each set
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import names, sets

FOLDER = Path.home() / ".cache/skipkernels/pictograms"
BLANK = 1  # digest of an icon without ink


class Icon(NamedTuple):
    """A line of icons.csv."""

    set: str
    family: str
    licence: str
    raw: str
    name: str
    style: str
    mono: str
    category: str


def icons(data: dict[str, dict[str, Any]]) -> Iterator[Icon]:
    """The icons of all used sets, without logos, skin tones and hidden ones."""
    categories = {prefix: each["info"].get("category") for prefix, each in data.items()}
    logo_sets = [[raw.replace("-", " ") for raw in data[p]["icons"]] for p, c in categories.items() if c == "Logos"]
    logos = names.logo_names(logo_sets)
    for prefix, each in data.items():
        info, shown = each["info"], [raw for raw, icon in each["icons"].items() if not icon.get("hidden")]
        if not sets.is_used(prefix, info):
            continue
        emoji = categories[prefix] == "Emoji" or sets.family(prefix) in sets.HELD_OUT
        styles = names.set_styles(shown, each.get("suffixes", ()))
        category = {raw: title for title, raws in each.get("categories", {}).items() for raw in raws}
        for raw in shown:
            name, style = raw.replace("-", " "), ""
            if not emoji:
                name, style = names.clean(raw, styles, each.get("prefixes", ()))
                if names.is_logo(name, logos) or names.is_logo(category.get(raw, "").lower().replace("/", " "), ()):
                    continue
            elif prefix == "streamline-emojis":
                name = names.clean(raw, ())[0]
            if "skin tone" in name:
                continue
            mono = not info.get("palette")
            yield Icon(
                prefix, sets.family(prefix), info["license"].get("spdx", ""), raw, name,
                style or ("" if mono else "colorful"), str(int(mono)), category.get(raw, ""),
            )  # fmt: skip


def write_rows(path: Path, rows: list[Icon]) -> None:
    """Write the lines of icons.csv."""
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([Icon._fields, *rows])


def read_rows(folder: Path) -> list[Icon]:
    """Read the lines of icons.csv."""
    with (folder / "icons.csv").open(newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        next(reader)
        return [Icon(*line) for line in reader]

"""Count the icons in the table, and write docs/pictograms.md (its tables) and LICENSES-pictograms.

python -m recipes.pictograms.count
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from . import names, pool, sets
from .table import BLANK, FOLDER, Icon, read_rows

ROOT = Path(__file__).parents[2]
DOCS, LICENCES = ROOT / "docs" / "pictograms.md", ROOT / "LICENSES-pictograms"
COLUMNS = ("images", "drawings", "names", "words", "families", "sets", "licences")


def counts(rows: Iterable[Icon]) -> list[int]:
    """Number of `COLUMNS`; a drawing is a name in a family."""
    rows = list(rows)
    found = [{(row.family, row.name) for row in rows}, {row.name for row in rows}]
    words = {word for name in found[1] for word in name.split()}
    columns = ({getattr(row, column) for row in rows} for column in ("family", "set", "licence"))
    return [len(rows), *(len(each) for each in (*found, words, *columns))]


def markdown(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A table in Markdown."""
    cells = [header, ["---"] * len(header), *lines]
    return "\n".join(
        "| " + " | ".join(f"{c:,}" if isinstance(c, int) else str(c) for c in line) + " |" for line in cells
    )


def tables(rows: list[Icon], digests: np.ndarray) -> dict[str, str]:
    """The tables of docs/pictograms.md by name."""
    drawn = [row for row, digest in zip(rows, digests.tolist(), strict=True) if digest > BLANK]
    concrete = pool.concrete_names(rows)
    words = names.held_out_words(concrete)
    lines = {"all icons": drawn, "held-out families": [row for row in drawn if row.family in sets.HELD_OUT]}
    for title, held_out in {"may be trained on": (), "the same without the held-out words": words}.items():
        usable = pool.training_rows(rows, digests, held_out)
        lines[title] = [rows[i] for i in usable]
    ordered, narrow, chosen = pool.choose(rows, usable)
    lines["chosen for pre-training"] = [rows[i] for i in chosen]
    narrow_names = set(ordered[:narrow])
    lines["of these, names of four families or more"] = [rows[i] for i in chosen if rows[i].name in narrow_names]

    def group(name: str) -> str:
        if names.has_word(name, words):
            return "held-out word"
        return "narrow" if name in narrow_names else "wide" if name in ordered_names else "no other family"

    ordered_names = set(ordered)
    columns = ("narrow", "wide", "held-out word", "no other family")
    by_task = {task: Counter(group(name) for name, own in concrete.items() if own == task) for task in sets.TASKS}
    return {
        "counts": markdown(("", *COLUMNS), [(title, *counts(each)) for title, each in lines.items()]),
        "tasks": markdown(
            ("task", "names", *columns),
            [(task, sum(found.values()), *(found[column] for column in columns)) for task, found in by_task.items()],
        ),
        "words": textwrap.fill(", ".join(sorted(words)) + ".", 120),
    }


def licences(title: str, rows: Iterable[Icon], information: dict[str, dict]) -> str:
    """A title, and the sets of these icons with their authors and licences."""
    used = Counter(row.set for row in rows)
    lines = [
        f"{title} the icon sets below, taken from the npm package",
        f"{sets.PACKAGE}. Each set: name, prefix in the package, author, licence, number of icons used.",
    ]
    for prefix, count in sorted(used.items()):
        info = information[prefix]
        author, licence = info["author"], info["license"]
        lines += ["", f"{info['name']} ({prefix}), {count:,} icons", f"  by {author['name']}, {author.get('url', '')}"]
        lines.append(f"  {licence['title']} ({licence['spdx']}), {licence.get('url', '')}")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    rows, digests = read_rows(folder), np.load(folder / "digests.npy")
    text = DOCS.read_text("utf-8")
    for name, table in tables(rows, digests).items():
        place = re.compile(rf"(<!-- pictograms:{name} -->\n).*?(<!-- /pictograms:{name} -->)", re.DOTALL)
        text = place.sub(lambda match, table=table: match[1] + table + "\n" + match[2], text)
    DOCS.write_text(text, "utf-8")
    words = names.held_out_words(pool.concrete_names(rows))
    used = [rows[i] for i in pool.choose(rows, pool.training_rows(rows, digests, words))[2]]
    title = "pictogram-tiny was pre-trained on drawings (counted here without the held-out words) from"
    LICENCES.write_text(licences(title, used, json.loads((folder / "sets.json").read_text())), "utf-8")
    print(f"wrote {DOCS.relative_to(ROOT)} and {LICENCES.relative_to(ROOT)}")


if __name__ == "__main__":
    main()

"""Write the tables of README.md and docs/, and the picture of README.md, from stored rows.

    python -m bench.report            write the pages that are out of date, and the picture
    python -m bench.report --check    write nothing; exit 1 and name the pages that are out of date

A pair of comments, `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`, marks the place of each table. A ratio is always
one that was measured within a run (`rows.py` says which row of a case counts). `bench/pages/` builds the tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from .pages import benchmarks, readme, studies
from .pages.cells import filled

ROOT = Path(__file__).parents[1]
PICTURE = Path("docs", "pictures", "step_bars.svg")


def of_study(*names: str) -> dict[str, Callable[[], str]]:
    """Tables of the study of when Skip Tuning wins."""
    return {f"when-{name}": partial(studies.when, name) for name in names}


# Functions that build the tables, by page and name.
PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"headline": readme.headline},
    "docs/benchmarks.md": {
        "step": benchmarks.steps,
        "sizes": benchmarks.sizes,
        "infer": benchmarks.classifying,
    },
    "docs/operators.md": {"operators": benchmarks.operators},
    "docs/fused-blocks.md": {"fuse": studies.fused},
    "docs/gpu.md": {"gpu-model": studies.estimates},
    "docs/heads.md": {"default": studies.default_cost, **of_study("tail")},
    "docs/when.md": of_study("default", "differences"),
    "docs/when-tables.md": of_study("harmonic", "joint", "base", "new"),
    "docs/when-details.md": of_study("settings", "trials", "own", "cost", "steps"),
}


def expected(page: str) -> str:
    """The text that a page must have."""
    text = (ROOT / page).read_text(encoding="utf-8")
    for name, table in PAGES[page].items():
        text = filled(text, name, table())
    return text


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    args = parser.parse_args(arguments)
    texts = {Path(page): expected(page) for page in PAGES}
    stale = {path: text for path, text in texts.items() if (ROOT / path).read_text(encoding="utf-8") != text}
    if args.check:
        for path in stale:
            print(f"{path} is out of date: python -m bench.report")
        return int(bool(stale))
    # The text of the picture depends on the version of matplotlib, so it is not compared.
    for path, text in (stale | {PICTURE: readme.step_bars()}).items():
        (ROOT / path).write_text(text, encoding="utf-8")
        print(f"{path} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())

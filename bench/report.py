"""Write the tables of README.md and docs/, and the picture of README.md, from stored rows.

    python -m bench.report            write the pages that are out of date, and the picture
    python -m bench.report --check    write nothing; exit 1 and name the pages that are out of date

A pair of comments, `<!-- bench:NAME -->` and `<!-- /bench:NAME -->`, marks the place of each table. Shown are the first
GPU, if there is one, and the first CPU. A ratio is always one that was measured within a run (`rows.py` says which row
of a case counts). `bench/pages/` builds the tables.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from .pages import bars, benchmarks, operators, readme, studies
from .pages.cells import SHOWN, filled
from .rows import Device, devices

ROOT = Path(__file__).parents[1]
# Tables of one device, by page and name.
BLOCKS: dict[str, dict[str, Callable[[Device], str]]] = {
    "README.md": {"headline": readme.headline},
    "docs/benchmarks.md": {
        "step": benchmarks.steps,
        "sizes": benchmarks.sizes,
        "memory": benchmarks.memory,
        "infer": benchmarks.classifying,
        "claims": benchmarks.claims,
        "lose": benchmarks.losses,
    },
    "docs/operators.md": {"operators": operators.operators},
    "docs/trainers.md": {"trainers": operators.trainers},
}
NOTHING = "Not measured yet."
PICTURE = Path("docs", "pictures", "step_bars.svg")
_WHEN = {"": ("default", "choices", "differences"), "-tables": ("harmonic", "joint", "base", "new")}
_WHEN |= {"-details": ("settings", "cost", "steps")}
# Tables of results that do not depend on the device, by page and name.
STUDIES: dict[str, dict[str, Callable[[Sequence[Device]], str]]] = {
    "docs/gpu.md": {"gpu-model": studies.estimates},
    "docs/using-a-model.md": {"unknown": studies.unknown_images},
    "docs/heads.md": {"when-tail": partial(studies.when, name="tail")},
    **{
        f"docs/when{page}.md": {f"when-{name}": partial(studies.when, name=name) for name in names}
        for page, names in _WHEN.items()
    },
    "docs/fused-blocks.md": {"fuse": studies.fused},
}


def expected_pages(root: Path) -> dict[Path, str]:
    """Text that each page must have, by path."""
    found = devices(root / "bench" / "results")
    first = {device.is_cpu: device for device in reversed(found)}
    shown = [first[is_cpu] for is_cpu in (False, True) if is_cpu in first]
    texts = {root / page: (root / page).read_text(encoding="utf-8") for page in (*BLOCKS, *STUDIES)}
    for page, blocks in BLOCKS.items():
        for name, block in blocks.items():
            parts = {device.name: text for device in shown if (text := block(device))}
            text = "\n\n".join(f"**{device}**\n\n{t}" if len(parts) > 1 else t for device, t in parts.items())
            texts[root / page] = filled(texts[root / page], name, text or NOTHING)
    for page, tables in STUDIES.items():
        for name, study in tables.items():
            texts[root / page] = filled(texts[root / page], name, study(found) or NOTHING)
    return texts


def picture(root: Path) -> str:
    """The picture of README. Its text depends on the version of matplotlib, so it is not compared."""
    found = devices(root / "bench" / "results")
    return bars.step_bars(found[0].latest_rows("step", **SHOWN)) if found else ""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if a page is out of date")
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout")
    args = parser.parse_args(arguments)
    expected = expected_pages(args.root)
    stale = {path: text for path, text in expected.items() if path.read_text(encoding="utf-8") != text}
    if args.check:
        for path in stale:
            print(f"{path.relative_to(args.root)} is out of date: python -m bench.report")
        return int(bool(stale))
    for path, text in (stale | {args.root / PICTURE: picture(args.root)}).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(f"{path.relative_to(args.root)} written")
    return 0


if __name__ == "__main__":
    sys.exit(main())

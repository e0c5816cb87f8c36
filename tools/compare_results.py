"""Compare the results of two commits: `skipkernels tune`, the counts of bench/results/counts.csv, and operator tests.

    python tools/compare_results.py BASE [HEAD]          HEAD by default

Each commit runs in a temporary git worktree, in the current environment, with C++ kernels built from its sources. Exit
status 1 if an accuracy or loss differs, a count grew, or an operator test fails. Takes about 15 minutes on two cores.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
COUNTS = ("flops", "saved_bytes", "gradient_bytes", "calls", "launches", "waits")


@contextmanager
def worktree(commit: str) -> Iterator[Path]:
    """The files of a commit in a temporary git worktree."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        subprocess.run(["git", "-C", ROOT, "worktree", "add", "--detach", "--quiet", tree, commit], check=True)
        try:
            yield tree
        finally:
            subprocess.run(["git", "-C", ROOT, "worktree", "remove", "--force", tree], check=True)


def run(tree: Path, *arguments: str) -> str:
    """The output of a Python module that runs in a worktree."""
    environment = os.environ | {"PYTHONPATH": str(tree)}
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=tree, env=environment, capture_output=True, text=True)
    return done.stdout + done.stderr


def results(commit: str, tests: bool) -> dict[str, Any]:
    """Results of a commit by name."""
    with worktree(commit) as tree:
        print(f"{commit}: tune", flush=True)
        run(tree, "skipkernels", "build")
        run(tree, "skipkernels", "tune", "--out", "run")
        metrics = json.loads((tree / "run" / "metrics.json").read_text())
        found = {f"tune, {s} {name}": value for s in ("zero_shot", "tuned") for name, value in metrics[s].items()}
        rows = [json.loads(line) for line in (tree / "run" / "metrics.jsonl").read_text().splitlines()]
        found |= {f"tune, loss of epoch {row['epoch']}": round(row["loss"], 5) for row in rows}
        with (tree / "bench" / "results" / "counts.csv").open(newline="") as file:
            for row in csv.DictReader(file):
                case = ", ".join(row[name] for name in ("what", "model", "C", "precision", "memory"))
                found |= {f"count, {case}, {name}": int(row[name]) for name in COUNTS if row.get(name)}
        if tests:
            print(f"{commit}: tests/ops", flush=True)
            found["tests/ops"] = run(tree, "pytest", "tests/ops", "-q", "-n", "2").strip().splitlines()[-1]
    return found


def main() -> int:
    """Print the differences; return 1 if a result is worse."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE")
    parser.add_argument("head", metavar="HEAD", nargs="?", default="HEAD")
    parser.add_argument("--no-tests", action="store_true", help="leave out the operator tests")
    args = parser.parse_args()
    base, head = (results(commit, not args.no_tests) for commit in (args.base, args.head))
    failed = 0
    for name in {**base, **head}:
        before, after = base.get(name, "–"), head.get(name, "–")
        if name == "tests/ops":
            failed += "failed" in after or "error" in after
        elif name.startswith("count"):
            failed += isinstance(before, int) and isinstance(after, int) and after > before
        else:
            failed += before != after
        if name == "tests/ops" or name.startswith("tune") or before != after:
            print(f"{'=' if before == after else '≠'} {name}: {before} → {after}")
    print(f"{sum(base.get(name) == value for name, value in head.items())} of {len(head)} results are equal")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

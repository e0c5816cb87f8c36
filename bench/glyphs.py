"""What tuning does on glyphs: skip against full fine-tuning, several seeds, each run in a process of its own.

    python -m bench.glyphs --seeds 3

Runs `skipkernels tune` for each method and seed, appends a row for each to bench/results/glyphs.csv, and prints means.
A process of its own makes peak memory comparable: it is the resident memory of that process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from . import measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=["skip", "full"])
    parser.add_argument("arguments", nargs="*", help="further arguments of skipkernels tune, after --")
    args = parser.parse_args()
    machine = measure.machine(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    rows = []
    for seed in range(args.seeds):  # methods in turn, so that a slow hour of the machine hits them alike
        for method in args.methods:
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, "-m", "skipkernels", "tune", "--method", method, "--seed", str(seed)]
                subprocess.run([*command, "--out", f"{folder}/run", *args.arguments], check=True)
                metrics = json.loads(Path(folder, "run", "metrics.json").read_text())
            rows.append(machine | row(metrics, seed, " ".join(args.arguments)))
    for method in args.methods:
        print(f"\n{method}, mean of {args.seeds} seeds (deviation):")
        for column in ("zero_shot_base", "zero_shot_new", "base", "new", "harmonic", "step_ms", "epoch_s", "peak_mib"):
            values = [r[column] for r in rows if r["method"] == method]
            print(f"  {column:15} {statistics.mean(values):9.2f}  ({statistics.pstdev(values):.2f})")
    print(f"appended to {measure.append_rows(rows, 'glyphs')}")


def row(metrics: dict, seed: int, arguments: str) -> dict:
    """A line of the table from metrics.json."""
    cost = metrics["cost"]
    return {
        "method": metrics["method"],
        "seed": seed,
        "arguments": arguments,
        **{f"zero_shot_{key}": metrics["zero_shot"][key] for key in ("base", "new", "harmonic")},
        **{key: round(metrics["tuned"][key], 4) for key in ("base", "new", "harmonic")},
        "kept_classes": metrics["kept_classes"],
        "step_ms": round(cost["milliseconds_per_step"], 2),
        "epoch_s": round(cost["seconds_per_epoch"], 2),
        "total_s": round(cost["seconds_total"], 1),
        "peak_mib": cost["peak_memory_mib"],
        "before_model_mib": cost["baseline_memory_mib"],
    }


if __name__ == "__main__":
    main()

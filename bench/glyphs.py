"""Accuracy and cost of Skip Tuning and other methods on glyphs, over several seeds, one process per run.

    python -m bench.glyphs --seeds 3 --methods skip full

Runs `skipkernels compare`. Appends a row for each run to bench/results/DEVICE/glyphs.csv, and prints means.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console

from skipkernels.app.config import TuneConfig
from skipkernels.app.methods.registry import METHODS
from skipkernels.app.studies.compare import compare
from skipkernels.app.studies.runs import Result

from . import measure


def main() -> None:
    parser = measure.command(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--data", default="glyphs")
    args = parser.parse_args()
    args.device = measure.default_device()
    with tempfile.TemporaryDirectory() as folder:
        config = TuneConfig(data=args.data)
        study = compare(config, args.methods, range(args.seeds), Path(folder), Console(stderr=True))
    for table in study.tables():
        Console(width=120).print(table)
    measure.save(args, [{"data": args.data} | row(result) for result in study.results], "glyphs")


def row(result: Result) -> dict:
    """The row of a run, from its metrics.json."""
    metrics, cost = result.metrics, result.metrics["cost"]
    pace = cost["milliseconds_per_step"]
    return {
        "method": result.variant,
        "seed": result.seed,
        **{f"zero_shot_{key}": value for key, value in metrics["zero_shot"].items()},
        **{key: None if value is None else round(value, 4) for key, value in metrics["tuned"].items()},
        "kept_classes": metrics["kept_classes"],
        "trained_parameters": metrics["parameters"]["trained"],
        "step_ms": None if pace is None else round(pace, 2),
        "tuning_s": round(cost["seconds_tuning"], 2),
        "total_s": round(cost["seconds_total"], 1),
        "peak_mib": cost["peak_memory_mib"],
        "before_model_mib": cost["baseline_memory_mib"],
    }


if __name__ == "__main__":
    main()

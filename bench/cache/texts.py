"""Many classes: SkipCLIP with text features in a folder against in memory, ViT-B/16 with random weights.

    python -m bench.cache.texts --classes 21841

Three processes: in memory; into an empty folder; from that folder. Each constructs SkipCLIP and runs some steps of
batch 4 on random features; reported are the seconds of construction, the peak resident memory and the milliseconds of a
step. All must give the same losses. Appends to bench/results/DEVICE/cache_texts.csv.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import skipkernels as sk
from skipkernels.memory import PeakMemory

from .. import measure
from ..inputs import autocast, parser, random_inputs


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, batch=4, classes=21841)
    options.add_argument("--steps", type=int, default=5)
    args = options.parse_args(arguments)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        ways = {"in memory": None, "into a folder": Path(name), "from a folder": Path(name)}
        losses = []
        for way, folder in ways.items():
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                made, step, before, peak, found = process.submit(run, args, folder).result()
            losses.append(found)
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder else 0
            rows.append(
                measure.machine(args.device)
                | {"texts": way, "model": args.model, "B": args.batch, "C": args.classes, "precision": args.precision}
                | {"skip_layers": args.skip_layers, "seconds_ready": round(made, 2), "step_ms": round(1000 * step, 1)}
                | {"before_mib": before >> 20, "peak_mib": peak >> 20, "folder_mib": size >> 20}
            )
            print(
                f"{way:14} ready in {made:.1f} s, {1000 * step:.0f} ms a step; {peak >> 20} MiB resident at most, "
                f"{before >> 20} with the model alone; {size >> 20} MiB on the disk"
            )
    if not all(found == losses[0] for found in losses):
        raise SystemExit(f"the losses differ: {losses}")
    if not args.no_save:
        print(f"appended to {measure.append_rows(rows, 'cache_texts')}")


def run(args: argparse.Namespace, folder: Path | None) -> tuple[float, float, int, int, list[float]]:
    """Seconds of construction and of a step, resident memory before and at the peak, and the losses."""
    model, tokens, images, labels = random_inputs(args.model, args.batch, args.classes, args.device)
    memory = PeakMemory(args.device)
    before = memory.read()
    started = time.perf_counter()
    clip = sk.SkipCLIP(model, tokens, skip_layers=args.skip_layers, text_cache=folder)
    ready = time.perf_counter() - started
    features, losses, seconds = clip.encode_lower(images), [], []
    for _ in range(args.steps):
        started = time.perf_counter()
        with autocast(args.device, args.precision):
            loss = clip(features, labels).loss
        loss.backward()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    return ready, measure.quantile(seconds, 0.5), before, memory.read(), losses


if __name__ == "__main__":
    main()

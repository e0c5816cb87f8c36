"""Predict a training step in many processes: work, messages, memory and time of each; or measure memory on this host.

    python -m bench.scale                       print the table; write bench/results/scale.csv
    python -m bench.scale --batch 4 --max-tail 1000 --no-save
    python -m bench.scale --measure             peak memory of a process, with 1 and 4 processes, and 200,000 classes

The table is for 1 to 64 processes with a GPU each and 1,000 to 1,000,000 classes: ViT-B/16 above block 6, bf16 autocast
with fp32 weights, SGD with momentum, and `--batch` images per process. The formulas, and the two ways of training that
they compare, are in bench/step_model.py. Nothing in the table is measured. With --measure, a row for each number of
processes is appended to bench/results/DEVICE/scale_memory.csv.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import open_clip
import torch
import torch.distributed as dist

import skipkernels as sk
from skipkernels import testing
from skipkernels.selection import RankSampler

from . import measure, tables
from .inputs import positive
from .step_model import CLASS_PARALLEL, GPUS, REPLICATED, VIT_B_16, WAYS, Model, faster_way, predict, step_seconds

TABLE = measure.RESULTS / "scale.csv"
PROCESSES, CLASSES = (1, 2, 4, 8, 16, 32, 64), (1_000, 10_000, 100_000, 1_000_000)


def columns_of(way: str, W: int, b: int, C: int, K: int, model: Model = VIT_B_16) -> dict[str, Any]:
    """Predicted columns of one way with b images per process."""
    found = predict(way, W, b, C, K, model)
    row: dict[str, Any] = {"gflop": round(found.flops / 1e9), "sent": found.sent}
    row |= {"class_mib": round(found.class_bytes / 2**20), "rest_mib": round(found.rest_bytes / 2**20)}
    return row | {f"{gpu}_ms": round(1e3 * step_seconds(found, W, model, gpu), 2) for gpu in GPUS}


def rows_of(batch: int, max_tail: int | None) -> Iterator[dict[str, Any]]:
    """One row for each number of classes and processes."""
    for C in CLASSES:
        for W in PROCESSES:
            K = RankSampler(max_tail=max_tail).expected_keep(C, W * batch)
            both = {way: columns_of(way, W, batch, C, K) for way in WAYS}
            row = {"C": C, "W": W, "B": W * batch, "K": K}
            row |= {f"{way} {name}": both[way][name] for way in WAYS for name in both[way]}
            for gpu in GPUS:
                row[f"faster on {gpu}"] = "equal" if W == 1 else faster_way(W, batch, C, K, VIT_B_16, gpu)
            yield row


# ---- measured on this host ---------------------------------------------------------------------------------------


def in_processes(W: int, threads: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Results of `function(rank, group, *arguments)` in each of W new processes with a number of threads."""
    spawn = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(W, mp_context=spawn) as pool:
        calls = [pool.submit(_in_process, rank, W, threads, folder, function, arguments) for rank in range(W)]
        return [call.result() for call in calls]


def _in_process(
    rank: int, W: int, threads: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> Any:
    torch.set_num_threads(threads)
    store = dist.FileStore(str(Path(folder, "store")), W)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=W)
    try:
        return function(rank, dist.group.WORLD, *arguments)
    finally:
        dist.destroy_process_group()


def small_model(D: int = 32) -> open_clip.CLIP:
    """CLIP of two blocks per tower, with random weights, for very many classes on a CPU."""
    torch.manual_seed(0)
    vision = {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": 8, "vocab_size": 1000, "width": 32, "heads": 2, "layers": 2}
    return open_clip.CLIP(D, vision, text)


def small_tokens(C: int) -> torch.Tensor:
    """Prompts [C, 8] of two shared tokens, three of the class, and the last one."""
    digits = torch.arange(C)[:, None] // torch.tensor([1, 100, 10_000]) % 100
    ends = torch.tensor([[998, 997], [999, 0]]).expand(C, 2, 2)
    return torch.cat([ends[:, 0], 1 + digits, ends[:, 1], torch.zeros(C, 1, dtype=torch.int64)], dim=1)


def peak_of_process(rank: int, group: Any, C: int, B: int) -> int:
    """Peak resident bytes of construction and two steps with C classes, above those with a hundred."""

    def train(tokens: torch.Tensor) -> None:
        clip = sk.SkipCLIP(small_model(), tokens, skip_layers=1, memory="fast", process_group=group)
        b = B // dist.get_world_size(group)
        for _ in range(2):
            clip(torch.randn(b, 3, 16, 16), torch.arange(b)).loss.backward()
            sk.parallel.all_reduce_gradients(clip)

    few, many = small_tokens(100), small_tokens(C)
    train(few)
    base = testing.peak_bytes(lambda: train(few), warm_up=False)
    return testing.peak_bytes(lambda: train(many), warm_up=False) - base


def measure_memory(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of the peak memory of a process for classes: the largest of all processes."""
    rows: list[dict[str, Any]] = []
    for W in (1, 4):
        peak = max(in_processes(W, 1, peak_of_process, args.classes, args.batch))
        rows.append({"C": args.classes, "W": W, "B": args.batch, "class_mib": round(peak / 2**20, 1)})
        rows[-1]["of_one"] = round(rows[-1]["class_mib"] / rows[0]["class_mib"], 3)
        print(f"C={args.classes:,} W={W}: {rows[-1]['class_mib']} MiB, {rows[-1]['of_one']:.0%} of one process")
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    parser = measure.command(__doc__)
    parser.add_argument("--batch", type=positive, default=32, help="images per process")
    parser.add_argument("--max-tail", type=positive, help="bound on the classes drawn from the tail")
    parser.add_argument("--measure", action="store_true", help="measure on this host; --batch is of all processes")
    parser.add_argument("--classes", type=positive, default=200_000, help="with --measure")
    args = parser.parse_args(arguments)
    if args.measure:
        args.device = measure.CPU
        measure.save(args, measure_memory(args), "scale_memory")
        return
    rows = list(rows_of(args.batch, args.max_tail))
    columns = [name.replace(CLASS_PARALLEL, "own").replace(REPLICATED, "all") for name in rows[0]]
    title = "own: class-parallel, all: replicated; * the faster"
    tables.show(columns, [list(row.values()) for row in rows], title, width=240)
    if not args.no_save:
        tables.write_dicts(TABLE, rows)
        print(f"wrote {TABLE}")


if __name__ == "__main__":
    main()

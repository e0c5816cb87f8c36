"""Estimate the time of a training step on a GPU from the launches that it makes. Nothing is measured.

    python -m bench.gpu_model              write bench/results/gpu_model.csv
    python -m bench.gpu_model --no-save    print only

The steps run on the meta device, and every launch is recorded with the bytes of its tensors, its FLOPs and the shape of
its product (`bench.recording`). A launch takes

    START + max(bytes / bandwidth, FLOPs / rate)

A Triton kernel with few warps does not reach the whole bandwidth. A product is divided into tiles, and the slowest
multiprocessor determines its time: of the tiles in TILES and the ways to split the inner dimension, the fastest counts.
The L2 cache is left out: a step moves many times its size.

    floor     FLOPs at the rate of a large product, and bytes at the bandwidth of the memory, without START
    graph     the launches of a CUDA graph one after the other, GAP between them
    eager     the longer of the launches on the device, one after the other, and of the calls on the host

The launches of the two towers, which are on two streams, may overlap: then a graph takes less. The published step is
eager.
The constants below describe an H100 SXM. They are assumptions: one run of bench/gpu.sh on a device can correct them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import NamedTuple

import torch

from skipkernels.selection import RankSampler

from . import measure, recording, tables
from .inputs import random_inputs
from .published import PublishedStep
from .recording import Launch
from .rows import RESULTS, command

TABLE = RESULTS / "gpu_model.csv"
MODEL, SKIP_LAYERS = "ViT-B-16", 6
TITLE = "Estimated for an H100; nothing is measured"
BATCHES, CLASSES, PRECISIONS = (4, 32), (100, 1000, 10_000), ("bf16", "fp32")

# ---- assumptions about the GPU ---------------------------------------------------------------------------------------

PROCESSORS = 132  # multiprocessors of an H100 SXM
RATES = {  # FLOP/s of products
    torch.bfloat16: 750e12,
    torch.float16: 750e12,
    torch.float32: 55e12,
    torch.float64: 55e12,
}
BANDWIDTH = 2.9e12  # bytes/s of the memory, read or written
WARPS = 8  # for each multiprocessor, which need to be loading for the whole bandwidth
START = 1.5e-6  # seconds until the programs of a kernel run at full speed, and until the last one ends
GAP = 1.1e-6  # seconds between two nodes of a graph
HOST_TORCH, HOST_TRITON = 5e-6, 12e-6  # seconds of the host for a call of PyTorch, and for a launch of Triton
TILES = {(128, 256): 0.9, (128, 128): 0.8, (128, 64): 0.6, (64, 64): 0.4}  # of products: share of the rate
SPLITS = (1, 2, 4, 8)  # of the inner dimension
ATTENTION = 0.4  # share of the rate that attention reaches


def seconds_of(launch: Launch) -> float:
    """Time of a launch on the device. Launches of PyTorch are assumed to fill the GPU."""
    filled = 1.0 if launch.warps is None else min(1.0, launch.warps / (PROCESSORS * WARPS))
    if launch.shape is not None:
        computing = seconds_of_product(*launch.shape, launch.dtype)
    else:
        computing = launch.flops / ATTENTION / RATES[launch.dtype]
    return START + max(launch.nbytes / (filled * BANDWIDTH), computing)


def seconds_of_product(batch: int, rows: int, columns: int, inner: int, dtype: torch.dtype) -> float:
    """Time of a product on the multiprocessors, with the best of TILES and SPLITS.

    >>> 1e6 * seconds_of_product(1, 8192, 8192, 8192, torch.bfloat16)  # 1466 at full rate
    1640.4...
    """
    of_processor = RATES[dtype] / PROCESSORS

    def seconds(tile: tuple[int, int], split: int) -> float:
        (height, width), share = tile, TILES[tile]
        tiles = batch * math.ceil(rows / height) * math.ceil(columns / width) * split
        of_tile = 2 * height * width * math.ceil(inner / split)
        return math.ceil(tiles / PROCESSORS) * of_tile / (share * of_processor)

    return min(seconds(tile, split) for tile, split in product(TILES, SPLITS))


# ---- steps -----------------------------------------------------------------------------------------------------------


def launches_of_ours(batch: int, classes: int, precision: str) -> list[Launch]:
    """Launches of our step in a graph."""
    return recording.record_step(*recording.skip_clip(MODEL, SKIP_LAYERS, batch, classes), precision).launches


def launches_of_published(batch: int, classes: int, precision: str) -> list[Launch]:
    """Launches of the published step and of PyTorch's update."""
    inputs = random_inputs(MODEL, batch, classes, measure.CPU)
    model, (tokens, images, labels) = inputs.model.to("meta"), (x.to("meta") for x in inputs[1:])
    step = PublishedStep(model, tokens, SKIP_LAYERS, RankSampler())
    features = step.image_features(images)
    sgd = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], momentum=0.9, foreach=True)

    def run() -> None:
        loss, _ = step(features, labels)
        loss.backward()
        sgd.step()
        sgd.zero_grad()

    return recording.record_second_call(run, precision).launches


# ---- the table -------------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A case: our step and the published one; times in microseconds."""

    B: int
    C: int
    precision: str
    launches: int
    floor_us: int
    graph_us: int
    eager_us: int
    published_us: int
    torch: str


def floor(launches: Sequence[Launch]) -> float:
    """Time at full speed."""
    return sum(max(each.nbytes / BANDWIDTH, each.flops / RATES[each.dtype]) for each in launches)


def graph(launches: Sequence[Launch]) -> float:
    """Time of the launches one after the other in a graph."""
    return sum(seconds_of(launch) + GAP for launch in launches)


def eager(launches: Sequence[Launch]) -> float:
    """Time of an eager step, on the device or on the host."""
    host = sum(HOST_TRITON if launch.triton else HOST_TORCH for launch in launches)
    return max(graph(launches), host)


def row_of(batch: int, classes: int, precision: str) -> Row:
    ours = launches_of_ours(batch, classes, precision)
    published = launches_of_published(batch, classes, precision)
    seconds = floor(ours), graph(ours), eager(ours), eager(published)
    version = ".".join(torch.__version__.split(".")[:2])
    return Row(batch, classes, precision, len(ours), *(round(1e6 * s) for s in seconds), version)


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines of the cases."""
    header = ["B", "C", "precision", "launches", "floor, ms", "graph, ms", "eager, ms", "published, ms"]
    lines = []
    for row in rows:
        case = str(row.B), f"{row.C:,}", row.precision, str(row.launches)
        times = (row.floor_us, row.graph_us, row.eager_us, row.published_us)
        ratio = f"{row.published_us / row.graph_us:.1f}"
        lines.append([*case, *(f"{us / 1000:.2f}" for us in times), ratio])
    return [*header, "published over graph"], lines


def main(arguments: Sequence[str] | None = None) -> None:
    args = command(__doc__).parse_args(arguments)
    measure.keep_freed_memory()
    rows = [row_of(*case) for case in product(BATCHES, CLASSES, PRECISIONS)]
    tables.show(*cells(rows), TITLE)
    if not args.no_save:
        tables.write(TABLE, rows)
        print(f"wrote {TABLE}")


if __name__ == "__main__":
    main()

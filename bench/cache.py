"""Benchmarks of the feature cache. Each command appends its rows to bench/results/DEVICE/cache_COMMAND.csv.

    python -m bench.cache build
    python -m bench.cache features --model ViT-B-16
    python -m bench.cache texts --classes 21841

build       Time of `FeatureCache.build` against the published extraction of the same images. The published one runs
            every block of the image tower and keeps the hidden states at the cut in a list (in fp32, in memory). Ours
            runs only the blocks below the cut, checks that values are finite, and writes a cache that is flushed to
            disk. Features are compared first (in fp32).
features    Error of the dtypes in the features, in the worst token, and in the loss over all classes, against
            fp32. (Trained weights have some features that are a hundred times larger than others; int8, with one scale
            per token, then loses more.)
texts       Many classes: text features in memory, into an empty folder, and from that folder, each in a new process
            that constructs SkipCLIP and runs --rounds steps of batch 4. All must give the same losses.

Models and images are random.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import skipkernels as sk
from skipkernels.app.train.precision import autocast
from skipkernels.features import FeatureCache
from skipkernels.features.layout import STORED_DTYPES
from skipkernels.memory import PeakMemory
from skipkernels.testing import relative_error

from . import measure
from .inputs import parser, random_inputs
from .rows import save

Rows = list[dict[str, Any]]

_SLACK = {"fp32": 1e-5, "bf16": 2e-2}  # relative error of features: the same arithmetic in another order


def main(arguments: Sequence[str] | None = None) -> None:
    outer = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = outer.add_subparsers(dest="command", required=True)
    for command, defaults in (
        (build, {"batch": 64, "classes": 2, "rounds": 3}),
        (features, {"batch": 32, "classes": 50}),
        (texts, {"batch": 4, "classes": 21841, "rounds": 5}),
    ):
        added = commands.add_parser(command.__name__, parents=[parser("", **defaults)], add_help=False)
        added.set_defaults(run=command)
    args = outer.parse_args(arguments)
    rows = args.run(args)
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    save(args, rows, f"cache_{args.command}")


# ---- build -----------------------------------------------------------------------------------------------------------


def build(args: argparse.Namespace) -> Rows:
    model, tokens, images, labels = random_inputs(args.model, args.batch, args.classes, args.device)
    dataset = TensorDataset(images.cpu(), labels.cpu())
    clip = sk.SkipCLIP(model, tokens, skip_layers=args.skip_layers)
    scratch = tempfile.TemporaryDirectory()

    def built(dtype: str = "bf16") -> FeatureCache:
        options = {"dtype": dtype, "batch_size": args.batch, "overwrite": True, "progress": False}
        with autocast(args.precision, args.device):
            return FeatureCache.build(scratch.name, clip, dataset, **options)

    with scratch:
        extract = partial(published, model, dataset, args)
        exact = built("fp32")
        ours = torch.stack([exact[i][0] for i in range(args.batch)])
        error = relative_error(ours, torch.cat(extract()).float())
        print(f"features differ by {error:.1e} of their norm in {args.precision}")
        if not error <= _SLACK[args.precision]:
            raise SystemExit("other features: no timing")
        seconds = measure.time_alternately({"published": extract, "build": built}, args.rounds, args.device)
    ratio = measure.median_ratio(seconds["published"], seconds["build"])
    return [
        {"extraction": name, "model": args.model, "images": args.batch, "B": args.batch}
        | {"skip_layers": args.skip_layers, "precision": args.precision, "dtype": "bf16"}
        | measure.milliseconds(times)
        | {"images_s": round(args.batch / measure.quantile(times, 0.5), 2)}
        | {"faster": round(ratio if name == "build" else 1.0, 3)}
        for name, times in seconds.items()
    ]


@torch.no_grad()
def published(model: Any, dataset: TensorDataset, args: argparse.Namespace) -> list[Tensor]:
    """Hidden states at the cut of all images, from a pass through the whole tower."""
    kept: list[Tensor] = []
    cut = model.visual.transformer.resblocks[args.skip_layers - 1]
    hook = cut.register_forward_hook(lambda module, inputs, output: kept.append(output.cpu()))
    try:
        with autocast(args.precision, args.device):
            for images, _labels in DataLoader(dataset, batch_size=args.batch):
                model.encode_image(images.to(args.device))
    finally:
        hook.remove()
    return kept


# ---- dtypes ----------------------------------------------------------------------------------------------------------


def features(args: argparse.Namespace) -> Rows:
    model, tokens, images, labels = random_inputs(args.model, args.batch, args.classes, args.device)
    clip = sk.SkipCLIP(model, tokens, skip_layers=args.skip_layers)
    dataset = TensorDataset(images.cpu(), labels.cpu())
    truth = clip.encode_lower(images).cpu()
    rows = []
    for dtype in STORED_DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            cache = FeatureCache.build(folder, clip, dataset, dtype=dtype, batch_size=args.batch, progress=False)
            (kept, _), *_ = cache.loader(args.batch, "sequential")
            size = cache.table.layout.row_bytes
        token = ((kept - truth).norm(dim=-1) / truth.norm(dim=-1)).max().item()
        with torch.no_grad():  # the same classes: all of them
            expected, got = (clip.predict(x.to(args.device)).double() for x in (truth, kept))
        loss = torch.nn.functional.cross_entropy
        change = abs(loss(got, labels) - loss(expected, labels)).item()
        errors = {"error": relative_error(kept, truth), "error_of_worst_token": token}
        errors |= {"error_of_logits": relative_error(got, expected), "loss_differs_by": change}
        row = {"model": args.model, "images": args.batch, "skip_layers": args.skip_layers, "dtype": dtype}
        rows.append(row | {"kb_an_image": round(size / 1000, 1)} | {name: f"{e:.2e}" for name, e in errors.items()})
    return rows


# ---- texts -----------------------------------------------------------------------------------------------------------


def texts(args: argparse.Namespace) -> Rows:
    rows, losses = [], []
    with tempfile.TemporaryDirectory() as name:
        ways = {"in memory": None, "into a folder": Path(name), "from a folder": Path(name)}
        for way, folder in ways.items():
            ready, step, before, peak, found = measure.in_new_process(steps_of, args, folder)
            losses.append(found)
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder else 0
            row = {"texts": way, "model": args.model, "B": args.batch, "C": args.classes, "precision": args.precision}
            row |= {"skip_layers": args.skip_layers, "seconds_ready": round(ready, 2), "step_ms": round(1000 * step, 1)}
            rows.append(row | {"before_mib": before >> 20, "peak_mib": peak >> 20, "folder_mib": size >> 20})
    if not all(found == losses[0] for found in losses):
        raise SystemExit(f"the losses differ: {losses}")
    return rows


def steps_of(args: argparse.Namespace, folder: Path | None) -> tuple[float, float, int, int, list[float]]:
    """Seconds of construction and of a step, resident memory before and at the peak, and the losses."""
    model, tokens, images, labels = random_inputs(args.model, args.batch, args.classes, args.device)
    memory = PeakMemory(args.device)
    before = memory.read()
    started = time.perf_counter()
    clip = sk.SkipCLIP(model, tokens, skip_layers=args.skip_layers, text_cache=folder)
    ready = time.perf_counter() - started
    at_the_cut, losses, seconds = clip.encode_lower(images), [], []
    for _ in range(args.rounds):
        started = time.perf_counter()
        with autocast(args.precision, args.device):
            loss = clip(at_the_cut, labels).loss
        loss.backward()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    return ready, measure.quantile(seconds, 0.5), before, memory.read(), losses


if __name__ == "__main__":
    main()

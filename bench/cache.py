"""Benchmarks of the feature cache. Each command appends its rows to bench/results/DEVICE/cache_COMMAND.csv.

    python -m bench.cache build --images 64 --rounds 3
    python -m bench.cache read --mib 4096
    python -m bench.cache features --model ViT-B-16
    python -m bench.cache tuning --seeds 0 1 2
    python -m bench.cache texts --classes 21841

build       Time of `FeatureCache.build` against the published extraction of the same images. The published one runs
            every block of the image tower and keeps the hidden states at the cut in a list (in fp32, in memory). Ours
            runs only the blocks below the cut, checks that values are finite, and writes a cache that is flushed to
            disk. Features are compared first (in fp32).
read        Time of an epoch in random order from a bf16 cache of --mib MiB, by `FeatureCache.loader`, and of sequential
            reading of its file, the most that the disk delivers. Each runs in a new process with a cold page cache; its
            peak resident memory includes mapped pages, so it must not grow with --mib.
features    Error of the dtypes in the features, in the worst token, and in the loss over all classes, against
            fp32. (Trained weights have some features that are a hundred times larger than others; int8, with one scale
            per token, then loses more.)
tuning      `make tune` from a cache of each dtype: accuracy, and the largest difference of an epoch's loss, against the
            run with an fp32 cache.
texts       Many classes: text features in memory, into an empty folder, and from that folder, each in a new process
            that constructs SkipCLIP and runs some steps of batch 4. All must give the same losses.

Features, models and images are random: ViT-B/16, 197 × 768, where no model is given.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import skipkernels as sk
from skipkernels.app.config import TuneConfig
from skipkernels.app.train import tune
from skipkernels.features import FeatureCache
from skipkernels.features.table import FEATURES, STORED_DTYPES, Layout
from skipkernels.features.writer import TableWriter
from skipkernels.memory import PeakMemory
from skipkernels.testing import relative_error

from . import measure
from .inputs import autocast, parser, random_inputs

Rows = list[dict[str, Any]]

SHAPE = (197, 768)  # shape of the features of an image in ViT-B/16
_SLACK = {"fp32": 1e-5, "bf16": 2e-2}  # relative error of features: the same arithmetic in another order
_BLOCK = 4 << 20


def main(arguments: Sequence[str] | None = None) -> None:
    outer = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = outer.add_subparsers(dest="command", required=True)

    def add(command: Callable[[argparse.Namespace], Rows], options: dict[str, Any], **of_model: Any) -> None:
        parents = [parser("", **of_model)] if of_model else []
        added = commands.add_parser(command.__name__, parents=parents, add_help=not of_model)
        added.set_defaults(run=command)
        if not of_model:
            added.set_defaults(device=measure.CPU)
            options = options | {"--no-save": False}
        for name, default in options.items():
            many, kind = isinstance(default, list), type(default[0] if isinstance(default, list) else default)
            how: Any = {"action": "store_true"} if kind is bool else {"type": kind, "nargs": "+" if many else None}
            added.add_argument(name, default=default, **how)

    add(build, {"--images": 64, "--dtype": "bf16"}, batch=64, classes=2, rounds=3)
    add(read, {"--mib": 4096, "--batch": 32, "--rounds": 3, "--folder": tempfile.gettempdir()})
    add(features, {}, batch=32, classes=50)
    add(tuning, {"--seeds": [0, 1, 2]})
    add(texts, {"--steps": 5}, batch=4, classes=21841)
    args = outer.parse_args(arguments)
    rows = args.run(args)
    for row in rows:
        print(", ".join(f"{name} {value}" for name, value in row.items()))
    measure.save(args, rows, f"cache_{args.command}")


def random_cache(folder: Path, images: int, dtype: str) -> Layout:
    """Write a complete cache of random features."""
    generator = torch.Generator().manual_seed(0)
    layout = Layout(images, SHAPE, dtype, "fp32", True, {"number of images": images})
    with TableWriter(folder, layout) as writer:
        for ids in torch.arange(images).split(64):
            writer.write(int(ids[0]), torch.randn(len(ids), *SHAPE, generator=generator), ids // 16)
    return layout


# ---- build -----------------------------------------------------------------------------------------------------------


def build(args: argparse.Namespace) -> Rows:
    model, tokens, images, labels = random_inputs(args.model, args.images, args.classes, args.device)
    dataset = TensorDataset(images.cpu(), labels.cpu())
    clip = sk.SkipCLIP(model, tokens, skip_layers=args.skip_layers)
    scratch = tempfile.TemporaryDirectory()

    def built(dtype: str = args.dtype) -> FeatureCache:
        options = {"dtype": dtype, "batch_size": args.batch, "overwrite": True, "progress": False}
        with autocast(args.device, args.precision):
            return FeatureCache.build(scratch.name, clip, dataset, **options)

    with scratch:
        extract = partial(published, model, dataset, args)
        ours = torch.stack([built("fp32")[i][0] for i in range(min(8, args.images))])
        error = relative_error(ours, torch.cat(extract())[: len(ours)].float())
        print(f"features differ by {error:.1e} of their norm in {args.precision}")
        if not error <= _SLACK[args.precision]:
            raise SystemExit("other features: no timing")
        seconds = measure.time_alternately({"published": extract, "build": built}, args.rounds, args.device)
    ratio = measure.median_ratio(seconds["published"], seconds["build"])
    return [
        {"extraction": name, "model": args.model, "images": args.images, "B": args.batch}
        | {"skip_layers": args.skip_layers, "precision": args.precision, "dtype": args.dtype}
        | measure.milliseconds(times)
        | {"images_s": round(args.images / measure.quantile(times, 0.5), 2)}
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
        with autocast(args.device, args.precision):
            for images, _labels in DataLoader(dataset, batch_size=args.batch):
                model.encode_image(images.to(args.device))
    finally:
        hook.remove()
    return kept


# ---- read ------------------------------------------------------------------------------------------------------------


def read(args: argparse.Namespace) -> Rows:
    ways: dict[str, Callable[[Path, int], None]] = {"loader": read_epoch, "file": read_file}
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        images = (args.mib << 20) // (SHAPE[0] * SHAPE[1] * 2)
        total = images * random_cache(Path(folder), images, "bf16").row_bytes
        for _ in range(args.rounds):
            for way, function in ways.items():
                drop(Path(folder))
                took, peaks[way] = measure.in_new_process(timed, function, Path(folder), args.batch)
                seconds[way].append(took)
    return [
        {"way": way, "images": images, "cache_mib": total >> 20, "B": args.batch}
        | {"gb_s": round(total / measure.quantile(times, 0.5) / 1e9, 3), "peak_resident_mib": peaks[way] >> 20}
        | {"of_file": round(measure.median_ratio(seconds["file"], times), 3)}
        for way, times in seconds.items()
    ]


def drop(folder: Path) -> None:
    """Drop the files of a folder from the page cache."""
    os.sync()
    for path in folder.iterdir():
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def timed(function: Callable[[Path, int], None], folder: Path, batch: int) -> tuple[float, int]:
    """Seconds and peak resident bytes of a call."""
    memory, started = PeakMemory(measure.CPU), time.perf_counter()
    function(folder, batch)
    return time.perf_counter() - started, memory.read()


def read_epoch(folder: Path, batch: int) -> None:
    """Read an epoch by the loader, in random order."""
    total = torch.zeros(())
    for features, _ in FeatureCache.open(folder).loader(batch, "random"):
        total += features[:, 0, 0].sum()  # use the batch


def read_file(folder: Path, batch: int) -> None:
    """Read the file sequentially."""
    buffer = bytearray(_BLOCK)
    with (folder / FEATURES).open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


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


def tuning(args: argparse.Namespace) -> Rows:
    found: dict[str, Rows] = {dtype: [] for dtype in STORED_DTYPES}
    for seed in args.seeds:
        for dtype in STORED_DTYPES:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder, "run")
                config = TuneConfig(seed=seed, cache=Path(folder, "cache"), cache_dtype=dtype, out=out)
                metrics = tune(config, Console(stderr=True))
                losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
            found[dtype].append(metrics["tuned"] | {"losses": losses})
    rows = []
    for dtype, results in found.items():
        pairs = list(zip(results, found["fp32"], strict=True))
        curves = [zip(ours["losses"], exact["losses"], strict=True) for ours, exact in pairs]
        row: dict[str, Any] = {"dtype": dtype, "seeds": " ".join(map(str, args.seeds))}
        for key in ("base", "new", "harmonic"):
            row[key] = round(sum(result[key] for result in results) / len(results), 2)
            row[f"{key}_at_most"] = round(max(abs(ours[key] - exact[key]) for ours, exact in pairs), 2)
        rows.append(row | {"loss_at_most": f"{max(abs(a - b) / b for curve in curves for a, b in curve):.1e}"})
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
    for _ in range(args.steps):
        started = time.perf_counter()
        with autocast(args.device, args.precision):
            loss = clip(at_the_cut, labels).loss
        loss.backward()
        losses.append(loss.item())
        seconds.append(time.perf_counter() - started)
    return ready, measure.quantile(seconds, 0.5), before, memory.read(), losses


if __name__ == "__main__":
    main()

"""Measure the share of a tuning epoch that is spent waiting for features from a store.

    python -m bench.cache.epoch --classes 50 --shots 16 --precision fp32

ViT-B/16 with random weights, classes × shots random images; a bf16 store on disk with a cold page cache; class-pure
batches of 4; forward, backward and `torch.optim.SGD`. Counted is the time of the loop in `next()`. Appends to
bench/results/DEVICE/cache_epoch.csv.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.progress import track

import skipkernels as sk

from .. import measure
from ..inputs import autocast, parser, random_inputs
from . import random_store
from .disk import drop


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, batch=4, classes=50)
    options.add_argument("--shots", type=int, default=16)
    options.add_argument("--dtype", default="bf16", help="of the store")
    args = options.parse_args(arguments)
    model, tokens, _, _ = random_inputs(args.model, 1, args.classes, args.device)
    clip = sk.SkipCLIP(model, tokens, skip_layers=args.skip_layers)
    optimizer = torch.optim.SGD(clip.parameter_groups(text_lr=1e-6, image_lr=1e-6), momentum=0.9)
    with tempfile.TemporaryDirectory() as name:
        random_store(Path(name), args.classes * args.shots, args.dtype)
        cache = sk.FeatureCache.open(name)
        loader = cache.loader(args.batch, device=args.device)
        drop(Path(name))
        measure.synchronize(args.device)
        started = time.perf_counter()
        for features, labels in track(loader, "an epoch", total=len(loader), transient=True):
            with autocast(args.device, args.precision):
                loss = clip(features, labels).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        measure.synchronize(args.device)
        seconds = time.perf_counter() - started
    share = loader.seconds_waited / seconds
    row = (
        measure.machine(args.device)
        | {"model": args.model, "images": len(cache), "B": args.batch, "C": args.classes, "dtype": args.dtype}
        | {"skip_layers": args.skip_layers, "precision": args.precision, "steps": len(loader)}
        | {"seconds": round(seconds, 2), "seconds_waited": round(loader.seconds_waited, 4), "share": round(share, 5)}
    )
    print(f"{len(loader)} steps in {seconds:.1f} s, of which {loader.seconds_waited:.2f} s waiting: {share:.2%}")
    if not args.no_save:
        print(f"appended to {measure.append_rows([row], 'cache_epoch')}")


if __name__ == "__main__":
    main()

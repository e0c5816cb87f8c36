"""Time building a store against the published extraction of the same images, ViT-B/16 with random weights.

    python -m bench.cache.build --images 64 --rounds 3

The published extraction runs every block of the image tower over the images and keeps the hidden states at the cut in a
list (in fp32, in memory). `FeatureCache.build` runs only the blocks below the cut, checks that values are finite, and
writes a store that is flushed to disk. Both load the same images, in the same batches.

Compares the features first (the store's in fp32), then times in turn. Appends to bench/results/DEVICE/cache_build.csv.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import skipkernels as sk
from skipkernels.testing import relative_error

from .. import measure
from ..inputs import autocast, parser, random_inputs

_SLACK = {"fp32": 1e-5, "bf16": 2e-2}  # relative error of features: the same arithmetic in another order


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, batch=64, classes=2, rounds=3)
    options.add_argument("--images", type=int, default=64, help="in all")
    options.add_argument("--dtype", default="bf16", help="of the store")
    args = options.parse_args(arguments)
    model, tokens, images, labels = random_inputs(args.model, args.images, args.classes, args.device)
    dataset = TensorDataset(images.cpu(), labels.cpu())
    clip = sk.SkipCLIP(model, tokens, skip_layers=args.skip_layers)
    scratch = tempfile.TemporaryDirectory()

    def build(dtype: str = args.dtype) -> sk.FeatureCache:
        with autocast(args.device, args.precision):
            return sk.FeatureCache.build(
                scratch.name, clip, dataset, dtype=dtype, batch_size=args.batch, overwrite=True, progress=False
            )

    with scratch:
        extract = partial(published, model, dataset, args)
        ours = torch.stack([build("fp32")[i][0] for i in range(min(8, args.images))])
        theirs = torch.cat(extract())[: len(ours)].float()
        error = relative_error(ours, theirs)
        print(f"features differ by {error:.1e} of their norm in {args.precision}")
        if not error <= _SLACK[args.precision]:
            raise SystemExit("other features: no timing")
        seconds = measure.time_alternately({"published": extract, "build": build}, args.rounds, args.device)
    ratio = measure.median_ratio(seconds["published"], seconds["build"])
    rows = []
    for name, times in seconds.items():
        rate = args.images / measure.quantile(times, 0.5)
        rows.append(
            measure.machine(args.device)
            | {"extraction": name, "model": args.model, "images": args.images, "B": args.batch}
            | {"skip_layers": args.skip_layers, "precision": args.precision, "dtype": args.dtype}
            | measure.milliseconds(times)
            | {"images_s": round(rate, 2), "faster": round(ratio if name == "build" else 1.0, 3)}
        )
        print(f"{name:10} {measure.shown(rows[-1])}  {rate:.1f} images/s")
    print(f"build is {ratio:.2f} times as fast (median of {args.rounds} pairs)")
    if not args.no_save:
        print(f"appended to {measure.append_rows(rows, 'cache_build')}")


@torch.no_grad()
def published(model: Any, dataset: TensorDataset, args: argparse.Namespace) -> list[Tensor]:
    """Hidden states at the cut of all images, from a pass through the whole tower."""
    visual, kept, features = model.visual, [], []
    hook = visual.transformer.resblocks[args.skip_layers - 1].register_forward_hook(
        lambda module, inputs, output: kept.append(output)
    )
    try:
        with autocast(args.device, args.precision):
            for images, _labels in DataLoader(dataset, batch_size=args.batch):
                model.encode_image(images.to(args.device))
                features.append(kept.pop().cpu())
    finally:
        hook.remove()
    return features


if __name__ == "__main__":
    main()

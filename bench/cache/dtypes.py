"""Error of the store dtypes: in the features, in the loss, and in the accuracy after tuning.

    python -m bench.cache.dtypes features --model ViT-B-16
    python -m bench.cache.dtypes tuning --seeds 0 1 2

`features`: ViT-B/16 with random weights. Relative error of the features, of the worst token, and of the loss over all
classes, against fp32. (Trained weights have some features that are a hundred times larger than others; int8, with one
scale per token, then loses more.) `tuning`: `make tune` from a store of each dtype; accuracy, and the largest
difference of an epoch's loss, against the run with an fp32 store. Appends to bench/results/DEVICE/cache_features.csv
and cache_tuning.csv.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from torch.utils.data import TensorDataset

import skipkernels as sk
from skipkernels.store import DTYPES
from skipkernels.testing import relative_error
from skipkernels.tuner import TuneConfig, tune

from .. import measure
from ..inputs import parser, random_inputs


def main(arguments: Sequence[str] | None = None) -> None:
    outer = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = outer.add_subparsers(dest="what", required=True)
    what.add_parser("features", parents=[parser("", batch=32, classes=50)], add_help=False)
    tuning = what.add_parser("tuning")
    tuning.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    tuning.add_argument("--no-save", action="store_true", help="print only")
    args = outer.parse_args(arguments)
    rows = features(args) if args.what == "features" else runs(args)
    if not args.no_save:
        print(f"appended to {measure.append_rows(rows, f'cache_{args.what}')}")


def features(args: argparse.Namespace) -> list[dict]:
    model, tokens, images, labels = random_inputs(args.model, args.batch, args.classes, args.device)
    clip = sk.SkipCLIP(model, tokens, skip_layers=args.skip_layers)
    dataset = TensorDataset(images.cpu(), labels.cpu())
    truth = clip.encode_lower(images).cpu()
    rows = []
    for dtype in DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            cache = sk.FeatureCache.build(folder, clip, dataset, dtype=dtype, batch_size=args.batch, progress=False)
            (kept, _), *_ = cache.loader(args.batch, "sequential")
            size = cache.store.bytes / len(cache)
        token = ((kept - truth).norm(dim=-1) / truth.norm(dim=-1)).max().item()
        with torch.no_grad():  # the same classes: all of them
            expected, got = (clip.predict(x.to(args.device)).double() for x in (truth, kept))
        loss = torch.nn.functional.cross_entropy
        change = abs(loss(got, labels) - loss(expected, labels)).item()
        rows.append(
            measure.machine(args.device)
            | {"model": args.model, "images": args.batch, "skip_layers": args.skip_layers, "dtype": dtype}
            | {"kb_an_image": round(size / 1000, 1), "error": f"{relative_error(kept, truth):.2e}"}
            | {"error_of_worst_token": f"{token:.2e}", "error_of_logits": f"{relative_error(got, expected):.2e}"}
            | {"loss_differs_by": f"{change:.2e}"}
        )
        print(
            f"{dtype}: {size / 1000:.0f} KB an image, features off by {rows[-1]['error']} (worst token {token:.2e}), "
            f"logits by {rows[-1]['error_of_logits']}, the loss by {change:.2e}"
        )
    return rows


def runs(args: argparse.Namespace) -> list[dict]:
    found: dict[str, list[dict]] = {dtype: [] for dtype in DTYPES}
    for seed in args.seeds:
        for dtype in DTYPES:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder, "run")
                config = TuneConfig(seed=seed, cache=Path(folder, "cache"), cache_dtype=dtype, out=out)
                metrics = tune(config, Console(stderr=True))
                losses = [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]
            found[dtype].append(metrics["tuned"] | {"losses": losses})
    rows = []
    for dtype, results in found.items():
        pairs = list(zip(results, found["fp32"], strict=True))
        curve = max(
            abs(a - b) / b for ours, exact in pairs for a, b in zip(ours["losses"], exact["losses"], strict=True)
        )
        row = measure.machine(torch.device("cpu")) | {"dtype": dtype, "seeds": " ".join(map(str, args.seeds))}
        for key in ("base", "new", "harmonic"):
            mean = sum(result[key] for result in results) / len(results)
            differs = [ours[key] - exact[key] for ours, exact in pairs]
            row |= {key: round(mean, 2), f"{key}_from_fp32": round(sum(differs) / len(differs), 2)}
            row |= {f"{key}_at_most": round(max(map(abs, differs)), 2)}
        row |= {"loss_at_most": f"{curve:.1e}"}
        rows.append(row)
        changed = row["harmonic_at_most"]
        changes = ", ".join(
            f"{key} {row[key]:.2f} ({row[f'{key}_from_fp32']:+.2f})" for key in ("base", "new", "harmonic")
        )
        print(f"{dtype}: {changes}; the harmonic mean of a seed by {changed:.2f} at most, a loss by {curve:.1e}")
    return rows


if __name__ == "__main__":
    main()

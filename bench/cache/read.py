"""Time reading batches from a store in the page cache, at ViT-B/16's 197 × 768.

    python -m bench.cache.read --images 800 --rounds 7

A round is an epoch in random order. `FeatureCache.loader`, which gathers from the mapped files into reused buffers, is
compared with the published way, a list of tensors with `torch.stack` and `.to(torch.float32)`, and with a plain copy of
as many bytes. All return fp32 batches, except "bf16 as it is".

Compares the first epoch's batches, then times in turn. Appends to bench/results/DEVICE/cache_read.csv.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from skipkernels.features import BatchSampler, FeatureCache

from .. import measure
from . import SHAPE, moved_bytes, random_store

_CASES = {  # name → dtype of the store, of the batch
    "fp32": ("fp32", torch.float32),
    "bf16": ("bf16", torch.float32),
    "int8": ("int8", torch.float32),
    "bf16 as it is": ("bf16", torch.bfloat16),
}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--batches", type=int, nargs="+", default=[4, 16, 64, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--no-save", action="store_true", help="print only")
    args = parser.parse_args(arguments)

    rows = []
    for case, (dtype, out) in _CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            layout = random_store(Path(folder), args.images, dtype)
            cache = FeatureCache.open(folder)
            kept = [cache.store.gather(torch.tensor([i]))[0] for i in range(args.images)]
            if dtype != "int8":  # the published list has no int8
                kept = [features.to(cache_dtype(dtype)) for features in kept]
            for batch in args.batches:
                epochs = epochs_of(cache, kept, batch, out)
                refuse_if_other(epochs, args.images)
                moved = moved_bytes(layout, out)
                copy = measure.copying(moved * batch)
                epochs["memcpy"] = lambda copy=copy, batch=batch: [copy() for _ in range(args.images // batch)]
                passes = {name: lambda epoch=epoch: consume(epoch()) for name, epoch in epochs.items()}
                seconds = measure.time_alternately(passes, args.rounds, measure.CPU)
                copied = args.images // batch * batch  # the copies omit the last, smaller batch
                rates = {
                    name: (copied if name == "memcpy" else args.images) * moved / measure.quantile(times, 0.5) / 1e9
                    for name, times in seconds.items()
                }
                ratio = measure.median_ratio(seconds["list"], seconds["loader"])
                ahead = measure.median_ratio(seconds["list"], seconds["loader, read ahead"])
                of_copy = rates["loader"] / rates["memcpy"]
                rows.append(
                    measure.machine(measure.CPU)
                    | {"store": case, "images": args.images, "N": SHAPE[0], "W": SHAPE[1], "B": batch}
                    | {f"{name}_gb_s": round(rate, 2) for name, rate in rates.items()}
                    | {"of_list": round(ratio, 2), "ahead_of_list": round(ahead, 2), "of_memcpy": round(of_copy, 3)}
                )
                print(
                    f"{case:14} B{batch:<4} loader {rates['loader']:5.1f} GB/s, list {rates['list']:5.1f}, memcpy "
                    f"{rates['memcpy']:5.1f}: {ratio:.1f} times the list ({ahead:.1f} with a thread that reads ahead), "
                    f"{of_copy:.0%} of memcpy"
                )
    if not args.no_save:
        print(f"appended to {measure.append_rows(rows, 'cache_read')}")


def cache_dtype(name: str) -> torch.dtype:
    return {"fp32": torch.float32, "bf16": torch.bfloat16}[name]


def epochs_of(
    cache: FeatureCache, kept: list[Tensor], batch: int, out: torch.dtype
) -> dict[str, Callable[[], Iterable[Tensor]]]:
    """The implementations to time; each call is an epoch in the same order."""

    def order() -> BatchSampler:
        return BatchSampler(cache.labels, batch, "random")

    loaders = {
        name: cache.loader(sampler=order(), dtype=out, prefetch=prefetch)
        for name, prefetch in (("loader", 0), ("loader, read ahead", 2))
    }
    shuffled = order()

    def from_list() -> Iterable[Tensor]:
        return (torch.stack([kept[i] for i in numbers]).to(out) for numbers in shuffled)

    def from_loader(name: str) -> Callable[[], Iterable[Tensor]]:
        return lambda: (features for features, _ in loaders[name])

    return {"list": from_list} | {name: from_loader(name) for name in loaders}


def consume(batches: Iterable[Tensor]) -> None:
    for _ in batches:
        pass


def refuse_if_other(epochs: dict[str, Callable[[], Iterable[Tensor]]], images: int) -> None:
    """Exit if the features of an implementation differ."""
    streams = [epoch() for epoch in epochs.values()]
    seen = 0
    for batches in zip(*streams, strict=True):
        if not all(batch.equal(batches[0]) for batch in batches):
            raise SystemExit(f"{', '.join(epochs)}: other features: no timing")
        seen += len(batches[0])
    if seen != images:
        raise SystemExit(f"{seen} of {images} images came: no timing")


if __name__ == "__main__":
    main()

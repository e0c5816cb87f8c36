"""Error of the dtypes of the feature cache, against fp32, with random weights and images.

    python -m bench.cache --model ViT-B-16

In the features, in the worst token, in the logits, and in the loss over all classes. Trained weights have some features
that are a hundred times larger than others; int8, with one scale per token, then loses more. Appends to
bench/results/DEVICE/cache_features.csv.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import skipkernels as sk
from skipkernels.features import FeatureCache
from skipkernels.features.folder_table import STORED_DTYPES
from skipkernels.testing import relative_error

from . import tables
from .inputs import parser, random_inputs
from .rows import save


def main(arguments: Sequence[str] | None = None) -> None:
    args = parser(__doc__, model="ViT-B-16", batch=32, classes=50, skip_layers=6).parse_args(arguments)
    model, tokens, images, labels = random_inputs(args.model, args.batch, args.classes, args.device)
    clip = sk.SkipCLIP(model, tokens, skip_layers=args.skip_layers)
    dataset = TensorDataset(images.cpu(), labels.cpu())
    truth = clip.encode_lower(images).cpu()
    rows: list[dict[str, Any]] = []
    for dtype in STORED_DTYPES:
        with tempfile.TemporaryDirectory() as folder:
            cache = FeatureCache.build(folder, clip, dataset, dtype=dtype, batch_size=args.batch, progress=False)
            (kept, _), *_ = cache.loader(args.batch, "sequential")
            size = cache.table.layout.row_bytes
        token = ((kept - truth).norm(dim=-1) / truth.norm(dim=-1)).max().item()
        with torch.no_grad():  # the same classes: all of them
            expected, got = (clip.predict(x.to(args.device)).double() for x in (truth, kept))
        change = abs(cross_entropy(got, labels) - cross_entropy(expected, labels)).item()
        errors = {"error": relative_error(kept, truth), "error_of_worst_token": token}
        errors |= {"error_of_logits": relative_error(got, expected), "loss_differs_by": change}
        row = {"model": args.model, "images": args.batch, "skip_layers": args.skip_layers, "dtype": dtype}
        rows.append(row | {"kb_an_image": round(size / 1000, 1)} | {name: f"{e:.2e}" for name, e in errors.items()})
    tables.show(list(rows[0]), [row.values() for row in rows])
    save(args, rows, "cache_features")


if __name__ == "__main__":
    main()

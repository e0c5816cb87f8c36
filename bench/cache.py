"""Error of the dtypes of the feature cache, against fp32, with random weights and images.

    python -m bench.cache --model ViT-B-16

In the features, in the worst token, in the logits, and in the loss over all classes. Trained weights have some features
that are a hundred times larger than others; int8, with one scale per token, then loses more. Appends to
bench/results/DEVICE/cache_features.csv.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence

import torch
from torch import Tensor
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
    rows = []
    for dtype in STORED_DTYPES:
        features, size = stored(clip, dataset, dtype)
        errors = {name: f"{error:.2e}" for name, error in errors_of(clip, features, truth, labels).items()}
        row = {"model": args.model, "images": args.batch, "skip_layers": args.skip_layers, "dtype": dtype}
        rows.append(row | {"kb_an_image": round(size / 1000, 1)} | errors)
    tables.show(list(rows[0]), [row.values() for row in rows])
    save(args, rows, "cache_features")


def stored(clip: sk.SkipCLIP, dataset: TensorDataset, dtype: str) -> tuple[Tensor, int]:
    """Features of a dataset from a cache, and the bytes of an image in it."""
    with tempfile.TemporaryDirectory() as folder:
        cache = FeatureCache.build(folder, clip, dataset, dtype=dtype, batch_size=len(dataset), progress=False)
        ((features, _),) = cache.loader(len(dataset), "sequential")
        return features, cache.table.layout.row_bytes


@torch.no_grad()
def errors_of(clip: sk.SkipCLIP, features: Tensor, truth: Tensor, labels: Tensor) -> dict[str, float]:
    """Errors of features at the cut, and of what follows from them, over all classes."""
    token = ((features - truth).norm(dim=-1) / truth.norm(dim=-1)).max().item()
    expected, got = (clip.predict(x.to(labels.device)).double() for x in (truth, features))
    return {
        "error": relative_error(features, truth),
        "error_of_worst_token": token,
        "error_of_logits": relative_error(got, expected),
        "loss_differs_by": abs(cross_entropy(got, labels) - cross_entropy(expected, labels)).item(),
    }


if __name__ == "__main__":
    main()

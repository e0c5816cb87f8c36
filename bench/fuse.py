"""Time and saved memory of training a whole CLIP on pairs, with its own blocks and with those of `sk.fuse`.

    python -m bench.fuse --model ViT-B-32 ViT-B-16 --batch 8 32

All weights train. Compared are the model as it is, with its gradient checkpointing, compiled by torch.compile, and
fused with each `memory`. Checks first that the gradients are equal up to rounding. Then measures the bytes saved for
backward, of the image tower alone and of the contrastive loss of both towers, and the time of a forward and backward
pass, in turn. Appends to bench/results/DEVICE/fuse.csv.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import skipkernels as sk
from skipkernels.app.devices import autocast
from skipkernels.testing import gradients, relative_error, saved_bytes

from . import measure
from .inputs import Inputs, parser, random_inputs
from .rows import save

PARTS = ("image", "pairs")
# Difference of all gradients from those of the model's own blocks, relative to their norm: two orders of summation.
_SLACK = {"fp32": 1e-4, "bf16": 5e-2}


def implementations(model: Any, names: Sequence[str]) -> dict[str, nn.Module]:
    """Models with equal weights, by name."""
    made: dict[str, Callable[[Any], Any]] = {
        "eager": lambda copied: copied,
        "checkpointing": _with_checkpointing,
        "compile": lambda copied: copied,  # compiled with its step
        **{f"fuse-{memory}": partial(sk.fuse, memory=memory) for memory in ("fast", "balanced", "min")},
    }
    return {name: made[name](copy.deepcopy(model)) for name in names}


def _with_checkpointing(model: Any) -> Any:
    model.set_grad_checkpointing(True)
    return model


def loss_of(model: Any, inputs: Inputs, part: str, precision: str) -> Tensor:
    """Contrastive loss of pairs, or the sum of the image embeddings."""
    with autocast(precision, inputs.images.device):
        image = model.encode_image(inputs.images, normalize=True)
        if part == "image":
            return image.float().sum()
        logits = model.logit_scale.exp() * image @ model.encode_text(inputs.tokens, normalize=True).T
        labels = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def gradients_of(model: Any, loss: Callable[[], Tensor]) -> Tensor:
    """Gradient of all weights in one vector."""
    return torch.cat([gradient.flatten() for gradient in gradients(model, loss()).values()])


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__ or "", model=["ViT-B-32"], batch=[8], precision=["fp32"], rounds=7)
    names = ("eager", "checkpointing", "compile", "fuse-fast", "fuse-balanced", "fuse-min")
    options.add_argument("--implementations", nargs="+", choices=names, default=names, help="eager must be one of them")
    options.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="image tower alone, or both on pairs")
    args = options.parse_args(arguments)
    cases = [(model, B, precision) for model in args.model for B in args.batch for precision in args.precision]
    for model, B, precision in cases:
        save(args, rows_of(args, model, B, precision, args.implementations, args.part), "fuse")


def rows_of(
    args: argparse.Namespace, model: str, B: int, precision: str, names: Sequence[str], parts: Sequence[str]
) -> list[dict[str, Any]]:
    """A row of each implementation and part of a model."""
    inputs = random_inputs(model, B, B, args.device)
    inputs.model.train().requires_grad_(True)
    case = {"model": model, "B": B, "precision": precision}
    return [
        row | case
        for part in parts
        for row in rows_of_part(args, implementations(inputs.model, names), inputs, part, precision)
    ]


def rows_of_part(
    args: argparse.Namespace, models: dict[str, Any], inputs: Inputs, part: str, precision: str
) -> list[dict[str, Any]]:
    """Check the gradients, then measure each implementation."""
    losses = {name: partial(loss_of, model, inputs, part, precision) for name, model in models.items()}
    if "compile" in losses:
        losses["compile"] = torch.compile(losses["compile"])
    expected = gradients_of(models["eager"], losses["eager"])
    for name, model in models.items():
        error = relative_error(gradients_of(model, losses[name]), expected)
        if not error <= _SLACK[precision]:
            raise SystemExit(f"{name}: gradients differ by {error:.1e} from those of the model: no measurement")
    saved = {name: saved_bytes(loss) for name, loss in losses.items()}
    rows = [{"implementation": name, "part": part, "saved_mib": round(size / 2**20, 1)} for name, size in saved.items()]
    steps = {name: partial(gradients_of, model, losses[name]) for name, model in models.items()}
    seconds = measure.time_alternately(steps, args.rounds, args.device)
    for row in rows:
        name = row["implementation"]
        row |= measure.milliseconds(seconds[name])
        size, time = saved[name] / saved["eager"], measure.median_ratio(seconds[name], seconds["eager"])
        print(f"{part:6} {name:14} {row['saved_mib']:8} MiB, {size:.2f} of the bytes, {time:.2f} of the time of eager")
    return rows


if __name__ == "__main__":
    main()

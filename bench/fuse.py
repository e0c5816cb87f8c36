"""Time and saved memory of training a whole CLIP on pairs, with its own blocks and with those of `sk.fuse`.

    python -m bench.fuse --model ViT-B-32 ViT-B-16 --batch 8 32

All weights train. Compared are the model as it is, with its gradient checkpointing, compiled by torch.compile, and
fused with each `memory`. Checks first that the gradients are equal up to rounding. Then measures the bytes saved for
backward, of the image tower alone and of the contrastive loss of both towers, and the time of a forward and backward
pass, in turn. Appends to bench/results/DEVICE/fuse.csv.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import skipkernels as sk
from skipkernels.app.devices import autocast
from skipkernels.testing import gradients, relative_error, saved_bytes

from . import measure
from .inputs import Case, Inputs, parser, random_inputs
from .rows import save

Loss = Callable[[], Tensor]
EAGER = "eager"  # the model as it is, with which the others are compared
PARTS = ("image", "pairs")
# Difference of all gradients from those of the model's own blocks, relative to their norm: two orders of summation.
_SLACK = {"fp32": 1e-4, "bf16": 5e-2}


def _with_checkpointing(model: Any) -> Any:
    model.set_grad_checkpointing(True)
    return model


class Implementation(NamedTuple):
    """Changes that make an implementation of a copy of the model, and of its loss."""

    model: Callable[[Any], Any] = lambda model: model
    loss: Callable[[Loss], Loss] = lambda loss: loss


IMPLEMENTATIONS = {
    EAGER: Implementation(),
    "checkpointing": Implementation(model=_with_checkpointing),
    "compile": Implementation(loss=lambda loss: torch.compile(loss)),  # looked up in the call: tests replace it
    **{
        f"fuse-{memory}": Implementation(model=partial(sk.fuse, memory=memory))
        for memory in ("fast", "balanced", "min")
    },
}


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__ or "", model=["ViT-B-32"], batch=[8], precision=["fp32"], rounds=7)
    options.add_argument(
        "--implementations",
        nargs="+",
        choices=IMPLEMENTATIONS,
        default=list(IMPLEMENTATIONS),
        help=f"compared with {EAGER}, which always runs",
    )
    options.add_argument("--part", nargs="+", choices=PARTS, default=PARTS, help="image tower alone, or both on pairs")
    args = options.parse_args(arguments)
    names = list(dict.fromkeys((EAGER, *args.implementations)))
    for model, B, precision in itertools.product(args.model, args.batch, args.precision):
        case = Case(model, batch=B, classes=B, device=args.device)
        save(args, rows_of(case, names, args.part, precision, args.rounds), "fuse")


def rows_of(
    case: Case, names: Sequence[str], parts: Sequence[str], precision: str, rounds: int
) -> list[dict[str, Any]]:
    """Rows of implementations of a model, on parts of it."""
    inputs = random_inputs(case.model, case.batch, case.classes, case.device)
    inputs.model.train().requires_grad_(True)
    columns = {"model": case.model, "B": case.batch, "precision": precision, "rounds": rounds}
    return [row | columns for part in parts for row in rows_of_part(names, inputs, part, precision, rounds)]


def rows_of_part(names: Sequence[str], inputs: Inputs, part: str, precision: str, rounds: int) -> list[dict[str, Any]]:
    """Check the gradients, then measure each implementation."""
    losses, steps = {}, {}
    for name in names:
        implementation = IMPLEMENTATIONS[name]
        model = implementation.model(copy.deepcopy(inputs.model))
        losses[name] = implementation.loss(partial(loss_of, model, inputs, part, precision))
        steps[name] = partial(gradients_of, model, losses[name])
    expected = in_one_vector(steps[EAGER]())
    for name in names:
        refuse_if_wrong(name, in_one_vector(steps[name]()), expected, precision)
    saved = {name: saved_bytes(loss) for name, loss in losses.items()}
    seconds = measure.time_alternately(steps, rounds, inputs.images.device)
    rows = []
    for name in names:
        row = {"implementation": name, "part": part, "saved_mib": round(saved[name] / 2**20, 1)}
        rows.append(row | measure.milliseconds(seconds[name]))
        size, time = saved[name] / saved[EAGER], measure.median_ratio(seconds[name], seconds[EAGER])
        print(f"{part:6} {name:14} {row['saved_mib']:8} MiB, {size:.2f} of the bytes, {time:.2f} of the time of eager")
    return rows


def loss_of(model: Any, inputs: Inputs, part: str, precision: str) -> Tensor:
    """Contrastive loss of pairs, or the sum of the image embeddings."""
    with autocast(precision, inputs.images.device):
        image = model.encode_image(inputs.images, normalize=True)
        if part == "image":
            return image.float().sum()
        logits = model.logit_scale.exp() * image @ model.encode_text(inputs.tokens, normalize=True).T
        labels = torch.arange(len(logits), device=logits.device)
        return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def gradients_of(model: Any, loss: Loss) -> dict[str, Tensor]:
    """Run a forward and backward pass; return the gradients of all weights."""
    return gradients(model, loss())


def in_one_vector(found: dict[str, Tensor]) -> Tensor:
    """Gradients of all weights, flat."""
    return torch.cat([gradient.flatten() for gradient in found.values()])


def refuse_if_wrong(name: str, found: Tensor, expected: Tensor, precision: str) -> None:
    """Exit if the gradients differ from those of the model as it is by more than rounding."""
    error = relative_error(found, expected)
    if not error <= _SLACK[precision]:
        raise SystemExit(f"{name}: gradients differ by {error:.1e} from those of the model: no measurement")


if __name__ == "__main__":
    main()

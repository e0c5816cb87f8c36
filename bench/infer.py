"""Time classification with SkipCLIP against the published evaluation of the same model, over the number of classes.

    python -m bench.infer                                                 100 images, 10 to 1,000 classes
    python -m bench.infer --images 100 --batch 25 --classes 100 --precision fp32
    python -m bench.infer --classes 1000 --implementation published skipkernels

    published               the texts of all classes, all 77 tokens, encoded again for every batch of 100 images
    skipkernels             SkipCLIP.predict from images, with no cached features or class embeddings
    skipkernels, cached     SkipCLIP.predict from cached features at the cut of images and texts, after a weight update,
                            as tuning evaluates after each epoch

All run in evaluation mode without gradients. Their logits are compared first, then they are timed in turn. The floor is
the time of the products at the rate of a large product, or of reading the weights, if longer. Rows are appended to
bench/results/DEVICE/infer.csv after each number of classes.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

import skipkernels as sk
from skipkernels.app.devices import autocast
from skipkernels.testing import relative_error

from . import measure
from .flops import flops_of
from .inputs import Inputs, parser, random_inputs
from .measure import OURS
from .rows import save, shown

# Relative error of the logits against the published evaluation in fp32. It may exceed that of the published evaluation
# in the same precision by this. ViT-S-32-alt: 2e-6 in fp32; in bf16 2.5e-2, published 3e-2.
_SLACK = {"fp32": 1e-4, "bf16": 1e-2}
PUBLISHED, CACHED = "published", "skipkernels, cached"
IMPLEMENTATIONS = (PUBLISHED, OURS, CACHED)
Evaluation = Callable[[], list[Tensor]]
"""Returns the logits [B, C] of each batch."""


def main(arguments: Sequence[str] | None = None) -> None:
    cases = {"model": ["ViT-B-16"], "batch": [100], "classes": [10, 100, 1000], "precision": ["fp32"]}
    options = parser(__doc__, rounds=3, skip_layers=6, **cases)
    options.add_argument("--images", type=int, default=100, help="number of images")
    options.add_argument("--implementation", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    args = options.parse_args(arguments)
    for model, batch, classes in itertools.product(args.model, args.batch, args.classes):
        inputs = random_inputs(model, args.images, classes, args.device)
        weights = sum(weight.nbytes for weight in inputs.model.parameters())
        truth = logits_of(partial(published, inputs, batch), "fp32", args.device)
        runs = {}
        for precision in args.precision:
            found = runs_of(inputs, batch, args.skip_layers, precision)
            names = dict.fromkeys((PUBLISHED, *args.implementation))
            refuse_if_wrong({name: found[name]() for name in names}, truth, precision)
            runs |= {(name, precision): found[name] for name in args.implementation}
        flops = {key: flops_of(run) for key, run in runs.items()}
        rows = []
        for (name, precision), times in measure.compare(runs, args.rounds, args.device).items():
            floor = 1000 * measure.floor(flops[name, precision], measure.DTYPES[precision], weights, args.device)
            row = {"implementation": name, "model": model, "images": args.images, "B": batch, "C": classes}
            row |= {"skip_layers": args.skip_layers, "precision": precision} | times
            rows.append(row | {"floor_ms": round(floor, 3), "above_floor": round(times["p50_ms"] / floor, 3)})
            print(f"{name:20} {precision}  C = {classes:5}  {shown(rows[-1])}")
        save(args, rows, "infer")


def runs_of(inputs: Inputs, batch: int, skip_layers: int, precision: str) -> dict[str, Callable[[], Tensor]]:
    """Logits [images, C] by implementation, without gradients."""
    evaluations = evaluations_of(inputs, batch, skip_layers, precision)
    return {
        name: partial(logits_of, evaluation, precision, inputs.images.device)
        for name, evaluation in evaluations.items()
    }


@torch.no_grad()
def logits_of(evaluation: Evaluation, precision: str, device: torch.device) -> Tensor:
    """Logits [images, C] of an evaluation without gradients."""
    # Entered for each call: its cache of cast weights is dropped at exit.
    with autocast(precision, device):
        return torch.cat(evaluation())


def evaluations_of(inputs: Inputs, batch: int, skip_layers: int, precision: str) -> dict[str, Evaluation]:
    """The implementations to time, by name."""
    # A copy, since SkipCLIP freezes weights, and autocast caches casts of trainable weights only.
    clip = sk.SkipCLIP(copy.deepcopy(inputs.model), inputs.tokens, skip_layers=skip_layers)
    batches = inputs.images.split(batch)
    with autocast(precision, inputs.images.device):
        at_the_cut = [clip.encode_lower(images) for images in batches]

    def nothing_kept() -> list[Tensor]:
        clip.texts.drop()
        return [clip.predict(images) for images in batches]

    text, _ = clip.parameter_groups(text_lr=0.0, image_lr=0.0)

    def features_kept() -> list[Tensor]:
        text["params"][0].mul_(1 + 2**-20)  # a change, as by a step: class embeddings are computed again
        return [clip.predict(features) for features in at_the_cut]

    return dict(zip(IMPLEMENTATIONS, (partial(published, inputs, batch), nothing_kept, features_kept), strict=True))


def published(inputs: Inputs, batch: int) -> list[Tensor]:
    """Logits [batch, C] of the published evaluation."""
    return [inputs.model.get_logits(images, inputs.tokens)[0] for images in inputs.images.split(batch)]


def refuse_if_wrong(logits: dict[str, Tensor], truth: Tensor, precision: str) -> None:
    """Exit if an error against the published logits in fp32 exceeds the published one in this precision."""
    errors = {name: relative_error(value, truth) for name, value in logits.items()}
    print("logits are off by " + ", ".join(f"{error:.1e} ({name})" for name, error in errors.items()))
    for name, error in errors.items():
        if not error <= errors[PUBLISHED] + _SLACK[precision]:
            raise SystemExit(f"the logits of {name} are not the published ones: no timing")


if __name__ == "__main__":
    main()

"""Classifying images with SkipCLIP against the published evaluation, on the same model.

    python -m bench.inference --images 100 --classes 100
    python -m bench.inference --images 1000 --batch 100 --classes 1000 --rounds 1

The published evaluation encodes the texts of all classes, all 77 tokens, again for every batch of test images, 100 of
them. Those 100 are the default here, so it does so once: more batches only add to what it takes. Against it, all four
in evaluation mode and without gradients:

    eager, texts once       the same, with the texts encoded before the first batch
    skipkernels             SkipCLIP.predict from images; nothing is kept from earlier, of images or classes
    skipkernels, cached     SkipCLIP.predict from features at the cut, as tuning evaluates after each epoch: those of
                            images and texts are kept, and the weights above the cut have changed

Compares all logits first, then times in turn. Appends to bench/results/DEVICE/inference.csv.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

import skipkernels as sk
from tests.tolerances import relative_error

from . import measure
from .inputs import Inputs, autocast, parser, random_inputs

# Error of the logits against the published evaluation in fp32, relative to their norm. They may be as wrong as the
# published ones in the same precision, and this much more. ViT-S-32-alt: 2e-6 in fp32; in bf16 2.5e-2, published 3e-2.
_SLACK = {"fp32": 1e-4, "bf16": 1e-2}

Evaluation = Callable[[], list[Tensor]]
"""Gives the logits [B, C] of each batch."""


def main(arguments: Sequence[str] | None = None) -> None:
    options = parser(__doc__, batch=100, classes=100, rounds=3)
    options.add_argument("--images", type=int, default=100, help="in all")
    args = options.parse_args(arguments)

    inputs = random_inputs(args.model, args.images, args.classes, args.device)
    evaluations = evaluations_of(inputs, args.batch, args.skip_layers, args.precision)

    @torch.no_grad()
    def run(name: str, precision: str = args.precision) -> Tensor:
        with autocast(args.device, precision):  # anew each time: what it keeps of weights is forgotten at its end
            return torch.cat(evaluations[name]())

    refuse_if_wrong({name: run(name) for name in evaluations}, run("published", "fp32"), args.precision)
    seconds = measure.time_alternately({name: partial(run, name) for name in evaluations}, args.rounds, args.device)
    rows = []
    for name, times in seconds.items():
        ratio = measure.median_ratio(times, seconds["published"])
        rows.append(
            measure.machine(args.device)
            | {"evaluation": name, "model": args.model, "images": args.images, "B": args.batch, "C": args.classes}
            | {"skip_layers": args.skip_layers, "precision": args.precision}
            | measure.milliseconds(times)
            | {"of_published": round(ratio, 3)}
        )
        print(f"{name:20} {measure.shown(rows[-1])}  {1 - ratio:6.1%} less time than published")
    if not args.no_save:
        print(f"appended to {measure.append_rows(rows, 'inference')}")


def evaluations_of(inputs: Inputs, batch: int, skip_layers: int, precision: str) -> dict[str, Evaluation]:
    """Everyone who is timed, by name."""
    model, tokens = inputs.model, inputs.tokens
    # On a copy, since SkipCLIP freezes weights, and autocast keeps what it has cast of a weight only if that trains.
    clip = sk.SkipCLIP(copy.deepcopy(model), tokens, skip_layers=skip_layers)
    batches = inputs.images.split(batch)
    with autocast(inputs.images.device, precision):
        at_the_cut = [clip.encode_lower(images) for images in batches]

    def published() -> list[Tensor]:
        return [model.get_logits(images, tokens)[0] for images in batches]

    def texts_once() -> list[Tensor]:
        text, scale = model.encode_text(tokens, normalize=True), model.logit_scale.exp()
        return [scale * model.encode_image(images, normalize=True) @ text.T for images in batches]

    # A weight of another version counts as changed, so what SkipCLIP keeps that depends on it is computed again.
    def nothing_kept() -> list[Tensor]:
        increment_version(clip.parameters())
        return [clip.predict(images) for images in batches]

    def features_kept() -> list[Tensor]:
        increment_version(clip.trainable_parameters())
        return [clip.predict(features) for features in at_the_cut]

    return {
        "published": published,
        "eager, texts once": texts_once,
        "skipkernels": nothing_kept,
        "skipkernels, cached": features_kept,
    }


def refuse_if_wrong(logits: dict[str, Tensor], truth: Tensor, precision: str) -> None:
    """Exit where logits are further from the published ones in fp32 than those in this precision."""
    errors = {name: relative_error(value, truth) for name, value in logits.items()}
    print("logits are off by " + ", ".join(f"{error:.1e} ({name})" for name, error in errors.items()))
    for name, error in errors.items():
        if not error <= errors["published"] + _SLACK[precision]:
            raise SystemExit(f"the logits of {name} are not the published ones: no timing")


if __name__ == "__main__":
    main()

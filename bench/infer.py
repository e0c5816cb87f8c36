"""Time classification with SkipCLIP against the published evaluation of the same model, over the number of classes.

    python -m bench.infer                                                 100 images, 10 to 1,000 classes
    python -m bench.infer --images 100 --batch 25 --classes 100 --precision fp32

    published               the texts of all classes, all 77 tokens, encoded again for every batch of 100 images
    eager, texts once       the same, with the texts encoded before the first batch
    skipkernels             SkipCLIP.predict from images, with no cached features or class embeddings
    skipkernels, cached     SkipCLIP.predict from cached features at the cut of images and texts, after a weight update,
                            as tuning evaluates after each epoch

All run in evaluation mode without gradients. Their logits are compared first, then they are timed in turn. The time is
predicted from two small numbers of classes; an implementation predicted to take longer than --longest is skipped, with
the reason in its row. The floor is the time of the products at the rate of a large product, and of reading the weights.
Rows are appended to bench/results/DEVICE/infer.csv after each number of classes.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

import skipkernels as sk
from skipkernels.testing import relative_error

from . import ceilings, measure
from .budget import NO_TIME, Plan, add_budget
from .cost_model import CostModel, Probe
from .flops import flops_of
from .inputs import Inputs, autocast, parser, random_inputs

# Relative error of the logits against the published evaluation in fp32. It may exceed that of the published evaluation
# in the same precision by this. ViT-S-32-alt: 2e-6 in fp32; in bf16 2.5e-2, published 3e-2.
_SLACK = {"fp32": 1e-4, "bf16": 1e-2}
PUBLISHED, ONCE, OURS, CACHED = "published", "eager, texts once", "skipkernels", "skipkernels, cached"
IMPLEMENTATIONS = (PUBLISHED, ONCE, OURS, CACHED)
_PROBES = 12, 24  # classes
_PROBED = 8  # images
_RUNS = 3  # besides the rounds: comparing logits, warm-up, counting FLOPs
_COLUMNS = "implementation model images B C skip_layers precision p20_ms p50_ms p80_ms rounds faster".split()
_COLUMNS += "images_s gflop floor_ms above_floor note".split()

Evaluation = Callable[[], list[Tensor]]
"""Returns the logits [B, C] of each batch."""


def main(arguments: Sequence[str] | None = None) -> None:
    cases = {"model": ["ViT-B-16"], "batch": [100], "classes": [10, 100, 1000], "precision": ["fp32"]}
    options = parser(__doc__, several=True, rounds=3, **cases)
    options.add_argument("--images", type=int, default=100, help="number of images")
    options.add_argument("--longest", type=float, default=60.0, help="seconds per implementation")
    add_budget(options)
    args = options.parse_args(arguments)
    for model, batch, precision in itertools.product(args.model, args.batch, args.precision):
        cost_models = cost_models_of(args, model, precision)
        for classes in args.classes:
            rows = rows_of(args, cost_models, model, batch, classes, precision)
            for row in rows:
                result = measure.shown(row) if row["p50_ms"] != "" else row["note"]
                print(f"{row['implementation']:20} C = {classes:5}  {result}")
            if not args.no_save:
                measure.append_rows([measure.machine(args.device) | row for row in rows], "infer")


def cost_models_of(args: argparse.Namespace, model: str, precision: str) -> dict[str, CostModel]:
    """Cost models over the number of classes, by implementation, from a batch of a few images."""
    found: dict[str, list[Probe]] = {}
    for classes in _PROBES:
        inputs = random_inputs(model, _PROBED, classes, args.device)
        for name, run in runs_of(inputs, _PROBED, args.skip_layers, precision).items():
            run()  # the first call includes set-up
            started = time.perf_counter()
            run()
            found.setdefault(name, []).append(Probe(classes, time.perf_counter() - started, 0))
    return {name: CostModel.of(*probes) for name, probes in found.items()}


def seconds_of(name: str, line: CostModel, images: int, batch: int, classes: int) -> float:
    """Predicted seconds for all images; the published evaluation encodes the texts for each batch.

    >>> line = CostModel.of(Probe(10, 2.0, 0), Probe(20, 3.0, 0))  # a second for 8 images, 0.1 for a class
    >>> seconds_of(PUBLISHED, line, 32, 16, 10), seconds_of(OURS, line, 32, 16, 10)
    (6.0, 5.0)
    """
    encoded = math.ceil(images / batch) if name == PUBLISHED else 1
    return line.seconds(0) * images / _PROBED + encoded * classes * line.seconds_each


def rows_of(
    args: argparse.Namespace, cost_models: dict[str, CostModel], model: str, batch: int, classes: int, precision: str
) -> list[dict[str, Any]]:
    """The row of each implementation for a number of classes."""
    notes, plan = {}, Plan(args.budget)
    for name, line in cost_models.items():
        seconds = seconds_of(name, line, args.images, batch, classes)
        if seconds > args.longest:
            notes[name] = f"left out: it takes about {seconds:.0f} s"
        elif not plan.takes((_RUNS + args.rounds) * seconds):
            notes[name] = NO_TIME
    runs: dict[str, Callable[[], Tensor]] = {}
    if len(notes) < len(cost_models):
        inputs = random_inputs(model, args.images, classes, args.device)
        runs = {n: run for n, run in runs_of(inputs, batch, args.skip_layers, precision).items() if n not in notes}
        if PUBLISHED in runs:
            truth = runs_of(inputs, batch, args.skip_layers, "fp32")[PUBLISHED]() if precision != "fp32" else None
            refuse_if_wrong({name: run() for name, run in runs.items()}, truth, precision)
    seconds = measure.time_alternately(runs, args.rounds, args.device, warm_up=PUBLISHED not in runs)
    rows = []
    for name in cost_models:
        row = dict.fromkeys(_COLUMNS, "") | {"implementation": name, "model": model, "images": args.images, "B": batch}
        row |= {"C": classes, "skip_layers": args.skip_layers, "precision": precision, "note": notes.get(name, "")}
        if name in runs:
            row |= measured(args, seconds, name, runs[name], inputs, precision)
            if PUBLISHED not in runs:
                row["note"] = f"logits compared at {_PROBES[1]} classes: the published evaluation is not run here"
        rows.append(row)
    return rows


def measured(
    args: argparse.Namespace,
    seconds: dict[str, list[float]],
    name: str,
    run: Callable[[], Tensor],
    inputs: Inputs,
    precision: str,
) -> dict[str, Any]:
    """Columns of a timed implementation."""
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    operations, weights = flops_of(run), sum(weight.nbytes for weight in inputs.model.parameters())
    floor = operations / ceilings.matrix_rate(args.device, dtype) + weights / ceilings.bandwidth(args.device)
    row = measure.milliseconds(seconds[name]) | {"rounds": args.rounds}
    row |= {"images_s": round(1000 * args.images / row["p50_ms"], 2), "gflop": round(operations / 1e9, 1)}
    row |= {"floor_ms": round(1000 * floor, 1), "above_floor": round(row["p50_ms"] / (1000 * floor), 3)}
    if name != OURS and OURS in seconds:
        row["faster"] = round(measure.median_ratio(seconds[name], seconds[OURS]), 3)
    return row


def runs_of(inputs: Inputs, batch: int, skip_layers: int, precision: str) -> dict[str, Callable[[], Tensor]]:
    """Logits [images, C] by implementation, without gradients."""

    @torch.no_grad()
    def run(evaluation: Evaluation) -> Tensor:
        with autocast(
            inputs.images.device, precision
        ):  # entered for each call: its cache of cast weights is dropped at exit
            return torch.cat(evaluation())

    evaluations = evaluations_of(inputs, batch, skip_layers, precision)
    return {name: partial(run, evaluation) for name, evaluation in evaluations.items()}


def evaluations_of(inputs: Inputs, batch: int, skip_layers: int, precision: str) -> dict[str, Evaluation]:
    """The implementations to time, by name."""
    model, tokens = inputs.model, inputs.tokens
    # A copy, since SkipCLIP freezes weights, and autocast caches casts of trainable weights only.
    clip = sk.SkipCLIP(copy.deepcopy(model), tokens, skip_layers=skip_layers)
    batches = inputs.images.split(batch)
    with autocast(inputs.images.device, precision):
        at_the_cut = [clip.encode_lower(images) for images in batches]

    def published() -> list[Tensor]:
        return [model.get_logits(images, tokens)[0] for images in batches]

    def texts_once() -> list[Tensor]:
        text, scale = model.encode_text(tokens, normalize=True), model.logit_scale.exp()
        return [scale * model.encode_image(images, normalize=True) @ text.T for images in batches]

    # Class embeddings are recomputed, as after a step.
    def nothing_kept() -> list[Tensor]:
        clip._text_encoder.forget()
        return [clip.predict(images) for images in batches]

    def features_kept() -> list[Tensor]:
        clip._text_encoder._embeddings = None
        return [clip.predict(features) for features in at_the_cut]

    return dict(zip(IMPLEMENTATIONS, (published, texts_once, nothing_kept, features_kept), strict=True))


def refuse_if_wrong(logits: dict[str, Tensor], truth: Tensor | None, precision: str) -> None:
    """Exit if an error against the published logits in fp32 exceeds the published one in this precision."""
    truth = logits[PUBLISHED] if truth is None else truth
    errors = {name: relative_error(value, truth) for name, value in logits.items()}
    print("logits are off by " + ", ".join(f"{error:.1e} ({name})" for name, error in errors.items()))
    for name, error in errors.items():
        if not error <= errors[PUBLISHED] + _SLACK[precision]:
            raise SystemExit(f"the logits of {name} are not the published ones: no timing")


if __name__ == "__main__":
    main()

"""A training step of SkipCLIP against the published step, on the same model and batch.

    python -m bench.step --model ViT-B-16 --batch 4 --classes 50

Checks the loss and every gradient first, then times forward and backward in turn, and counts the bytes saved for
backward. Appends to bench/results/step.csv.
"""

from __future__ import annotations

import argparse
import copy
import logging

import open_clip
import torch

import skipkernels as sk
from skipkernels.selection import RankSampler

from . import measure
from .published import PublishedStep

# fp32: two orders of summation through six blocks. bf16: each product is rounded to 8 bits on both sides.
_GRADIENT_TOLERANCE = {"fp32": 1e-3, "bf16": 0.15}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--skip-layers", type=int, default=6)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    logging.disable(logging.WARNING)  # open_clip warns of random weights
    device = torch.device(args.device)

    torch.manual_seed(0)
    ours = open_clip.create_model(args.model).to(device)
    theirs = copy.deepcopy(ours)
    tokens = open_clip.get_tokenizer(args.model)([f"a photo of a {name}." for name in class_names(args.classes)])
    tokens = tokens.to(device)
    images = torch.randn(args.batch, 3, *ours.visual.image_size, device=device)
    labels = torch.randint(args.classes, (1,), device=device).expand(args.batch)  # a class-pure batch

    def sampler() -> RankSampler:
        return RankSampler(generator=torch.Generator().manual_seed(0))

    clip = sk.SkipCLIP(ours, tokens, skip_layers=args.skip_layers, generator=torch.Generator().manual_seed(0))
    published = PublishedStep(theirs, tokens, args.skip_layers, sampler())
    features, their_features = clip.encode_lower(images), published.image_features(images)
    trainable = {name for name, p in ours.named_parameters() if p.requires_grad}
    for name, parameter in theirs.named_parameters():
        parameter.requires_grad_(name in trainable)

    def autocast() -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")

    def forward_ours():
        with autocast():
            return clip(features, labels)

    def forward_theirs():
        with autocast():
            return published(their_features, labels)

    def step(forward, model) -> None:
        for parameter in model.parameters():
            parameter.grad = None
        forward()[0].backward()

    # The gate: same classes, same loss, same gradients, or no number.
    out, (loss, class_ids) = forward_ours(), forward_theirs()
    out.loss.backward()
    loss.backward()
    worst = max(
        ((p.grad - q.grad).norm() / q.grad.norm()).item()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True)
        if q.grad is not None
    )
    print(f"loss {out.loss.item():.6f} against {loss.item():.6f}; worst gradient differs by {worst:.1e} of its norm")
    if not out.class_ids.equal(class_ids) or not worst < _GRADIENT_TOLERANCE[args.precision]:
        raise SystemExit("the two steps do not agree: no timing")
    kept = len(class_ids)

    # The tail is drawn anew in each step, so K stays what it is; the gate has used one draw of both samplers.
    saved = {"published": measure.saved_bytes(forward_theirs), "skipkernels": measure.saved_bytes(forward_ours)}
    seconds = measure.time_alternately(
        {"published": lambda: step(forward_theirs, theirs), "skipkernels": lambda: step(forward_ours, ours)},
        args.rounds,
        device,
    )
    ratios = [a / b for a, b in zip(seconds["published"], seconds["skipkernels"], strict=True)]
    rows = []
    for name in seconds:
        low, middle, high = (1000 * measure.quantile(seconds[name], q) for q in (0.2, 0.5, 0.8))
        rows.append(
            measure.machine(device)
            | {"step": name, "model": args.model, "B": args.batch, "C": args.classes, "K": kept}
            | {"skip_layers": args.skip_layers, "precision": args.precision}
            | {"p20_ms": round(low, 1), "p50_ms": round(middle, 1), "p80_ms": round(high, 1)}
            | {"saved_mib": round(saved[name] / 2**20, 1)}
        )
        print(f"{name:12} {middle:8.1f} ms  (p20 {low:.1f}, p80 {high:.1f})  {saved[name] / 2**20:8.1f} MiB saved")
    print(
        f"{measure.quantile(ratios, 0.5):.2f} times faster (median of {len(ratios)} pairs), "
        f"{saved['skipkernels'] / saved['published']:.0%} of the bytes; K = {kept} of {args.classes}, {args.precision}"
    )
    print(f"appended to {measure.append_rows(rows, 'step')}")


def class_names(count: int) -> list[str]:
    """Names of one to three words, as real class names are."""
    words = "red small old wild great common northern striped golden spotted river mountain".split()
    things = "dog cat bird car house tree fish boat chair lamp".split()
    names = [f"{a} {b} {thing}" for a in words for b in words for thing in things]
    return [*things, *(f"{a} {thing}" for a in words for thing in things), *names][:count]


if __name__ == "__main__":
    main()

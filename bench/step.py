"""A training step of SkipCLIP against the published step, on the same model and batch.

    python -m bench.step --model ViT-B-16 --batch 4 --classes 50

Checks every gradient first, then times forward and backward in turn, and counts the bytes saved for
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

# Error of a gradient against the published step in fp32, relative to the gradient's norm. Ours may be as wrong as the
# published step in the same precision, and this much more: another order of summation through six blocks in fp32; in
# bf16, where each product is rounded to 8 bits, another draw of the same rounding.
_SLACK = {"fp32": 1e-3, "bf16": 0.05}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--skip-layers", type=int, default=6)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--memory", choices=("fast", "min"), default="fast")
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

    clip = sk.SkipCLIP(ours, tokens, skip_layers=args.skip_layers, generator=sampler().generator, memory=args.memory)
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
        model.zero_grad()
        forward()[0].backward()

    # The gate: same classes, and gradients no further from fp32 than the published step's, or no number.
    def gradients(loss, model) -> dict[str, torch.Tensor]:
        loss.backward()
        found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        return found

    out, (loss, class_ids) = forward_ours(), forward_theirs()
    if not out.class_ids.equal(class_ids):
        raise SystemExit("the two steps chose other classes: no timing")
    in_ours, in_theirs = gradients(out.loss, ours), gradients(loss, theirs)
    published.sampler = sampler()  # the same draw again
    truth = gradients(published(published.image_features(images), labels)[0], theirs)
    errors = {
        name: [((step[name] - truth[name]).norm() / truth[name].norm()).item() for step in (in_ours, in_theirs)]
        for name in truth
    }
    name, (ours_off, theirs_off) = max(errors.items(), key=lambda item: item[1][0] - item[1][1])
    print(
        f"loss {out.loss.item():.6f} against {loss.item():.6f}; worst gradient, of {name}: off by {ours_off:.1e} of its"
    )
    print(f"norm from fp32, the published step by {theirs_off:.1e}")
    if in_ours.keys() != truth.keys() or not ours_off <= theirs_off + _SLACK[args.precision]:
        raise SystemExit("the two steps do not agree: no timing")
    kept = len(class_ids)

    # The tail is drawn anew in each step, but K stays what it is.
    ours_name = "skipkernels" if args.memory == "fast" else "skipkernels, memory=min"
    saved = {"published": measure.saved_bytes(forward_theirs), ours_name: measure.saved_bytes(forward_ours)}
    seconds = measure.time_alternately(
        {"published": lambda: step(forward_theirs, theirs), ours_name: lambda: step(forward_ours, ours)},
        args.rounds,
        device,
    )
    ratios = [a / b for a, b in zip(seconds["published"], seconds[ours_name], strict=True)]
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
        f"{saved[ours_name] / saved['published']:.0%} of the bytes; K = {kept} of {args.classes}, {args.precision}"
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

"""Time a training step over the number of classes: SkipCLIP, the published step, full fine-tuning, prompt tuning.

    python -m bench.step                                                       ViT-B/16, batch 4, 10 to 21,841 classes
    python -m bench.step --classes 50 --implementation skipkernels published --precision fp32
    python -m bench.step --model ViT-L-14 --batch 4 32 --classes 10 1000

    published             the published step (bench/published.py), from features at the cut
    published, compiled   the same by torch.compile
    full fine-tuning      every layer trains, on all classes and tokens, from images
    prompt tuning         CoOp: the whole text tower on all classes, the image tower without gradients, from images
    skipkernels           SkipCLIP, from features at the cut, with memory="fast", or "min"

Each is checked against another computation of the same result before it is timed: the gradients of ours against the
published step in fp32, where that does not fit, with few classes (note). Then forward and backward run in turn, in a
new order each round. Time and memory are extrapolated from two small numbers of classes: a step predicted not to fit,
or to take longer than a minute, is skipped with the reason in its row. Half of the blocks of each tower are skipped,
and rows are appended to bench/results/DEVICE/step.csv after each number of classes.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch

from skipkernels import testing
from skipkernels.memory import free_bytes
from skipkernels.selection import RankSampler

from . import measure
from .inputs import Case, parser, random_inputs
from .measure import OURS
from .rows import PRECISIONS, save, shown
from .training import Published, Step, full_fine_tuning, prompt_tuning, skip_step

CLASSES = (10, 50, 100, 500, 1000, 5000, 21841)
PUBLISHED, COMPILED, MIN = "published", "published, compiled", "skipkernels, memory=min"
FULL, PROMPTS = "full fine-tuning", "prompt tuning"
# By the word of --implementation.
_NAMES = {OURS: OURS, "min": MIN, PUBLISHED: PUBLISHED, "compiled": COMPILED, "full": FULL, "prompts": PROMPTS}
IMPLEMENTATIONS = tuple(_NAMES.values())
_COLUMNS = (
    "implementation model B C K skip_layers precision p20_ms p50_ms p80_ms rounds faster saved_mib peak_mib note"
).split()
_LONGEST = 60.0  # seconds of a step
_PROBED = 4, 12  # classes from which time and memory are extrapolated
_MANY = 2000  # classes from which text features are kept on disk between steps


class Variant(NamedTuple):
    """An implementation in a precision."""

    name: str
    precision: str


_CHECK = Variant(PUBLISHED, "fp32")  # what the gradients of our steps are compared with, in each precision


class Probe(NamedTuple):
    """Seconds of a step, and bytes that it saves for backward."""

    seconds: float
    saved: float


def main(arguments: Sequence[str] | None = None) -> None:
    cases = {"model": ["ViT-B-16"], "batch": [4], "classes": list(CLASSES), "precision": list(PRECISIONS)}
    options = parser(__doc__, rounds=7, **cases)
    options.add_argument("--implementation", nargs="+", choices=list(_NAMES), default=list(_NAMES))
    args = options.parse_args(arguments)
    names = [name for word, name in _NAMES.items() if word in args.implementation]
    variants = [Variant(name, precision) for precision in args.precision for name in names]
    for model, batch in itertools.product(args.model, args.batch):
        case_of = functools.partial(Case, model, batch, device=args.device)
        probes = [probe(case_of(classes), variants) for classes in _PROBED]
        for classes in args.classes:
            rows = rows_of(args, case_of(classes), variants, probes)
            for row in rows:
                print(f"{row['implementation']:24} {row['precision']}  C = {classes:5}  {shown(row)}")
            save(args, rows, "step")


def kept(classes: int, batch: int, name: str) -> int:
    """Number of classes in a step."""
    return classes if name in (FULL, PROMPTS) else RankSampler().expected_keep(classes, batch)


# ---- predictions -----------------------------------------------------------------------------------------------------


def probe(case: Case, variants: Sequence[Variant]) -> dict[Variant, Probe]:
    """Measure the steps with few classes."""
    # The published step in place of the compiled one: what compiled code saves cannot be counted.
    eager = [variant._replace(name=PUBLISHED) if variant.name == COMPILED else variant for variant in variants]
    found = {}
    for variant, step in build(case, [*dict.fromkeys([_CHECK, *eager])]).items():
        saved = testing.saved_bytes(step.loss)
        found[variant] = Probe(measure.seconds_of(step, case.device), saved)
    return found | {Variant(COMPILED, p): found[Variant(PUBLISHED, p)] for name, p in variants if name == COMPILED}


def reason_to_skip(case: Case, variant: Variant, probes: Sequence[dict[Variant, Probe]]) -> str:
    """The reason why a step is not run, or ""."""
    K, few, more = (kept(classes, case.batch, variant.name) for classes in (case.classes, *_PROBED))
    share = (K - few) / (more - few)
    first, second = (each[variant] for each in probes)
    seconds, saved = (extrapolated(*values, share) for values in zip(first, second, strict=True))
    free = free_bytes(case.device)
    if 1.25 * saved > 0.9 * free:  # temporaries and gradients are extra
        of = "" if K == case.classes else f"{K} of "
        keep = f"{of}{case.classes} classes keep about {saved / 2**30:.1f} GiB for backward"
        return f"does not fit: {keep}, {free / 2**30:.1f} are free"
    return f"left out: a step takes about {seconds:.0f} s" if seconds > _LONGEST else ""


def extrapolated(first: float, second: float, share: float) -> float:
    """A value that is linear in the number of classes and does not fall with it."""
    return first + share * max(0.0, second - first)


# ---- measurements ----------------------------------------------------------------------------------------------------


def build(
    case: Case, variants: Sequence[Variant], folder: Path | None = None, compare: bool = True
) -> dict[Variant, Step]:
    """The steps to time, checked against another computation of the same result: ours against the published step, if
    `compare`. `folder` is for many text features."""
    inputs = random_inputs(case.model, case.batch, case.classes, case.device)
    skip = tuple(len(tower.transformer.resblocks) // 2 for tower in (inputs.model.visual, inputs.model))
    published = functools.cache(lambda: Published(inputs, skip))
    texts = folder / "texts" if folder and case.classes > _MANY else None

    def ours(memory: str, precision: str) -> Step:
        return skip_step(inputs, skip, memory, precision, published() if compare else None, texts)

    make: dict[str, Callable[[str], Step]] = {
        OURS: functools.partial(ours, "fast"),
        MIN: functools.partial(ours, "min"),
        PUBLISHED: lambda precision: published().step(precision),
        COMPILED: lambda precision: published().compiled(precision),
        FULL: lambda precision: full_fine_tuning(inputs, precision),
        PROMPTS: lambda precision: prompt_tuning(inputs, precision, open_clip.get_tokenizer(case.model)),
    }
    return {variant: make[variant.name](variant.precision) for variant in variants}


def rows_of(
    args: argparse.Namespace, case: Case, variants: Sequence[Variant], probes: Sequence[dict[Variant, Probe]]
) -> list[dict[str, Any]]:
    """A row of each implementation: times and sizes, or the reason why there are none."""
    reasons = {variant: reason_to_skip(case, variant, probes) for variant in [_CHECK, *variants]}
    run, compare = [variant for variant in variants if not reasons[variant]], not reasons[_CHECK]
    gc.collect()  # models of earlier sizes are in reference cycles
    with tempfile.TemporaryDirectory() as folder:
        found = timed(build(case, run, Path(folder), compare=compare), args.rounds, case.device) if run else {}
    rows = []
    for variant in variants:
        name, note = variant.name, reasons[variant]
        if variant in found and name in (OURS, MIN) and not compare:
            note = f"gradients compared at {_PROBED[1]} classes: the published step in fp32 is not run here"
        sizes = {"B": case.batch, "C": case.classes, "K": kept(case.classes, case.batch, name)}
        row = {"implementation": name, "model": case.model, **sizes, "precision": variant.precision, "note": note}
        rows.append(dict.fromkeys(_COLUMNS, "") | row | found.get(variant, {}))
    return rows


def timed(steps: dict[Variant, Step], rounds: int, device: torch.device) -> dict[Variant, dict[str, Any]]:
    """Columns of the steps: sizes, then times in turn, then peak memory."""
    saved = {variant: testing.saved_bytes(step.loss) for variant, step in steps.items() if variant.name != COMPILED}
    found = measure.compare(dict(steps), rounds, device)
    for variant, step in steps.items():
        step.model.zero_grad()  # free the gradients of the rounds before measuring memory
        peak = testing.peak_bytes(step, device, warm_up=False)
        skip = step.skip_layers if isinstance(step.skip_layers, int) else "+".join(map(str, step.skip_layers))
        found[variant] |= {"skip_layers": skip, "peak_mib": round(peak / 2**20, 1)}
        if variant in saved:
            found[variant]["saved_mib"] = round(saved[variant] / 2**20, 1)
    return found


if __name__ == "__main__":
    main()

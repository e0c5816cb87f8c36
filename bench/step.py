"""Time a training step over the number of classes: SkipCLIP, the published step, full fine-tuning, prompt tuning.

    python -m bench.step                                                       ViT-B/16, batch 4, 10 to 21,841 classes
    python -m bench.step --classes 50 --implementation skipkernels published --precision fp32
    python -m bench.step --model ViT-L-14 --batch 4 32 --classes 10 1000

    published             the published step (bench/published.py), from features at the cut
    published, compiled   the same by torch.compile
    full fine-tuning      every layer trains, on all classes and tokens, from images
    prompt tuning         CoOp: the whole text tower on all classes, the image tower without gradients, from images
    skipkernels           SkipCLIP, from features at the cut, with memory="fast", or "min"

Each is checked against another computation of the same result before it is timed. Then forward and backward run in
turn, in a new order each round. Time and memory are extrapolated from two small numbers of classes: a step predicted
not to fit, or to take longer than a minute, is skipped with the reason in its row. Half of the blocks of each tower
are skipped, and rows are appended to bench/results/DEVICE/step.csv after each number of classes. With --skip-layers
they are only printed.
"""

from __future__ import annotations

import argparse
import functools
import gc
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch

from skipkernels import testing
from skipkernels.memory import free_bytes
from skipkernels.selection import RankSampler

from . import measure
from .inputs import Case, parser, random_inputs
from .measure import OURS
from .rows import PRECISIONS, save
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

Key = tuple[str, str]
"""Implementation and precision."""
Probe = tuple[float, float]
"""Seconds of a step, and bytes that it saves for backward."""


def main(arguments: Sequence[str] | None = None) -> None:
    cases = {"model": ["ViT-B-16"], "batch": [4], "classes": list(CLASSES), "precision": list(PRECISIONS)}
    options = parser(__doc__, rounds=7, skip_layers=None, **cases)
    options.add_argument("--implementation", nargs="+", choices=list(_NAMES), default=list(_NAMES))
    args = options.parse_args(arguments)
    keys = [(_NAMES[word], precision) for precision in args.precision for word in _NAMES if word in args.implementation]
    for model, batch in itertools.product(args.model, args.batch):
        case_of = functools.partial(Case, model, batch, device=args.device, skip_layers=args.skip_layers)
        probes = [probe(case_of(classes), keys) for classes in _PROBED]
        for classes in args.classes:
            rows = rows_of(args, case_of(classes), keys, probes)
            for row in rows:
                print(f"{row['implementation']:24} {row['precision']}  C = {classes:5}  {measure.shown(row)}")
            if not args.skip_layers:
                save(args, rows, "step")


def kept(classes: int, batch: int, name: str) -> int:
    """Number of classes in a step."""
    return classes if name in (FULL, PROMPTS) else RankSampler().expected_keep(classes, batch)


# ---- predictions -----------------------------------------------------------------------------------------------------


def uncompiled(key: Key) -> Key:
    """The key of the same step, not compiled: what compiled code saves cannot be counted."""
    return (PUBLISHED, key[1]) if key[0] == COMPILED else key


def probe(case: Case, keys: Sequence[Key]) -> dict[Key, Probe]:
    """Measure the steps with few classes."""
    found = {}
    for key, step in build(case, list(dict.fromkeys(map(uncompiled, keys)))).items():
        saved = testing.saved_bytes(step.loss)
        found[key] = measure.time_alternately({key: step}, 1, case.device, warm_up=False)[key][0], saved
    return found


def extrapolate(few: Probe, more: Probe, classes: Sequence[int], K: int) -> Probe:
    """Time and bytes with K classes, linear in the number of classes and never falling with it.

    >>> extrapolate((2.0, 100), (4.0, 500), (10, 30), 50)
    (6.0, 900.0)
    """
    share = (K - classes[0]) / (classes[1] - classes[0])
    seconds, saved = (a + share * max(0.0, b - a) for a, b in zip(few, more, strict=True))
    return seconds, saved


def reason_to_skip(case: Case, key: Key, probes: Sequence[dict[Key, Probe]]) -> str:
    """The reason why a step is not run, or ""."""
    K, *probed = (kept(classes, case.batch, key[0]) for classes in (case.classes, *_PROBED))
    few, more = (each[uncompiled(key)] for each in probes)
    seconds, saved = extrapolate(few, more, probed, K)
    free = free_bytes(case.device)
    if 1.25 * saved > 0.9 * free:  # temporaries and gradients are extra
        of = "" if K == case.classes else f"{K} of "
        keep = f"{of}{case.classes} classes keep about {saved / 2**30:.1f} GiB for backward"
        return f"does not fit: {keep}, {free / 2**30:.1f} are free"
    return f"left out: a step takes about {seconds:.0f} s" if seconds > _LONGEST else ""


# ---- measurements ----------------------------------------------------------------------------------------------------


def build(case: Case, keys: Sequence[Key], folder: Path | None = None) -> dict[Key, Step]:
    """The steps to time, checked against another computation of the same result; `folder` is for many text features."""
    inputs = random_inputs(case.model, case.batch, case.classes, case.device)
    skip = case.skip_layers or half_of(inputs.model)
    published = Published(inputs, skip) if PUBLISHED in {uncompiled(key)[0] for key in keys} else None
    texts = folder / "texts" if folder and case.classes > _MANY else None
    make: dict[str, Callable[[str], Step]] = {
        OURS: lambda precision: skip_step(inputs, skip, "fast", precision, published, texts),
        MIN: lambda precision: skip_step(inputs, skip, "min", precision, published, texts),
        FULL: lambda precision: full_fine_tuning(inputs, precision),
        PROMPTS: lambda precision: prompt_tuning(inputs, precision, open_clip.get_tokenizer(case.model)),
    }
    if published is not None:
        make |= {PUBLISHED: published.step, COMPILED: published.compiled}
    return {(name, precision): make[name](precision) for name, precision in keys}


def rows_of(
    args: argparse.Namespace, case: Case, keys: Sequence[Key], probes: Sequence[dict[Key, Probe]]
) -> list[dict[str, Any]]:
    """A row of each implementation: times and sizes, or the reason why there are none."""
    reasons = {key: reason_to_skip(case, key, probes) for key in keys}
    run = [key for key in keys if not reasons[key]]
    gc.collect()  # models of earlier sizes are in reference cycles
    with tempfile.TemporaryDirectory() as folder:
        found = timed(build(case, run, Path(folder)), args.rounds, case.device) if run else {}
    rows = []
    for key in keys:
        name, precision = key
        sizes = {"B": case.batch, "C": case.classes, "K": kept(case.classes, case.batch, name)}
        row = {"implementation": name, "model": case.model, **sizes, "precision": precision, "note": reasons[key]}
        row = dict.fromkeys(_COLUMNS, "") | row | found.get(key, {})
        if key in found and name in (OURS, MIN) and not any(other == PUBLISHED for other, _ in run):
            row["note"] = f"gradients compared at {_PROBED[1]} classes: the published step is not run here"
        rows.append(row)
    return rows


def timed(steps: dict[Key, Step], rounds: int, device: torch.device) -> dict[Key, dict[str, Any]]:
    """Columns of the steps: sizes, then times in turn, then peak memory."""
    saved = {key: testing.saved_bytes(steps.get(uncompiled(key), step).loss) for key, step in steps.items()}
    found = measure.compare(dict(steps), rounds, device)
    for key, step in steps.items():
        step.model.zero_grad()  # free the gradients of the rounds before measuring memory
        peak = testing.peak_bytes(step, device, warm_up=False)
        skip = step.skip_layers if isinstance(step.skip_layers, int) else "+".join(map(str, step.skip_layers))
        found[key] |= {"skip_layers": skip, "K": step.K}
        found[key] |= {"saved_mib": round(saved[key] / 2**20, 1), "peak_mib": round(peak / 2**20, 1)}
    return found


def half_of(model: Any) -> tuple[int, int]:
    """Skipped blocks of the image and the text tower."""
    return len(model.visual.transformer.resblocks) // 2, len(model.transformer.resblocks) // 2


if __name__ == "__main__":
    main()

"""Time a training step over the number of classes: SkipCLIP, the published step, full fine-tuning, prompt tuning.

    python -m bench.step                                                       ViT-B/16, batch 4, 10 to 21,841 classes
    python -m bench.step --classes 50 --implementation skipkernels published --precision fp32
    python -m bench.step --model ViT-L-14 --batch 4 32 --classes 10 1000
    python -m bench.step --classes 100 --implementation skipkernels published full --training

    published             the published step (bench/published.py), from features at the cut
    published, compiled   the same by torch.compile
    full fine-tuning      every layer trains, on all classes and tokens, from images
    prompt tuning         CoOp: the whole text tower on all classes, the image tower without gradients, from images
    skipkernels           SkipCLIP, from features at the cut, with memory="fast", or "min"

Each is checked against another computation of the same result before it is timed. Then forward and backward run in
turn, in a new order each round. Time and memory are predicted from two small numbers of classes; a step predicted not
to fit, or to take longer than --longest, is skipped with the reason in its row. The floor of a step is the time of its
products at the rate of a large product, and of reading its weights twice and writing their gradients at the rate of a
copy. Rows are appended to bench/results/DEVICE/step.csv after each number of classes; with --skip-layers to a table of
its own. By default half of the blocks of each tower are skipped.

--training also measures the memory of training: in a process of its own, the peak of the second step with its update
above the memory before the model is made. Besides the step that is weights, momentum, and text features at the cut.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch

import skipkernels as sk
from skipkernels import testing
from skipkernels.memory import PeakMemory, free_bytes
from skipkernels.selection import RankSampler

from . import cuda, measure
from .budget import Probe, add_budget
from .curve import OURS, PUBLISHED, Curve, Key
from .flops import flops_of
from .inputs import PRECISIONS, parser, random_inputs
from .training import Published, Step, full_fine_tuning, prompt_tuning, skip_step

CLASSES = (10, 50, 100, 500, 1000, 5000, 21841)
MIN, COMPILED = "skipkernels, memory=min", "published, compiled"
FULL, PROMPTS = "full fine-tuning", "prompt tuning"
IMPLEMENTATIONS = (OURS, MIN, PUBLISHED, COMPILED, FULL, PROMPTS)
_SHORT = {"min": MIN, "compiled": COMPILED, "full": FULL, "prompts": PROMPTS}
_MANY = 2000  # classes from which text features are kept on disk between steps
_SETTING_UP = 5  # timed calls per step, for predictions
_RUNS = 8  # runs of a step, at least: comparison, counts, time, memory
_COMPILING = 60.0  # approximate seconds of torch.compile
_STARTING = 20.0  # approximate seconds until a new process has a model
_IN_FP32 = {"fp32": 1.0, "bf16": 3.0}  # approximate time relative to the precision of the step


def main(arguments: Sequence[str] | None = None) -> None:
    cases = {"model": ["ViT-B-16"], "batch": [4], "classes": list(CLASSES), "precision": list(PRECISIONS)}
    options = parser(__doc__, several=True, rounds=7, skip_layers=None, **cases)
    names = [*IMPLEMENTATIONS, *_SHORT]
    options.add_argument("--implementation", nargs="+", choices=names, default=list(IMPLEMENTATIONS))
    options.add_argument("--longest", type=float, default=60.0, help="most seconds per step")
    seconds = "approximate seconds for the rounds of a number of classes"
    options.add_argument("--seconds", type=float, default=60.0, help=seconds)
    options.add_argument("--training", action="store_true", help="also measure the memory of training")
    add_budget(options)
    args = options.parse_args(arguments)
    given = {_SHORT.get(name, name) for name in args.implementation}
    args.implementation = [name for name in IMPLEMENTATIONS if name in given]
    for model, batch in itertools.product(args.model, args.batch):
        Steps(args, model, batch).measure(f"step_skip_{args.skip_layers}" if args.skip_layers else "step")


class Steps(Curve):
    """The steps of one model and batch size."""

    columns = (
        "implementation model B C K skip_layers precision p20_ms p50_ms p80_ms rounds faster "
        "saved_mib peak_mib training_mib gflop floor_ms above_floor launches graph_ms note"
    ).split()
    probes = 4, 12
    compared = OURS, MIN
    unchecked = "gradients compared at {} classes: the published step is not run here"

    def case(self, classes: int, name: str) -> dict[str, Any]:
        return super().case(classes, name) | {"K": self.kept(classes, name)}

    def kept(self, classes: int, name: str) -> int:
        """Number of kept classes of a step."""
        return classes if name in (FULL, PROMPTS) else RankSampler().expected_keep(classes, self.batch)

    def probe(self, key: Key, classes: int, function: Step) -> Probe:
        saved = testing.saved_bytes(function.loss)
        seconds = measure.time_alternately({key: function}, 1, self.args.device, warm_up=False)[key][0]
        return Probe(function.K, seconds, saved)

    def predict(self) -> None:
        super().predict()
        published = {precision: line for (name, precision), line in self.cost_models.items() if name == PUBLISHED}
        self.cost_models |= {(COMPILED, precision): line for precision, line in published.items()}

    def reason(self, classes: int, key: Key) -> str:
        line, K = self.cost_models[key], self.kept(classes, key[0])
        free, seconds = free_bytes(self.args.device), line.seconds(K)
        if not line.fits(K, free):
            of = "" if K == classes else f"{K} of "
            return (
                f"does not fit: {of}{classes} classes keep about {line.saved(K) / 2**30:.1f} GiB for backward, "
                f"{free / 2**30:.1f} are free; up to {line.most_classes(free)} that take part fit"
            )
        if seconds > self.args.longest:
            return f"left out: a step takes about {seconds:.0f} s"
        if (setting_up := self.encoding(classes, key)) > _SETTING_UP * self.args.longest:
            return f"left out: encoding all texts, before the first step, takes about {setting_up:.0f} s"
        return ""

    def seconds(self, classes: int, key: Key) -> float:
        encoding, once = self.encoding(classes, key), self.cost_models[key].seconds(self.kept(classes, key[0]))
        if key[0] == COMPILED:
            return encoding + _RUNS * once + _COMPILING
        return encoding + _RUNS * once + (_STARTING + encoding + 2 * once if self.args.training else 0.0)

    def encoding(self, classes: int, key: Key) -> float:
        """Predicted seconds for all texts before the first step: the lower half of the text tower and all of it in fp32
        without gradients, as long as forward and backward of the upper half."""
        if key[0] in (FULL, PROMPTS):
            return 0.0
        return classes * self.cost_models[key].seconds_each * _IN_FP32[key[1]]

    def build(self, classes: int, keys: Sequence[Key], folder: Path, *, probing: bool = False) -> dict[Key, Step]:
        if probing:  # the compiled step has the cost of the published one
            keys = list(dict.fromkeys((PUBLISHED if name == COMPILED else name, precision) for name, precision in keys))
        inputs = random_inputs(self.model, self.batch, classes, self.args.device)
        skip = self.args.skip_layers or half_of(inputs.model)
        published = Published(inputs, skip) if {PUBLISHED, COMPILED} & {name for name, _ in keys} else None
        texts = folder / "texts" if classes > _MANY else None
        make: dict[str, Callable[[str], Step]] = {
            OURS: lambda precision: skip_step(inputs, skip, "fast", precision, published, texts),
            MIN: lambda precision: skip_step(inputs, skip, "min", precision, published, texts),
            FULL: lambda precision: full_fine_tuning(inputs, precision),
            PROMPTS: lambda precision: prompt_tuning(inputs, precision, open_clip.get_tokenizer(self.model)),
        }
        if published is not None:
            make |= {PUBLISHED: published.step, COMPILED: published.compiled}
        return {(name, precision): make[name](precision) for name, precision in keys}

    def sizes(self, key: Key, function: Step, found: dict[Key, dict[str, Any]]) -> dict[str, Any]:
        """Bytes saved for backward and FLOPs; those of the compiled step are the published ones."""
        skipped = (
            function.skip_layers if isinstance(function.skip_layers, int) else "+".join(map(str, function.skip_layers))
        )
        if key[0] == COMPILED:
            sizes = {column: found.get((PUBLISHED, key[1]), {}).get(column, "") for column in ("saved_mib", "gflop")}
        else:
            saved = testing.saved_bytes(function.loss)
            sizes = {"saved_mib": round(saved / 2**20, 1), "gflop": round(flops_of(function) / 1e9, 2)}
        return {"skip_layers": skipped, "K": function.K} | sizes

    def moved(self, function: Step) -> int:
        """Weights are read twice, gradients written."""
        return 3 * sum(weight.nbytes for weight in function.model.parameters() if weight.requires_grad)

    def after(self, key: Key, function: Step) -> dict[str, Any]:
        function.model.zero_grad()  # free the gradients of the rounds before measuring memory
        peak = testing.peak_bytes(function, self.args.device, warm_up=False)
        launches = cuda.launches_and_graph(function) if self.args.device.type == "cuda" else {}
        return {"peak_mib": round(peak / 2**20, 1)} | launches

    def rows(self, classes: int) -> list[dict[str, Any]]:
        rows = super().rows(classes)
        for row in rows:
            if self.args.training and row["p50_ms"] != "" and row["implementation"] != COMPILED:
                case = self.args, self.model, self.batch, classes, (row["implementation"], row["precision"])
                row["training_mib"] = round(measure.in_new_process(training_bytes, *case) / 2**20, 1)
        return rows


def training_bytes(args: argparse.Namespace, model: str, batch: int, classes: int, key: Key) -> int:
    """Peak memory of the second step with its update, above the memory before the model is made."""
    with tempfile.TemporaryDirectory() as folder:
        small = argparse.Namespace(**vars(args) | {"skip_layers": None})
        training(Steps(small, "glyph-tiny", batch).build(Steps.probes[0], [key], Path(folder))[key])()  # load libraries
        testing.release_freed_memory()
        before = PeakMemory(args.device).read()
        train = training(Steps(args, model, batch).build(classes, [key], Path(folder))[key])
        return testing.peak_bytes(train, args.device, above=before)  # of the second call


def training(step: Step) -> Callable[[], None]:
    """A step with its update, ours as in `tune`, others as in a plain loop."""
    weights = [weight for weight in step.model.parameters() if weight.requires_grad]
    optimizer = (sk.FusedSGD if step.name.startswith(OURS) else torch.optim.SGD)(weights, lr=1e-5, momentum=0.9)

    def train() -> None:
        step.loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return train


def half_of(model: Any) -> tuple[int, int]:
    """Skipped blocks of the image and the text tower."""
    return len(model.visual.transformer.resblocks) // 2, len(model.transformer.resblocks) // 2


if __name__ == "__main__":
    main()

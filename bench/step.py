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
turn, in a new order each round. Time and memory are predicted from two small numbers of classes; a step predicted not
to fit, or to take longer than --longest, is skipped with the reason in its row. The floor of a step is the time of its
products at the rate of a large product, and of reading its weights twice and writing their gradients at the rate of a
copy. Rows are appended to bench/results/DEVICE/step.csv after each number of classes; with --skip-layers to a table of
its own. By default half of the blocks of each tower are skipped.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch

from skipkernels import testing
from skipkernels.memory import free_bytes
from skipkernels.selection import RankSampler

from . import ceilings, cuda, measure
from .budget import NO_TIME, Plan, add_budget
from .cost_model import CostModel, Probe
from .flops import flops_of
from .inputs import PRECISIONS, Inputs, parser, random_inputs
from .training import Published, Skip, Step, full_fine_tuning, prompt_tuning, skip_step

CLASSES = (10, 50, 100, 500, 1000, 5000, 21841)
OURS, MIN = "skipkernels", "skipkernels, memory=min"
PUBLISHED, COMPILED, FULL, PROMPTS = "published", "published, compiled", "full fine-tuning", "prompt tuning"
IMPLEMENTATIONS = (OURS, MIN, PUBLISHED, COMPILED, FULL, PROMPTS)
_SHORT = {"min": MIN, "compiled": COMPILED, "full": FULL, "prompts": PROMPTS}
_PROBES = 4, 12  # classes
_MANY = 2000  # classes from which text features are kept on disk between steps
_SETTING_UP = 5  # timed calls per step, for predictions
_RUNS = 6  # runs of a step, at least: comparison, counts, time, memory
_COMPILING = 60.0  # approximate seconds of torch.compile
_IN_FP32 = {"fp32": 1.0, "bf16": 3.0}  # approximate time relative to the precision of the step

_COLUMNS = "implementation model B C K skip_layers precision p20_ms p50_ms p80_ms rounds faster".split()
_COLUMNS += "saved_mib peak_mib gflop floor_ms above_floor launches graph_ms note".split()


def main(arguments: Sequence[str] | None = None) -> None:
    cases = {"model": ["ViT-B-16"], "batch": [4], "classes": list(CLASSES), "precision": list(PRECISIONS)}
    options = parser(__doc__, several=True, rounds=7, skip_layers=None, **cases)
    options.add_argument(
        "--implementation", nargs="+", choices=[*IMPLEMENTATIONS, *_SHORT], default=list(IMPLEMENTATIONS)
    )
    options.add_argument("--longest", type=float, default=60.0, help="most seconds per step")
    options.add_argument(
        "--seconds", type=float, default=60.0, help="approximate seconds for the rounds of a number of classes"
    )
    add_budget(options)
    args = options.parse_args(arguments)
    args.implementation = list(dict.fromkeys(_SHORT.get(name, name) for name in args.implementation))
    for model, batch in itertools.product(args.model, args.batch):
        Curve(args, model, batch).measure()


class Curve:
    """The steps of one model and batch size over the number of classes."""

    def __init__(self, args: argparse.Namespace, model: str, batch: int):
        self.args, self.model, self.batch = args, model, batch
        self.wanted = [(name, precision) for precision in args.precision for name in args.implementation]
        self.cost_models: dict[tuple[str, str], CostModel] = {}
        self.skip: Skip = args.skip_layers

    def measure(self) -> None:
        """Measure every number of classes and append the rows."""
        self._probe()
        for classes in self.args.classes:
            started = time.perf_counter()
            rows = [self._row(**found) for found in self._of(classes)]
            for row in rows:
                print(f"{row['implementation']:24} {row['precision']}  C = {classes:5}  {shown(row)}")
            print(f"  {self.model}, batch {self.batch}, {classes} classes: {time.perf_counter() - started:.0f} s")
            if not self.args.no_save:
                table = "step" if self.args.skip_layers is None else f"step_skip_{self.args.skip_layers}"
                measure.append_rows([measure.machine(self.args.device) | row for row in rows], table)

    def _row(self, **found: Any) -> dict[str, Any]:
        return dict.fromkeys(_COLUMNS, "") | {"model": self.model, "B": self.batch} | found

    # ---- predictions ---------------------------------------------------------------------------------------------

    def _probe(self) -> None:
        """Cost models from two small steps of each implementation, which are also checked."""
        found: dict[tuple[str, str], list[Probe]] = {}
        keys = dict.fromkeys((PUBLISHED if name == COMPILED else name, precision) for name, precision in self.wanted)
        for classes in _PROBES:
            for key, step in self._steps(classes, list(keys), Path()).items():
                saved = testing.saved_bytes(step.loss)
                seconds = measure.time_alternately({key: step}, 1, self.args.device, warm_up=False)[key][0]
                found.setdefault(key, []).append(Probe(step.K, seconds, saved))
        self.cost_models = {key: CostModel.of(*probes) for key, probes in found.items()}

    def _kept(self, classes: int, name: str) -> int:
        """Number of kept classes of a step."""
        return classes if name in (FULL, PROMPTS) else RankSampler().expected_keep(classes, self.batch)

    def _in_the_way(self, classes: int, name: str, precision: str) -> str:
        """The reason to skip a step, or ""."""
        line, K = self._cost_model(name, precision), self._kept(classes, name)
        free, seconds = free_bytes(self.args.device), line.seconds(K)
        if not line.fits(K, free):
            of = "" if K == classes else f"{K} of "
            return (
                f"does not fit: {of}{classes} classes keep about {line.saved(K) / 2**30:.1f} GiB for backward, "
                f"{free / 2**30:.1f} are free; up to {line.most_classes(free)} that take part fit"
            )
        if seconds > self.args.longest:
            return f"left out: a step takes about {seconds:.0f} s"
        setting_up = self._encoding(classes, name, precision)
        if setting_up > _SETTING_UP * self.args.longest:
            return f"left out: encoding all texts, before the first step, takes about {setting_up:.0f} s"
        return ""

    def _needs(self, classes: int, name: str, precision: str) -> float:
        """Predicted seconds until the row of a step is complete."""
        runs = _RUNS * self._cost_model(name, precision).seconds(self._kept(classes, name))
        return self._encoding(classes, name, precision) + runs + (_COMPILING if name == COMPILED else 0.0)

    def _encoding(self, classes: int, name: str, precision: str) -> float:
        """Predicted seconds for all texts before the first step: the lower half of the text tower and all of it in fp32
        without gradients, as long as forward and backward of the upper half."""
        if name in (FULL, PROMPTS):
            return 0.0
        return classes * self._cost_model(name, precision).seconds_each * _IN_FP32[precision]

    def _cost_model(self, name: str, precision: str) -> CostModel:
        """The cost model; the compiled step has that of the published one."""
        return self.cost_models[PUBLISHED if name == COMPILED else name, precision]

    # ---- measurements --------------------------------------------------------------------------------------------

    def _of(self, classes: int) -> list[dict[str, Any]]:
        """Columns of each implementation: times and sizes, or the reason why there are none."""
        plan = Plan(self.args.budget)
        reasons = {key: self._in_the_way(classes, *key) for key in self.wanted}
        reasons |= {
            key: NO_TIME for key in self.wanted if not reasons[key] and not plan.takes(self._needs(classes, *key))
        }
        runs = [key for key, reason in reasons.items() if not reason]
        with tempfile.TemporaryDirectory() as folder:
            steps = self._steps(classes, runs, Path(folder))
            found = self._timed(steps) if steps else {}
        checked = (PUBLISHED, "fp32") in steps or (PUBLISHED, "bf16") in steps
        rows = []
        for name, precision in self.wanted:
            row = {
                "implementation": name,
                "precision": precision,
                "C": classes,
                "K": self._kept(classes, name),
            }
            note = reasons[name, precision]
            if not note and name in (OURS, MIN) and not checked:
                note = f"gradients compared at {_PROBES[1]} classes: the published step is not run here"
            rows.append(row | found.get((name, precision), {}) | {"note": note})
        return rows

    def _steps(self, classes: int, keys: Sequence[tuple[str, str]], folder: Path) -> dict[tuple[str, str], Step]:
        """The steps of `keys`, checked against another computation of the same result."""
        gc.collect()  # models of earlier steps are in reference cycles
        inputs = random_inputs(self.model, self.batch, classes, self.args.device)
        self.skip = self.args.skip_layers or half_of(inputs.model)
        published: Published | None = None
        if {PUBLISHED, COMPILED} & {name for name, _ in keys}:
            published = Published(inputs, self.skip)
        make: dict[str, Callable[[str], Step]] = {
            OURS: lambda precision: self._ours(inputs, "fast", precision, published, folder),
            MIN: lambda precision: self._ours(inputs, "min", precision, published, folder),
            FULL: lambda precision: full_fine_tuning(inputs, precision),
            PROMPTS: lambda precision: prompt_tuning(inputs, precision, open_clip.get_tokenizer(self.model)),
        }
        if published is not None:
            make |= {PUBLISHED: published.step, COMPILED: published.compiled}
        return {(name, precision): make[name](precision) for name, precision in keys}

    def _ours(self, inputs: Inputs, memory: str, precision: str, against: Published | None, folder: Path) -> Step:
        texts = folder / "texts" if len(inputs.tokens) > _MANY else None
        return skip_step(inputs, self.skip, memory, precision, against, texts)

    def _timed(self, steps: dict[tuple[str, str], Step]) -> dict[tuple[str, str], dict[str, Any]]:
        """Measure sizes, then times in turn."""
        args, found = self.args, {}
        started = time.perf_counter()
        for key in sorted(steps, key=lambda key: key[0] == COMPILED):  # same sizes as the published step
            found[key] = self._sizes(steps[key], found.get((PUBLISHED, key[1]), {}))
        once = (time.perf_counter() - started) / 2
        rounds = max(1, min(args.rounds, int(args.seconds / once)))
        seconds = measure.time_alternately(steps, rounds, args.device, warm_up=args.device.type == "cuda")
        for key, row in found.items():
            row |= measure.milliseconds(seconds[key]) | {"rounds": rounds}
            ours = seconds.get((OURS, key[1]))
            if ours is not None and key[0] != OURS:
                row["faster"] = round(measure.median_ratio(seconds[key], ours), 3)
            if row["gflop"] != "":
                # The floor does not include recomputed blocks.
                base = found.get((OURS, key[1]), row) if key[0] == MIN else row
                row["floor_ms"] = round(self._floor(base["gflop"], steps[key]), 1)
                row["above_floor"] = round(row["p50_ms"] / row["floor_ms"], 3)
            steps[key].model.zero_grad()  # free the gradients of the rounds before measuring memory
            row["peak_mib"] = round(testing.peak_bytes(steps[key], args.device, warm_up=False) / 2**20, 1)
            row |= cuda.launches_and_graph(steps[key]) if args.device.type == "cuda" else {}
        return found

    def _sizes(self, step: Step, of_the_same: dict[str, Any]) -> dict[str, Any]:
        """Bytes saved for backward and FLOPs; FLOPs cannot be counted in compiled code."""
        saved = of_the_same or {"saved_mib": "", "gflop": ""}
        if step.name != COMPILED:
            kept = testing.saved_bytes(step.loss)
            saved = {"saved_mib": round(kept / 2**20, 1), "gflop": round(flops_of(step) / 1e9, 2)}
        skipped = step.skip_layers if isinstance(step.skip_layers, int) else "+".join(map(str, step.skip_layers))
        return {"skip_layers": skipped, "K": step.K} | {name: saved[name] for name in ("saved_mib", "gflop")}

    def _floor(self, gflop: float, step: Step) -> float:
        """Floor in milliseconds: products, weights read twice, gradients written."""
        device = self.args.device
        dtype = torch.bfloat16 if step.precision == "bf16" else torch.float32
        weights = sum(weight.nbytes for weight in step.model.parameters() if weight.requires_grad)
        products = gflop * 1e9 / ceilings.matrix_rate(device, dtype)
        return 1000 * (products + 3 * weights / ceilings.bandwidth(device))


def shown(row: dict[str, Any]) -> str:
    """The printed result of a row."""
    if row["p50_ms"] == "":
        return str(row["note"])
    told = f"{measure.shown(row)}  {row['peak_mib']:7.1f} MiB more at the peak"
    told += f", {row['saved_mib']:.1f} saved" if row["saved_mib"] != "" else ""
    told += f", {row['above_floor']:.2f} times the floor" if row["above_floor"] != "" else ""
    return told + (f"; skipkernels is {row['faster']:.2f} times faster" if row["faster"] != "" else "")


def half_of(model: Any) -> tuple[int, int]:
    """Skipped blocks of the image and the text tower."""
    return len(model.visual.transformer.resblocks) // 2, len(model.transformer.resblocks) // 2


if __name__ == "__main__":
    main()

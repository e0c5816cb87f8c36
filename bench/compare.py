"""Compare the speed of two commits: which jobs became faster, which slower, and which show no difference.

    python -m bench.compare HEAD~1                     the working tree against a commit
    python -m bench.compare HEAD~20 --head main --jobs step/ViT-B-16 predict --budget 9m
    python -m bench.compare main --rounds 30 --fail-above 1.05

Each side is a copy of the files of its commit, with C++ kernels built from them. In a round each side runs once, in a
new process and in random order, and repeats every job; the round gives one ratio, head over base, of the median times.
A process has a speed of its own, depending on memory layout: two processes of one commit were 3 % apart in
`class_scores`. Hence the interval is that of the median over rounds (T. Kalibera and R. Jones, Rigorous Benchmarking in
Reasonable Time, ISMM 2013), from order statistics: from the k-th smallest ratio to the k-th largest (H. A. David and
H. N. Nagaraja, Order Statistics, 2003, section 7.1). It needs 6 rounds.

Rows are appended to bench/results/DEVICE/compare.csv. Exit status: 1 if a job fails on the head or its interval is
above --fail-above; 2 if nothing could be compared. With --fail-above it is 125, which `git bisect run` skips, if that
cannot be decided.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import logging
import math
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import measure, tables  # these import no skipkernels: a side imports this file with its own package
from .budget import add_budget

_HERE = Path(__file__).parents[1]
ROOT = _HERE  # the repository of the commits
BASE, HEAD = "base", "head"
UNDECIDED = 125  # exit status: git bisect skips such a commit
_LEAST_SECONDS = 0.2  # a job is repeated for this long, at least three times
_SAME = 0.02  # relative difference of the norms of results: bf16, summed in another order

Job = Callable[[], Any]
"""Returns a tensor or a list of tensors."""


class Refused(Exception):
    """Nothing can be compared; the message is one line."""


# ---- jobs ------------------------------------------------------------------------------------------------------------


@functools.cache
def _skip_clip(model: str, classes: int, device: torch.device) -> tuple[Any, Tensor]:
    """SkipCLIP with random weights, half of the blocks skipped, and the features of four images at the cut."""
    import open_clip

    import skipkernels as sk

    logging.disable(logging.WARNING)  # open_clip warns about random weights
    for config in Path(sk.__file__).parent.rglob("glyph-tiny.json"):
        open_clip.add_model_config(config)
    torch.manual_seed(0)
    network = open_clip.create_model(model).to(device).eval()
    prompts = [f"a photo of a {'very ' * (number % 3)}small thing {number}." for number in range(classes)]
    clip = sk.SkipCLIP(network, open_clip.get_tokenizer(model)(prompts).to(device), skip_layers=0.5)
    return clip, clip.encode_lower(torch.randn(4, 3, *network.visual.image_size).to(device))


def _step(model: str, classes: int, precision: str, device: torch.device) -> Job:
    """Forward and backward."""
    clip, features = _skip_clip(model, classes, device)
    labels = torch.zeros(len(features), dtype=torch.int64, device=device)

    def step() -> Tensor:
        clip.zero_grad()
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = clip(features, labels).loss
        loss.backward()
        return loss

    return step


def _predict(model: str, classes: int, device: torch.device) -> Job:
    """Logits after a weight update: the class embeddings are recomputed."""
    clip, features = _skip_clip(model, classes, device)
    weights = clip.trainable_parameters()

    def predict() -> Tensor:
        torch.autograd.graph.increment_version(weights)
        return clip.predict(features)

    return predict


JOBS: dict[str, Callable[[torch.device], Job]] = {
    "step/ViT-B-16/fp32": functools.partial(_step, "ViT-B-16", 50, "fp32"),
    "step/ViT-B-16/bf16": functools.partial(_step, "ViT-B-16", 50, "bf16"),
    "step/glyph-tiny/fp32": functools.partial(_step, "glyph-tiny", 20, "fp32"),
    "predict/ViT-B-16/fp32": functools.partial(_predict, "ViT-B-16", 50),
}


def chosen(words: Sequence[str]) -> list[str]:
    """The jobs with these names, or with names that begin with them up to a slash.

    >>> chosen(["predict", "step/ViT-B-16"])
    ['step/ViT-B-16/fp32', 'step/ViT-B-16/bf16', 'predict/ViT-B-16/fp32']
    """
    for word in words:
        if not any(f"{job}/".startswith(f"{word}/") for job in JOBS):
            raise Refused(f"--jobs: no job {word!r}; choose from {', '.join(JOBS)}")
    return [job for job in JOBS if any(f"{job}/".startswith(f"{word}/") for word in words)]


# ---- one side --------------------------------------------------------------------------------------------------------

# The package comes from the side's files; the jobs come from this checkout.
_START = "import sys; sys.path.insert(0, sys.argv[1]); import skipkernels; sys.path[0] = sys.argv[2]; "
_START += "from bench import compare; compare.run_jobs(sys.argv[3], sys.argv[4:])"


def run_jobs(device: str, jobs: Sequence[str]) -> None:
    """Run jobs in this process; print a line of JSON for each: median seconds and norm of the result, or the error."""
    for name in jobs:
        try:
            print(
                json.dumps({"job": name} | _timed(JOBS[name](torch.device(device)), torch.device(device))), flush=True
            )
        except Exception as error:  # reported; the other jobs run
            reason = (str(error).strip().splitlines() or [""])[0]
            print(json.dumps({"job": name, "error": f"{type(error).__name__}: {reason}"}), flush=True)


def _timed(job: Job, device: torch.device) -> dict[str, float]:
    results = job()
    results = results if isinstance(results, list) else [results]
    norm = math.hypot(*(x.detach().float().norm().item() for x in results))
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < _LEAST_SECONDS:
        measure.synchronize(device)
        start = time.perf_counter()
        job()
        measure.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return {"seconds": statistics.median(seconds), "norm": norm}


def measured(tree: Path, device: str, jobs: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The results of a side, by job, from a new process.

    Raises:
        Refused: If the process does not start.
    """
    command = [sys.executable, "-c", _START, str(tree), str(_HERE), device, *jobs]
    environment = {"SKIPKERNELS_CPP": "build", **os.environ}  # kernels of its own sources
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"job"')]
    if not rows:
        raise Refused(f"{tree.name} does not start: {(done.stderr.strip().splitlines() or ['no output'])[-1]}")
    ended = {"error": f"the process ended with exit code {done.returncode}"}
    return dict.fromkeys(jobs, ended) | {row["job"]: row for row in rows}


def git(*arguments: str) -> str:
    """The output of a git command."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"git: {(done.stderr.strip().splitlines() or ['failed'])[-1].removeprefix('fatal: ')}")
    return done.stdout.strip()


@contextlib.contextmanager
def both_trees(base: str, head: str | None) -> Iterator[dict[str, Path]]:
    """The files of each side, in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="skipkernels-compare-") as folder:
        trees = {side: Path(folder, side) for side in (BASE, HEAD)}
        for side, commit in ((BASE, base), (HEAD, head)):
            trees[side].mkdir()
            if commit is None:  # the working tree, with uncommitted changes
                files = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "skipkernels", "csrc")
                for name in filter(None, files.split("\0")):
                    if (ROOT / name).is_file():
                        (trees[side] / name).parent.mkdir(parents=True, exist_ok=True)
                        shutil.copy2(ROOT / name, trees[side] / name)
            else:
                archive = trees[side].with_suffix(".tar")
                git("archive", f"--output={archive}", commit, "skipkernels", "csrc")
                shutil.unpack_archive(archive, trees[side])
        yield trees


# ---- statistics ------------------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    low: float
    high: float


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """Confidence interval of the median: the k-th smallest to the k-th largest value, or None if there are too few.

    The median of the distribution is below the k-th smallest of n values if fewer than k of them fall below it, which
    has the probability P(B < k), B binomial(n, ½); likewise above the k-th largest.

    >>> median_interval([3.0, 1.0, 2.0, 5.0, 4.0]), median_interval([3.0, 1.0, 2.0, 5.0, 4.0, 6.0])
    (None, Interval(low=1.0, high=6.0))
    """
    n, k, fewer = len(values), 0, 1  # fewer / 2ⁿ is P(B < k + 1)
    while k < n and 2 * fewer <= (1 - confidence) * 2**n:
        k += 1
        fewer += math.comb(n, k)
    ordered = sorted(values)
    return Interval(ordered[k - 1], ordered[n - k]) if k else None


def row_of(job: str, rounds: Sequence[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """The columns of a job: median milliseconds of both sides, ratio, interval and verdict."""
    row: dict[str, Any] = {"job": job, "rounds": len(rounds)} | dict.fromkeys(("base_ms", "head_ms", "ratio"), "")
    row |= {"low": "", "high": ""}
    for side in (BASE, HEAD):
        if errors := [each[side]["error"] for each in rounds if "error" in each[side]]:
            return row | {"verdict": f"fails on {side}: {errors[0]}"}
    ratios = [each[HEAD]["seconds"] / each[BASE]["seconds"] for each in rounds]
    row |= {f"{s}_ms": f"{1000 * statistics.median(each[s]['seconds'] for each in rounds):.4g}" for s in (BASE, HEAD)}
    row["ratio"] = f"{statistics.median(ratios):.3f}"
    verdict = "too few rounds"
    if interval := median_interval(ratios):
        row |= {"low": f"{interval.low:.3f}", "high": f"{interval.high:.3f}"}
        verdict = "slower" if interval.low > 1 else "faster" if interval.high < 1 else "no difference shown"
    base, head = (rounds[0][side]["norm"] for side in (BASE, HEAD))
    if not math.isclose(base, head, rel_tol=_SAME):
        verdict += f"; results differ: norm {base:.5g} → {head:.5g}"
    return row | {"verdict": verdict}


def status(rows: Sequence[dict[str, Any]], fail_above: float | None) -> int:
    """1 if a job fails on the head or is slower than allowed; UNDECIDED if the rounds cannot tell."""
    failed = any(row["verdict"].startswith(f"fails on {HEAD}") for row in rows)
    if fail_above is None:
        return int(failed)
    if any(row["low"] and float(row["low"]) > fail_above for row in rows):
        return 1
    timed = [row for row in rows if row["ratio"]]
    return 0 if not failed and timed and all(row["low"] for row in timed) else UNDECIDED


# ---- the command -----------------------------------------------------------------------------------------------------


def compared(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Run the rounds and return a row for each job."""
    if args.rounds < 1:
        raise Refused(f"--rounds must be at least 1; got {args.rounds}")
    jobs, order = chosen(args.jobs), random.Random(0)
    names = {BASE: git("rev-parse", "--verify", "--short", f"{args.base}^{{commit}}")}
    names[HEAD] = git("rev-parse", "--verify", "--short", f"{args.head or 'HEAD'}^{{commit}}")
    rounds: list[dict[str, dict[str, dict[str, Any]]]] = []
    with both_trees(names[BASE], names[HEAD] if args.head else None) as trees, contextlib.suppress(KeyboardInterrupt):
        expected = 0.0
        for number in range(args.rounds):
            if not args.budget.allows(expected):
                break
            print(f"round {number + 1} of {args.rounds}")
            start = time.monotonic()
            found = {side: measured(trees[side], str(args.device), jobs) for side in order.sample((BASE, HEAD), 2)}
            rounds.append({job: {side: found[side][job] for side in found} for job in jobs})
            expected = time.monotonic() - start
    if not rounds:
        raise Refused("stopped before a round was complete")
    names[HEAD] = names[HEAD] if args.head else f"working tree on {names[HEAD]}"
    return [names | row_of(job, [each[job] for each in rounds]) for job in jobs]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = measure.command(__doc__)
    parser.add_argument("base", metavar="BASE", help="the commit to compare with")
    parser.add_argument("--head", metavar="COMMIT", help="another commit; default: the working tree")
    parser.add_argument("--jobs", nargs="+", default=["step", "predict"], help="names, or their beginnings")
    parser.add_argument("--rounds", type=int, default=9, help="at most; an interval needs 6")
    parser.add_argument("--device", type=torch.device, default=measure.default_device())
    parser.add_argument("--fail-above", type=float, metavar="RATIO", help="fail if an interval is above this ratio")
    add_budget(parser)
    args = parser.parse_args(arguments)
    try:
        rows = compared(args)
    except Refused as refusal:
        print(f"bench.compare: {refusal}", file=sys.stderr)
        return 2 if args.fail_above is None else UNDECIDED
    columns = ("job", "base_ms", "head_ms", "ratio", "low", "high", "verdict")
    title = f"{rows[0][HEAD]} against {rows[0][BASE]}; low and high bound a 95 % interval"
    tables.show(columns, [[row[column] for column in columns] for row in rows], title)
    measure.save(args, rows, "compare")
    return status(rows, args.fail_above)


if __name__ == "__main__":
    sys.exit(main())

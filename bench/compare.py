"""Two commits, timed in turn in one session: what has become faster, what slower, and what shows no difference.

    python -m bench.compare HEAD~1                     the working tree as it is, against a commit
    python -m bench.compare HEAD~20 --head main --jobs step/ViT-B-16 operators --budget 9m
    python -m bench.compare main --rounds 30 --fail-above 1.05

Each side has a copy of its files, kernels built from them (in the user's cache, which knows them by what they are built
from), and in each round a new process. The two processes are asked in turn, for every job, in random order of jobs and
sides, so that slow minutes of a machine hit both alike. Jobs are those of this file on both sides, made of what is
public of skipkernels. What one side cannot do is reported and left out.

A process has a speed of its own as long as it lives, by where its code and its data happen to lie: two of one commit
were 3 % apart in `class_scores`, with an interval of ±1 % over twenty turns. So a round gives one ratio, head over
base, the median of its turns, and the interval is that of rounds. Source: T. Kalibera and R. Jones, Rigorous
Benchmarking in Reasonable Time, ISMM 2013.

The interval of the median, at 95 %, goes from the k-th smallest ratio to the k-th largest, with the largest k for which
the median is outside by chance in at most 5 % of all sessions: a binomial chance, whatever the ratios are distributed
like. A bootstrap would only be right for many rounds: resampled, the median of nine ratios is one of a few of them.
Below 6 rounds there is no such interval. Source: W. R. Thompson, Annals of Mathematical Statistics 7(3), 1936; H. A.
David and H. N. Nagaraja, Order Statistics, 2003, section 7.1. "Faster" and "slower" say that 1 is outside: of twenty
jobs with no difference, so is one.

Rows are appended to bench/results/DEVICE/compare.csv. The exit status is 1 if a job failed on the head's side, or if an
interval lies above --fail-above; 2 if nothing could be compared, with the reason. With --fail-above it is 125, which
`git bisect run` skips, where that cannot be told: a job failed, too few rounds, nothing to compare.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import importlib
import json
import logging
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

import skipkernels as sk

from .budget import Budget, add_budget

_HERE = Path(__file__).parents[1]
ROOT = _HERE  # the repository whose commits are compared
BASE, HEAD = "base", "head"
_UNTOLD = 125  # of the exit status: git bisect skips such a commit
_LEAST_SECONDS = 0.05  # a job is repeated until it takes as long, the median counts: another process cuts in for less
_TURNS = 3  # of each side in a round
_SAME = 0.02  # norms of what the two sides give may differ by this: bf16, summed in another order

Job = Callable[[], Any]
"""Gives a tensor or a list of them."""


class Refused(Exception):
    """Why nothing can be compared, in one line."""


class Failed(Exception):
    """Why a side cannot do what it is asked, in one line."""


# ---- what both sides are asked to do ---------------------------------------------------------------------------------


@functools.cache
def _skip_clip(model: str, classes: int, device: torch.device) -> tuple[sk.SkipCLIP, Tensor]:
    """Half of the blocks skipped, and a batch of four at the cut. Weights are random and always the same."""
    import open_clip  # not at the head: it takes seconds, in each process

    logging.disable(logging.WARNING)  # open_clip warns of random weights
    open_clip.add_model_config(_HERE / "skipkernels" / "data" / "glyph-tiny.json")
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
    """Logits as after a step, which has changed the weights: the classes are embedded anew."""
    clip, features = _skip_clip(model, classes, device)
    weights = clip.trainable_parameters()

    def predict() -> Tensor:
        torch.autograd.graph.increment_version(weights)
        return clip.predict(features)

    return predict


def _operator(name: str, dtype: torch.dtype, device: torch.device) -> Job:
    """Its first case in the microbenchmarks."""
    case = next(iter(importlib.import_module(f"bench.operators.{name}").cases(dtype, device)))
    case.prepare()
    return case.runs["skipkernels"]


JOBS: dict[str, Callable[[torch.device], Job]] = {
    "step/ViT-B-16/fp32": functools.partial(_step, "ViT-B-16", 50, "fp32"),
    "step/ViT-B-16/bf16": functools.partial(_step, "ViT-B-16", 50, "bf16"),
    "step/glyph-tiny/fp32": functools.partial(_step, "glyph-tiny", 20, "fp32"),
    "predict/ViT-B-16/fp32": functools.partial(_predict, "ViT-B-16", 50),
} | {
    f"operators/{path.stem}/{precision}": functools.partial(_operator, path.stem, dtype)
    for path in sorted(Path(__file__).with_name("operators").glob("[!_]*.py"))
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
}


def chosen(words: Sequence[str]) -> list[str]:
    """The jobs whose names are the words, or begin with them up to a slash.

    >>> chosen(["predict", "operators/class_scores"])
    ['predict/ViT-B-16/fp32', 'operators/class_scores/fp32', 'operators/class_scores/bf16']
    """
    for word in words:
        if not any(f"{job}/".startswith(f"{word}/") for job in JOBS):
            raise Refused(f"--jobs: there is no job {word!r}; there are {', '.join(JOBS)}")
    return [job for job in JOBS if any(f"{job}/".startswith(f"{word}/") for word in words)]


# ---- a side's process ------------------------------------------------------------------------------------------------

# skipkernels comes from the side's files; all else, the jobs too, from where this file is.
_START = """
import sys
sys.path.insert(0, sys.argv[1])
import skipkernels
sys.path[0] = sys.argv[2]
from bench import compare
compare.serve(sys.argv[3])
"""


def serve(device: str) -> None:
    """Answer what is asked on standard input, line by line; what else is printed goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    worker = Worker(torch.device(device))
    for line in sys.stdin:
        request, *arguments = json.loads(line)
        try:
            answer = {"answer": getattr(worker, request)(*arguments)}
        except Exception as error:  # of any kind: it is reported, and the other jobs go on
            reason = str(error).strip().splitlines() or [""]
            answer = {"error": f"{type(error).__name__}: {reason[0]}"}
        print(json.dumps(answer), file=answers)


class Worker:
    """What a side can be asked."""

    def __init__(self, device: torch.device):
        self.device = device
        self.jobs: dict[str, Job] = {}

    def package(self) -> str:
        """Where skipkernels is."""
        return str(Path(sk.__file__ or "").parent)

    def kernels(self) -> list[str]:
        """The C++ libraries of skipkernels that are loaded."""
        return sorted(str(path) for path in torch.ops.loaded_libraries if "skipkernels" in Path(path).parts)

    def prepare(self, name: str) -> float:
        """Make a job, and do it once: the norm of what it gives."""
        self.jobs[name] = JOBS[name](self.device)
        results = self.jobs[name]()
        tensors = results if isinstance(results, list) else [results]
        return math.hypot(*(tensor.detach().float().norm().item() for tensor in tensors))

    def run(self, name: str, times: int) -> float:
        """Seconds of a job: the median of several in a row."""
        return statistics.median(self._seconds(self.jobs[name]) for _ in range(times))

    def _seconds(self, job: Job) -> float:
        self._wait()
        start = time.perf_counter()
        job()
        self._wait()
        return time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


class Side:
    """The process of a side."""

    def __init__(self, name: str, tree: Path, device: torch.device):
        self.name, self.tree = name, tree
        # Kernels are built from the side's own sources, by one compiler; SKIPKERNELS_CPP=0 still means none.
        environment = {"SKIPKERNELS_CPP": "build", **os.environ}
        command = [sys.executable, "-c", _START, str(tree), str(_HERE), str(device)]
        # In a session of its own: Ctrl-C is for the process that removes the files.
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=tree, env=environment, start_new_session=True, **pipes)

    def tell(self, *request: Any) -> None:
        """Ask for a method of its `Worker`, by name and arguments, and do not wait."""
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has ended, and there will be no answer
            print(json.dumps(request), file=self.process.stdin, flush=True)

    def hear(self) -> Any:
        """The answer.

        Raises:
            Failed: If there is none.
        """
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"its process ended with exit code {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise Failed(answer["error"])
        return answer["answer"]

    def ask(self, *request: Any) -> Any:
        """Both."""
        self.tell(*request)
        return self.hear()

    def check_package(self) -> None:
        """Raises Refused if it does not start, or with files that are not its own."""
        try:
            package = Path(self.ask("package"))
        except Failed as failure:
            raise Refused(f"the {self.name} does not start: {failure}") from None
        if package.resolve() != (self.tree / "skipkernels").resolve():
            raise Refused(f"the {self.name} runs {package}, and not its own files in {self.tree}")

    def kernels(self) -> list[str]:
        """The C++ libraries that it runs; none if its process has ended."""
        with contextlib.suppress(Failed):
            return self.ask("kernels")
        return []

    def stop(self) -> None:
        """End it at once, and a compiler that it runs: it has nothing to keep."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in filter(None, (self.process.stdin, self.process.stdout)):
            with contextlib.suppress(OSError):  # what was asked last is not read
                pipe.close()


# ---- its files -------------------------------------------------------------------------------------------------------


def git(*arguments: str) -> str:
    """What it prints."""
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise Refused(f"git: {reason.removeprefix('fatal: ')}")
    return done.stdout.strip()


def commit_of(name: str) -> str:
    """A branch, a tag or an id as a short id."""
    try:
        return git("rev-parse", "--verify", "--short", "--end-of-options", f"{name}^{{commit}}")
    except Refused as refusal:
        raise Refused(f"{name!r} is no commit in {ROOT} ({refusal})") from None


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """What stops this process, or one that it starts here, waits until the end."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def worktree(commit: str, folder: Path) -> Iterator[None]:
    """The files of a commit in a folder, as a git worktree that is gone afterwards."""
    try:
        with uninterrupted():
            git("-c", "core.hooksPath=/dev/null", "worktree", "add", "--detach", "--quiet", str(folder), commit)
        yield
    finally:
        if folder.exists():
            with uninterrupted():
                git("worktree", "remove", "--force", str(folder))


def copy_working_tree(folder: Path) -> None:
    """The package as it is now, uncommitted changes included: what is edited meanwhile changes nothing."""
    files = git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", "skipkernels", "csrc")
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():  # and not deleted
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


@contextlib.contextmanager
def both_trees(base: str, head: str | None) -> Iterator[dict[str, Path]]:
    """The files of each side in a temporary folder, which is gone afterwards."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="skipkernels-compare-")))
        trees = {side: folder / side for side in (BASE, HEAD)}
        stack.enter_context(worktree(base, trees[BASE]))
        if head is None:
            copy_working_tree(trees[HEAD])
        else:
            stack.enter_context(worktree(head, trees[HEAD]))
        for side, tree in trees.items():
            if not (tree / "skipkernels" / "__init__.py").exists():
                raise Refused(f"the {side} has no package skipkernels")
        yield trees


def cpp_sources(tree: Path) -> str:
    """A digest of them."""
    digest = hashlib.sha256()
    for path in sorted((tree / "csrc").glob("*")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


# ---- statistics ------------------------------------------------------------------------------------------------------


class Interval(NamedTuple):
    low: float
    high: float


def median_interval(values: Sequence[float], confidence: float = 0.95) -> Interval | None:
    """From the k-th smallest value to the k-th largest, with the largest k that holds `confidence`, if there is one.

    The median of what n values are drawn from is below the k-th smallest of them if fewer than k fall below it, which
    has the chance P(B < k) with B from the binomial distribution of n and ½; and as likely above the k-th largest.

    >>> median_interval([3.0, 1.0, 2.0, 5.0, 4.0]), median_interval([3.0, 1.0, 2.0, 5.0, 4.0, 6.0])
    (None, Interval(low=1.0, high=6.0))
    """
    n, k, fewer = len(values), 0, 1  # fewer / 2ⁿ is P(B < k + 1)
    while k < n and 2 * fewer <= (1 - confidence) * 2**n:
        k += 1
        fewer += math.comb(n, k)
    ordered = sorted(values)
    return Interval(ordered[k - 1], ordered[n - k]) if k else None


class Comparison:
    """A job on both sides.

    Attributes:
        failures: By side, why it cannot do it.
        norms: By side, the norm of what it gave first.
        times: How often it is done in a turn.
        turns: By side, the seconds of each turn of this round.
        seconds: By side, the median of the turns of each round.
        ratios: Head over base, of each round.
    """

    def __init__(self, job: str):
        self.job = job
        self.failures: dict[str, str] = {}
        self.norms: dict[str, float] = {}
        self.times = 1
        self.turns: dict[str, list[float]] = {BASE: [], HEAD: []}
        self.seconds: dict[str, list[float]] = {BASE: [], HEAD: []}
        self.ratios: list[float] = []

    def end_round(self) -> None:
        """Make one ratio of its turns."""
        turns, self.turns = self.turns, {BASE: [], HEAD: []}
        if not self.failures:
            self.ratios.append(statistics.median(h / b for b, h in zip(turns[BASE], turns[HEAD], strict=True)))
            for side, seconds in turns.items():
                self.seconds[side].append(statistics.median(seconds))

    @property
    def verdict(self) -> str:
        """In words."""
        if self.failures:
            return "; ".join(f"not on {side}: {reason}" for side, reason in self.failures.items())
        interval = median_interval(self.ratios)
        if interval is None:
            verdict = "too few rounds"
        elif interval.low > 1:
            verdict = "slower"
        else:
            verdict = "faster" if interval.high < 1 else "no difference shown"
        base, head = self.norms[BASE], self.norms[HEAD]
        if not math.isclose(base, head, rel_tol=_SAME):
            verdict += f"; other results: norm {base:.5g} → {head:.5g}"
        return verdict

    def row(self) -> dict[str, Any]:
        """Columns of the table; what is not known is empty."""
        row: dict[str, Any] = dict.fromkeys(("base_ms", "head_ms", "ratio", "low", "high"), "")
        if not self.failures and self.ratios:
            row |= {f"{side}_ms": f"{1000 * statistics.median(self.seconds[side]):.4g}" for side in (BASE, HEAD)}
            row["ratio"] = f"{statistics.median(self.ratios):.3f}"
            if (interval := median_interval(self.ratios)) is not None:
                row |= {"low": f"{interval.low:.3f}", "high": f"{interval.high:.3f}"}
        return {"job": self.job, "rounds": len(self.ratios), **row, "verdict": self.verdict}


# ---- the session -----------------------------------------------------------------------------------------------------


class Session:
    """Both sides, and what they have answered."""

    def __init__(self, trees: dict[str, Path], jobs: Sequence[str], device: torch.device):
        self.trees, self.device = trees, device
        self.comparisons = [Comparison(job) for job in jobs]
        self.kernels: dict[str, list[str]] = {}
        self._random = random.Random(0)

    def rounds(self, most: int, budget: Budget, console: Console) -> bool:
        """Rounds as long as there is time; whether they were not stopped by hand."""
        expected = 0.0
        try:
            for number in range(most):
                if not budget.allows(expected):
                    break
                console.print(f"[dim]round {number + 1} of {most}[/dim]", end="\r" if console.is_terminal else "\n")
                start = time.monotonic()
                self.round()
                expected = time.monotonic() - start
        except KeyboardInterrupt:
            return False
        return True

    def round(self) -> None:
        """Some turns of every job, with new processes."""
        with contextlib.ExitStack() as stack:
            sides: list[Side] = []
            for name, tree in self.trees.items():
                with uninterrupted():
                    sides.append(Side(name, tree, self.device))
                    stack.callback(sides[-1].stop)
            for side in sides:
                side.check_package()
            for comparison in self.comparisons:
                self._prepare(comparison, sides)
            self.check_kernels(sides)
            for _ in range(_TURNS):
                for comparison in self._random.sample(self.comparisons, len(self.comparisons)):
                    for name, seconds in self._run(comparison, self._random.sample(sides, 2)).items():
                        comparison.turns[name].append(seconds)
        for comparison in self.comparisons:
            comparison.end_round()

    def _prepare(self, comparison: Comparison, sides: Sequence[Side]) -> None:
        """Do a job once on both sides at a time; in the first round again, to learn how often to repeat it."""
        if comparison.failures:
            return
        for side in sides:
            side.tell("prepare", comparison.job)
        norms = self._answers(comparison, sides, Side.hear)
        if not comparison.norms and not comparison.failures:
            comparison.norms = norms
            seconds = self._run(comparison, sides)
            comparison.times = math.ceil(_LEAST_SECONDS / max(*seconds.values(), 1e-6))

    def _run(self, comparison: Comparison, sides: Sequence[Side]) -> dict[str, float]:
        """Seconds by side, who are asked in this order; nobody is asked again for what failed."""
        request = "run", comparison.job, comparison.times
        return {} if comparison.failures else self._answers(comparison, sides, lambda side: side.ask(*request))

    def _answers(self, comparison: Comparison, sides: Sequence[Side], answer: Callable[[Side], Any]) -> dict[str, Any]:
        """By side."""
        answers = {}
        for side in sides:
            try:
                answers[side.name] = answer(side)
            except Failed as failure:
                comparison.failures[side.name] = str(failure)
        return answers

    def check_kernels(self, sides: Sequence[Side]) -> None:
        """Raises Refused if sides with other C++ sources run the same kernels."""
        self.kernels = {side.name: side.kernels() for side in sides}
        same = set.intersection(*map(set, self.kernels.values()))
        if same and len({cpp_sources(tree) for tree in self.trees.values()}) > 1:
            raise Refused(f"the two sides have other C++ sources, and both run {', '.join(same)}")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", metavar="BASE", help="a commit: what is compared with")
    parser.add_argument("--head", metavar="COMMIT", help="another commit; by default the working tree as it is")
    parser.add_argument("--jobs", nargs="+", default=["step", "predict", "operators"], help="names, or how names begin")
    parser.add_argument("--rounds", type=int, default=9, help="at most; an interval needs 6")
    parser.add_argument("--device", type=torch.device, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--fail-above", type=float, metavar="RATIO", help="fail if an interval lies above it")
    parser.add_argument("--no-save", action="store_true", help="print only")
    add_budget(parser)
    args = parser.parse_args(arguments)
    try:
        return run(args)
    except Refused as refusal:
        print(f"bench.compare: {refusal}", file=sys.stderr)
        return 2 if args.fail_above is None else _UNTOLD
    except KeyboardInterrupt:
        print("bench.compare: stopped before anything was measured", file=sys.stderr)
        return 130


def run(args: argparse.Namespace) -> int:
    if args.rounds < 1:
        raise Refused(f"--rounds must be at least 1; got {args.rounds}")
    jobs, base, now = chosen(args.jobs), commit_of(args.base), commit_of("HEAD")
    head = commit_of(args.head) if args.head else None
    console = Console()
    console.width = max(console.width, 120)  # a cut figure is none, also in a file
    with both_trees(base, head) as trees:
        session = Session(trees, jobs, args.device)
        finished = session.rounds(args.rounds, args.budget, console)
    if not finished and not any(comparison.ratios for comparison in session.comparisons):
        raise KeyboardInterrupt

    for side, kernels in session.kernels.items():
        console.print(f"{side}: C++ kernels {', '.join(kernels) or 'none'}", highlight=False, soft_wrap=True)
    rows = [comparison.row() for comparison in session.comparisons]
    names = {"base": base, "head": head or f"working tree on {now}"}
    show(rows, f"{names['head']} against {base}", console)
    if not args.no_save:
        # Not above: a side imports this file, and its skipkernels may lack what measuring needs.
        from . import measure

        kept = [measure.machine(args.device) | names | row for row in rows]
        console.print(f"appended to {measure.append_rows(kept, 'compare')}", soft_wrap=True)
    return status(session.comparisons, args.fail_above) if finished else 130


def status(comparisons: Sequence[Comparison], fail_above: float | None) -> int:
    """1 if a job failed on the head's side, or is slower than is wanted; what cannot tell whether it is, _UNTOLD."""
    failed = any(HEAD in comparison.failures for comparison in comparisons)
    if fail_above is None:
        return int(failed)
    intervals = [median_interval(comparison.ratios) for comparison in comparisons if not comparison.failures]
    if any(interval and interval.low > fail_above for interval in intervals):
        return 1
    return _UNTOLD if failed or not intervals or not all(intervals) else 0


def show(rows: Sequence[dict[str, Any]], title: str, console: Console) -> None:
    """A table of what was timed, and a line for each of the others."""
    table = Table("job", "base ms", "head ms", "ratio", "95 % interval", "verdict", title=title)
    for row in rows:
        if row["ratio"]:
            interval = f"{row['low']} – {row['high']}" if row["low"] else ""
            table.add_row(row["job"], row["base_ms"], row["head_ms"], row["ratio"], interval, row["verdict"])
    console.print(table)
    for row in rows:
        if not row["ratio"]:
            console.print(f"{row['job']}: {row['verdict']}", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is temporary is removed
    sys.exit(main())

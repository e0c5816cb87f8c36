"""Comparing two commits: the intervals hold, each side runs what is its own, and nothing is left behind."""

from __future__ import annotations

import contextlib
import csv
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from bench import compare, measure
from bench.budget import Budget

HERE = Path(compare.__file__).parents[1]
CPU = torch.device("cpu")
in_a_repository = pytest.mark.skipif(not (HERE / ".git").exists(), reason="not a git repository")


# ---- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(6, 1), (8, 1), (9, 2), (11, 2), (12, 3), (15, 4), (20, 6), (25, 8)])
def test_ranks_are_those_of_the_tables(n, k):
    values = random.Random(n).sample(range(100), n)
    assert compare.median_interval(values) == (sorted(values)[k - 1], sorted(values)[-k])


def test_too_few_values_have_no_interval():
    assert [compare.median_interval([1.0] * n) is None for n in range(7)] == [True] * 6 + [False]


@pytest.mark.parametrize("n", range(6, 60))
def test_the_interval_holds_and_is_the_shortest_that_does(n):
    low, high = compare.median_interval(range(n))
    k = low + 1
    assert high == n - k

    def outside(k: int) -> float:
        return 2 * sum(math.comb(n, fewer) for fewer in range(k)) / 2**n

    assert outside(k) <= 0.05 < outside(k + 1)


def test_the_median_of_a_skewed_distribution_is_inside_as_often_as_promised():
    draw, sessions, median = random.Random(0), 4000, math.log(2)
    inside = 0
    for _ in range(sessions):
        low, high = compare.median_interval([draw.expovariate(1) for _ in range(9)])
        inside += low <= median <= high
    assert inside / sessions == pytest.approx(0.961, abs=0.01)  # 1 − 20 / 2⁹


def compared(*ratios: float, **norms: float) -> compare.Comparison:
    comparison = compare.Comparison("step/glyph-tiny/fp32")
    comparison.norms = {"base": 1.0, "head": 1.0} | norms
    for ratio in ratios:
        comparison.turns = {"base": [2.0, 1.0, 9.0], "head": [2.0 * ratio, 1.0 * ratio, 9.0 * ratio]}
        comparison.end_round()
    return comparison


@pytest.mark.parametrize(
    ("comparison", "verdict"),
    [
        (compared(*[1.1] * 6), "slower"),
        (compared(*[0.9] * 6), "faster"),
        (compared(*[1.1] * 5, 0.99), "no difference shown"),
        (compared(*[1.1] * 8, 0.99), "slower"),
        (compared(*[1.1] * 5), "too few rounds"),
        (compared(*[1.1] * 6, head=1.03), "slower; other results: norm 1 → 1.03"),
        (compared(*[1.1] * 6, head=math.nan), "slower; other results: norm 1 → nan"),
    ],
)
def test_verdict(comparison, verdict):
    assert comparison.verdict == verdict


def test_a_row_has_medians_of_medians():
    row = compared(1.0, 1.1, 1.2, 1.3, 1.4, 1.5).row()
    assert row | {"verdict": ""} == {
        "job": "step/glyph-tiny/fp32",
        "rounds": 6,
        "base_ms": "2000",
        "head_ms": "2500",
        "ratio": "1.250",
        "low": "1.000",
        "high": "1.500",
        "verdict": "",
    }
    assert compared(1.0).row()["low"] == "" and compared().row()["ratio"] == ""


# ---- the whole -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(monkeypatch, tmp_path) -> Path:
    """Where temporary folders would stay, if they did."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("SKIPKERNELS_CPP", "0")  # nobody waits for a compiler
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path / "temporary"


class Repository:
    """A throwaway one."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir()
        self.git("init", "--quiet")

    def git(self, *arguments: str) -> str:
        implementation = ("-c", "user.name=nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(self.path), *implementation, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def write(self, **files: str) -> None:
        for name, text in files.items():
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            (self.path / name).write_text(text)

    def commit(self) -> str:
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "changed")
        return self.git("rev-parse", "--short", "HEAD").strip()


@pytest.fixture
def repository(monkeypatch, tmp_path) -> Repository:
    """The repository whose commits are compared."""
    repository = Repository(tmp_path / "repository")
    monkeypatch.setattr(compare, "ROOT", repository.path)
    return repository


# A package that is a job and nothing else: its processes start in a second.
PACKAGE = """
import time, torch

def waits():
    time.sleep({seconds})
    return torch.ones(1)
"""
LATER = "\ndef is_new():\n    return torch.ones(1)\n"


@pytest.mark.slow
def test_what_became_slower_is_found_and_what_one_side_cannot_do_is_told(repository, folders, monkeypatch, capfd):
    monkeypatch.setattr(compare, "JOBS", {"waits": None, "is_new": None})
    jobs = "compare.JOBS = {name: lambda _, name=name: getattr(skipkernels, name) for name in ('waits', 'is_new')}\n"
    monkeypatch.setattr(compare, "_START", compare._START.replace("compare.serve", f"{jobs}compare.serve"))
    repository.write(**{"skipkernels/__init__.py": PACKAGE.format(seconds=0.002)})
    base = repository.commit()
    repository.write(**{"skipkernels/__init__.py": PACKAGE.format(seconds=0.004) + LATER})  # and not committed
    before = repository.git("worktree", "list")

    assert compare.main([base, "--jobs", "waits", "is_new", "--rounds", "6", "--fail-above", "1.05"]) == 1

    (table,) = measure.RESULTS.glob("*/compare.csv")
    slower, absent = list(csv.DictReader(table.open()))
    assert (slower["job"], slower["verdict"], slower["rounds"]) == ("waits", "slower", "6")
    assert 1.05 < float(slower["low"]) <= float(slower["ratio"]) <= float(slower["high"])
    assert float(slower["base_ms"]) >= 2 and float(slower["head_ms"]) >= 4
    reason = "AttributeError: module 'skipkernels' has no attribute 'is_new'"
    assert (absent["verdict"], absent["ratio"]) == (f"not on base: {reason}", "")
    assert (slower["base"], slower["head"]) == (base, f"working tree on {base}")
    assert f"is_new: not on base: {reason}\n" in capfd.readouterr().out
    assert repository.git("worktree", "list") == before and not list(folders.iterdir())


def test_status():
    fine, slow, broken, older = compared(*[1.0] * 6), compared(*[1.06] * 6), compared(), compared()
    broken.failures, older.failures = {"head": "no"}, {"base": "no"}
    assert [compare.status(found, 1.05) for found in ([fine, older], [slow], [slow, broken])] == [0, 1, 1]
    assert [compare.status(found, None) for found in ([fine, slow, older], [broken])] == [0, 1]
    for untold in ([broken], [older], [compared(1.2)], [fine, compared(1.2)]):
        assert compare.status(untold, 1.05) == 125, "git bisect skips it"


@in_a_repository
def test_a_commit_against_itself(folders, capfd):
    before = compare.git("worktree", "list")
    command = ["HEAD", "--head", "HEAD", "--jobs", "step/glyph-tiny", "--rounds", "1", "--no-save"]
    assert compare.main(command) == 0
    out = capfd.readouterr().out
    assert "step/glyph-tiny/fp32" in out and "too few rounds" in out and "other results" not in out
    assert compare.git("worktree", "list") == before and not list(folders.iterdir())


@in_a_repository
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_who_is_stopped_leaves_nothing_behind(folders, number):
    before = compare.git("worktree", "list")
    command = [sys.executable, "-m", "bench.compare", "HEAD", "--jobs", "step/glyph-tiny", "--no-save"]
    environment = os.environ | {"TMPDIR": str(folders)}
    heard = lambda: signal.signal(number, signal.SIG_DFL)  # noqa: E731  # SIGINT is not, in what `nohup` or "&" started
    process = subprocess.Popen(command, cwd=HERE, env=environment, stderr=subprocess.PIPE, text=True, preexec_fn=heard)
    wait_for(lambda: list(folders.glob("*/head/skipkernels")))
    process.send_signal(number)
    told = process.communicate(timeout=20)[1]
    assert (process.returncode, told.splitlines()[-1]) == (130, "bench.compare: stopped before anything was measured")
    assert compare.git("worktree", "list") == before and not list(folders.iterdir())


def test_processes_end_with_who_is_stopped(repository, folders, monkeypatch, capfd):
    repository.write(**{"skipkernels/__init__.py": ""})
    base, processes = repository.commit(), []

    def stop(session, comparison, sides):
        processes.extend(side.process for side in sides)
        raise KeyboardInterrupt

    monkeypatch.setattr(compare.Session, "_prepare", stop)
    assert compare.main([base, "--no-save"]) == 130
    assert [process.poll() for process in processes] == [-signal.SIGKILL] * 2
    assert capfd.readouterr().err == "bench.compare: stopped before anything was measured\n"


def test_rounds_that_are_done_are_told_when_it_is_stopped(repository, folders, monkeypatch, capfd):
    repository.write(**{"skipkernels/__init__.py": ""})
    base = repository.commit()

    def one_and_no_more(session):
        (comparison,) = session.comparisons
        if comparison.ratios:
            raise KeyboardInterrupt
        session.comparisons[0] = compared(1.25)

    monkeypatch.setattr(compare.Session, "round", one_and_no_more)
    assert compare.main([base, "--jobs", "step/glyph-tiny"]) == 130
    (table,) = measure.RESULTS.glob("*/compare.csv")
    (row,) = csv.DictReader(table.open())
    assert (row["rounds"], row["ratio"], row["verdict"]) == ("1", "1.250", "too few rounds")


def wait_for(condition: Callable[[], object], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


# ---- kernels ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_kernels(repository, folders, monkeypatch) -> Callable[[str], str]:
    """Commits of a package that has one C++ source, built as that of skipkernels is."""
    monkeypatch.delenv("SKIPKERNELS_CPP")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folders.parent / "cache"))
    extension = (HERE / "skipkernels" / "_extension.py").read_text()
    functional = "from . import _extension\n\ndef class_scores(image, *_):\n    _extension.load()\n    return image\n"

    def commit(source: str) -> str:
        files = {"__init__.py": "", "reference.py": "def class_scores(): ...\n", "functional.py": functional}
        files["_extension.py"] = extension + '\nSOURCES, HEADERS = ("one.cpp",), ()\n'
        repository.write(**{f"skipkernels/{name}": text for name, text in files.items()})
        repository.write(**{"csrc/one.cpp": source})
        return repository.commit()

    return commit


@pytest.mark.skipif(not shutil.which("c++") and not shutil.which("g++"), reason="no C++ compiler")
def test_each_side_runs_its_own_kernels(with_kernels, capfd):
    commits = [with_kernels(f'extern "C" int side() {{ return {side}; }}\n') for side in (1, 2)]
    with compare.both_trees(*commits) as trees:
        session = compare.Session(trees, compare.chosen(["operators/class_scores/fp32"]), CPU)
        session.round()
        assert not session.comparisons[0].failures
        (base,), (head,) = session.kernels.values()
        assert Path(base).parent != Path(head).parent and Path(base).read_bytes() != Path(head).read_bytes()
    assert "building the C++ kernels" in capfd.readouterr().err


@pytest.mark.parametrize(("sources", "refused"), [("12", True), ("11", False)])
def test_kernels_that_are_not_those_of_the_sources_are_refused(tmp_path, sources, refused):
    trees = {"base": tmp_path / "base", "head": tmp_path / "head"}
    for tree, source in zip(trees.values(), sources, strict=True):
        (tree / "csrc").mkdir(parents=True)
        (tree / "csrc" / "one.cpp").write_text(source)
    sides = [SimpleNamespace(name=name, kernels=lambda: ["one.so"]) for name in trees]
    told = pytest.raises(compare.Refused, match="have other C.. sources, and both run one.so")
    with told if refused else contextlib.nullcontext():
        compare.Session(trees, [], CPU).check_kernels(sides)


def test_a_side_that_runs_other_files_is_refused(repository, folders, monkeypatch):
    repository.write(**{"skipkernels/__init__.py": ""})
    base = repository.commit()
    monkeypatch.setattr(compare, "_START", compare._START.replace("sys.argv[1])", "sys.argv[2])"))
    with compare.both_trees(base, None) as trees, pytest.raises(compare.Refused, match="and not its own files in"):
        compare.Session(trees, [], CPU).round()


# ---- what cannot be compared -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "told"),
    [
        (["no-such-commit"], "'no-such-commit' is no commit in "),
        (["--", "--all"], "'--all' is no commit in "),
        (["HEAD", "--head", "no-such-commit"], "'no-such-commit' is no commit in "),
        (["HEAD", "--rounds", "0"], "--rounds must be at least 1; got 0"),
        (["HEAD", "--jobs", "step/ViT-B"], "--jobs: there is no job 'step/ViT-B'; there are step/ViT-B-16/fp32, "),
    ],
    ids=["base", "option", "head", "rounds", "job"],
)
def test_what_cannot_be_compared_is_one_line(repository, capsys, command, told):
    repository.write(**{"skipkernels/__init__.py": ""})
    repository.commit()
    assert compare.main(command) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"bench.compare: {told}")


def test_no_repository_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert compare.main(["HEAD"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "not a git repository" in line


def test_a_commit_without_the_package_is_one_line(repository, folders, capfd):
    repository.write(readme="")
    base = repository.commit()
    assert compare.main([base, "--jobs", "operators/class_scores", "--no-save"]) == 2
    assert capfd.readouterr().err == "bench.compare: the base has no package skipkernels\n"
    assert not list(folders.iterdir())


def test_a_package_that_does_not_start_is_told(repository, folders, capfd):
    repository.write(**{"skipkernels/__init__.py": "raise RuntimeError('broken')"})
    base = repository.commit()
    assert compare.main([base, "--jobs", "operators/class_scores", "--no-save"]) == 2
    assert (
        capfd.readouterr().err.splitlines()[-1]
        == "bench.compare: the base does not start: its process ended with exit code 1"
    )
    assert not list(folders.iterdir())


def test_no_time_is_left(folders):
    session = compare.Session({}, ["step/glyph-tiny/fp32"], CPU)
    session.round = lambda: time.sleep(0.2)
    started = time.monotonic()
    assert session.rounds(1000, Budget(0.5), Console()) and time.monotonic() - started < 2

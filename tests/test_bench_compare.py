"""bench.compare: the intervals are right, each side runs its own files, and no files remain."""

from __future__ import annotations

import csv
import math
import random
import subprocess
import tempfile
from pathlib import Path

import pytest

from bench import compare, measure

# ---- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "k"), [(6, 1), (8, 1), (9, 2), (11, 2), (12, 3), (15, 4), (20, 6), (25, 8)])
def test_median_interval_has_the_published_ranks(n, k):
    values = random.Random(n).sample(range(100), n)
    assert compare.median_interval(values) == (sorted(values)[k - 1], sorted(values)[-k])


def test_median_interval_needs_six_values():
    assert [compare.median_interval([1.0] * n) is None for n in range(7)] == [True] * 6 + [False]


@pytest.mark.parametrize("n", range(6, 60, 9))
def test_median_interval_is_the_shortest_that_holds(n):
    low, high = compare.median_interval(range(n))
    k = low + 1
    assert high == n - k

    def outside(k: int) -> float:
        return 2 * sum(math.comb(n, fewer) for fewer in range(k)) / 2**n

    assert outside(k) <= 0.05 < outside(k + 1)


def test_median_interval_covers_a_skewed_distribution():
    draw, sessions, median = random.Random(0), 4000, math.log(2)
    inside = 0
    for _ in range(sessions):
        low, high = compare.median_interval([draw.expovariate(1) for _ in range(9)])
        inside += low <= median <= high
    assert inside / sessions == pytest.approx(0.961, abs=0.01)  # 1 − 20 / 2⁹


def rounds(*ratios: float, head_norm: float = 1.0) -> list[dict[str, dict[str, float]]]:
    return [
        {"base": {"seconds": 0.002, "norm": 1.0}, "head": {"seconds": 0.002 * ratio, "norm": head_norm}}
        for ratio in ratios
    ]


@pytest.mark.parametrize(
    ("found", "verdict"),
    [
        (rounds(*[1.06] * 6), "slower"),
        (rounds(*[0.9] * 6), "faster"),
        (rounds(*[0.9, 1.1] * 4), "no difference shown"),
        (rounds(1.1), "too few rounds"),
        (rounds(*[1.06] * 6, head_norm=2.0), "slower; results differ: norm 1 → 2"),
        ([{"base": {"error": "no"}, "head": {"seconds": 1.0, "norm": 1.0}}], "fails on base: no"),
    ],
)
def test_row_of_verdict(found, verdict):
    assert compare.row_of("step", found)["verdict"] == verdict


def test_row_of_has_medians():
    row = compare.row_of("step", rounds(1.0, 2.0, 3.0))
    assert (row["base_ms"], row["head_ms"], row["ratio"], row["rounds"]) == ("2", "4", "2.000", 3)


def test_status_of_rows():
    fine, slow = (compare.row_of("a", rounds(*[ratio] * 6)) for ratio in (1.0, 1.06))
    few = compare.row_of("a", rounds(1.2))
    broken, older = (
        compare.row_of("a", [{"base": {"error": "no"}, "head": {"error": "no"}} | fixed])
        for fixed in ({"base": {"seconds": 1.0, "norm": 1.0}}, {"head": {"seconds": 1.0, "norm": 1.0}})
    )
    assert [compare.status(rows, 1.05) for rows in ([fine, older], [slow], [slow, broken])] == [0, 1, 1]
    assert [compare.status(rows, None) for rows in ([fine, slow, older], [broken])] == [0, 1]
    for undecided in ([broken], [older], [few], [fine, few]):
        assert compare.status(undecided, 1.05) == compare.UNDECIDED


@pytest.fixture
def folders(monkeypatch, tmp_path) -> Path:
    """The folder for temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    monkeypatch.setenv("SKIPKERNELS_CPP", "0")  # do not build
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path / "temporary"


class Repository:
    """A temporary repository."""

    def __init__(self, path: Path):
        self.path = path
        path.mkdir()
        self.git("init", "--quiet")

    def git(self, *arguments: str) -> str:
        user = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
        command = ["git", "-C", str(self.path), *user, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def commit(self, package: str) -> str:
        for name, text in (("skipkernels/__init__.py", package), ("csrc/a.cpp", "")):
            (self.path / name).parent.mkdir(exist_ok=True)
            (self.path / name).write_text(text)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--message", "changed")
        return self.git("rev-parse", "--short", "HEAD").strip()


@pytest.fixture
def repository(monkeypatch, tmp_path) -> Repository:
    repository = Repository(tmp_path / "repository")
    monkeypatch.setattr(compare, "ROOT", repository.path)
    return repository


PACKAGE = """
import time, torch

def waits():
    time.sleep({seconds})
    return torch.ones(1)
"""


def test_main_runs_the_files_of_each_side(repository, folders, monkeypatch, capsys):
    monkeypatch.setattr(compare, "JOBS", {"waits": None, "is_new": None})
    jobs = "compare.JOBS = {n: lambda _, n=n: getattr(skipkernels, n) for n in ('waits', 'is_new')}; "
    monkeypatch.setattr(compare, "_START", compare._START.replace("compare.run_jobs", f"{jobs}compare.run_jobs"))
    base = repository.commit(PACKAGE.format(seconds=0.005))
    later = PACKAGE.format(seconds=0.05) + "\ndef is_new():\n    return torch.ones(1)\n"
    (repository.path / "skipkernels/__init__.py").write_text(later)  # not committed
    assert compare.main([base, "--jobs", "waits", "is_new", "--rounds", "1"]) == 0
    (table,) = measure.RESULTS.glob("*/compare.csv")
    slower, absent = list(csv.DictReader(table.open()))
    assert (slower["job"], slower["verdict"], slower["rounds"]) == ("waits", "too few rounds", "1")
    assert float(slower["base_ms"]) >= 5 and float(slower["head_ms"]) >= 50
    reason = "AttributeError: module 'skipkernels' has no attribute 'is_new'"
    assert (absent["verdict"], absent["ratio"]) == (f"fails on base: {reason}", "")
    assert (slower["base"], slower["head"]) == (base, f"working tree on {base}")
    assert not list(folders.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "git: Needed a single revision"),
        (["HEAD", "--jobs", "stp"], "--jobs: no job 'stp'; choose from step/ViT-B-16/fp32"),
        (["HEAD", "--rounds", "0"], "--rounds must be at least 1; got 0"),
        (["HEAD", "--jobs", "step/glyph-tiny"], "does not start: "),
    ],
)
def test_main_refuses_in_one_line(repository, folders, capsys, arguments, message):
    repository.commit("raise ValueError('broken')")
    assert compare.main([*arguments, "--no-save"]) == 2
    assert message in capsys.readouterr().err

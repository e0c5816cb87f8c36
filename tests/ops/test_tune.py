"""bench.tune: candidates, times and tables. The interpreter takes the place of a GPU."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from bench import tune
from bench.machine_code import Compiled
from bench.operators import Case
from bench.operators.gate import Gate
from bench.operators.record import cases_of
from skipkernels.ops import launching
from tests.bench.test_tables import KERNEL
from tests.ops.backends import INTERPRETED, Backend

interpreted = pytest.mark.parametrize("backend", [INTERPRETED], indirect=True)
DEFAULT = {"BLOCK_B": 16, "BLOCK_C": 16, "BLOCK_D": 32, "num_warps": 2, "num_stages": 4}
NAME = "BLOCK_B=16 BLOCK_C=16 BLOCK_D=32 num_warps=2 num_stages=4"


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """One case, of four candidates that compile."""
    case = next(cases_of("class_scores", "fp32", torch.device("cpu")))
    monkeypatch.setattr(tune, "cases", lambda *_: iter([("class_scores", "fp32", case)]))
    monkeypatch.setattr(tune, "sound", lambda op, dtype, target, place, candidates: candidates[:4])
    monkeypatch.setattr(launching, "target", lambda device: launching.Target("cuda", 90, "My GPU"))


def times(monkeypatch: pytest.MonkeyPatch, *seconds: float) -> list[str]:
    """Let the default and each candidate take a time; return the names of those that were timed."""
    timed: list[str] = []

    def time_replays(case: Case, names: list[str], device: torch.device) -> dict[str, Any]:
        timed.extend(names)
        return {
            name: [each] for name, each in zip(names, itertools.chain(seconds, itertools.repeat(1.0)), strict=False)
        }

    monkeypatch.setattr(tune, "time_replays", time_replays)
    return timed


@interpreted
def test_fastest_candidate_is_in_the_table(backend: Backend, small, monkeypatch, tmp_path: Path, capsys):
    timed = times(monkeypatch, 1.0, 1.0, 0.5)
    tune.main(["--op", "class_scores", "--dtype", "fp32", "--device", "cpu", "--out", str(tmp_path)])
    assert timed[0] == NAME and len(set(timed)) == len(timed) == 5
    table, defaults = launching.read_table(tmp_path / "my-gpu.json"), launching.table_of(launching.Target("cuda", 90))
    replaced, *rest = table["class_scores"]
    assert table.keys() == {"class_scores"} and rest == defaults["class_scores"][1:]
    assert replaced == defaults["class_scores"][0]._replace(options=DEFAULT | {"num_warps": 4})
    output = capsys.readouterr().out
    assert "class_scores 4 bytes C ≤ 4095, B4-C100-D512 fp32: 1000.0000 ms, 0.50 of it" in output
    assert f"result: 1 entries timed; the table is {tmp_path / 'my-gpu.json'}" in output.splitlines()


@interpreted
def test_other_entries_of_the_table_stay(backend: Backend, small, monkeypatch, tmp_path: Path):
    """Those of an earlier run; the entry that is timed again may become the default."""
    earlier = tune.table_with(launching.Target("cuda", 90), {("total", None): {"BLOCK": 512, "num_warps": 4}})
    place = "class_scores", 4, ("C", 4095)
    ours = tune.table_with(launching.Target("cuda", 90), {place: DEFAULT | {"num_warps": 4}})
    (tmp_path / "my-gpu.json").write_text(json.dumps(earlier | ours))
    times(monkeypatch, 1.0)
    tune.main(["--device", "cpu", "--out", str(tmp_path)])
    assert json.loads((tmp_path / "my-gpu.json").read_text()) == earlier
    times(monkeypatch, 1.0, 0.5)
    tune.main(["--device", "cpu", "--out", str(tmp_path), "--no-save"])
    assert json.loads((tmp_path / "my-gpu.json").read_text()) == earlier


def table_after(folder: Path, *, seconds: str = "60") -> dict[str, Any]:
    """Tune; return the table, which is empty if all defaults stay."""
    tune.main(["--device", "cpu", "--out", str(folder), "--seconds", seconds])
    path = folder / "my-gpu.json"
    return launching.read_table(path) if path.exists() else {}


@interpreted
def test_default_stays_for_gains_within_the_noise(backend: Backend, small, monkeypatch, tmp_path: Path):
    timed = times(monkeypatch, 1.0, *[0.98] * 4)
    assert table_after(tmp_path) == {} and len(timed) == 5


@interpreted
def test_default_stays_if_others_have_wrong_results(backend: Backend, small, monkeypatch, tmp_path: Path):
    timed = times(monkeypatch, 1.0, *[0.5] * 4)
    monkeypatch.setattr(Gate, "error_of", lambda gate, name: "" if name == NAME else "wrong")
    assert table_after(tmp_path) == {} and timed == [NAME]


@interpreted
def test_default_stays_without_time(backend: Backend, small, monkeypatch, tmp_path: Path):
    timed = times(monkeypatch, 1.0, *[0.5] * 4)
    monkeypatch.setattr(tune, "defaults_but", None)  # no case is run
    assert table_after(tmp_path, seconds="-1") == {} and not timed


def test_sound_candidates_compile_without_spills(monkeypatch):
    """In all calls: the second candidate does not compile in one of two, and the third spills in one."""
    good, spilling = Compiled(KERNEL, []), Compiled(KERNEL, ["spills 4 bytes"])
    missing = Compiled(None, ["does not compile"])
    monkeypatch.setattr(tune, "once", lambda _: ["job", "job"])
    monkeypatch.setattr(tune, "compile_all", lambda _: [good, good, good, missing, spilling, good])
    given = [{"num_warps": warps} for warps in (1, 2, 4)]
    assert tune.sound("class_scores", "bf16", "sm_90", ("class_scores",), given) == given[:1]


@interpreted
def test_candidates_are_what_runs(backend: Backend, monkeypatch):
    """Also in backward, and in no other kernel."""
    case = next(cases_of("class_sampled_ce", "fp32", torch.device("cpu")))
    launched: list[tuple[str, int]] = []
    monkeypatch.setattr(
        launching, "_run", lambda kernel, grid, options, *_: launched.append((kernel.fn.__name__, options["num_warps"]))
    )
    with tune.defaults_but({}) as taken:
        case.runs["skipkernels"]()
    (place,) = [place for place in taken if place[0] == "class_sampled_ce_bwd_logits"]
    before = launched.copy()
    launched.clear()
    with tune.defaults_but({place: {**taken[place], "num_warps": 2}}):
        case.runs["skipkernels"]()
    changed = [(new, old) for new, old in zip(launched, before, strict=True) if new != old]
    assert changed == [(("_class_sampled_ce_bwd_logits_kernel", 2), ("_class_sampled_ce_bwd_logits_kernel", 4))]

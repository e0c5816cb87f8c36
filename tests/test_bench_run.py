"""bench.run: wrong results get no time, missing peers have a reason, and rows are appended at once."""

from __future__ import annotations

import csv
import functools
import importlib
import itertools
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bench import ceilings, measure, peers, run
from bench.operators import COMPILED, Case, Run, class_sampled_ce
from skipkernels import testing
from skipkernels.ops import OPERATORS

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MODULES = [name.rstrip("_") for name in OPERATORS]
CHECKED = {"sgd_momentum": 2}  # by number; the first one otherwise, which has 62 M parameters here


@pytest.fixture(autouse=True)
def results(monkeypatch, tmp_path) -> Path:
    """Folder for rows, and fixed limits of the machine: 2 MB/s and 1 MFLOP/s."""
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(ceilings, "bandwidth", lambda device: 2e6)
    monkeypatch.setattr(ceilings, "matrix_rate", lambda device, dtype: 1e6)
    return tmp_path


def doubling(factor: float = 2.0, flops: int = 0, shape: str = "N1024") -> Case:
    x = torch.linspace(1, 2, 1024, requires_grad=True)
    d_y = torch.ones(1024)

    def run(function: Callable[[torch.Tensor], torch.Tensor]) -> Run:
        return lambda: [y := function(x), *torch.autograd.grad(y, x, d_y)]

    def fails(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel for this\nand more lines")

    return Case(
        shape=shape,
        runs={
            "skipkernels": run(lambda x: x * factor),
            "eager": run(lambda x: x + x),
            "peer": run(lambda x: 2 * x),
            "wrong peer": run(lambda x: x * 2.002),
            "shorter peer": lambda: [x[:-1] + x[:-1], d_y],
            "failing peer": run(fails),
            COMPILED: run(lambda x: x * 2.0),
        },
        truth=lambda: [x.detach().double() * 2, 2 * d_y.double()],
        moved=4096,
        flops=flops,
        absent={"absent peer": "needs a GPU"},
        versions={"peer": "peer 1.2"},
        target="≥ 1",
    )


def rows_of(case: Case) -> dict[str, dict[str, str]]:
    return {row["implementation"]: row for row in run.rows_of(case, torch.float32, CPU, 0.01)}


@functools.cache
def rows_of_all() -> dict[str, dict[str, str]]:
    return rows_of(doubling())


def test_rows_of_a_correct_result():
    rows = rows_of_all()
    ours, eager, peer = rows["skipkernels"], rows["eager"], rows["peer"]
    assert float(ours["p20_ms"]) <= float(ours["p50_ms"]) <= float(ours["p80_ms"])
    assert float(eager["faster"]) > 0 and float(peer["faster"]) > 0 and ours["faster"] == ""
    assert [row["wanted"] for row in rows.values() if row["wanted"]] == [eager["wanted"]] == ["≥ 1"]
    assert [ours["note"], eager["note"], peer["note"]] == ["", "", "peer 1.2"]
    assert float(ours["peak_mib"]) >= 0


def test_rows_of_a_wrong_result():
    rows = rows_of(doubling(2.001))
    assert rows["skipkernels"]["p50_ms"] == "" and "wrong: result 0 is off by 5.0e-04" in rows["skipkernels"]["note"]
    assert float(rows["eager"]["p50_ms"]) > 0 and rows["eager"]["faster"] == ""


@pytest.mark.parametrize(
    "implementation, note",
    [
        ("wrong peer", "wrong: result 0 is off by 1.0e-03, eager by 0.0e+00"),
        ("shorter peer", "wrong: result 0 is off by inf"),
        ("failing peer", "failed: RuntimeError: no kernel for this"),
        ("absent peer", "needs a GPU"),
    ],
)
def test_rows_of_a_peer_without_a_time(implementation, note):
    row = rows_of_all()[implementation]
    assert row["note"].startswith(note) and "\n" not in row["note"]
    assert not any(row[column] for column in run.MEASURED)


def test_rows_without_a_correct_result():
    case = doubling(3.0)
    case = case._replace(runs={name: case.runs["skipkernels"] for name in ("skipkernels", "eager")})
    rows = rows_of(case)
    assert [row["note"][:5] for row in rows.values()] == ["wrong", "wrong", "needs"]


def test_rows_raise_on_a_lost_device():
    def lost() -> list[torch.Tensor]:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    case = doubling()
    with pytest.raises(torch.AcceleratorError):
        rows_of(case._replace(runs=case.runs | {"peer": lost}))


@pytest.mark.parametrize("flops, least", [(0, 4096 / 2e6), (100, 4096 / 2e6), (10000, 10000 / 1e6)])
def test_rows_have_rates_and_the_share_of_the_ceiling(monkeypatch, flops, least):
    monkeypatch.setattr(run, "timed", lambda runs, seconds, device: dict.fromkeys(runs, [0.020, 0.040, 0.100]))
    monkeypatch.setattr(testing, "peak_bytes", lambda function, device: 0)
    row = rows_of(doubling(flops=flops))["skipkernels"]
    assert float(row["of_ceiling"]) == pytest.approx(least / 0.040, abs=1e-4)
    assert float(row["gbytes_s"]) == pytest.approx(4096 / 0.040 / 1e9, abs=1e-3)
    assert row["gflops_s"] == (f"{flops / 0.040 / 1e9:.2f}" if flops else "")


# ---- the command -------------------------------------------------------------------------------------------------

COMMAND = "--op class_scores gather_rows --device cpu --seconds 0.01".split()


def rows_in(results: Path) -> list[dict[str, str]]:
    (table,) = results.glob("*/operators.csv")
    return list(csv.DictReader(table.open()))


@pytest.fixture
def two_cases(monkeypatch) -> None:
    """Two shapes of every operator, without the slow measurement of memory."""
    monkeypatch.setattr(testing, "peak_bytes", lambda function, device: 0)
    both = [("fp32", doubling()), ("fp32", doubling(shape="N1024-again"))]
    monkeypatch.setattr(run, "cases_of", lambda op, dtypes, device: iter(both))


def test_main_writes_all_columns(two_cases, results, capsys):
    run.main(COMMAND)
    rows = rows_in(results)
    assert list(rows[0]) == [*measure.machine(CPU), "op", "shape", "dtype", "implementation", *run.MEASURED, "note"]
    found = {(row["op"], row["shape"], row["implementation"]) for row in rows}
    everyone = {"absent peer", *doubling().runs}
    assert found == {
        (op, n, implementation) for op in COMMAND[1:3] for n in ("N1024", "N1024-again") for implementation in everyone
    }
    told = capsys.readouterr().out
    assert "wrong peer, N1024-again in fp32: wrong: result 0 is off" in told
    assert told.count("absent peer: needs a GPU") == 2  # once for each operator


def test_main_no_save_writes_nothing(two_cases, results):
    run.main([*COMMAND, "--no-save"])
    assert not list(results.iterdir())


def test_main_reports_cases_beyond_the_budget(monkeypatch, two_cases, results, capsys):
    answers = iter([True, False, False])

    class Little:
        def __init__(self, seconds: float):
            assert seconds <= 540

        def allows(self, seconds: float) -> bool:
            return next(answers)

    monkeypatch.setattr(run, "Budget", Little)
    run.main([*COMMAND, "--budget", "9m"])
    assert {(row["op"], row["shape"]) for row in rows_in(results)} == {("class_scores", "N1024")}
    told = capsys.readouterr().out
    assert "no time was left for class_scores, from N1024-again in fp32 on" in told
    assert "no time was left for gather_rows, from N1024 in fp32 on" in told


def test_main_keeps_rows_when_interrupted(monkeypatch, results):
    def stopped(op, dtypes, device):
        yield "fp32", doubling()
        raise KeyboardInterrupt

    monkeypatch.setattr(testing, "peak_bytes", lambda function, device: 0)
    monkeypatch.setattr(run, "cases_of", stopped)
    with pytest.raises(KeyboardInterrupt):
        run.main(COMMAND)
    assert {(row["op"], row["shape"]) for row in rows_in(results)} == {("class_scores", "N1024")}


def test_main_quick_runs_the_first_shape(two_cases, results):
    run.main([*COMMAND, "--quick", "--dtype", "fp32", "--without", "peer"])
    rows = {row["implementation"]: row for row in rows_in(results)}
    assert {row["shape"] for row in rows.values()} == {"N1024"}
    assert rows[COMPILED]["p50_ms"] == "" and rows[COMPILED]["note"].startswith("left out with --quick")
    assert rows["peer"]["p50_ms"] == "" and rows["peer"]["note"] == "left out with --without"


def test_main_exit_status_of_a_wrong_result(monkeypatch, results, capsys):
    monkeypatch.setattr(testing, "peak_bytes", lambda function, device: 0)
    monkeypatch.setattr(run, "cases_of", lambda op, dtypes, device: iter([("fp32", doubling(2.001))]))
    with pytest.raises(SystemExit) as ended:
        run.main(COMMAND)
    assert ended.value.code == 1 and len(rows_in(results)) == 2 * (len(doubling().runs) + 1)
    assert "skipkernels is wrong: class_scores, N1024 in fp32: wrong: result 0" in capsys.readouterr().out


def test_cases_are_ordered_by_shape_then_dtype():
    found = [(dtype, case.shape) for dtype, case in run.cases_of("class_scores", ["fp32", "bf16"], CPU)]
    assert [dtype for dtype, _ in found] == ["fp32", "bf16"] * (len(found) // 2)
    assert all(found[i][1] == found[i + 1][1] for i in range(0, len(found), 2))


# ---- the cases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_cases_of_every_operator_are_correct(name, dtype):
    cases = importlib.import_module(f"bench.operators.{name}").cases(dtype, CPU)
    case = next(itertools.islice(cases, CHECKED.get(name, 0), None))
    assert {"skipkernels", "eager"} <= set(case.runs) and case.moved > 0
    assert COMPILED in {*case.runs, *case.absent}
    assert run.Gate(case, dtype, CPU).error_of("skipkernels") == ""


def test_cases_of_pairs_call_the_operator_twice():
    case = class_sampled_ce.of_pairs(48, 64, torch.float32, CPU)
    gate = run.Gate(case, torch.float32, CPU)
    assert [
        gate.error_of(implementation)
        for implementation in ("skipkernels", "eager", "linear_cross_entropy")
        if implementation in case.runs
    ] == ([""] * (2 + hasattr(torch.nn.functional, "linear_cross_entropy")))
    assert case.absent["memeff"] == "needs a GPU"


# ---- peers -------------------------------------------------------------------------------------------------------


def test_peers_without_a_gpu_have_reasons():
    found = peers.cross_entropies(CPU, torch.bfloat16, 64) | peers.layer_norms(CPU) | peers.attentions(CPU)
    for name in ("cut-cross-entropy", "cut-cross-entropy filtered", "inf-cl", "Liger", "xformers", "add, then Liger"):
        assert found[name] == (None, "needs a GPU")
    assert found["siglip-kernel"].note.startswith("another loss")


def test_peers_with_a_gpu_have_other_reasons(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    found = peers.cross_entropies(CUDA, torch.float32, 4)
    assert found["cut-cross-entropy"].note == "its backward is for bf16 and fp16"
    assert found["inf-cl"].note == "it reads past its buffers unless B is a multiple of 64"
    assert found["Liger"] == (None, "not installed: pip install liger-kernel")
    assert found["memeff"].note.startswith("another loss")
    found = peers.contrastive_losses(CUDA, torch.bfloat16, 64)
    assert found["memeff"] == (None, "not installed: pip install memeff")
    assert found["cut-cross-entropy"] == (None, "not installed: pip install cut-cross-entropy")


def test_peers_share_one_signature(monkeypatch):
    cut = types.SimpleNamespace(
        linear_cross_entropy=lambda image, text, labels, filter_eps="high": (image.shape, filter_eps)
    )
    monkeypatch.setitem(sys.modules, "cut_cross_entropy", cut)
    monkeypatch.setitem(sys.modules, "inf_cl", types.SimpleNamespace())  # of another version
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.1")
    found = peers.cross_entropies(CUDA, torch.bfloat16, 64)
    inputs = torch.ones(64, 3), torch.ones(5, 3), torch.zeros(64, dtype=torch.int64)
    for name, expected in (("cut-cross-entropy", None), ("cut-cross-entropy filtered", "high")):
        assert found[name].note == "cut-cross-entropy 0.1"
        function = found[name].function
        assert function is not None and function(*inputs) == ((64, 3), expected)


def test_peers_import_error_is_a_reason(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setitem(sys.modules, "memeff", None)
    note = peers.contrastive_losses(CUDA, torch.bfloat16, 64)["memeff"].note
    assert note.startswith("cannot be imported: ModuleNotFoundError")


# ---- measuring ---------------------------------------------------------------------------------------------------


def test_peak_bytes_counts_temporary_allocations():
    assert testing.peak_bytes(lambda: torch.zeros(50 << 20, dtype=torch.uint8).sum()) >= 45 << 20
    assert testing.peak_bytes(lambda: None) < 5 << 20

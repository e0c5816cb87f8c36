"""bench/operators: wrong results get no time, missing peers have a reason, and times become rows."""

from __future__ import annotations

import importlib
import itertools
import math
import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

from bench import measure, peers
from bench.operators import COMPILED, Case, Run, Work, test_operators
from bench.operators.gate import Gate
from bench.rows import KINDS, MACHINE, latest_rows
from skipkernels.ops import OPERATORS
from tests.ops.harness import Calls

ROOT = Path(measure.__file__).parents[1]
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
MODULES = [name.rstrip("_") for name in OPERATORS]
CHECKED = {"sgd_momentum": 2}  # by number; the first one otherwise, which has 62 M parameters here


def doubling(factor: float = 2.0, flops: int = 0) -> Case:
    x = torch.linspace(1, 2, 1024, requires_grad=True)
    d_y = torch.ones(1024)

    def run(function: Callable[[torch.Tensor], torch.Tensor]) -> Run:
        return lambda: [y := function(x), *torch.autograd.grad(y, x, d_y)]

    def fails(x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no kernel for this\nand more lines")

    return Case(
        shape="N1024",
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
        work=Work(64 << 20, flops, "≥ 1"),
        absent={"absent peer": "needs a GPU"},
        versions={"peer": "peer 1.2"},
    )


# ---- one benchmark ---------------------------------------------------------------------------------------------------


def timed(monkeypatch, case: Case, implementation: str, deadline: float = math.inf) -> None:
    """Run a benchmark without a fixture to time it: what is timed fails with a TypeError."""
    monkeypatch.setattr(test_operators, "prepared", lambda *_: (case, Gate(case, torch.float32, CPU)))
    config = types.SimpleNamespace(option=types.SimpleNamespace(device=CPU, deadline=deadline))
    test_operators.test_operator(None, config, "class_scores", "fp32", case.shape, implementation)


@pytest.mark.parametrize(
    "implementation, outcome, reason",
    [
        ("wrong peer", pytest.xfail, "wrong: result 0 is off by 1.0e-03, eager by 0.0e+00"),
        ("shorter peer", pytest.xfail, "wrong: result 0 is off by inf"),
        ("failing peer", pytest.xfail, "failed: RuntimeError: no kernel for this"),
        ("absent peer", pytest.skip, "needs a GPU"),
    ],
)
def test_operator_of_a_peer_without_a_time(monkeypatch, implementation, outcome, reason):
    with pytest.raises(outcome.Exception, match=re.escape(reason)) as found:
        timed(monkeypatch, doubling(), implementation)
    assert "\n" not in str(found.value)


def test_operator_of_a_wrong_result_fails(monkeypatch):
    with pytest.raises(pytest.fail.Exception, match="wrong: result 0 is off by 5.0e-04"):
        timed(monkeypatch, doubling(2.001), "skipkernels")
    with pytest.raises(TypeError):
        timed(monkeypatch, doubling(2.001), "eager")


def case_of(name: str, dtype: torch.dtype) -> Case:
    cases = importlib.import_module(f"bench.operators.{name}").cases(dtype, CPU)
    return next(itertools.islice(cases, CHECKED.get(name, 0), None))


# ---- the command -----------------------------------------------------------------------------------------------------

# pytest with the case above in place of the operators', and with limits of the machine that are not measured.
COMMAND = """
import sys, pytest
from bench import measure
from bench.operators import test_operators
from skipkernels import testing
from tests.test_bench_operators import doubling
cases = {("class_scores", "fp32"): doubling()}
test_operators.cases_of = lambda op, dtype, device: iter([cases[op, dtype]] if (op, dtype) in cases else [])
measure.bandwidth = lambda device: 1e9
testing.peak_bytes = lambda run, device: 0
options = ["--device=cpu", "-p", "no:cacheprovider", "-rxs", "--benchmark-max-time=0", *sys.argv[1:]]
sys.exit(pytest.main(["bench/operators", *options]))
"""


def command(*options: str) -> str:
    # In a process of xdist pytest-benchmark times nothing.
    env = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run([sys.executable, "-c", COMMAND, *options], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_command_saves_rows(tmp_path, monkeypatch):
    output = command("--save", str(tmp_path))
    assert "4 passed, 1 skipped, 3 xfailed" in output
    assert "needs a GPU" in output and "wrong: result 0 is off by 1.0e-03" in output
    monkeypatch.setattr("bench.rows.RESULTS", tmp_path)
    rows = {row["implementation"]: row for row in latest_rows("operators")}
    assert rows.keys() == {"skipkernels", "eager", "peer", COMPILED}
    ours, eager, peer = rows["skipkernels"], rows["eager"], rows["peer"]
    kind = KINDS["operators"]
    assert {*MACHINE, *kind.case.split(), kind.measured} <= ours.keys() == eager.keys()
    assert float(ours["p20_ms"]) <= float(ours["p50_ms"]) <= float(ours["p80_ms"])
    assert float(peer["faster"]) == pytest.approx(float(peer["p50_ms"]) / float(ours["p50_ms"]), abs=1e-3)
    assert (ours["faster"], ours["wanted"], eager["wanted"], peer["note"]) == ("", "", "≥ 1", "peer 1.2")
    slower = [f"class_scores N1024 fp32 {name}" for name, row in rows.items() if float(row["faster"] or 1) < 1]
    text = f"another implementation is faster in {len(slower)} of 3 comparisons"
    assert f"result: {'; '.join([text, *slower])}" in output.splitlines()


# ---- the cases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODULES)
def test_cases_of_every_operator_are_correct(name):
    """In bf16; in fp32 their copies: with large inputs in other memory."""
    case, copied = (case_of(name, dtype) for dtype in (torch.bfloat16, torch.float32))
    assert {"skipkernels", "eager"} <= set(case.runs) and case.work.moved > 0
    assert COMPILED in {*case.runs, *case.absent}
    assert Gate(case, torch.bfloat16, CPU).error_of("skipkernels") == ""
    copy = copied.copy()
    assert copy.keys() == copied.runs.keys()
    assert Gate(copied._replace(runs=copy), torch.float32, CPU).error_of("skipkernels") == ""
    copied.prepare()
    found = [inputs_of(runs["skipkernels"]) for runs in (copied.runs, copy)]
    assert not found[0] & found[1]


def inputs_of(run: Run) -> set[int]:
    """Addresses of the large tensors among the arguments of the first operator: not of labels and offsets."""
    with Calls() as calls:
        run()
    return {x.data_ptr() for x in tree_leaves(calls.found[0][1]) if isinstance(x, torch.Tensor) and x.numel() > 100}


# ---- peers -------------------------------------------------------------------------------------------------------


def test_peers_have_reasons_why_they_cannot_run(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    on_cpu = peers.cross_entropies(CPU, torch.bfloat16, 64) | peers.layer_norms(CPU) | peers.attentions(CPU)
    assert on_cpu["inf-cl"] == on_cpu["Liger"] == on_cpu["xformers"] == (None, "needs a GPU")
    found = peers.cross_entropies(CUDA, torch.float32, 4)
    assert found["cut-cross-entropy"].note == "its backward is for bf16 and fp16"
    assert found["inf-cl"].note == "it reads past its buffers unless B is a multiple of 64"
    assert found["Liger"] == (None, "not installed: pip install liger-kernel")
    assert peers.contrastive_losses(CUDA, torch.bfloat16, 64)["memeff"].note == "not installed: pip install memeff"

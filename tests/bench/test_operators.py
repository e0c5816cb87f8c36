"""bench/operators, in docs/operators.md: wrong results get no time, missing peers have a reason, times become rows."""

from __future__ import annotations

import importlib
import itertools
import math
import re
import types
from collections.abc import Callable
from unittest.mock import Mock

import pytest
import torch
from torch.utils._pytree import tree_leaves

from bench import peers
from bench.measure import CPU
from bench.operators import COMPILED, Case, Run, Work, conftest, test_operators
from bench.operators.gate import Gate
from bench.operators.record import cases_of
from bench.rows import KINDS, MACHINE, latest_rows
from skipkernels.ops import OPERATORS
from tests.ops.harness import Calls

CUDA = torch.device("cuda")
CHECKED = {"sgd_momentum_": 2}  # by number; the first one otherwise, which has 62 M parameters here


def doubling(factor: float = 2.0) -> Case:
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
        work=Work(64 << 20),
        absent={"absent peer": "needs a GPU"},
        versions={"peer": "peer 1.2"},
    )


@pytest.fixture
def measured(machine, monkeypatch) -> Callable[..., types.SimpleNamespace]:
    """Run a benchmark of a case that takes `seconds`, without them with pytest-benchmark disabled; returns options."""
    option = types.SimpleNamespace(device=CPU, deadline=math.inf, measured=[], save=None)

    def run(case: Case, implementation: str, seconds: float | None = None) -> types.SimpleNamespace:
        monkeypatch.setattr(test_operators, "prepared", lambda *_: (case, Gate(case, torch.float32, CPU)))
        benchmark = Mock(stats=seconds and Mock(stats=Mock(data=[seconds] * 3)))
        request = Mock(config=Mock(option=option), getfixturevalue=lambda name: benchmark)
        test_operators.test_operator(request, "class_scores", "fp32", case.shape, implementation)
        benchmark.assert_called_once_with(case.runs[implementation])
        return option

    return run


@pytest.mark.parametrize(
    "implementation, factor, outcome, reason",
    [
        ("skipkernels", 2.001, pytest.fail, "wrong: result 0 is off by 5.0e-04"),
        ("wrong peer", 2.0, pytest.xfail, "wrong: result 0 is off by 1.0e-03, eager by 0.0e+00"),
        ("shorter peer", 2.0, pytest.xfail, "wrong: result 0 is off by inf"),
        ("failing peer", 2.0, pytest.xfail, "failed: RuntimeError: no kernel for this"),
        ("absent peer", 2.0, pytest.skip, "needs a GPU"),
    ],
)
def test_operator_without_a_time(measured, implementation, factor, outcome, reason):
    with pytest.raises(outcome.Exception, match=re.escape(reason)) as found:
        measured(doubling(factor), implementation)
    assert "\n" not in str(found.value)


def test_operator_saves_rows(measured, results, capsys):
    measured(doubling(), "eager").save = results
    for implementation, seconds in {"skipkernels": 0.002, "eager": 0.004, "peer": 0.001}.items():
        option = measured(doubling(), implementation, seconds)
    rows = latest_rows("operators")
    assert [(row["implementation"], row["p50_ms"], row["faster"], row["note"]) for row in rows] == [
        ("skipkernels", "2.0", "", ""), ("eager", "4.0", "2.0", ""), ("peer", "1.0", "0.5", "peer 1.2"),
    ]  # fmt: skip
    kind = KINDS["operators"]
    assert all({*MACHINE, *kind.case.split(), kind.measured} <= row.keys() for row in rows)
    conftest.pytest_terminal_summary(Mock(config=Mock(option=option), write_line=print))
    text = "another implementation is faster in 1 of 2 comparisons; class_scores N1024 fp32 peer"
    assert capsys.readouterr().out == f"result: {text}\n"


def case_of(name: str, dtype: str) -> Case:
    return next(itertools.islice(cases_of(name, dtype, CPU), CHECKED.get(name, 0), None))


# ---- the cases ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPERATORS)
def test_cases_of_every_operator_are_correct(name):
    """In bf16; in fp32 their copies: with large inputs in other memory."""
    case, copied = (case_of(name, dtype) for dtype in ("bf16", "fp32"))
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
    on_cpu = peers.cross_entropies(CPU, torch.bfloat16) | peers.layer_norms(CPU) | peers.attentions(CPU)
    assert on_cpu["Liger"] == on_cpu["xformers"] == (None, "needs a GPU")
    found = peers.cross_entropies(CUDA, torch.float32)
    assert found["cut-cross-entropy"].note == "its backward is for bf16 and fp16"
    assert found["Liger"] == (None, "not installed: pip install liger-kernel")

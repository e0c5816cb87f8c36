"""The benchmarks: nothing wrong gets a time, and every case is one that the operators agree on."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import skipkernels as sk
from bench import inference, inputs, measure, profile, run, step, training
from bench.operators import Case, with_gradients
from bench.published import PublishedStep
from skipkernels.ops import OPERATORS

MODULES = [name.rstrip("_") for name in OPERATORS]


def doubling(factor: float, moved: int = 4096) -> Case:
    x = torch.linspace(1, 2, 1024, requires_grad=True)
    d_y = torch.ones(1024)
    return Case(
        shape="N1024",
        runs={
            "skipkernels": with_gradients(lambda: [x * factor], [x], [d_y]),
            "eager": with_gradients(lambda: [x + x], [x], [d_y]),
        },
        truth=with_gradients(lambda: [x.double() * 2], [x], [d_y.double()]),
        moved=moved,
        absent={"peer": "needs a GPU"},
        target="≥ 1",
    )


def test_a_wrong_result_gets_no_time():
    rows = {row["who"]: row for row in run.rows_of(doubling(2.001), 0.01)}
    assert rows["skipkernels"]["p50_ms"] == "" and "wrong: result 0 is off by 5.0e-04" in rows["skipkernels"]["wanted"]
    assert float(rows["eager"]["p50_ms"]) > 0 and rows["eager"]["faster"] == ""


def test_a_right_result_gets_times_a_ratio_and_memory():
    rows = {row["who"]: row for row in run.rows_of(doubling(2.0), 0.01)}
    ours, eager, peer = rows["skipkernels"], rows["eager"], rows["peer"]
    assert float(ours["p20_ms"]) <= float(ours["p50_ms"]) <= float(ours["p80_ms"])
    assert float(eager["faster"]) > 0 and eager["wanted"] == "≥ 1" and ours["faster"] == ""
    assert 0 < float(ours["of_copy"]) and float(ours["peak_mib"]) >= 0
    assert peer["wanted"] == "needs a GPU" and peer["p50_ms"] == ""


def test_peak_bytes_counts_what_is_allocated_in_between():
    assert measure.peak_bytes(lambda: torch.zeros(50 << 20, dtype=torch.uint8).sum()) >= 45 << 20
    assert measure.peak_bytes(lambda: None) < 5 << 20


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_operator_has_a_case_with_a_right_result(name, dtype):
    case = next(iter(importlib.import_module(f"bench.operators.{name}").cases(dtype)))
    assert {"skipkernels", "eager"} <= set(case.runs) and case.moved > 0
    assert run.error_of(case, "skipkernels") == ""


# ---- a whole model -----------------------------------------------------------------------------------------------

STEP = "--model glyph-tiny --skip-layers 3 --classes 20 --device cpu --rounds 1 --no-save".split()
INFERENCE = [*STEP, "--images", "4", "--batch", "2"]


@pytest.fixture(autouse=True)
def results(monkeypatch, tmp_path) -> Path:
    """Where rows would go."""
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "main, options, told",
    [
        (step.main, STEP, "times faster"),
        (step.main, [*STEP, "--against", "full", "--memory", "min"], "times faster"),
        (inference.main, INFERENCE, "less time than published"),
        (profile.main, STEP, "GFLOP/s"),
    ],
    ids=["step", "full", "inference", "profile"],
)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_command_reports_what_agrees(capsys, results, main, options, told, precision):
    main([*options, "--precision", precision])
    assert told in capsys.readouterr().out
    assert not list(results.iterdir())


def test_each_step_has_a_row_that_fits_the_table(results):
    bf16_against_fp32 = ["--precision", "bf16", "--published-precision", "fp32"]
    for against in ("published", "full"):
        step.main([option for option in STEP if option != "--no-save"] + ["--against", against, *bf16_against_fp32])
    (table,) = results.glob("*/step.csv")
    rows = list(csv.DictReader(table.open()))
    assert [(row["step"], row["precision"], row["K"], row["skip_layers"]) for row in rows] == [
        ("published", "fp32", "11", "3"),
        ("skipkernels", "bf16", "11", "3"),
        ("full", "fp32", "20", "0"),
        ("skipkernels", "bf16", "11", "3"),
    ]
    assert all(float(row["p50_ms"]) > 0 and float(row["saved_mib"]) > 0 for row in rows)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_step_that_does_not_agree_gets_no_time(monkeypatch, capsys, precision):
    right = PublishedStep.__call__

    def wrong(self, features, labels, class_ids=None):
        loss, class_ids = right(self, features, labels, class_ids)
        return 1.1 * loss, class_ids

    monkeypatch.setattr(PublishedStep, "__call__", wrong)
    for main in (step.main, profile.main):
        with pytest.raises(SystemExit, match="do not agree: no timing"):
            main([*STEP, "--precision", precision])
    assert " ms " not in capsys.readouterr().out


def test_a_step_on_other_classes_gets_no_time(monkeypatch, capsys):
    monkeypatch.setattr(PublishedStep, "choose", lambda self, image, labels: torch.arange(12))
    with pytest.raises(SystemExit, match="choose other classes: no timing"):
        step.main(STEP)
    assert " ms " not in capsys.readouterr().out


@pytest.mark.parametrize("factor", [0.999, float("nan")])
def test_full_fine_tuning_with_another_loss_gets_no_time(monkeypatch, capsys, factor):
    right = training.full_step
    monkeypatch.setattr(training, "full_step", lambda *of: lambda *batch: (factor * right(*of)(*batch)[0], 20))
    with pytest.raises(SystemExit, match="another loss: no timing"):
        step.main([*STEP, "--against", "full"])
    assert " ms " not in capsys.readouterr().out


def test_full_fine_tuning_trains_every_layer():
    full = training.full_fine_tuning(inputs.random_inputs("glyph-tiny", 2, 5, measure.CPU), "fp32")
    full()
    without = [name for name, parameter in full.model.named_parameters() if parameter.grad is None]
    assert without == ["logit_scale"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_wrong_logits_get_no_time(monkeypatch, capsys, precision):
    right = sk.SkipCLIP.predict
    monkeypatch.setattr(sk.SkipCLIP, "predict", lambda self, x: right(self, x).roll(1, dims=1))
    with pytest.raises(SystemExit, match="the logits of skipkernels are not the published ones: no timing"):
        inference.main([*INFERENCE, "--precision", precision])
    assert " ms " not in capsys.readouterr().out


def test_inference_computes_again_what_it_says():
    def work(classes: int) -> dict[str, int]:
        """Operations of the second call."""
        random = inputs.random_inputs("glyph-tiny", 4, classes, measure.CPU)
        found = {}
        for name, evaluate in inference.evaluations_of(random, 2, 3, "fp32").items():
            for _ in range(2):
                with torch.no_grad(), FlopCounterMode(display=False) as counter:
                    evaluate()
            found[name] = counter.get_total_flops()
        return found

    few, many = work(10), work(30)
    of_classes = {name: many[name] - few[name] for name in few}
    comparing = 2 * 4 * 20 * 128  # images with classes
    assert of_classes["published"] == pytest.approx(2 * of_classes["eager, texts once"], rel=0.01)  # two batches
    assert 10 * comparing < of_classes["skipkernels, cached"] < of_classes["skipkernels"] / 2


def test_a_profile_adds_up():
    left, right = torch.randn(300, 200), torch.randn(200, 100)
    hidden = torch.randn(1, 2, 50, 8)

    def function() -> None:
        left @ right
        torch.nn.functional.scaled_dot_product_attention(hidden, hidden, hidden)
        sk.functional.class_scores(left, right.T, torch.tensor([0]).expand(300))

    found = profile.profile_of(function, measure.CPU)
    assert found.flops == 2 * 300 * 200 * 100
    groups = (profile.MATRIX, profile.ATTENTION, profile.OURS, profile.REST)
    assert all(found.group(name) > 0 for name in groups)
    assert sum(map(found.share, groups)) == pytest.approx(1)


def test_class_names_are_different_and_the_first_ones_stay_the_same():
    names = inputs.class_names(22000)
    assert len(set(names)) == 22000
    assert names[:1570] == inputs.class_names(1570)
    assert names[0] == "dog"

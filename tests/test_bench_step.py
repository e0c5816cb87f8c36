"""bench.step: wrong steps get no time, steps that cannot run are skipped, and rows fit the table."""

from __future__ import annotations

import argparse
import csv
import math
import weakref
from pathlib import Path

import open_clip
import pytest
import torch

from bench import budget, ceilings, inputs, measure, profile, published, step, training
from bench.budget import CostModel, Probe
from bench.published import PublishedStep
from skipkernels import testing

SMALL = "--model glyph-tiny --classes 20 --device cpu --rounds 1".split()
LIBRARIES = 32 << 20  # bytes of code and tables that a process reads for the first time


@pytest.fixture(autouse=True)
def results(monkeypatch, tmp_path) -> Path:
    """Folder for rows; fixed limits of the machine, and no slow measurement of memory."""
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(testing, "peak_bytes", lambda function, device, **_: 0)
    monkeypatch.setattr(ceilings, "matrix_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(ceilings, "bandwidth", lambda device: 1e10)
    return tmp_path


@pytest.fixture
def table(results):
    """Run the command and return its rows."""

    def run(*options: str) -> dict[tuple[str, str, int], dict[str, str]]:
        step.main([*SMALL, *options])
        (file,) = results.glob("*/step.csv")
        return {(row["implementation"], row["precision"], int(row["C"])): row for row in csv.DictReader(file.open())}

    return run


def test_main_writes_a_row_per_implementation(table):
    rows = table("--implementation", "skipkernels", "min", "published", "full", "prompts")
    assert len(rows) == 5 * 2
    for (implementation, *_), row in rows.items():
        own = "" if implementation == "skipkernels" else float(row["faster"])
        assert own == "" or own > 0
        assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"]) and row["note"] == ""
        assert row["skip_layers"] == ("0" if implementation in ("full fine-tuning", "prompt tuning") else "3+2")
        assert row["K"] == ("20" if implementation in ("full fine-tuning", "prompt tuning") else "11")
        assert float(row["above_floor"]) == pytest.approx(float(row["p50_ms"]) / float(row["floor_ms"]), rel=0.1)
    for precision in ("fp32", "bf16"):
        saved = {implementation: float(rows[implementation, precision, 20]["saved_mib"]) for implementation, *_ in rows}
        assert saved["skipkernels, memory=min"] < saved["skipkernels"] < saved["published"] < saved["full fine-tuning"]
        floor = {implementation: float(rows[implementation, precision, 20]["floor_ms"]) for implementation, *_ in rows}
        flop = {implementation: float(rows[implementation, precision, 20]["gflop"]) for implementation, *_ in rows}
        assert floor["skipkernels, memory=min"] == floor["skipkernels"], "the floor excludes recomputed blocks"
        assert flop["skipkernels"] < flop["skipkernels, memory=min"] and flop["skipkernels"] < flop["published"]


def test_compiled_step_equals_the_published_step(monkeypatch, table):
    """Compiled by the eager backend: speed is not tested here."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: compiler(function, backend="eager"))
    rows = table("--implementation", "compiled", "published", "skipkernels", "--precision", "fp32")
    compiled, published = rows["published, compiled", "fp32", 20], rows["published", "fp32", 20]
    assert compiled["gflop"] == published["gflop"] and compiled["saved_mib"] == published["saved_mib"]
    assert float(compiled["p50_ms"]) > 0


def test_main_skips_a_step_that_does_not_fit(monkeypatch, table):
    monkeypatch.setattr(step, "free_bytes", lambda device: 400 * 2**20)
    rows = table("--implementation", "skipkernels", "full", "--precision", "fp32", "--classes", "20", "1000")
    assert rows["full fine-tuning", "fp32", 20]["note"] == ""
    left = rows["full fine-tuning", "fp32", 1000]
    assert left["p50_ms"] == "" and left["note"].startswith("does not fit: 1000 classes keep about ")
    most = int(left["note"].split("up to ")[1].split()[0])
    assert 12 <= most < 1000
    assert float(rows["skipkernels", "fp32", 1000]["p50_ms"]) > 0
    assert "compared at 12 classes" in rows["skipkernels", "fp32", 1000]["note"]


def test_peak_memory_excludes_earlier_gradients(monkeypatch, table):
    held = []

    def peak_bytes(step, device, **_):
        held.append(any(weight.grad is not None for weight in step.model.parameters()))
        return 0

    monkeypatch.setattr(testing, "peak_bytes", peak_bytes)
    table("--implementation", "skipkernels", "published", "full", "--precision", "fp32")
    assert held == [False] * 3


def test_training_is_measured_in_a_process_of_its_own(monkeypatch, table):
    asked = []

    def in_new_process(function, args, *case):
        asked.append((function, *case))
        return 300 * 2**20

    monkeypatch.setattr(measure, "in_new_process", in_new_process)
    rows = table("--implementation", "skipkernels", "full", "--precision", "fp32", "--training")
    assert [row["training_mib"] for row in rows.values()] == ["300.0", "300.0"]
    cases = [("glyph-tiny", 4, 20, (name, "fp32")) for name in ("skipkernels", "full fine-tuning")]
    assert asked == [(step.training_bytes, *case) for case in cases]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_training_bytes_include_weights_gradients_and_momentum():
    args = argparse.Namespace(device=measure.CPU, skip_layers=None, precision=["fp32"], implementation=[step.FULL])
    full = training.full_fine_tuning(inputs.random_inputs("glyph-tiny", 4, 20, measure.CPU), "fp32")
    weights, saved = sum(weight.nbytes for weight in full.model.parameters()), testing.saved_bytes(full.loss)
    found = measure.in_new_process(step.training_bytes, args, "glyph-tiny", 4, 20, (step.FULL, "fp32"))
    assert 3 * weights < found < 3 * weights + saved + LIBRARIES


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--classes", "0"], "--classes: expected a whole number above 0; got '0'"),
        (["--batch", "-4"], "--batch: expected a whole number above 0; got '-4'"),
        (["--skip-layers", "0"], "--skip-layers: expected a whole number above 0; got '0'"),
        (["--rounds", "x"], "--rounds: expected a whole number above 0; got 'x'"),
        (["--model", "ViT-B-61"], "open_clip has no model 'ViT-B-61'"),
    ],
    ids=lambda value: value[0][2:] if isinstance(value, list) else "",
)
def test_main_refuses_bad_options(options, message, capsys):
    with pytest.raises(SystemExit) as ended:
        step.main([*SMALL, "--no-save", *options])
    assert message in capsys.readouterr().err + str(ended.value)


def test_append_rows_keeps_a_file_with_other_columns(results):
    def read(path):
        return [row["implementation"] for row in csv.DictReader(path.open(encoding="utf-8"))]

    row = {"device": "A CPU", "implementation": "first", "p50_ms": 1.0}
    path = measure.append_rows([row], "step")
    measure.append_rows([{"device": "A CPU", "implementation": "≥ second"}], "step")
    assert read(path) == ["first", "≥ second"], "a row with fewer columns fits"
    assert measure.append_rows([row | {"implementation": "third", "note": ""}], "step") == path
    (before,) = path.parent.glob("step-until-*.csv")
    assert (read(before), read(path)) == (["first", "≥ second"], ["third"])


def test_cost_model_is_linear():
    line = CostModel.of(Probe(10, 2.0, 100), Probe(30, 4.0, 500))
    assert (line.seconds(50), line.saved(50)) == (6.0, 900.0)
    free = budget._MARGIN / budget._MOST * 900
    assert line.fits(50, free + 1e-6) and not line.fits(51, free) and line.most_classes(free + 1e-6) == 50
    noisy = CostModel.of(Probe(10, 2.0, 100), Probe(30, 1.0, 100))
    assert noisy.seconds(1000) == 2.0, "more classes never take less"


# ---- wrong results get no time -------------------------------------------------------------------------------------


@pytest.fixture
def random() -> inputs.Inputs:
    return inputs.random_inputs("glyph-tiny", 4, 20, measure.CPU)


def checked_step(random: inputs.Inputs, precision: str = "fp32") -> training.Step:
    return training.skip_step(random, 3, "fast", precision, training.Published(random, 3))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_skip_step_refuses_different_gradients(monkeypatch, random, precision):
    right = PublishedStep.__call__

    def wrong(self, features, labels, class_ids=None):
        loss, class_ids = right(self, features, labels, class_ids)
        return 1.1 * loss, class_ids

    monkeypatch.setattr(PublishedStep, "__call__", wrong)
    with pytest.raises(SystemExit, match="do not agree: no timing"):
        checked_step(random, precision)


@pytest.mark.parametrize("main", [step.main, profile.main])
def test_main_does_not_time_a_wrong_step(monkeypatch, capsys, main):
    right = published.choose_classes
    monkeypatch.setattr(published, "choose_classes", lambda *arguments: torch.arange(len(right(*arguments))))
    with pytest.raises(SystemExit, match="choose other classes: no timing"):
        main([*SMALL, "--no-save", "--skip-layers", "3", "--precision", "fp32"])
    assert " ms " not in capsys.readouterr().out


def test_skip_step_refuses_different_parameters(monkeypatch, random):
    monkeypatch.setattr(published, "freeze", lambda *arguments: None)
    with pytest.raises(SystemExit, match="train other parameters: no timing"):
        checked_step(random)


@pytest.mark.parametrize("factor", [0.999, math.nan])
def test_full_fine_tuning_refuses_another_loss(monkeypatch, random, factor):
    right = training.full_step
    monkeypatch.setattr(training, "full_step", lambda *of: lambda *batch: factor * right(*of)(*batch))
    with pytest.raises(SystemExit, match="full fine-tuning has another loss: no timing"):
        training.full_fine_tuning(random, "fp32")


def test_prompt_tuning_refuses_another_loss(monkeypatch, random):
    right = training.CoOp.step
    other = lambda self, *batch: right(self, *batch)._replace(loss=right(self, *batch).loss * 1.01)  # noqa: E731
    monkeypatch.setattr(training.CoOp, "step", other)
    with pytest.raises(SystemExit, match="prompt tuning has another loss: no timing"):
        training.prompt_tuning(random, "fp32", open_clip.get_tokenizer("glyph-tiny"))


def test_baselines_train_their_parameters():
    random = inputs.random_inputs("glyph-tiny", 2, 5, measure.CPU)
    full = training.full_fine_tuning(random, "fp32")
    full()
    without = [name for name, parameter in full.model.named_parameters() if parameter.grad is None]
    assert without == ["logit_scale"]
    prompts = training.prompt_tuning(random, "fp32", open_clip.get_tokenizer("glyph-tiny"))
    prompts()
    (context,) = prompts.model.parameters()
    assert context.shape == (4, 96) and context.grad is not None and context.grad.abs().sum() > 0


def test_class_names_are_distinct_and_stable():
    names = inputs.class_names(22000)
    assert len(set(names)) == 22000
    assert names[:1570] == inputs.class_names(1570)
    assert names[0] == "dog"


def test_saved_bytes_keeps_no_tensor_alive():
    """A node that saves its own result, such as a softmax, would form a reference cycle."""
    x = torch.randn(8, requires_grad=True)
    alive = weakref.ref(result := x.softmax(0))
    del result
    assert alive() is None
    kept = []

    def step() -> torch.Tensor:
        kept.append(weakref.ref(result := x.softmax(0)))
        return result

    assert testing.saved_bytes(step) == 32
    assert kept[0]() is None

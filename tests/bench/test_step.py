"""bench.step and bench.infer: the table of README, and those of steps, sizes and predictions in docs/benchmarks.md.

Wrong results get no time, what cannot run is skipped, and rows have what the tables show.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

import skipkernels as sk
from bench import infer, inputs, measure, published, step, training
from bench.rows import KINDS, MACHINE

SMALL = "--model vit-tiny --classes 20 --device cpu --rounds 1".split()
INFER = [*SMALL, *"--skip-layers 3 --images 4 --batch 2".split()]
FEW = "--precision fp32 --implementation skipkernels".split()


pytestmark = pytest.mark.usefixtures("machine", "results")


def rows_of(results: Path, kind: str) -> list[dict[str, str]]:
    """The rows of a table, which must have the columns that bench.report reads."""
    (file,) = results.glob(f"*/{kind}.csv")
    rows = list(csv.DictReader(file.open()))
    of = KINDS.get(kind)
    assert of is None or {*MACHINE, *of.case.split(), of.measured} <= rows[0].keys()
    return rows


@pytest.fixture
def table(results):
    """Run bench.step and return its rows."""

    def run(*options: str) -> dict[tuple[str, str, int], dict[str, str]]:
        step.main([*SMALL, *options])
        return {(row["implementation"], row["precision"], int(row["C"])): row for row in rows_of(results, "step")}

    return run


def test_step_writes_a_row_per_implementation(monkeypatch, table):
    monkeypatch.setattr(torch, "compile", lambda function, mode: function)
    found = {implementation: row for (implementation, *_), row in table("--precision", "fp32").items()}
    assert tuple(found) == step.IMPLEMENTATIONS
    for implementation, row in found.items():
        assert row["faster"] == "" if implementation == "skipkernels" else float(row["faster"]) > 0
        assert float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"]) and row["note"] == ""
        every = implementation in (step.FULL, step.PROMPTS)
        assert (row["skip_layers"], row["K"]) == (("0", "20") if every else ("3+2", "11"))
    assert found.pop(step.COMPILED)["saved_mib"] == "", "what compiled code saves cannot be counted"
    saved = {name: float(row["saved_mib"]) for name, row in found.items()}
    assert saved["skipkernels, memory=min"] < saved["skipkernels"] < saved["published"] < saved["full fine-tuning"]


def test_step_that_does_not_fit_is_skipped(monkeypatch, table):
    """Neither is the published step of the check, which is not timed here; the note says so."""
    monkeypatch.setattr(step, "free_bytes", lambda device: 40 * 2**20)
    monkeypatch.setattr(step, "_LONGEST", math.inf)  # the time depends on what else the machine does
    rows = table("--implementation", "skipkernels", "full", "--precision", "fp32", "--classes", "10", "1000")
    assert rows["skipkernels", "fp32", 10]["note"] == "", "compared at all classes"
    assert rows["full fine-tuning", "fp32", 10]["note"] == ""
    left = rows["full fine-tuning", "fp32", 1000]
    assert left["p50_ms"] == "" and left["note"].startswith("does not fit: 1000 classes keep about ")
    assert float(rows["skipkernels", "fp32", 1000]["p50_ms"]) > 0
    assert "compared at 12 classes" in rows["skipkernels", "fp32", 1000]["note"]


def test_random_inputs_are_the_same_and_leave_the_generator():
    state = torch.get_rng_state()
    first, second = (inputs.random_inputs("vit-tiny", 2, 3, measure.CPU) for _ in range(2))
    assert torch.equal(first.images, second.images) and torch.equal(torch.get_rng_state(), state)


def test_class_names_are_different():
    assert len(set(inputs.class_names(30_000))) == 30_000


@pytest.mark.parametrize(("flops", "moved", "seconds"), [(3e11, 1e10, 3.0), (1e11, 2e10, 2.0), (0, 2e10, 2.0)])
def test_floor_is_the_longer_of_two_times(flops, moved, seconds):
    assert measure.floor(flops, torch.float32, moved, measure.CPU) == seconds


# ---- wrong results get no time -------------------------------------------------------------------------------------


def scaled(factor: float) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Multiply the result of a function, a number or numbers by name."""

    def call(right: Callable[..., Any], *arguments: Any) -> Any:
        found = right(*arguments)
        return {name: factor * x for name, x in found.items()} if isinstance(found, dict) else factor * found

    return lambda right: lambda *arguments: call(right, *arguments)


def skip_step(random: inputs.Inputs) -> training.Step:
    return training.skip_step(random, 3, "fast", "fp32", training.Published(random, 3))


def full_step(random: inputs.Inputs) -> training.Step:
    return training.full_fine_tuning(random, "fp32")


def prompts(random: inputs.Inputs) -> training.Step:
    return training.prompt_tuning(random, "fp32", open_clip.get_tokenizer("vit-tiny"))


# A function, another in its place, what refuses its results, and the message.
WRONG = {
    "gradients": (training.Published, "gradients", scaled(1.1), skip_step, "two steps do not agree"),
    "loss": (training, "_own_loss", scaled(0.999), full_step, "full fine-tuning has another loss"),
    "nan": (training, "_own_loss", scaled(math.nan), full_step, "full fine-tuning has another loss"),
    "prompts": (training, "_own_loss", scaled(1.01), prompts, "prompt tuning has another loss"),
    "classes": (
        published, "choose_classes", lambda right: lambda *of: torch.arange(len(right(*of))),
        lambda _: step.main([*SMALL, *FEW]), "two steps choose other classes",
    ),
    "logits": (
        sk.SkipCLIP, "predict", lambda right: lambda self, x: right(self, x).roll(1, dims=1),
        lambda _: infer.main(INFER), "logits of skipkernels.* are not the published ones",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("owner", "name", "wrong", "measures", "message"), WRONG.values(), ids=WRONG)
def test_wrong_results_are_not_timed(monkeypatch, results, capsys, owner, name, wrong, measures, message):
    random = inputs.random_inputs("vit-tiny", 4, 20, measure.CPU)
    monkeypatch.setattr(owner, name, wrong(getattr(owner, name)))
    with pytest.raises(SystemExit, match=f"{message}.*: no (timing|measurement)"):
        measures(random)
    assert " ms " not in capsys.readouterr().out and not list(results.iterdir())


# ---- bench.infer ---------------------------------------------------------------------------------------------------


def test_infer_writes_a_row_per_implementation(results):
    infer.main([*INFER, "--precision", "bf16"])
    found = {row["implementation"]: row for row in rows_of(results, "infer")}
    assert len(found) == len(infer.IMPLEMENTATIONS)
    for implementation, row in found.items():
        assert (row["faster"] == "") == (implementation == "skipkernels") and float(row["above_floor"]) > 0

"""bench.infer, bench.epoch, bench.profile and `python -m bench`."""

from __future__ import annotations

import argparse
import csv
import importlib
import shlex
import subprocess
from pathlib import Path

import pytest
import torch

import skipkernels as sk
from bench import __main__ as everything
from bench import ceilings, epoch, infer, inputs, measure, profile
from bench.budget import Budget, budget
from bench.flops import flops_of

MODEL = "--model glyph-tiny --skip-layers 3 --device cpu".split()
INFER = [*MODEL, "--classes", "20", "--images", "4", "--batch", "2", "--rounds", "1"]
EPOCH = [*MODEL, "--classes", "6", "--shots", "2", "--tests", "7"]


@pytest.fixture(autouse=True)
def results(monkeypatch, tmp_path) -> Path:
    """Folder for rows."""
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(ceilings, "matrix_rate", lambda device, dtype: 1e11)
    monkeypatch.setattr(ceilings, "bandwidth", lambda device: 1e10)
    return tmp_path


def rows(results: Path, table: str) -> dict[str, dict[str, str]]:
    (file,) = results.glob(f"*/{table}.csv")
    return {row["implementation"]: row for row in csv.DictReader(file.open())}


# ---- inference -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_infer_writes_a_row_per_implementation(results, precision):
    infer.main([*INFER, "--precision", precision])
    found = rows(results, "infer")
    assert list(found) == list(infer.IMPLEMENTATIONS)
    for implementation, row in found.items():
        assert float(row["images_s"]) == pytest.approx(4000 / float(row["p50_ms"]), rel=0.01) and row["note"] == ""
        assert (row["faster"] == "") == (implementation == "skipkernels") and float(row["above_floor"]) > 0
    assert float(found["skipkernels, cached"]["gflop"]) < float(found["published"]["gflop"])


def test_infer_runs_what_is_asked_for(results):
    infer.main([*INFER, "--implementation", "published", "skipkernels"])
    found = rows(results, "infer")
    assert list(found) == ["published", "skipkernels"] and float(found["published"]["faster"]) > 0


def test_infer_refuses_wrong_logits(monkeypatch, capsys):
    right = sk.SkipCLIP.predict
    monkeypatch.setattr(sk.SkipCLIP, "predict", lambda self, x: right(self, x).roll(1, dims=1))
    with pytest.raises(SystemExit, match="the logits of skipkernels are not the published ones: no timing"):
        infer.main([*INFER, "--precision", "bf16"])
    assert " ms " not in capsys.readouterr().out


def test_infer_recomputes_text_features():
    def work(classes: int) -> dict[str, int]:
        """FLOPs of the second call."""
        random = inputs.random_inputs("glyph-tiny", 4, classes, measure.CPU)
        found = {}
        for name, run in infer.runs_of(random, 2, 3, "fp32").items():
            run()
            found[name] = flops_of(run)
        return found

    few, many = work(10), work(30)
    of_classes = {name: many[name] - few[name] for name in few}
    comparing = 2 * 4 * 20 * 128  # images with classes
    assert of_classes["published"] == pytest.approx(2 * of_classes["eager, texts once"], rel=0.01)  # two batches
    assert 10 * comparing < of_classes["skipkernels, cached"] < of_classes["skipkernels"] / 2


# ---- an epoch ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_epoch_writes_a_row_per_implementation(results, precision):
    epoch.main([*EPOCH, "--precision", precision])
    found = rows(results, "epoch")
    assert list(found) == list(epoch.IMPLEMENTATIONS)
    for implementation, row in found.items():
        parts = [float(row[f"{part}_s"]) for part in ("features", "training", "evaluation")]
        assert float(row["epoch_s"]) == pytest.approx(sum(parts), abs=0.002) and int(row["steps"]) == 3
        assert (row["faster"] == "") == (implementation == "skipkernels")
    assert float(found["published"]["loss"]) == pytest.approx(float(found["skipkernels"]["loss"]), rel=2e-2)
    assert found["full fine-tuning"]["features_s"] == "0.0"


def test_epoch_refuses_another_loss(monkeypatch):
    right = epoch.PublishedStep.__call__
    wrong = lambda self, *batch: (1.01 * right(self, *batch)[0], None)  # noqa: E731
    monkeypatch.setattr(epoch.PublishedStep, "__call__", wrong)
    with pytest.raises(SystemExit, match="the epoch of skipkernels has the loss"):
        epoch.main([*EPOCH, "--implementation", "skipkernels", "published", "--no-save"])


def test_epoch_stops_after_a_slow_step(results):
    epoch.main([*EPOCH, "--implementation", "published", "--longest", "1e-9"])
    assert rows(results, "epoch")["published"]["note"].startswith("left out: 3 steps of about ")


# ---- bench.profile ---------------------------------------------------------------------------------


def test_profile_prints_shares(capsys):
    profile.main([*MODEL, "--classes", "20", "--rounds", "1", "--no-save"])
    assert "GFLOP/s" in capsys.readouterr().out


def test_profile_adds_up():
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


# ---- python -m bench -------------------------------------------------------------------------------------------------


def test_main_shares_the_time_and_continues_after_a_failure(monkeypatch):
    commands = []

    def run(command, check):
        commands.append(command[2:])
        return subprocess.CompletedProcess(command, 1 if command[2] == "bench.infer" else 0)

    monkeypatch.setattr(subprocess, "run", run)
    assert everything.main(["--budget", "18m", "--no-save"]) == 1
    modules = ["bench.step"] * 3 + ["bench.epoch", "bench.infer", "pytest"]
    assert [command[0] for command in commands] == modules
    assert all(command[-1] == "--no-save" for command in commands)
    seconds = [budget(command[command.index("--budget") + 1]).left for command in commands]
    assert seconds[0] == pytest.approx(300, abs=2), "5 of 18 shares"
    assert seconds[-1] == pytest.approx(1080, abs=2), "what the others left"


@pytest.mark.parametrize("job", [job for job, _ in everything.JOBS if not job.startswith("pytest ")])
def test_main_jobs_are_valid_commands(job, monkeypatch):
    parse = argparse.ArgumentParser.parse_args

    class Parsed(Exception):
        pass

    def parse_only(parser, arguments):
        parse(parser, arguments)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_only)
    module, *options = shlex.split(job)
    with pytest.raises(Parsed):
        importlib.import_module(module).main(options)


def test_budget_counts_down(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    used = Budget(10)
    now[0] = 7.0
    assert used.left == 3.0 and used.allows(3.0) and not used.allows(3.1)
    now[0] = 11.0
    assert used.left == 0.0
    for text, seconds in (("90s", 90), ("1.5h", 5400)):
        assert budget(text).left == seconds
    with pytest.raises(Exception, match="expected a time such as 9m"):
        budget("9")

"""bench.gpu: the stages of bench/gpu.sh, as docs/gpu.md describes them. No page has their numbers yet."""

from __future__ import annotations

import itertools
import time

import pytest
import torch

from bench import gpu, gpu_step, measure
from bench.rows import machine_columns

CUT = "--model vit-tiny --classes 20 --skip-layers 3 --device cpu --rounds 1 --no-save".split()


@pytest.mark.parametrize(
    "stage, printed",
    [
        ("check", ""),
        ("machine", f"result: {machine_columns(measure.CPU)['device']}, torch "),
        ("step", "result: bf16, 4 images, 20 classes: skipkernels "),
        ("profile_step", "skipkernels::"),
        ("one_step", "loss: "),
        ("smoke", "class_scores: "),
        ("full", "result: 4 pairs: eager "),
    ],
)
def test_stages_run_on_the_cpu(stage, printed, machine, capsys, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function: function)
    gpu.main([stage, *CUT])
    assert printed in capsys.readouterr().out


@pytest.mark.parametrize(
    "error", [RuntimeError("failed"), AssertionError("failed")], ids=lambda error: type(error).__name__
)
def test_times_stay_if_the_comparison_of_bits_fails(monkeypatch, capsys, error):
    def differences(case, precision):
        raise error

    monkeypatch.setattr(gpu, "differences", differences)
    rows = [{"implementation": gpu_step.GRAPHED, "p50_ms": "", "note": "1 ms"}]
    monkeypatch.setattr(gpu, "rows_of", lambda args, case, compiles: rows)
    gpu.main("step --precision fp32 --device cpu --no-save".split())
    first, second = capsys.readouterr().out.splitlines()
    assert first.endswith("classes: failed") and second.endswith("skipkernels as a graph 1 ms")


def test_all_shapes_within_the_time(monkeypatch, capsys):
    """All of them without torch.compile, then with it; one that gives no time does not stop the others."""

    def rows_of(args, case, compiles):
        if case.classes == 10000:
            raise {4: torch.OutOfMemoryError("out of memory\nmore"), 32: SystemExit("no timing")}[case.batch]
        return [{"implementation": gpu_step.GRAPHED, "p50_ms": "", "note": "1 ms"}]

    monkeypatch.setattr(gpu, "differences", lambda case, precision: {"note": "1 ms, compared"})
    monkeypatch.setattr(gpu, "rows_of", rows_of)
    times = itertools.count()
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    gpu.main("step --precision bf16 --all-shapes --device cuda --seconds 8 --no-save".split())
    results = capsys.readouterr().out.splitlines()
    measured = "skipkernels as a graph 1 ms"
    of_shapes = [f"{measured}, compared", *[measured] * 3, "out of memory", "no timing"]
    compiled = [measured] * 2 + ["no time left"] * 4
    shapes = [f"result: bf16, {B} images, {C} classes" for B, C in gpu._SHAPES]
    assert results[:6] == [f"{shape}: {result}" for shape, result in zip(shapes, of_shapes, strict=True)]
    assert results[6:] == [f"{shape}, compiled: {result}" for shape, result in zip(shapes, compiled, strict=True)]

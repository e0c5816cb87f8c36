"""bench.gpu_step, of which no page has numbers yet: rows, with the CPU in place of a GPU, and a comparison of bits."""

from __future__ import annotations

import csv
import math

import pytest
import torch

from bench import gpu, gpu_step, inputs, measure, rows, training
from skipkernels import testing
from skipkernels.graphs import graphed_step

STEP = "step --model vit-tiny --classes 20 --skip-layers 3 --rounds 1 --precision bf16 --device cuda --out".split()


@pytest.mark.parametrize("captured", [True, False])
def test_step_on_a_gpu(monkeypatch, capsys, tmp_path, captured):
    """Rows have what is printed; eager steps are not called a graph. Every path but the capture and the launches."""
    monkeypatch.setattr(gpu_step, "_random_inputs", lambda *case: inputs.random_inputs(*case[:3], measure.CPU))
    monkeypatch.setattr(gpu_step, "count_launches", lambda run, device: {"kernels": 5, "copies": 2})
    monkeypatch.setattr(gpu_step, "floor_of", lambda step, device: 0.005)
    monkeypatch.setattr(graphed_step.GraphedStep, "is_captured", captured)
    monkeypatch.setattr(measure, "seconds_of", lambda function, device, calls=1, before=None: 0.001 * calls)
    monkeypatch.setattr(testing, "peak_bytes", lambda function, device, **_: 2**20)
    monkeypatch.setattr(rows, "machine_columns", lambda device: {"device": "NVIDIA H100 PCIe"})
    monkeypatch.setattr(training.Published, "compiled", lambda published, precision, mode: published.step(precision))
    gpu.main([*STEP, str(tmp_path)])
    found = list(csv.DictReader((tmp_path / "nvidia-h100-pcie/gpu_step.csv").open()))
    graph = [gpu_step.GRAPHED] if captured else []
    names = [measure.OURS, gpu_step.PUBLISHED, *graph, measure.OURS, *gpu_step.COMPILED.values(), *graph]
    assert [row["implementation"] for row in found] == names
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("result: ")]
    assert len(printed) == len(found) and sum("no graph was captured" in line for line in printed) == 2 * (not captured)
    replayed = {gpu_step.GRAPHED, gpu_step.COMPILED["reduce-overhead"]}
    assert {row["implementation"] for row in found if row["peak_mib"] == ""} == replayed & set(names)
    assert {row["floor_ms"] for row in found} == {"5.0"} and {row["K"] for row in found} == {"11"}


def test_steps_have_equal_bits():
    """Without a GPU all steps are eager."""
    found = gpu_step.differences(inputs.Case("vit-tiny", 4, 20, measure.CPU, 3), "bf16")
    assert found == {"eager_difference": "0", "replay_difference": "0"}


def test_difference_is_the_largest_of_all_weights():
    classes, weights = [[0, 1], [0, 2]], [torch.ones(3), torch.ones(4)]
    changed = [weights[0], torch.tensor([1.0, 1.0, 1.0, 1.5])]
    assert gpu_step.difference((classes, weights), (classes, changed)) == pytest.approx(0.25)
    assert gpu_step.difference((classes, weights), (classes[::-1], weights)) == math.inf

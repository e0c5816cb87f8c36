"""Steps of a run: as a CUDA graph or in a loop, without host syncs, and in training mode."""

from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from skipkernels.app.methods.skip import Skip
from skipkernels.app.train import trainer, tune
from tests.app.runs import results, small


@pytest.fixture
def graphed_steps(monkeypatch) -> list[int]:
    """Sizes of the batches of graphed steps, which are made as on a GPU; on the CPU such a step is the plain loop."""
    sizes, make = [], Skip.graphed

    def graphed(self, *arguments):
        step = make(self, *arguments)
        return lambda inputs, labels: sizes.append(len(labels)) or step(inputs, labels)

    monkeypatch.setattr(trainer, "_captures", lambda device: True)
    monkeypatch.setattr(Skip, "graphed", graphed)
    return sizes


def test_tune_graphed_gives_the_same_results(run, tmp_path, graphed_steps):
    tune(small(tmp_path))
    assert results(tmp_path)[1:] == results(run[0])[1:]
    assert graphed_steps == [4] * 12


@pytest.mark.parametrize(
    ("changes", "reasons"),
    [({"graph": False}, []), ({"precision": "fp16"}, ["the gradient scaler"])],
    ids=["graph", "fp16"],
)
def test_tune_without_graph(tmp_path, graphed_steps, changes, reasons):
    """Only a step that was to be captured has a note."""
    console = Console(file=io.StringIO())
    tune(small(tmp_path, epochs=1, max_classes=4, **changes), console)
    printed = " ".join(console.file.getvalue().split())
    assert not graphed_steps
    assert re.findall("note: steps run without a CUDA graph: (the gradient scaler)?", printed) == reasons


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_step_does_not_synchronize(tmp_path, monkeypatch, precision):
    step, steps = trainer.Trainer._step, []

    def watched(self, *args):
        steps.append(1)
        torch.cuda.set_sync_debug_mode("error" if len(steps) > 1 else "default")  # the first compiles kernels
        try:
            return step(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(trainer.Trainer, "_step", watched)
    tune(small(tmp_path, epochs=1, device="cuda", precision=precision))
    assert len(steps) == 6


def test_to_training_mode_keeps_batch_norm_statistics():
    """A batch of one class has no representative statistics."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Dropout())
    trainer.to_training_mode(SimpleNamespace(model=model, train=model.train))
    assert [module.training for module in model] == [False, True]

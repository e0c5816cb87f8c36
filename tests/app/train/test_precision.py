"""Mixed precision of models, steps and updates; a step does not synchronize."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from skipkernels.app.train import evaluate_run, tune
from skipkernels.app.train import trainer as trainer_module
from skipkernels.app.train.model import load_model
from skipkernels.app.train.precision import MixedPrecision
from skipkernels.app.train.trainer import Trainer
from skipkernels.optimizer import FusedSGD
from tests.app.runs import losses, rows, small

CPU = torch.device("cpu")


def test_half_precision_keeps_accuracy(run, tmp_path):
    folder, _ = run
    metrics = tune(small(tmp_path, epochs=1, precision="bf16-sr"))
    assert losses(tmp_path) == pytest.approx(losses(folder)[:1], rel=0.1)
    assert metrics["tuned"]["base"] == pytest.approx(rows(folder)[0]["accuracy"]["base"], abs=12)  # one image is 4.2 %
    assert evaluate_run(tmp_path) == metrics["tuned"]
    kept = {tensor.dtype for name, tensor in load_file(tmp_path / "model.safetensors").items() if name != "logit_scale"}
    assert kept == {torch.bfloat16}


def test_bf16_sr_keeps_logit_scale():
    model, _, _ = load_model("pictogram-tiny", None, CPU)
    scale = model.logit_scale.exp().item()
    MixedPrecision("bf16-sr", CPU).prepare(model)
    assert model.logit_scale.exp().item() == scale
    assert {p.dtype for name, p in model.named_parameters() if name != "logit_scale"} == {torch.bfloat16}


def test_bf16_sr_applies_updates_below_half_ulp():
    weight = torch.nn.Parameter(torch.ones(10_000, dtype=torch.bfloat16))
    precision = MixedPrecision("bf16-sr", CPU)
    groups = precision.parameter_groups([{"name": "text", "params": [weight], "lr": 1e-4}])
    optimizer = FusedSGD(groups, in_backward=False, momentum=0.0, weight_decay=0.0, seed=0)
    for _ in range(10):
        weight.grad = torch.ones_like(weight)
        precision.update(optimizer, None)
    assert weight.float().mean().item() == pytest.approx(1 - 10 * 1e-4, rel=2e-4)


def test_parameter_groups_split_by_dtype():
    half, full = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16)), torch.nn.Parameter(torch.ones(1))
    group = {"name": "text", "params": [full, half], "lr": 1.0}
    split = MixedPrecision("bf16-sr", CPU).parameter_groups([group])
    assert [(g["params"], g["stochastic_rounding"], g["lr"]) for g in split] == [
        ([half], True, 1.0),
        ([full], False, 1.0),
    ]
    assert MixedPrecision("bf16", CPU).parameter_groups([group]) == [group]


def test_fp16_skips_update_on_overflow():
    weight = torch.nn.Parameter(torch.ones(1))
    precision = MixedPrecision("fp16", CPU)
    optimizer = FusedSGD([{"params": [weight], "lr": 0.5}], in_backward=False, momentum=0.9, weight_decay=0.1)
    scale = precision.scaler.get_scale()
    precision.backward(weight.sum() * float("inf"))
    precision.update(optimizer, None)
    assert weight.item() == 1.0 and precision.scaler.get_scale() == scale / 2
    again = MixedPrecision("fp16", CPU)
    again.load_state_dict(precision.state_dict())
    assert again.scaler.get_scale() == scale / 2


@pytest.mark.parametrize("name", ["fp32", "fp16"])
def test_clip_grad_norm_unscales_gradients(name):
    weight = torch.nn.Parameter(torch.zeros(2))
    precision = MixedPrecision(name, CPU)
    optimizer = FusedSGD([{"params": [weight], "lr": 1.0}], in_backward=False, momentum=0.0, weight_decay=0.0)
    precision.backward((weight * torch.tensor([30.0, 40.0])).sum())
    precision.update(optimizer, 1.0)
    assert weight.tolist() == pytest.approx([-0.6, -0.8], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "bf16-sr"])
def test_step_does_not_synchronize(tmp_path, monkeypatch, precision):
    step, steps = Trainer._step, []

    def watched(self, *args):
        steps.append(1)
        torch.cuda.set_sync_debug_mode("error" if len(steps) > 1 else "default")  # the first compiles kernels
        try:
            return step(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(Trainer, "_step", watched)
    tune(small(tmp_path, epochs=1, device="cuda", precision=precision))
    assert len(steps) == 6


def test_to_training_mode_keeps_batch_norm_statistics():
    """A batch of one class has no representative statistics."""
    model = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Dropout())
    trainer_module.to_training_mode(SimpleNamespace(model=model, train=model.train))
    assert [module.training for module in model] == [False, True]

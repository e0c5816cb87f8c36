"""`skipkernels warmup`: the kernels that it finds, and its errors. tests/test_aot.py compiles."""

from __future__ import annotations

import pytest
import torch

from skipkernels.app.cli.main import main
from skipkernels.app.cli.warmup import WarmupCommand
from skipkernels.ops import launching
from skipkernels.ops.precompile import ARCHITECTURES

pytestmark = pytest.mark.skipif(not launching.installed, reason="Triton is not installed")


@pytest.mark.parametrize("precision", ["fp32", "bf16-sr"])
def test_launches_of_a_step(precision):
    command = WarmupCommand(model="glyph-tiny", classes=6, precision=precision)
    launches = command.launches(ARCHITECTURES["sm_90"], torch.device("cpu"))
    kernels = {launch.kernel.fn.__name__ for launch in launches}
    parts = "class_scores class_sampled_ce_fwd class_sampled_ce_bwd add_layer_norm_fwd add_layer_norm_bwd".split()
    parts += "mlp_activation_fwd mlp_activation_bwd pooled_attention_fwd pooled_attention_bwd sgd_momentum".split()
    assert not [part for part in parts if not any(part in kernel for kernel in kernels)], kernels


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is no CUDA or ROCm device here. Choose a GPU with --target, such as sm_90."),
        (["--classes", "0"], "--classes must be at least 1; got 0."),
        (["--model", "no-such-model"], "no-such-model"),
    ],
)
def test_errors(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(launching.triton.knobs.runtime, "interpret", False)
    assert main(["warmup", *(["--target", "sm_90"] if arguments[:1] == ["--model"] else []), *arguments]) == 2
    assert message in capsys.readouterr().err

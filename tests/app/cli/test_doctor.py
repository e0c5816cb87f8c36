"""`skipkernels doctor`."""

from __future__ import annotations

import pytest
import torch

from skipkernels.app.cli.main import main


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
@pytest.mark.parametrize("cuda", ["13.0", None])
def test_doctor(cuda, capsys, monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "torch" in out and "class_sampled_ce" in out and "no device" in out
    assert ("torch is built for CUDA 13.0" in out) == (cuda is not None)

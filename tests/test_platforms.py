"""Other machines, imitated: Windows, arm64, and devices without fp64 such as Apple's MPS."""

from __future__ import annotations

import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import skipkernels as sk
from bench.operators.record import small_call
from skipkernels import _build, dtypes
from skipkernels.app.devices import resolved_precision, usable_device
from skipkernels.ops import registration
from tests.features.caches import images, skip_clip
from tests.processes import run_in_processes

PACKAGE, ROOT = Path(sk.__file__).parent, Path(__file__).parents[1]
ON_THE_CPU = ("sampler.py", "probabilities.py")  # of any device


class WithoutFp64(TorchDispatchMode):
    """Raise for a result in fp64, as MPS does, except in modules that compute on the CPU for every device."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function.namespace == "skipkernels":
            with self:  # its plain PyTorch, which a call of the operator would hide
                results = registration.definitions[function._opname].fallback(*args, **kwargs or {})
        else:
            results = function(*args, **kwargs or {})
        if any(isinstance(x, torch.Tensor) and x.dtype == torch.float64 for x in tree_leaves(results)):
            frame = sys._getframe()
            while frame is not None and not frame.f_code.co_filename.startswith(str(PACKAGE)):
                frame = frame.f_back
            if frame is None or not frame.f_code.co_filename.endswith(ON_THE_CPU):
                raise TypeError(f"{function} has a result in fp64, for {frame and frame.f_code}")
        return results


def train(folder: Path) -> float:
    """Everything of a training: construction, cache, steps, updates and evaluation."""
    clip = skip_clip()
    cache = sk.FeatureCache.build(folder, clip, images(), progress=False)
    optimizer = sk.FusedSGD(clip.parameters(), lr=0.01)
    for features, labels in cache.loader(batch_size=4):
        clip(features, labels).loss.backward()
        optimizer.step()
    clip.eval()
    clip(features, labels)
    return clip.predict(features).sum().item()


def train_without_fp64(rank: int, folder: Path) -> float:
    os.environ["SKIPKERNELS_CPP"] = "0"
    with WithoutFp64(), pytest.raises(TypeError, match="result in fp64"):  # of a scale, on a device with fp64
        sk.functional.class_sampled_logits(torch.ones(2, 3), torch.ones(4, 3), 1.0).sum().double()
    dtypes.WITHOUT_FP64 = frozenset({"cpu"})
    with WithoutFp64():
        for name in sk.functional.__all__:
            call = small_call(name)
            inputs = [x.requires_grad_() for x in call.inputs.values()]
            total = call.total(*inputs)
            if inputs:
                total.backward()
        return train(folder)


def test_training_needs_no_fp64(tmp_path):
    (total,) = run_in_processes(1, tmp_path, train_without_fp64, tmp_path / "cache")
    assert math.isfinite(total)


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, False, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_device(monkeypatch, cuda, mps, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    monkeypatch.setattr(torch, "empty", lambda *args, device: torch.tensor([]))  # which no device here can make
    assert usable_device("auto", "tune") == expected


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), "fp32"), ((8, 0), "bf16")])
def test_auto_precision(monkeypatch, capability, expected):
    """bf16 on the GPU of the run, not on the current one, if it is not emulated there."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", {"cuda:1": capability}.get)
    assert resolved_precision("auto", "cuda:1") == expected


@pytest.mark.parametrize("key", ["AutocastCPU", "AutocastCUDA", "AutocastMPS", "AutocastXPU"])
def test_autocast_is_registered(key):
    """Under autocast, class_sampled_ce casts its features and not its scale on every device."""
    assert torch._C._dispatch_has_kernel_for_dispatch_key("skipkernels::class_sampled_ce", key)


def test_arm64_has_what_the_tests_of_operators_import():
    """tools/arm64.sh copies folders of the repository to the emulated system."""
    copied = re.search(r"^cp -r (.*) \S+$", (ROOT / "tools" / "arm64.sh").read_text(), re.MULTILINE)[1].split()
    texts = [path.read_text() for path in (ROOT / "tests" / "ops").glob("*.py")]
    imported = {name for text in texts for name in re.findall(r"^(?:from|import) (\w+)", text, re.MULTILINE)}
    assert {name for name in imported if (ROOT / name).is_dir()} <= {*copied}


def test_no_compiler_is_asked_on_windows(monkeypatch, tmp_path):
    monkeypatch.setattr(_build.sys, "platform", "win32")
    assert "Windows" in _build.load.__wrapped__().reason
    with pytest.raises(_build.BuildError, match="Windows"):
        _build.build(tmp_path / "kernels.so")

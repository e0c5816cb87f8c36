"""Refusals of the modules of the library that are no packages: the call, the error, and words of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import skipkernels as sk
from skipkernels.retrieval import recall
from skipkernels.towers.base import UnsupportedModel
from tests.models import tiny_clip, tiny_tokens

C = 7


def weight(dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter(torch.ones(2, dtype=dtype))


def optimizer_with_state(**options: Any) -> None:
    optimizer = sk.FusedSGD([weight()])
    state = optimizer.state_dict()
    state["param_groups"][0] |= options
    optimizer.load_state_dict(state)


def clip(model: nn.Module | None = None, skip: Any = 1, rank: int | None = None) -> sk.SkipCLIP:
    made = sk.SkipCLIP(model or tiny_clip(), tiny_tokens(C), skip_layers=skip)
    if rank is not None:
        sk.add_lora(made, rank)
    return made


def resnet() -> nn.Module:
    return tiny_clip(vision={"layers": (1, 1, 1, 1), "width": 8, "image_size": 32, "head_width": 8})


def recall_of(**changed: Any) -> object:
    good = {"image": torch.ones(3, 4), "text": torch.ones(6, 4), "image_of_text": torch.arange(6) // 2}
    return recall(**good | changed)


NESTEROV = "FusedSGD: nesterov is not supported; got True. Use torch.optim.SGD"
CALLS: list[tuple[Callable[[], object], type[Exception], str]] = [
    (lambda: copy.copy(sk.FusedSGD([weight()])), TypeError, r"FusedSGD: cannot be copied or .* Use state_dict"),
    (lambda: copy.deepcopy(sk.FusedSGD([weight()])), TypeError, "FusedSGD: cannot be copied"),
    (lambda: sk.FusedSGD([weight(torch.complex64)]), TypeError, "FusedSGD: params must be float32, .*complex64"),
    (lambda: sk.FusedSGD(2 * [weight()]), ValueError, "FusedSGD: params must be different weights"),
    (lambda: sk.FusedSGD([{"params": [weight()], "nesterov": True}]), ValueError, NESTEROV),
    (lambda: optimizer_with_state(nesterov=True), ValueError, NESTEROV),
    (lambda: sk.add_lora(tiny_clip(), 2), TypeError, "add_lora: clip must be a SkipCLIP; got CLIP"),
    (lambda: sk.add_lora(clip(), 0), ValueError, "add_lora: rank must be an integer of at least 1; got 0"),
    (lambda: sk.add_lora(clip(), 2, alpha=0), ValueError, "add_lora: alpha must be above 0 and finite; got 0.0"),
    (lambda: sk.add_lora(clip(), 2, alpha=math.inf), ValueError, "add_lora: alpha must be .*; got inf"),
    (lambda: sk.add_lora(clip(), 2, ()), ValueError,
     r"add_lora: targets must be of q, k, v, out, fc, proj, or \"all-linear\"; got \(\)"),
    (lambda: sk.add_lora(clip(), 2, ("q", "q_proj")), ValueError, r"targets must be of q, .*; got \('q', 'q_proj'\)"),
    (lambda: sk.add_lora(clip(rank=2), 2), ValueError, "add_lora: .* has low-rank updates already"),
    (lambda: sk.add_lora(clip(skip=1.0), 2), ValueError, "add_lora: no block is above the cut"),
    (lambda: sk.add_lora(clip(resnet()), 2), UnsupportedModel,
     "add_lora: blocks above the cut of the image tower must be fused"),
    (lambda: sk.merge_lora(clip()), ValueError, "merge_lora: the model has no low-rank updates"),
    (lambda: sk.save_lora(clip(), "x"), ValueError, "save_lora: the model has no low-rank updates"),
    (lambda: sk.save_lora(clip(rank=2), "x"), ValueError, "save_lora: PEFT's format is for Hugging .* got open_clip"),
    (lambda: recall_of(text=torch.ones(6, 5)), ValueError, r"recall: text must be \[m, D=4\]"),
    (lambda: recall_of(image=[[1.0] * 4] * 3), TypeError, "recall: image must be a tensor; got list"),
    (lambda: recall_of(text=torch.ones(6, 4).long()), TypeError, "recall: text must be float32"),
    (lambda: recall_of(image_of_text=torch.arange(6)), ValueError,
     "recall: image_of_text must be rows of image, 0 to 2; got 0 to 5"),
    (lambda: recall_of(image_of_text=torch.zeros(3).long()), ValueError, r"recall: image_of_text must be \[m=6\]"),
    (lambda: recall_of(ks=(0, 1)), ValueError, r"recall: ks must be at least 1; got \[0, 1\]"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate")
@pytest.mark.parametrize(("call", "error", "words"), CALLS, ids=[words for *_, words in CALLS])
def test_call_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()


OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": math.nan}, ValueError, "lr must be at least 0; got nan"),
    ({"momentum": -0.1}, ValueError, "momentum must be at least 0; got -0.1"),
    ({"stochastic_rounding": True}, TypeError, "params must be bfloat16; got torch.float32. Set stochastic_rounding"),
]


@pytest.mark.parametrize(("options", "error", "words"), OPTIONS, ids=[words for *_, words in OPTIONS])
def test_option_of_fused_sgd_is_refused(options, error, words):
    """In the constructor, in a group, and in a later group. No hook is left, although its frames are alive."""
    good = weight()
    optimizer = sk.FusedSGD([weight()])
    for call in (
        lambda: sk.FusedSGD([weight()], **options),
        lambda: sk.FusedSGD([{"params": [good]}, {"params": [weight()], **options}]),
        lambda: optimizer.add_param_group({"params": [good], **options}),
    ):
        with pytest.raises(error, match=f"^FusedSGD: {words}") as refused:
            call()
        good.sum().backward()
        assert type(good.grad) is torch.Tensor and good.eq(1).all() and refused.tb is not None
        good.grad = None
    assert len(optimizer.param_groups) == 1

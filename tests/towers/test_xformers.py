"""xformers as an attention backend. Without a GPU its masks are materialised and used in plain attention."""

from __future__ import annotations

import pickle
import sys
import types

import pytest
import torch

import skipkernels as sk
from skipkernels.testing import gradients
from skipkernels.towers.xformers import XFORMERS
from tests.models import tiny_batch, tiny_clip, tiny_tokens
from tests.reference_step import assert_close_by_name

CLASSES = 9


def masked_attention(query, key, value, attn_bias=None):
    """Reference of `memory_efficient_attention`: softmax(query · key / √E + bias) · value, over [n, tokens, H, E]."""
    logits = torch.einsum("nqhe,nkhe->nhqk", query, key) / query.shape[-1] ** 0.5
    if attn_bias is not None:
        logits = logits + attn_bias.materialize((query.shape[1], key.shape[1]), logits.dtype)
    return torch.einsum("nhqk,nkhe->nqhe", logits.softmax(-1), value)


@pytest.fixture
def xformers_ops():
    return pytest.importorskip("xformers.ops")


@pytest.fixture
def calls(monkeypatch, xformers_ops):
    seen = []

    def attention(query, key, value, attn_bias=None):
        seen.append(type(attn_bias).__name__)
        return masked_attention(query, key, value, attn_bias)

    monkeypatch.setattr(xformers_ops, "memory_efficient_attention", attention)
    return seen


@pytest.mark.parametrize("packed", [True, False], ids=["packed", "padded"])
@pytest.mark.parametrize("memory", ["fast", "min"])
def test_xformers_same_step(calls, monkeypatch, memory, packed):
    if not packed:
        monkeypatch.setattr("skipkernels.towers.prompts.counts_are_known", lambda device: False)
    images, labels = tiny_batch(4, CLASSES)
    found = []
    for attention in ("sdpa", "xformers"):
        model = tiny_clip()
        clip = sk.SkipCLIP(model, tiny_tokens(CLASSES), skip_layers=1, attention=attention, memory=memory)
        loss = clip(images, labels).loss
        found.append({"loss": loss.detach()} | gradients(model, loss))
        assert bool(calls) == (attention == "xformers")
    assert {"NoneType", "BlockDiagonalCausalFromBottomRightMask"} == set(calls)
    assert_close_by_name(found[1], found[0], tolerance=1e-12)


def test_xformers_unavailable_raises(xformers_ops):
    with pytest.raises(ValueError, match='attention="xformers" cannot be used here: No operator found'):
        sk.SkipCLIP(tiny_clip(), tiny_tokens(4), skip_layers=1, attention="xformers")


@pytest.mark.parametrize(
    ("package", "reason"),
    [(None, "xformers"), (types.ModuleType("xformers"), "no attribute 'memory_efficient_attention'")],
    ids=["not installed", "without what its attention needs"],
)
def test_xformers_without_attention(monkeypatch, package, reason):
    if package is not None:
        package.ops = types.ModuleType("xformers.ops")
        monkeypatch.setitem(sys.modules, "xformers.ops", package.ops)
    monkeypatch.setitem(sys.modules, "xformers", package)
    with pytest.raises(ValueError, match=f"cannot be used here: .*{reason}.* Leave it at"):
        sk.SkipCLIP(tiny_clip(), tiny_tokens(4), skip_layers=1, attention="xformers")


def test_xformers_backend_in_a_pickle():
    """A pickled SkipCLIP has it, such as for another process."""
    assert pickle.loads(pickle.dumps(XFORMERS)) == XFORMERS


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_xformers_same_step_on_gpu(xformers_ops, dtype):
    """The order of summation differs: a few units in the last of 8 bits after three blocks."""
    images, labels = tiny_batch(4, CLASSES, dtype)
    losses = []
    for attention in ("sdpa", "xformers"):
        model = tiny_clip(dtype, vision={"head_width": 8}).cuda()
        clip = sk.SkipCLIP(model, tiny_tokens(CLASSES).cuda(), skip_layers=1, attention=attention)
        losses.append(clip(images.cuda(), labels.cuda()).loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=5e-2)

"""Refusals of `ShardedSkipCLIP`, in a group of one process: the call, the error, and words of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist

import skipkernels as sk
from skipkernels.parallel import checks
from skipkernels.towers.base import UnsupportedModel
from tests.models import tiny_batch, tiny_clip, tiny_tokens
from tests.parallel.sharded import CLASSES, small_clip

BATCH = tiny_batch(2, CLASSES)


def sharded(model: Any, group: Any) -> sk.parallel.ShardedSkipCLIP:
    return sk.parallel.ShardedSkipCLIP(model, tiny_tokens(CLASSES), skip_layers=1, process_group=group)


REFUSED: list[tuple[Callable[[Any], object], type[Exception], str]] = [
    (lambda group: small_clip("gloo"), TypeError, "process_group must be a torch.distributed.ProcessGroup .* got str"),
    (lambda group: sharded((tiny_clip(),), group), TypeError, "model must be a CLIP, .* got tuple. Pass its first"),
    (lambda group: sharded("ViT-B-32", group), TypeError, "model must be a CLIP, an nn.Module; got str"),
    (lambda group: sharded(torch.nn.ReLU(), group), UnsupportedModel, "model must be one of .* got torch.nn"),
    (lambda group: sk.graphed(clip := small_clip(group), torch.optim.SGD(clip.parameters()), 2), RuntimeError,
     "graphed: clip must be"),
    (lambda group: small_clip(group).encode_classes(BATCH[1]), RuntimeError, "encode_classes is not supported"),
    (lambda group: small_clip(group).eval()(*BATCH), RuntimeError, "an evaluation with gradients is not supported"),
    (lambda group: small_clip(group)(*BATCH, return_logits=True), ValueError,
     "labels must be class ids .B. and return_logits False"),
    (lambda group: small_clip(group)(BATCH[0], torch.eye(CLASSES)[BATCH[1]] / 2 + 1 / 2 / CLASSES), ValueError,
     "^ShardedSkipCLIP: labels must be class ids"),
    (lambda group: small_clip(group)(BATCH[0][:1], BATCH[1][:0]), ValueError, r"labels must be .* \[B=1\]"),
    (lambda group: small_clip(group)(BATCH[0][:0], BATCH[1]), ValueError, "at least one image; got"),
    (lambda group: sk.parallel.pair_loss(small_clip(group), BATCH[0][:1], tiny_tokens(0)), ValueError,
     "pair_loss: captions"),
    (lambda group: sk.parallel.all_reduce_gradients(small_clip()), TypeError,
     "parallel.all_reduce_gradients: clip must be a ShardedSkipCLIP; got SkipCLIP"),
]  # fmt: skip


@pytest.mark.parametrize(("call", "error", "words"), REFUSED, ids=[words for *_, words in REFUSED])
def test_call_is_refused(group, call, error, words):
    with pytest.raises(error, match=words):
        call(group)


@pytest.mark.parametrize(
    ("function", "value", "words"),
    [
        ("get_backend_config", "cuda:nccl", "must have gloo or NCCL for tensors on cpu, .* got None. Move the model"),
        ("get_backend_config", "cpu:mpi", "must have gloo or NCCL for tensors on cpu, .* got mpi"),
        ("get_world_size", CLASSES + 1, "at least as many classes as processes; got C=18 and 19 processes"),
    ],
)
def test_group_is_refused(group, monkeypatch, function, value, words):
    monkeypatch.setattr(dist, function, lambda group: value)
    with pytest.raises(ValueError, match=words):
        small_clip(group)


def test_batch_norms_above_the_cut_are_refused(group, monkeypatch):
    monkeypatch.setattr(dist, "get_world_size", lambda group: 2)
    model = tiny_clip(vision={"layers": (1, 1, 1, 1), "width": 8, "image_size": 32, "head_width": 8})
    with pytest.raises(UnsupportedModel, match="batch norms above the cut must use the images of all processes"):
        sk.parallel.ShardedSkipCLIP(model, tiny_tokens(CLASSES), skip_layers=1, process_group=group)
    monkeypatch.setattr(checks, "check_equal", lambda *arguments: 1 / 0)  # what follows that check
    with pytest.raises(ZeroDivisionError):
        sk.parallel.ShardedSkipCLIP(model, tiny_tokens(CLASSES), skip_layers=(1.0, 1), process_group=group)

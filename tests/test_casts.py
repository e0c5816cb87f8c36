"""`casts.Casts`: the update writes the copies in 16 bits that a step would cast, and nothing else changes.

tests/graphs/test_capture.py has the steps of a graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import skipkernels as sk
from skipkernels import casts
from skipkernels.casts import Casts
from tests.hugging_face_models import hugging_face_clip
from tests.models import tiny_batch, tiny_clip, tiny_tokens

CLASSES = 30


class Trained:
    """A SkipCLIP under autocast with its optimizer, which keeps casts if `keeps`."""

    def __init__(self, keeps: bool, make: Callable[[], nn.Module], memory: str, **options: Any):
        self.clip = sk.SkipCLIP(make().float(), tiny_tokens(CLASSES), skip_layers=1, memory=memory).train()
        groups = self.clip.parameter_groups(text_lr=0.02, image_lr=0.01)
        self.optimizer = sk.FusedSGD(groups, **{"momentum": 0.9, "weight_decay": 0.01, **options})
        self.kept = Casts(self.clip.trainable_parameters() if keeps else ())

    def step(self, seed: int = 0) -> float:
        """One step; returns the loss."""
        images, labels = tiny_batch(4, CLASSES, torch.float32, seed=seed)
        with self.kept.active():
            with torch.autocast("cpu", torch.bfloat16):
                out = self.clip(images, labels)
            out.loss.backward()
            self.optimizer.step()
        self.optimizer.zero_grad()
        return out.loss.item()

    def weights(self) -> list[Tensor]:
        return [p.detach() for p in self.clip.model.parameters()]


@pytest.fixture
def cast(monkeypatch) -> list[int]:
    """Number of weights of each cast, those that train."""
    found: list[int] = []
    whole = torch._foreach_copy_

    def counted(targets, sources):
        found.extend([len(sources)] if all(x.requires_grad for x in sources) else [])
        whole(targets, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    return found


def separate_projections() -> nn.Module:
    """Model of which query, key and value are joined."""
    return hugging_face_clip(end=59)


@pytest.mark.parametrize("options", [{}, {"in_backward": False}, {"momentum": 0.0}], ids=str)
@pytest.mark.parametrize("memory", ["fast", "min"])
@pytest.mark.parametrize("make", [tiny_clip, separate_projections])
def test_results_are_the_same_and_nothing_is_cast_again(cast, make, memory, options):
    ours, theirs = (Trained(keeps, make, memory, **options) for keeps in (True, False))
    assert ours.step() == theirs.step()
    assert [ours.step(seed) for seed in (1, 2)] == [theirs.step(seed) for seed in (1, 2)]
    assert all(map(torch.equal, ours.weights(), theirs.weights()))
    cast.clear()
    ours.step()
    assert cast == []
    theirs.step()
    assert len(cast) >= 4, "a cast for each block"


def test_which_weights_have_a_cast():
    first, second, third = (torch.full((2, 3), float(number)) for number in range(3))
    others = torch.zeros(3, 2).T, torch.zeros(2, 3).bfloat16()
    kept = Casts([first, second, third, *others])
    joint = kept.joint_cast([first, second], torch.bfloat16)
    assert joint.tolist() == [[0.0] * 3] * 2 + [[1.0] * 3] * 2 and joint.dtype == torch.bfloat16
    assert kept.joint_cast([first, second], torch.bfloat16) is joint
    assert kept.joint_cast([first, second], torch.float16) is None, "another dtype of autocast"
    refused = [[first], [third, first], [third, third], [others[0]], [others[1]], [torch.zeros(2, 3)]]
    assert [kept.joint_cast(weights, torch.bfloat16) for weights in refused] == [None] * 6
    assert kept.joint_cast([third], torch.float32) is None
    one, two, none = map(kept.cast_of, [first, second, third])
    assert none is None and one.data_ptr() == joint.data_ptr() and two.equal(joint[2:])
    second.add_(1)
    with kept.active():
        pass
    assert joint[2:].eq(2).all()


def test_steps_of_two_models_have_their_own_casts():
    """At the same time, in two threads; every thread finds them, as those of autograd must."""
    one, two = (Casts([torch.full((2, 3), float(number))]) for number in range(2))
    (first,), (second,) = (list(kept._weights.values()) for kept in (one, two))
    found = []

    def other() -> None:
        with two.active():
            found.extend(casts.active_joint_cast([x], torch.bfloat16) for x in (first, second))

    with one.active():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        found += [casts.active_joint_cast([x], torch.bfloat16) for x in (first, second)]
    assert found[0] is found[2] and torch.is_tensor(found[0]) and torch.is_tensor(found[1]) and found[3] is None

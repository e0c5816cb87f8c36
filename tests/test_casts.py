"""`FusedSGD(keep_casts=True)`: the update writes the copies in 16 bits that a step would cast; nothing else changes."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from hugging_face_models import hugging_face_clip
from torch import Tensor

import skipkernels as sk
from skipkernels import casts
from tests.models import tiny_batch, tiny_clip, tiny_tokens

CLASSES = 30


class Trained:
    """A SkipCLIP under bf16 autocast, its optimizer, and the number of weights that its steps cast."""

    def __init__(self, model: Any = None, *, memory: str = "fast", tokens: Tensor | None = None, **options: Any):
        model = tiny_clip(torch.float32) if model is None else copy.deepcopy(model).float()
        tokens = tiny_tokens(CLASSES) if tokens is None else tokens
        self.clip = sk.SkipCLIP(model, tokens, skip_layers=1, memory=memory).train()
        groups = self.clip.parameter_groups(text_lr=0.02, image_lr=0.01)
        self.optimizer = sk.FusedSGD(groups, **{"momentum": 0.9, "weight_decay": 0.01, **options})

    def step(self, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> float:
        images, labels = tiny_batch(4, CLASSES, torch.float32, seed=seed)
        with torch.autocast("cpu", dtype):
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


def assert_equal(ours: Trained, theirs: Trained) -> None:
    assert all(map(torch.equal, ours.weights(), theirs.weights()))


@pytest.mark.parametrize("options", [{}, {"in_backward": False}, {"momentum": 0.0}], ids=str)
@pytest.mark.parametrize("memory", ["fast", "min"])
def test_results_are_the_same_and_nothing_is_cast_again(cast, memory, options):
    ours, theirs = Trained(memory=memory, keep_casts=True, **options), Trained(memory=memory, **options)
    assert ours.step() == theirs.step()
    cast.clear()
    assert [ours.step(seed) for seed in (1, 2, 3)] == [x := theirs.step(seed) for seed in (1, 2, 3)] and x > 0
    assert_equal(ours, theirs)
    cast.clear()
    ours.step()
    assert cast == []
    theirs.step()
    assert len(cast) >= 4, "a cast for each block"


def test_separate_query_key_and_value_are_joined_once(cast):
    tokens = torch.randint(3, 40, (CLASSES, 12), generator=torch.Generator().manual_seed(0))
    tokens[:, 0], tokens[:, -1] = 0, 2
    model = hugging_face_clip()
    ours, theirs = (Trained(model, tokens=tokens, keep_casts=keeps) for keeps in (True, False))
    for seed in range(3):
        assert ours.step(seed) == theirs.step(seed)
    assert_equal(ours, theirs)
    cast.clear()
    ours.step()
    assert cast == []


def add_(trained: Trained) -> None:
    with torch.no_grad():
        for weight in trained.weights():
            weight.add_(0.01)


def load(trained: Trained) -> None:
    trained.clip.load_state_dict(
        {name: 0.9 * x for name, x in trained.clip.state_dict().items() if x.is_floating_point()}, strict=False
    )


def replace_data(trained: Trained) -> None:
    for weight in trained.clip.trainable_parameters():
        weight.data = 0.9 * weight.data


def other_optimizer(trained: Trained) -> None:
    torch.optim.SGD(trained.clip.trainable_parameters(), lr=0.1, weight_decay=0.1).step()
    for weight in trained.clip.trainable_parameters():
        weight.grad = torch.ones_like(weight)
    torch.optim.SGD(trained.clip.trainable_parameters(), lr=0.1).step()
    trained.optimizer.zero_grad()


@pytest.mark.parametrize("change", [add_, load, replace_data, other_optimizer], ids=lambda f: f.__name__)
def test_changed_weights_are_cast_again(change):
    ours, theirs = Trained(keep_casts=True), Trained()
    for trained in (ours, theirs):
        trained.step()
        change(trained)
    for seed in (1, 2):
        assert ours.step(seed) == theirs.step(seed)
    assert_equal(ours, theirs)


def test_first_use_in_inference_mode():
    ours, theirs = Trained(keep_casts=True), Trained()
    images, labels = tiny_batch(4, CLASSES, torch.float32)
    for trained in (ours, theirs):
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            trained.clip(images, labels)
    for seed in (1, 2):
        assert ours.step(seed) == theirs.step(seed)
    assert_equal(ours, theirs)


def test_another_dtype_of_autocast():
    ours, theirs = Trained(keep_casts=True), Trained()
    for seed, dtype in enumerate((torch.bfloat16, torch.float16, torch.bfloat16)):
        assert ours.step(seed, dtype) == theirs.step(seed, dtype)
    assert_equal(ours, theirs)


def test_renew_copies_what_changed_into_the_same_memory(cast):
    trained = Trained(keep_casts=True)
    trained.step()
    weight = next(w for w in trained.clip.trainable_parameters() if w.ndim == 2 and casts.own(w) is not None)
    before = casts.own(weight)
    with torch.no_grad():
        weight.mul_(2)
    assert casts.own(weight) is None
    cast.clear()
    trained.optimizer.copy_options()
    trained.optimizer.copy_options()
    assert cast == [1]
    assert casts.own(weight) is before and before.equal(weight.bfloat16())


def test_weight_of_two_products_is_kept_for_one():
    first, second = torch.zeros(2, 3), torch.ones(2, 3)
    casts.keep([first, second])
    joined = casts.joined([first, second], torch.bfloat16)
    assert joined.shape == (4, 3) and casts.joined([first, second], torch.bfloat16) is joined
    for others in ([first], [second], [second, first]):
        assert casts.joined(others, torch.bfloat16) is None
    assert casts.own(first) is None, "nothing is copied yet"


def test_casts_end_with_the_optimizer_or_the_weights():
    trained = Trained(keep_casts=True)
    trained.step()
    weights = list(trained.clip.trainable_parameters())
    assert any(casts.own(weight) is not None for weight in weights)
    trained.optimizer.close()
    assert all(casts.own(weight) is None for weight in weights)
    trained = Trained(keep_casts=True)
    kept = len(casts._kept)
    del trained, weights
    gc.collect()
    assert len(casts._kept) < kept

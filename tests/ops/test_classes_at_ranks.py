"""classes_at_ranks against its definition."""

from __future__ import annotations

import math

import pytest
import torch

from skipkernels.ops.classes_at_ranks import classes_at_ranks
from tests.ops.backends import GPU, INTERPRETED, Backend

# There are no C++ kernels.
pytestmark = pytest.mark.parametrize("backend", ["reference", INTERPRETED, GPU], indirect=True)


def selected(scores: list[float], ranks: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """Kept classes and positions of the labels, by sorting."""
    scores = [-math.inf if math.isnan(score) else score for score in scores]
    order = sorted(range(len(scores)), key=lambda class_id: -scores[class_id])  # stable: the first of equal ones first
    kept = sorted(order[rank] for rank in ranks)
    return kept, [kept.index(label) for label in labels]


def check_selection(backend: Backend, scores: torch.Tensor, ranks: list[int], labels: list[int]) -> None:
    tensors = scores.to(backend.device), *(torch.tensor(x, device=backend.device) for x in (ranks, labels))
    found = classes_at_ranks(*tensors)
    assert [x.tolist() for x in found] == list(selected(scores.tolist(), ranks, labels))
    class_ids, targets = classes_at_ranks(*tensors[:2], None)
    assert torch.equal(class_ids, found[0]) and len(targets) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("C", "K"), [(1, 1), (2, 1), (31, 31), (33, 5), (130, 40), (300, 170)])
def test_classes_at_ranks(backend: Backend, C, K, dtype):
    """Scores repeat, in 16 bits more often; ranks have the labels' among them."""
    backend.skip_unless_supported(dtype)
    rng = torch.Generator().manual_seed(C)
    scores, labels = torch.randn(C, generator=rng).mul(8).round().to(dtype), [C // 2, 0 if K > 1 else C // 2, C // 2]
    scores[labels] = math.inf
    first = len(set(labels))  # ranks of the labels
    others = first + torch.randperm(C - first, generator=rng)[: max(K - first, 0)]
    check_selection(backend, scores, [*range(first), *sorted(others.tolist())], labels)


def test_classes_at_ranks_of_nan_and_infinite_scores(backend: Backend):
    """NaN ranks as −∞, and of equal scores the first class ranks first."""
    scores = torch.tensor([math.nan, -math.inf, 0.0, -0.0, math.inf, 2.0, math.nan, math.inf, 2.0])
    for first in range(9):
        check_selection(backend, scores, [*range(first, 9)], [])
    check_selection(backend, scores, [0, 1, 8], [4, 7, 6, 4])


def test_more_classes_than_are_counted(backend: Backend, monkeypatch):
    """Are sorted by PyTorch: no kernel is launched."""
    scores, ranks, labels = torch.arange(40.0).sin(), torch.tensor([0, 3, 20]), torch.tensor([], dtype=torch.int64)
    tensors = scores.to(backend.device), ranks.to(backend.device), labels.to(backend.device)
    counted = classes_at_ranks(*tensors)
    monkeypatch.setattr("skipkernels.ops.classes_at_ranks.MOST_RANKED", 39)
    monkeypatch.setattr("skipkernels.ops.classes_at_ranks.launch", lambda *_, **__: pytest.fail("launched"))
    assert all(map(torch.equal, counted, classes_at_ranks(*tensors)))


@pytest.mark.parametrize("rank", [-1, 3])
def test_ranks_out_of_range_are_an_error(backend: Backend, rank):
    if backend.name not in ("reference", "interpreter"):
        pytest.skip("an assertion stops the device")
    with pytest.raises(Exception, match=r"out of range|ranks must be from 0 to C - 1"):
        classes_at_ranks(torch.ones(3), torch.tensor([0, rank]), None)


def test_opcheck(backend: Backend):
    scores, ids = torch.randn(9, device=backend.device), torch.tensor([0, 2, 4], device=backend.device)
    backend.opcheck(classes_at_ranks, (scores, ids, ids))
    backend.opcheck(classes_at_ranks, (scores, ids, None))

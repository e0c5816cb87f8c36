"""classes_at_ranks and packed_layout against their definitions."""

from __future__ import annotations

import math

import pytest
import torch

from skipkernels.ops import class_selection
from skipkernels.ops.class_selection import classes_at_ranks, packed_layout
from tests.ops.conftest import GPU, INTERPRETED, Backend

# There are no C++ kernels.
pytestmark = pytest.mark.parametrize("backend", ["reference", INTERPRETED, GPU], indirect=True)


def selected(scores: list[float], ranks: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    """Kept classes and positions of the labels, by sorting."""
    order = sorted(range(len(scores)), key=lambda c: (-(-math.inf if math.isnan(scores[c]) else scores[c]), c))
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
    scores, labels = torch.randn(C, generator=rng).mul(8).round().to(dtype), [C // 2, 0, C // 2][: min(C, 3)]
    scores[labels] = math.inf
    tail = torch.randperm(C - len(set(labels)), generator=rng)[: max(K - len(set(labels)), 0)] + len(set(labels))
    check_selection(backend, scores, [*range(len(set(labels))), *sorted(tail.tolist())], labels)


def test_classes_at_ranks_of_nan_and_infinite_scores(backend: Backend):
    """NaN ranks as −∞, and of equal scores the first class ranks first."""
    scores = torch.tensor([math.nan, -math.inf, 0.0, -0.0, math.inf, 2.0, math.nan, math.inf, 2.0])
    for first in range(9):
        check_selection(backend, scores, [*range(first, 9)], [])
    check_selection(backend, scores, [0, 1, 8], [4, 7, 6, 4])


def test_more_classes_than_are_counted(backend: Backend, monkeypatch):
    scores, ranks, labels = torch.arange(40.0).sin(), torch.tensor([0, 3, 20]), torch.tensor([], dtype=torch.int64)
    tensors = scores.to(backend.device), ranks.to(backend.device), labels.to(backend.device)
    counted = classes_at_ranks(*tensors)
    monkeypatch.setattr(class_selection, "MOST_CLASSES", 39)
    assert all(map(torch.equal, counted, classes_at_ranks(*tensors)))


LENGTHS = torch.tensor([3, 1, 200, 2, 7, 1, 129])


@pytest.mark.parametrize("class_ids", [[2], [0, 1, 3, 6], [6, 2, 4], list(range(7)), [1, 1, 5]], ids=str)
@pytest.mark.parametrize(("P", "spare"), [(0, 0), (2, 0), (5, 1), (140, 300)])
def test_packed_layout(backend: Backend, class_ids, P, spare):
    """Spare rows begin again at the first row; a program writes several hundred of them."""
    starts = P + LENGTHS.cumsum(0) - LENGTHS
    rows, offsets, ends = list(range(P)), [0], []
    for class_id in class_ids:
        rows += range(int(starts[class_id]), int(starts[class_id] + LENGTHS[class_id]))
        offsets.append(len(rows) - P)
        ends.append(len(rows) - 1)
    rows += range(spare)
    tensors = (x.to(backend.device) for x in (torch.tensor(class_ids), starts, LENGTHS))
    found = packed_layout(*tensors, P, len(rows))
    assert [x.tolist() for x in found] == [rows, offsets, ends]


def test_more_classes_than_are_packed(backend: Backend, monkeypatch):
    class_ids, lengths = (x.to(backend.device) for x in (torch.tensor([0, 2, 5]), LENGTHS))
    arguments = class_ids, lengths.cumsum(0), lengths, 4, 300
    packed = packed_layout(*arguments)
    monkeypatch.setattr(class_selection, "MOST_KEPT", 2)
    assert all(map(torch.equal, packed, packed_layout(*arguments)))


def test_opcheck(backend: Backend):
    scores, ids = torch.randn(9, device=backend.device), torch.tensor([0, 2, 4], device=backend.device)
    lengths = LENGTHS.to(backend.device)
    backend.opcheck(classes_at_ranks, (scores, ids, ids))
    backend.opcheck(classes_at_ranks, (scores, ids, None))
    backend.opcheck(packed_layout, (ids, lengths, lengths, 2, 300))

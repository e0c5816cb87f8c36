"""Recall at k against sorted lists, and the top k over chunks of classes against a stable sort."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from skipkernels import retrieval
from tests.allocations import allocated_bytes


def brute_force_recall(image, text, image_of_text, ks):
    """Ranks by sorting every list, with right candidates after wrong ones of the same score."""
    scores = (F.normalize(image, dim=1) @ F.normalize(text, dim=1).T).tolist()
    owner = image_of_text.tolist()

    def found(row, right, k):
        order = sorted(range(len(row)), key=lambda j: (-row[j], right[j]))
        return any(right[j] for j in order[:k])

    images = sorted(set(owner))
    by_image = {k: sum(found(scores[i], [o == i for o in owner], k) for i in images) / len(images) for k in ks}
    columns = list(zip(*scores, strict=True))
    by_text = {
        k: sum(found(columns[j], [i == o for i in range(len(image))], k) for j, o in enumerate(owner)) / len(owner)
        for k in ks
    }
    return by_image, by_text


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_recall_equals_brute_force(rows, monkeypatch):
    rng = torch.Generator().manual_seed(0)
    image_of_text = torch.randint(0, 20, (50,), generator=rng)  # a few images without a caption
    # Unit vectors of one entry ±1 have exact cosines with many ties.
    axes, signs = torch.randint(0, 6, (70,), generator=rng), torch.randint(0, 2, (70, 1), generator=rng) * 2.0 - 1
    exact = signs * F.one_hot(axes, 6)
    monkeypatch.setattr(retrieval, "_SCORES", rows * 20)
    for image, text in (exact.split([20, 50]), torch.randn(70, 6, generator=rng).split([20, 50])):
        ours = retrieval.recall(image, text, image_of_text, ks=(1, 3, 10))
        assert tuple(ours) == brute_force_recall(image, text, image_of_text, (1, 3, 10))


@pytest.mark.parametrize("texts", [*range(37, 61, 3), 119])
@pytest.mark.parametrize("width", [4, 768, 1024])
def test_recall_of_useless_embeddings_is_zero(width, texts):
    """Columns of a matrix product that should be equal differ in the last bits, for some sizes."""
    owner = torch.arange(texts) % 3
    for row in (torch.randn(width, generator=torch.Generator().manual_seed(texts)), torch.full((width,), torch.nan)):
        found = retrieval.recall(row.expand(3, -1), row.expand(texts, -1), owner, ks=(1, 2))
        assert found == ({1: 0.0, 2: 0.0}, {1: 0.0, 2: 0.0})


@pytest.mark.parametrize("chunk", [1, 2, 7, 1000])
@pytest.mark.parametrize("k", [1, 2, 5, 39, 40])
def test_top_k_logits_equal_ones_by_class(k, chunk, monkeypatch):
    """Products of small integers are exact, and most are equal."""
    monkeypatch.setattr(retrieval, "_SCORES", 6 * chunk)
    generator = torch.Generator().manual_seed(0)
    image, text = (torch.randint(-1, 2, (n, 3), generator=generator).float() for n in (6, 40))
    values, class_ids = (image @ text.T).sort(dim=1, descending=True, stable=True)
    expected, class_ids = values[:, :k], class_ids[:, :k]
    assert (expected[:, 1:] == expected[:, :-1]).any() or k == 1
    got = retrieval.top_k_logits(image, text, k)
    assert got[0].equal(expected) and got[1].equal(class_ids)
    assert got[0].equal((image @ text.T).topk(k).values)


def test_top_k_shows_logits_that_are_not_finite(monkeypatch):
    monkeypatch.setattr(retrieval, "_SCORES", 4)
    text = torch.ones(13, 3)
    for class_id in (0, 7, 12):
        spoiled = text.clone()
        spoiled[class_id] = torch.nan
        for k in (1, 3):
            assert retrieval.top_k_logits(torch.ones(2, 3), spoiled, k)[0][:, 0].isnan().all()


def test_top_k_memory_does_not_grow_with_classes():
    """A chunk of 2²² logits of four bytes; the rest are candidates."""
    image, text = torch.randn(64, 12), torch.randn(200_000, 12)
    peak = allocated_bytes(lambda: retrieval.top_k_logits(image, text, 5))
    assert peak <= (4 << 22) + (1 << 20) < 4 * len(image) * len(text) / 2

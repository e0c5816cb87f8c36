"""Features in memory."""

from __future__ import annotations

import pytest
import torch
from torch.utils.data import TensorDataset

from skipkernels.features.in_memory import collect


def images(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(count * 12.0).view(count, 3, 2, 2), torch.arange(count))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_collect_keeps_the_order(batch_size):
    seen: list[int] = []
    kept, labels = collect(images(7), lambda batch: 2 * batch.flatten(1), batch_size=batch_size, on_batch=seen.append)
    assert kept.rows.equal(2 * torch.arange(84.0).view(7, 12)) and labels.equal(torch.arange(7))
    assert sum(seen) == 7 and max(seen) <= batch_size


def test_collect_records_no_gradient():
    layer = torch.nn.Conv2d(3, 2, 2)
    assert not collect(images(3), layer)[0].rows.requires_grad


def test_collect_refuses_too_many_items(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 1 kB\n")
    monkeypatch.setattr("skipkernels.memory._PROC", tmp_path)
    collect(images(10), lambda batch: batch)  # 480 bytes of 1,024
    with pytest.raises(
        MemoryError,
        match=r"20 items of \[3, 2, 2\] torch.float32 .* Use a cache on the disk \(FeatureCache.build\), fewer",
    ):
        collect(images(20), lambda batch: batch)


def test_collect_of_an_empty_dataset():
    with pytest.raises(ValueError, match="no images"):
        collect(images(0))

"""Features in memory, and files that are whole or not there."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import TensorDataset

from skipkernels.cache import collect, memory, replace_file


def images(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(count * 12.0).view(count, 3, 2, 2), torch.arange(count))


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_collect_keeps_every_item_in_order(batch_size):
    seen: list[int] = []
    kept = collect(images(7), lambda batch: 2 * batch.flatten(1), batch_size=batch_size, on_batch=seen.append)
    encoded, labels = kept.tensors
    assert encoded.equal(2 * torch.arange(84.0).view(7, 12)) and labels.equal(torch.arange(7))
    assert sum(seen) == 7 and max(seen) <= batch_size


def test_collect_records_no_gradient():
    layer = torch.nn.Conv2d(3, 2, 2)
    assert not collect(images(3), layer).tensors[0].requires_grad


def test_collect_refuses_what_does_not_fit(monkeypatch, tmp_path):
    (tmp_path / "meminfo").write_text("MemTotal: 9 kB\nMemAvailable: 1 kB\n")
    monkeypatch.setattr(memory, "_MEMORY_INFO", tmp_path / "meminfo")
    collect(images(10), lambda batch: batch)  # 480 bytes of 1,024
    with pytest.raises(MemoryError, match=r"20 items of \[3, 2, 2\] torch.float32 .* Use fewer shots"):
        collect(images(20), lambda batch: batch)


def test_collect_of_nothing():
    with pytest.raises(ValueError, match="no images"):
        collect(images(0))


def test_replace_file_keeps_the_old_one_when_writing_fails(tmp_path):
    file = tmp_path / "file"
    replace_file(file, lambda temporary: temporary.write_text("old"))

    def fail(temporary):
        temporary.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        replace_file(file, fail)
    assert file.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"], "no temporary file is left"
    replace_file(file, lambda temporary: temporary.write_text("new"))
    assert file.read_text() == "new"


def test_a_file_has_the_permissions_that_new_files_have(tmp_path):
    (tmp_path / "plain").touch()
    replace_file(tmp_path / "ours", lambda temporary: save_file({"x": torch.ones(1)}, temporary))
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode

"""bench.gpu_model: its launches are those of bench.counts, and its times follow its assumptions."""

import pytest
import torch

from bench import counts, gpu_model, tables


def test_launches_are_those_that_are_counted():
    """The update is in backward, and in bf16 it writes the casts, which is counted of an update in `step`."""
    counted = {
        (row.precision, row.optimizer): row.launches
        for row in tables.read(counts.TABLE, counts.Row)
        if (row.model, row.B, row.C, row.memory) == (gpu_model.MODEL, 4, 1000, "fast")
    }
    casts = counted["bf16", counts.SGD] - counted["bf16", counts.KEPT]
    rows = [row for row in tables.read(gpu_model.TABLE, gpu_model.Row) if (row.B, row.C) == (4, 1000)]
    launches = {row.precision: row.launches for row in rows}
    in_backward = {precision: counted[precision, counts.IN_BACKWARD] for precision in ("fp32", "bf16")}
    assert launches == in_backward | {"bf16": in_backward["bf16"] - casts}


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(gpu_model, "MODEL", "vit-tiny")
    monkeypatch.setattr(gpu_model, "SKIP_LAYERS", 3)


def test_steps_are_recorded(tiny):
    ours, without_casts = (gpu_model.launches_of_ours(4, 20, precision) for precision in ("bf16", "fp32"))
    published = gpu_model.launches_of_published(4, 20, "bf16")
    update, update_fp32 = (next(x for x in step if x.name == "_sgd_momentum_kernel") for step in (ours, without_casts))
    weights, rest = divmod(update_fp32.nbytes, 5 * 4)
    assert update.triton and rest == 0, "weight and buffer read and written, gradient read; fp32"
    assert 0 < update.nbytes - update_fp32.nbytes < 2 * weights, "casts of the matrices"
    assert "_foreach_copy_" not in {launch.name for launch in ours}
    products = [launch for launch in ours if launch.shape]
    assert products and all(launch.dtype == torch.bfloat16 for launch in products if launch.flops > 1e6)
    assert len(published) > len(ours) and not any(launch.triton for launch in published)
    assert {launch.side for launch in ours} == {"", "text", "image"}
    assert [launch.side for launch in ours if "sgd" in launch.name] == ["", ""], "less than is gathered in backward"
    floor = sum(launch.floor for launch in ours)
    assert floor < gpu_model.packed(ours) < gpu_model.serial(ours) <= gpu_model.eager(ours)

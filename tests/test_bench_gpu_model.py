"""bench.gpu_model: its launches are those of bench.counts, and its times follow its assumptions."""

import pytest
import torch

from bench import counts, gpu_model, tables


def test_launches_are_those_that_are_counted():
    """The update is in backward, and in bf16 it writes the casts, which is counted of an update in `step`."""
    counted = {
        (row.precision, row.optimizer): row.launches
        for row in counts.read_table()
        if (row.model, row.B, row.C, row.memory) == (gpu_model.MODEL, 4, 1000, "fast")
    }
    casts = counted["bf16", counts.SGD] - counted["bf16", counts.KEPT]
    for row in tables.read(gpu_model.TABLE, gpu_model.Row):
        if row.key in ((gpu_model.OURS, 4, 1000, "fp32"), (gpu_model.OURS, 4, 1000, "bf16")):
            expected = counted[row.precision, counts.IN_BACKWARD] - (casts if row.precision == "bf16" else 0)
            assert row.launches == expected


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(gpu_model, "MODEL", "vit-tiny")
    monkeypatch.setattr(gpu_model, "SKIP_LAYERS", 3)


def test_steps_are_recorded(tiny):
    ours, published = (record(4, 20, "bf16") for record in gpu_model.RECORDERS.values())
    steps = ours, gpu_model.launches_of_ours(4, 20, "fp32")
    update, without_casts = (next(x for x in step if x.name == "_sgd_momentum_kernel") for step in steps)
    weights, rest = divmod(without_casts.nbytes, 5 * 4)
    assert update.triton and rest == 0, "weight and buffer read and written, gradient read; fp32"
    assert 0 < update.nbytes - without_casts.nbytes < 2 * weights, "casts of the matrices"
    assert "_foreach_copy_" not in {launch.name for launch in ours}
    products = [launch for launch in ours if launch.shape]
    assert products and all(launch.dtype == torch.bfloat16 for launch in products if launch.flops > 1e6)
    assert len(published) > len(ours) and not any(launch.triton for launch in published)
    row = gpu_model.row_of(gpu_model.OURS, 4, 20, "bf16", ours)
    assert row.floor_us < row.graph_us < row.eager_us and row.launches == len(ours)


def test_sides_overlap(tiny):
    launches = gpu_model.launches_of_ours(4, 20, "bf16")
    assert {launch.side for launch in launches} == {"", "text", "image"}
    assert [launch.side for launch in launches if "sgd" in launch.name] == ["", ""], "less than is gathered in backward"
    alone = gpu_model.Launch("one", True, 0, 0, torch.float32, None)
    sides = [alone, *[alone._replace(side="text")] * 3, *[alone._replace(side="image")] * 2]
    assert gpu_model.overlapped(sides) == pytest.approx(4 * (gpu_model.START + gpu_model.GAP))
    full = alone._replace(nbytes=int(gpu_model.BANDWIDTH))  # a second
    assert gpu_model.overlapped([alone, full._replace(side="text"), full._replace(side="image")]) > 2


def test_a_product_takes_whole_tiles():
    def seconds(rows):
        return gpu_model.seconds_of_product(1, rows, 128 * gpu_model.PROCESSORS, 768, torch.bfloat16)

    assert seconds(128) == seconds(100) < seconds(129)
    flops = 2 * 128 * 128 * gpu_model.PROCESSORS * 768
    assert seconds(128) >= flops / gpu_model.RATES[torch.bfloat16]


def test_products_in_tf32_are_faster(tiny):
    whole, tf32 = (gpu_model.steps_of(gpu_model.OURS, 4, 20, precision) for precision in ("fp32", "tf32"))
    assert [launch.name for launch in whole] == [launch.name for launch in tf32]
    for launch, faster in zip(whole, tf32, strict=True):
        assert faster.seconds <= launch.seconds if launch.shape else faster == launch
    assert sum(launch.seconds for launch in tf32) < sum(launch.seconds for launch in whole)

"""recipes.pictograms: cleaned names, what is held out, more tasks, and a pre-training run that is interrupted."""

import json
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch

from recipes.pictograms import more, pool, pretrain, sets
from recipes.pictograms.table import Icon
from skipkernels.app.demo import pictogram_tiny


def icon(prefix, name, mono="1", category=""):
    return Icon(prefix, sets.family(prefix), "MIT", name.replace(" ", "-"), name, "", mono, category)


def test_training_rows_hold_out_families_their_drawings_and_words():
    rows = [icon("noto", "cat"), icon("mdi", "cat"), icon("ri", "cat"), icon("ri", "cat"), icon("ph", "dogs")]
    rows += [icon("ph", "hot dog"), icon("noto-v1", "bird"), icon("game-icons", "bird"), icon("ph", "bird")]
    digests = np.array([7, 7, 8, 8, 9, 10, 11, 12, 1], np.uint64)  # mdi's cat is noto's; 1 is blank
    assert pool.training_rows(rows, digests, {"dog"}) == [2]
    assert pool.training_rows(rows, digests, ()) == [2, 4, 5]


def test_arrays_leave_out_blank_and_equal_images():
    def picture(name, value):
        return more.Picture(name, "set", None if value is None else np.full((2, 2, 3), value, np.uint8))

    train = [picture("cat", 1), picture("dog", 2), picture("ox", 3), picture("hen", 4)]
    test = [picture("cat", 5), picture("dog", 2), picture("ox", 6), picture("hen", None), picture("cat", 7)]
    found = more.arrays("photos", {"train": train, "test": test})
    assert found["photos/train/names"].tolist() == ["cat", "ox"]
    assert found["photos/test/names"].tolist() == ["cat", "ox", "cat"]
    assert found["photos/test/images"][:, 0, 0, 0].tolist() == [5, 6, 7]


@pytest.fixture
def small_pool():
    rng = np.random.default_rng(0)
    words = [f"{a}{b}" for a in ("red", "big", "old", "wet") for b in ("cat", "dog", "cup")]
    return pool.Pool(
        alpha=rng.integers(0, 256, (24, 40, 40), np.uint8),
        color=rng.integers(0, 256, (12, 40, 40, 4), np.uint8),
        label=np.arange(36) % 12,
        style=np.array(["outline", ""] * 18),
        names=np.array(words),
        narrow=8,
        test_images=rng.integers(0, 256, (8, 40, 40, 4), np.uint8),
        test_set=np.repeat(pool.TEST_SETS, 2),
        test_name=np.array(words[:2] * 4),
        test_task=np.array(["food"] * 8),
        test_group=np.array(["narrow"] * 8),
    )


@pytest.fixture
def options(tmp_path):
    settings = json.loads(pictogram_tiny.CONFIG.read_text()) | {"embed_dim": 16}
    settings["text_cfg"] |= {"width": 64, "layers": 1, "heads": 1}
    config = tmp_path / "pictogram-test.json"
    config.write_text(json.dumps(settings))
    open_clip.add_model_config(config)
    steps = {"names_steps": 3, "pairs_steps": 2, "wide_steps": 2, "decay": 2, "every": 2}
    return pretrain.Options(out=tmp_path, model=config.stem, batch=4, texts=6, **steps)


def test_run_interrupted_in_each_phase_gives_the_same_weights(small_pool, options, tmp_path):
    whole = pretrain.Run(replace(options, out=tmp_path / "whole"), small_pool)
    whole.train()
    for _ in range(4):
        run = pretrain.Run(options, small_pool)
        for _ in range(min(2, options.steps - run.step)):
            run.train_step()
        run.save()
    assert run.step == whole.step == 7
    assert all(torch.equal(one, other) for one, other in zip(run.averaged, whole.averaged, strict=True))
    constant = torch.load(tmp_path / "whole/constant.pt", weights_only=True)
    assert constant["step"] == 5  # before the decay
    assert [row[:3] for row in whole.rows] == [[2, "names", 8], [4, "pairs", 16], [6, "wide", 24], [7, "wide", 28]]

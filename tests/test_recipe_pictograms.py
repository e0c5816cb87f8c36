"""recipes.pictograms: cleaned names, what is held out, more tasks, and a pre-training run that is interrupted."""

import json
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch

from recipes.pictograms import more, pool, pretrain, sets, table
from recipes.pictograms.table import Icon
from skipkernels.app.demo import pictogram_tiny


def test_icons_leaves_out_logos_skin_tones_and_licences():
    def icon_set(licence, category, *raws, **other):
        info = {"license": {"spdx": licence}, "category": category, "palette": False}
        return {"info": info, "icons": {raw: {"body": ""} for raw in raws}, **other}

    brands = {f"logos{i}": icon_set("MIT", "Logos", "firefox") for i in range(3)}
    data = brands | {
        "mdi": icon_set("MIT", "UI", "cat-outline", "firefox", "x-logo", "y", categories={"Brand / Logo": ["y"]}),
        "noto": icon_set("MIT", "Emoji", "cat", "man-dark-skin-tone"),
        "entypo": icon_set("CC-BY-SA-4.0", "UI", "dog"),
        "openmoji": icon_set("CC-BY-SA-4.0", "Emoji", "dog"),
    }
    found = [(icon.set, icon.name, icon.style) for icon in table.icons(data)]
    assert found == [("mdi", "cat", "outline"), ("noto", "cat", ""), ("openmoji", "dog", "")]


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


def test_export_embeds_as_the_averaged_model_in_open_clip(small_pool, options):
    run = pretrain.Run(options, small_pool)
    for _ in range(3):
        run.train_step()
    run.export()
    model = open_clip.create_model(options.model, pretrained=str(options.out / f"{pretrain.NAME}.safetensors"))
    assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in model.modules())
    views = run.views(np.arange(8), np.arange(8))
    run.model.eval()
    with run.average(), torch.no_grad():
        expected = pretrain.encode_image(run.model, views)
        torch.testing.assert_close(pretrain.encode_image(model, views), expected, rtol=0, atol=1e-2)  # fp16 weights

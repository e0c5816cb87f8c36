"""Glyphs: distinct characters and reproducible images; glyph-tiny: its file."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file

from skipkernels.app.data import open_source
from skipkernels.app.demo import glyph_tiny, glyphs


def test_block_characters_count():
    assert len(glyphs.block_characters(list(glyphs.BLOCKS), ["sans"])) > 5000


def test_distinct_characters_without_equal_pixels():
    latin, cyrillic, greek = ord("A"), 0x0410, 0x0391
    assert glyphs.master(latin, "sans").tobytes() == glyphs.master(cyrillic, "sans").tobytes()
    assert glyphs.distinct_characters([greek, cyrillic, latin], "sans") == [latin]
    assert glyphs.distinct_characters([cyrillic], "sans") == [cyrillic], "distinct if alone"


def test_distinct_characters_without_blank_unnamed_combining():
    space_like, unassigned, combining = 0x2003, 0x0378, 0x0301
    assert glyphs.distinct_characters([space_like, unassigned, combining, ord("x")], "sans") == [ord("x")]


def test_block_characters_differ_in_every_font():
    kept = glyphs.block_characters(["latin-extended-additional"], glyphs.HELD_OUT_FONTS)
    for font in glyphs.HELD_OUT_FONTS:
        assert len({glyphs.master(c, font).tobytes() for c in kept}) == len(kept) > 200


def test_glyph_dataset_images_are_independent():
    fonts = ["serif", "serif-bold"]
    alone = glyphs.GlyphDataset([ord("g")], fonts, per_class=4, seed=3)
    among = glyphs.GlyphDataset([ord("a"), ord("g"), ord("z")], fonts, per_class=6, seed=3)
    for number in range(4):
        assert alone[number][0].tobytes() == among[6 + number][0].tobytes()
    other = glyphs.GlyphDataset([ord("g")], fonts, per_class=4, seed=4)
    assert all(alone[number][0].tobytes() != other[number][0].tobytes() for number in range(4))


def test_glyph_dataset_labels():
    dataset = glyphs.GlyphDataset([ord("a"), ord("b")], ["sans"], per_class=3, seed=0)
    assert dataset.labels == [dataset[index][1] for index in range(len(dataset))]
    with pytest.raises(IndexError):
        dataset[6]


def test_master_shrinks_wide_characters():
    pixels = np.asarray(glyphs.master(0xFDFA, "sans"))  # an Arabic ligature several letters wide
    assert pixels.min() < 128
    assert (pixels[:, 0] == 255).all() and (pixels[:, -1] == 255).all()


def test_draw_glyph_noise_and_size():
    rng = np.random.default_rng(0)
    assert glyphs.draw_glyph(ord("a"), "sans", rng, size=48).size == (48, 48)
    noisy = np.asarray(glyphs.draw_glyph(ord("a"), "sans", rng, noise=0.2))
    assert len(np.unique(noisy)) > 100


@pytest.mark.parametrize("call", [lambda: glyphs.block_characters(["klingon"], ["sans"]),
                                  lambda: glyphs.distinct_characters([65], "comic")])  # fmt: skip
def test_unknown_block_or_font(call):
    with pytest.raises(ValueError, match="choose from"):
        call()


# ---- glyph-tiny --------------------------------------------------------------------------------------------------


def test_glyph_tiny_is_small_and_loads():
    assert glyph_tiny.WEIGHTS.stat().st_size <= 4_000_000
    glyph_tiny.register()
    model = open_clip.create_model("glyph-tiny")
    model.load_state_dict(glyph_tiny.state_dict())


def test_save_and_state_dict_keep_used_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(glyphs, "FONTS", {name: glyphs.FONTS[name] for name in glyphs.HELD_OUT_FONTS})
    glyph_tiny.register()
    model = open_clip.create_model("glyph-tiny").half().float()
    glyph_tiny.save(model, tmp_path / "model.safetensors")
    state, used = glyph_tiny.state_dict(tmp_path / "model.safetensors"), glyph_tiny.used_token_ids()
    assert state["token_embedding.weight"][used].equal(model.token_embedding.weight[used])
    assert state["visual.proj"].equal(model.visual.proj)
    tokens = open_clip.get_tokenizer("glyph-tiny")(open_source("glyphs").prompts[0])
    assert set(tokens.unique().tolist()) <= set(used.tolist())


def test_state_dict_unused_tokens_differ():
    glyph_tiny.register()
    model = open_clip.create_model("glyph-tiny").eval()
    model.load_state_dict(glyph_tiny.state_dict())
    tokens = open_clip.get_tokenizer("glyph-tiny")([f"a photo of a {name}." for name in ("banana", "guitar", "cactus")])
    names = set(tokens[:, 5].tolist())
    assert len(names) == 3 and not names & set(load_file(glyph_tiny.WEIGHTS)["token_ids"].tolist())
    with torch.no_grad():
        text = model.encode_text(tokens, normalize=True)
    assert torch.pdist(text).min() > 0.05  # with rows of zeros, 0


def test_state_dict_is_reproducible():
    first, again = (glyph_tiny.state_dict()["token_embedding.weight"] for _ in range(2))
    assert first.equal(again)

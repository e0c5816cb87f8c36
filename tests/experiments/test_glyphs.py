"""Glyphs: which characters count, and that an image depends on what it is and on nothing else."""

from __future__ import annotations

import numpy as np
import open_clip
import pytest
import torch
from safetensors.torch import load_file

from skipkernels.data import open_source
from skipkernels.experiments import glyph_tiny, glyphs


def test_over_five_thousand_classes_in_one_font():
    assert len(glyphs.block_characters(list(glyphs.BLOCKS), ["sans"])) > 5000


def test_characters_that_look_alike_are_left_out_by_their_pixels():
    latin, cyrillic, greek = ord("A"), 0x0410, 0x0391
    assert glyphs.master(latin, "sans").tobytes() == glyphs.master(cyrillic, "sans").tobytes()
    assert glyphs.distinct_characters([greek, cyrillic, latin], "sans") == [latin]
    assert glyphs.distinct_characters([cyrillic], "sans") == [cyrillic], "alone it is told apart"


def test_blank_and_unnamed_and_combining_characters_are_left_out():
    space_like, unassigned, combining = 0x2003, 0x0378, 0x0301
    assert glyphs.distinct_characters([space_like, unassigned, combining, ord("x")], "sans") == [ord("x")]


def test_every_kept_character_differs_from_every_other():
    kept = glyphs.block_characters(["latin-extended-additional"], glyphs.HELD_OUT_FONTS)
    for font in glyphs.HELD_OUT_FONTS:
        assert len({glyphs.master(c, font).tobytes() for c in kept}) == len(kept) > 200


def test_an_image_does_not_depend_on_the_rest_of_the_dataset():
    fonts = ["serif", "serif-bold"]
    alone = glyphs.GlyphDataset([ord("g")], fonts, per_class=4, seed=3)
    among = glyphs.GlyphDataset([ord("a"), ord("g"), ord("z")], fonts, per_class=6, seed=3)
    for number in range(4):
        assert alone[number][0].tobytes() == among[6 + number][0].tobytes()
    other = glyphs.GlyphDataset([ord("g")], fonts, per_class=4, seed=4)
    assert all(alone[number][0].tobytes() != other[number][0].tobytes() for number in range(4))


def test_labels_without_drawing():
    dataset = glyphs.GlyphDataset([ord("a"), ord("b")], ["sans"], per_class=3, seed=0)
    assert dataset.labels == [dataset[index][1] for index in range(len(dataset))]
    with pytest.raises(IndexError):
        dataset[6]


def test_a_wide_character_is_shrunk_to_fit():
    pixels = np.asarray(glyphs.master(0xFDFA, "sans"))  # an Arabic ligature several letters wide
    assert pixels.min() < 128
    assert (pixels[:, 0] == 255).all() and (pixels[:, -1] == 255).all()


def test_noise_and_size():
    rng = np.random.default_rng(0)
    assert glyphs.draw_glyph(ord("a"), "sans", rng, size=48).size == (48, 48)
    noisy = np.asarray(glyphs.draw_glyph(ord("a"), "sans", rng, noise=0.2))
    assert len(np.unique(noisy)) > 100


@pytest.mark.parametrize("call", [lambda: glyphs.block_characters(["klingon"], ["sans"]),
                                  lambda: glyphs.distinct_characters([65], "comic")])  # fmt: skip
def test_unknown_blocks_and_fonts_are_named(call):
    with pytest.raises(ValueError, match="choose from"):
        call()


# ---- glyph-tiny --------------------------------------------------------------------------------------------------


def test_the_shipped_model_is_small_and_loads():
    assert glyph_tiny.WEIGHTS.stat().st_size <= 4_000_000
    glyph_tiny.register()
    model = open_clip.create_model("glyph-tiny")
    model.load_state_dict(glyph_tiny.state_dict())


def test_saving_and_loading_keeps_every_row_in_use(tmp_path):
    glyph_tiny.register()
    model = open_clip.create_model("glyph-tiny").half().float()
    glyph_tiny.save(model, tmp_path / "model.safetensors")
    state, used = glyph_tiny.state_dict(tmp_path / "model.safetensors"), glyph_tiny.used_token_ids()
    assert state["token_embedding.weight"][used].equal(model.token_embedding.weight[used])
    assert state["visual.proj"].equal(model.visual.proj)
    tokens = open_clip.get_tokenizer("glyph-tiny")(open_source("glyphs").prompts[0])
    assert set(tokens.unique().tolist()) <= set(used.tolist())


def test_state_dict_tells_words_outside_glyph_names_apart():
    glyph_tiny.register()
    model = open_clip.create_model("glyph-tiny").eval()
    model.load_state_dict(glyph_tiny.state_dict())
    tokens = open_clip.get_tokenizer("glyph-tiny")([f"a photo of a {name}." for name in ("banana", "guitar", "cactus")])
    names = set(tokens[:, 5].tolist())
    assert len(names) == 3 and not names & set(load_file(glyph_tiny.WEIGHTS)["token_ids"].tolist())
    with torch.no_grad():
        text = model.encode_text(tokens, normalize=True)
    assert torch.pdist(text).min() > 0.05  # with rows of zeros, 0


def test_state_dict_draws_the_same_rows_each_time():
    first, again = (glyph_tiny.state_dict()["token_embedding.weight"] for _ in range(2))
    assert first.equal(again)

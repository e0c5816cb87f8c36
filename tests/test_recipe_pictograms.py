"""recipes.pictograms: cleaned names, what is held out, more tasks, and a pre-training run that is interrupted."""

import io
import json
import tarfile
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from recipes.pictograms import count, more, names, pool, pretrain, sets, table
from recipes.pictograms.table import Icon
from skipkernels.app.demo import pictogram_tiny


@pytest.mark.parametrize(
    "raw, expected",
    [
        ("access-time-20-filled", ("access time", "filled")),
        ("coffee-cup-02", ("coffee cup", "")),
        ("sharp-two-tone", ("sharp", "two-tone")),
        ("light-bulb", ("light bulb", "")),
        ("phone-outgoing2", ("phone outgoing", "")),
        ("outline", ("outline", "")),
        ("outline-moped", ("moped", "outline")),
    ],
)
def test_clean_removes_styles_sizes_and_numbers(raw, expected):
    assert names.clean(raw, names.set_styles([raw]), prefixes={"outline"}) == expected


def test_set_styles_keeps_words_that_few_names_end_with():
    raws = [f"icon{i}-bold" for i in range(30)] + [f"icon{i}" for i in range(30)] + ["traffic-light"]
    assert "bold" in names.set_styles(raws)
    assert "light" not in names.set_styles(raws)
    assert "light" in names.set_styles(raws, suffixes=["bold-light"])


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


def test_choose_takes_families_in_turn():
    rows = [icon("mdi", "cat")] * 50 + [icon(prefix, "cat") for prefix in ("ri", "ph", "tabler")] + [icon("ri", "ox")]
    ordered, narrow, chosen = pool.choose(rows, range(len(rows)))
    assert (ordered, narrow) == (["cat", "ox"], 1)
    assert {50, 51, 52, 53} < set(chosen) and len(chosen) == pool.NARROW_IMAGES + 1


def test_held_out_words_are_the_same_each_time():
    concrete = [f"word{chr(97 + i // 26)}{chr(97 + i % 26)}".replace("word", "w") for i in range(400)]
    first, again = names.held_out_words(concrete), names.held_out_words(reversed(concrete))
    assert first == again and len(first) == names.WORDS_HELD_OUT


def test_counts_a_name_of_a_family_as_one_drawing():
    rows = [icon("fa6-solid", "cat"), icon("fa7-solid", "cat"), icon("ri", "cat"), icon("ri", "hot dog")]
    assert dict(zip(count.COLUMNS, count.counts(rows), strict=True)) == {
        "images": 4, "drawings": 3, "names": 2, "words": 3, "families": 2, "sets": 3, "licences": 1,
    }  # fmt: skip


def test_licences_names_each_set_once_with_author_and_licence():
    information = {
        prefix: {
            "name": prefix.title(),
            "author": {"name": f"{prefix}'s author"},
            "license": {"title": "T", "spdx": "MIT"},
        }
        for prefix in ("mdi", "ri", "unused")
    }
    text = count.licences("Of", [icon("mdi", "cat"), icon("mdi", "dog"), icon("ri", "cat")], information)
    assert text.count("Mdi (mdi), 2 icons\n  by mdi's author") == text.count("Ri (ri), 1 icons") == 1
    assert text.count("T (MIT)") == 2 and "unused" not in text


def named(drawings):
    return [(own.set, own.name) for own in drawings]


def test_game_icons_are_tested_and_others_trained_on():
    prefixes = ("game-icons", "noto", "mdi", "ri", "openmoji")
    rows = [icon(prefix, "cat") for prefix in prefixes]
    rows += [icon("game-icons", "ox"), icon("mdi", "dog"), icon("game-icons", "hen"), icon("ph", "hen")]
    found = more.game_icons(more.by_family(rows))
    assert named(found["test"]) == [("game-icons", "cat"), ("game-icons", "hen")]
    cats = {prefix for prefix, name in named(found["train"]) if name == "cat"}
    assert len(cats) == 2 and cats < {"noto", "mdi", "ri"} and ("ph", "hen") in named(found["train"])


def test_many_classes_are_drawn_by_two_families_of_pre_training():
    rows = [icon(prefix, "cat") for prefix in ("mdi", "ri", "ri", "noto")]
    rows += [icon(prefix, "dog") for prefix in ("fa6-solid", "fa7-solid", "noto")]
    found = more.many_classes(more.by_family(rows))
    assert sorted(named(found["train"] + found["test"])) == [("mdi", "cat"), ("ri", "cat")]


def test_flags_have_the_names_of_twemoji():
    characters = {"1f1eb-1f1f7": "flag-france", "1f1f1-1f1f0": "flag-sri-lanka", "1f1ee-1f1f9": "flag-italy"}
    characters |= {"1f431": "cat", "1f3f4-200d": "black-flag"}
    data = {prefix: {"chars": characters} for prefix in ("twemoji", "openmoji")} | {
        "cif": {"icons": {"fr": {}, "lk": {}}}
    }
    found = more.flags(data)
    assert named(found["test"]) == [("openmoji", "flag of france"), ("openmoji", "flag of sri lanka")]
    assert [own[1:] for own in found["train"][:2]] == [("twemoji", "flag-france"), ("cif", "fr")]


def test_stamps_are_photographs_with_a_known_name():
    image = Image.new("RGBA", (40, 20))
    image.paste("red", (10, 5, 30, 15))
    photo = io.BytesIO()
    image.save(photo, "PNG")
    stored = {"frog-1.png": photo.getvalue(), "frog-1.txt": b"A green frog.\nde=Ein Frosch."}
    stored |= {"bat.png": photo.getvalue(), "bat.svg": b"", "bat.txt": b"A bat."}
    stored |= {"cartoon/owl.png": photo.getvalue(), "cartoon/owl.txt": b"An owl."}
    stored |= {"x.png": photo.getvalue(), "x.txt": b"An Emu!", "y.png": photo.getvalue(), "y.txt": b"Say cheese!"}
    with tarfile.open(fileobj=(archive := io.BytesIO()), mode="w") as files:
        for name, content in stored.items():
            member = tarfile.TarInfo(f"./usr/share/tuxpaint/stamps/{name}")
            member.size = len(content)
            files.addfile(member, io.BytesIO(content))
    with tarfile.open(fileobj=io.BytesIO(archive.getvalue())) as files:
        frog, emu = more.stamps(files, {"bat", "frog", "owl", "emu"})
    assert (frog.name, emu.name) == ("frog", "emu")
    assert (frog.image[32, 1:63] == (255, 0, 0)).all() and (frog.image[:12] == 255).all()


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


def test_captions_have_the_tokens_of_their_text(options):
    named = ["coffee cup", "cat o'nine tails"]
    captions = pretrain.Captions(options.model, named, ["outline", ""])
    openings = ("", "an icon of a ", "an outline icon of a ")
    expected = captions.tokenizer([opening + name for name in named for opening in openings])
    drawn = captions.draw(np.array([0, 1] * 50), ["outline", ""] * 50, np.random.default_rng(0))
    assert {tuple(row) for row in drawn[0::2].tolist()} == {tuple(row) for row in expected[:3].tolist()}
    assert {tuple(row) for row in drawn[1::2].tolist()} == {tuple(row) for row in expected[3:5].tolist()}


def test_name_table_adds_the_vectors_of_words():
    table = pretrain.NameTable(["red cat", "cat"], 8)
    red, cat = table.words.weight[1], table.words.weight[0]
    torch.nn.init.normal_(table.own)
    expected = torch.stack([(red + cat) / 2, cat]) + table.own
    torch.testing.assert_close(table(), torch.nn.functional.normalize(expected, dim=-1))


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

"""Folders of images: splits, class names, and skipped files."""

from __future__ import annotations

import json
import os
import unicodedata

import hypothesis
import hypothesis.strategies as st
import pytest

from skipkernels.app.data import TaskOptions, load_task, open_source
from skipkernels.app.data.images import Images
from skipkernels.app.data.splits import listed_source
from tests.app.data.pictures import contents, draw_image, make_folders


def open_folder(root):
    return open_source(f"imagefolder:{root}")


# ---- splits ----------------------------------------------------------------------------------------------------------


def test_open_image_folder_splits_by_hash(tmp_path):
    source = open_folder(make_folders(tmp_path, {"dog": 10, "cat": 7, "sea_lion": 2}))
    assert source.classes == ("cat", "dog", "sea lion")
    assert source.prompts == (["a photo of a cat.", "a photo of a dog.", "a photo of a sea lion."],)
    parts = {split: contents(source, split) for split in ("train", "val", "test")}
    counts = {split: {name: len(found) for name, found in part.items()} for split, part in parts.items()}
    assert counts == {
        "train": {"cat": 4, "dog": 5, "sea lion": 1},
        "val": {"cat": 1, "dog": 2},
        "test": {"cat": 2, "dog": 3, "sea lion": 1},
    }
    names = [name for part in parts.values() for found in part.values() for name in found]
    assert sorted(names) == sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.png"))
    assert [note for note in source.notes if "split by a hash of their names: 10 train, 3 val, 6 test" in note]


def test_split_by_hash_fixed_values(tmp_path):
    """A change would make test images of earlier versions training images."""
    source = open_folder(make_folders(tmp_path, {"dog": 9, "cat": 7}))
    assert source.images("test").names == ["cat/00.png", "cat/04.png", "dog/00.png", "dog/03.png", "dog/08.png"]


@hypothesis.given(st.lists(st.lists(st.text(min_size=1), min_size=2, max_size=30, unique=True), min_size=1, max_size=4))
def test_hash_splits_30_and_20_percent_in_any_order(classes):
    found = [(label, f"{label}/{name}") for label, names in enumerate(classes) for name in names]

    def splits_of(listed):
        labels, names = zip(*listed, strict=True)
        images = Images([None] * len(names), labels, names)
        source = listed_source("a", images, list(map(str, range(len(classes)))), None, None)
        return {split: set(zip(part.labels, part.names, strict=True)) for split, part in source.splits.items()}

    parts = splits_of(found)
    assert splits_of(found[::-1]) == parts
    assert sorted(one for part in parts.values() for one in part) == sorted(found)
    for label, names in enumerate(classes):
        count = {split: sum(of == label for of, _ in parts.get(split, ())) for split in ("train", "val", "test")}
        assert count["train"] and count["test"]
        assert abs(count["test"] - 0.3 * len(names)) <= 0.5 and abs(count["val"] - 0.2 * len(names)) <= 0.5


@pytest.mark.parametrize("names", [("train", "validation", "test"), ("Training", "Valid", "TESTING")])
def test_open_image_folder_uses_split_folders(tmp_path, names):
    train, val, test = names
    source = open_folder(make_folders(tmp_path, {f"{train}/cat": 3, f"{train}/dog": 2, f"{val}/cat": 1, f"{val}/dog": 1,
                                            f"{test}/cat": 1, f"{test}/dog": 4}))  # fmt: skip
    assert {split: len(source.images(split)) for split in ("train", "val", "test")} == {"train": 5, "val": 2, "test": 5}
    assert contents(source, "test")["cat"] == [f"{test}/cat/00.png"]
    assert source.notes == ()


def test_open_image_folder_val_without_test(tmp_path):
    source = open_folder(make_folders(tmp_path, {"train/cat": 3, "train/dog": 2, "valid/cat": 1, "valid/dog": 1}))
    assert contents(source, "test") == {"cat": ["valid/cat/00.png"], "dog": ["valid/dog/00.png"]}
    assert "the val images are the test images" in source.notes[0]


def test_open_image_folder_train_alone_is_split_by_hash(tmp_path):
    source = open_folder(make_folders(tmp_path, {"train/cat": 10, "train/dog": 10}))
    assert [len(source.images(split)) for split in ("train", "val", "test")] == [10, 4, 6]
    assert contents(source, "val")["cat"][0].startswith("train/cat/")


def test_open_image_folder_test_alone_is_not_split(tmp_path):
    source = open_folder(make_folders(tmp_path, {"test/cat": 2, "test/dog": 1}))
    assert source.splits.keys() == {"test"} and len(source.images("test")) == 3


def test_open_image_folder_class_named_train(tmp_path):
    assert open_folder(make_folders(tmp_path, {"train": 2, "tram": 2})).classes == ("train", "tram")


@pytest.mark.parametrize("path", ["pets", "~/pets"])
def test_open_image_folder_relative_path_and_home(tmp_path, monkeypatch, path):
    """Images are found after a change of the working directory."""
    make_folders(tmp_path / "pets", {"cat": 2, "dog": 2})
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    source = open_folder(path)
    monkeypatch.chdir("/")
    assert len(contents(source, "test")) == 2 and source.name == f"imagefolder:{path}"


# ---- skipped files ---------------------------------------------------------------------------------------------------


def test_open_image_folder_notes_other_files(tmp_path):
    make_folders(tmp_path, {"cat": 2, "dog": 2, "cat/more": 1})
    for name in ("cat/notes.txt", "dog/labels.csv", "dog/Thumbs.db", "dog/other.TXT", "cat/.DS_Store", "readme.md"):
        (tmp_path / name).write_text("x")
    source = open_folder(tmp_path)
    assert sum(map(len, source.splits.values())) == 5
    assert f"imagefolder:{tmp_path}: skipped files that are not images: .csv 1, .db 1, .txt 2." in source.notes


# ---- class names -----------------------------------------------------------------------------------------------------

COMPOSED = "Küche"
DECOMPOSED = unicodedata.normalize("NFD", COMPOSED)  # as on some file systems


def test_class_names_compose_unicode(tmp_path):
    assert COMPOSED != DECOMPOSED
    source = open_folder(make_folders(tmp_path, {DECOMPOSED: 2, "日本_語": 2, "naïve": 2}))
    assert source.classes == (COMPOSED, "naïve", "日本 語")
    assert contents(source, "test")[COMPOSED][0].startswith(f"{DECOMPOSED}/")


FOLDERS = {"n01": 2, "n02": 2, "n03": 2}


def test_class_names_from_file(tmp_path):
    make_folders(tmp_path, FOLDERS)
    names = {"n02": "dog", "n01": "sea_lion", "n03": "owl", "n99": "not here"}
    (tmp_path / "classes.json").write_text(json.dumps(names))
    source = open_folder(tmp_path)
    assert source.classes == ("sea lion", "dog", "owl")
    assert contents(source, "test")["dog"][0].startswith("n02/")


UNUSUAL = [b"a\nb", b"\x1b[31m", b"-rf", b"[b]", b"\xff\xfe", b"x" * 251, b"\xe2\x80\xae", b" ", b"%s{}", b"'\""]


def test_load_task_unusual_file_names(tmp_path):
    """Files are listed, split, chosen and loaded."""
    draw_image(tmp_path / "one.png")
    for folder in (b"cat", b"\x1b[2J[b]"):
        os.mkdir(os.fsencode(tmp_path) + b"/" + folder)
        for name in UNUSUAL:
            os.link(tmp_path / "one.png", os.fsencode(tmp_path) + b"/" + folder + b"/" + name + b".png")
    task = load_task(f"imagefolder:{tmp_path}", TaskOptions(protocol="few-shot", shots=9, validation="auto"))
    assert len(task.train) == 10 and all(note.isprintable() for note in task.notes)
    assert any(r"\x1b[2J[b] (5)" in note for note in task.notes)
    assert [task.train[i][0].mode for i in range(10)] == ["RGB"] * 10

"""`skipkernels check`, and runs on datasets with images that can't be read."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from skipkernels.app.cli.main import main
from skipkernels.app.config import TuneConfig
from skipkernels.app.data import InputError, TaskOptions, load_task
from skipkernels.app.data.coop import DATASETS
from skipkernels.app.data.shots import class_sizes_note
from skipkernels.app.data.unreadable import without_unreadable
from skipkernels.app.train import tune
from skipkernels.app.train.setup import build_task
from tests.app.data.pictures import make_coop

SETTINGS = {"method": "zero-shot", "device": "cpu", "shots": "all"}


def photo(seed: int) -> Image.Image:
    blocks = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((120, 90))


@pytest.fixture
def data(tmp_path) -> Path:
    """Two classes in two splits, without duplicates."""
    for number in range(24):
        path = tmp_path / "data" / ("test" if number % 4 == 3 else "train") / ("cat", "dog")[number // 12]
        path.mkdir(parents=True, exist_ok=True)
        photo(number).save(path / f"{number}.png")
    return tmp_path / "data"


def check(capsys, data: Path, *options: object) -> tuple[int, str]:
    code = main(["check", f"imagefolder:{data}", *map(str, options)])
    return code, capsys.readouterr().out


def test_check_without_findings(data, capsys, monkeypatch, recwarn):
    """The EXIF data of an image end too early, of which Pillow warns."""
    monkeypatch.delenv("COLUMNS", raising=False)
    photo(0).save(data / "train/cat/0.png", exif=b"Exif\0\0II*\0\x08\0\0\0\x05\0\x12\x01\x03\0\x01")
    code, out = check(capsys, data)
    assert not [each for each in recwarn if "EXIF" in str(each.message)]
    assert code == 0 and "no unreadable images, no duplicates" in out
    heads = ("split", "images", "unreadable", "classes", "per class", "smallest", "median", "largest")
    assert all(head in out for head in heads) and out.count("120×90") == 6, "in a pipe, the table is not cut"
    assert "fewer than 16 training images: 2 of 2 classes: cat 9, dog 9" in out


def test_check_and_tune_name_classes_of_different_size(data, capsys):
    for number in range(100, 118):
        photo(number).save(data / "train" / "cat" / f"{number}.png")
    note = "classes differ in size: of 36 train{} images cat has 27 and dog 9."
    assert note.format("") in check(capsys, data)[1]
    task = build_task(TuneConfig(data=f"imagefolder:{data}", protocol="few-shot", shots="all", validation="none"))
    (found,) = (each for each in task.notes if note.format("ing") in each)
    assert "--prior balanced with a head, or --class-weight balanced without one" in found


def test_class_sizes_count_absent_classes_and_classes_of_one_name():
    assert class_sizes_note({"test": [0] * 30}, ["cat", "dog"]) == (
        "classes differ in size: of 30 test images cat has 30 and dog 0."
    )
    assert class_sizes_note({"test": [0, 0, 1, 2]}, ["cat", "dog", "dog"]) is None


def test_check_findings(data, tmp_path, capsys):
    train, test = data / "train", data / "test"
    shutil.copy(train / "cat/0.png", train / "dog/copy.png")
    photo(1).save(train / "cat/again.webp", lossless=True)  # the same pixels in another file
    shutil.copy(train / "cat/2.png", test / "cat/copy.png")
    for name in ("a.png", "b.jpg", "\x1b[1m\udcff.jpg"):
        (train / "cat" / name).write_text("no image")
    code, out = check(capsys, data, "--out", tmp_path / "found.csv")
    assert code == 1 and "train" in out and str(train / "cat" / "b.jpg") in out
    rows = list(csv.DictReader((tmp_path / "found.csv").read_text().splitlines()))
    assert {(row["kind"], row["name"]): row["detail"] for row in rows if row["kind"] != "unreadable"} == {
        ("duplicate", "train/cat/again.webp"): "train/cat/1.png (train, cat)",
        ("duplicate in another class", "train/dog/copy.png"): "train/cat/0.png (train, cat)",
        ("duplicate in another split", "test/cat/copy.png"): "train/cat/2.png (train, cat)",
    }
    assert [row["name"] for row in rows if row["kind"] == "unreadable"] == [
        r"train/cat/\x1b[1m\udcff.jpg",
        "train/cat/a.png",
        "train/cat/b.jpg",
    ]


def test_check_names_the_kind_of_a_folder(data, capsys):
    assert main(["check", str(data)]) == 2
    assert capsys.readouterr().err.startswith(f"error no dataset '{data}'; did you mean imagefolder:{data}?")


@pytest.mark.parametrize(
    ("images", "words"),
    [
        ({"cat": ["photo"] * 4}, "fewer than two classes"),
        ({"cat": ["photo"] * 4, "dog": ["photo"]}, "no test images"),
        ({"cat": ["photo"] * 4, "dog": ["photo", "broken"]}, "no training image of dog can be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_check_says_what_tune_refuses(tmp_path, capsys, images, words):
    for name, kinds in images.items():
        for number, kind in enumerate(kinds):
            path = tmp_path / "data" / name / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo(number).save(path) if kind == "photo" else path.write_text("no image")
    code, out = check(capsys, tmp_path / "data")
    assert code == 1 and "tune refuses this dataset: " in out and words in out.partition("tune refuses")[2]
    with pytest.raises(InputError, match=words):
        tune(TuneConfig(data=f"imagefolder:{tmp_path / 'data'}", out=tmp_path / "run", unreadable="skip", **SETTINGS))


def test_check_refuses_what_the_default_protocol_refuses(tmp_path, capsys):
    """Without test images of the second half of the classes, which few-shot would accept."""
    make_coop(tmp_path, "eurosat")
    path = tmp_path / DATASETS["eurosat"].folder / str(DATASETS["eurosat"].split_file)
    splits = json.loads(path.read_text())
    path.write_text(json.dumps(splits | {"test": [row for row in splits["test"] if row[1] < 2]}))
    assert main(["check", "coop:eurosat", "--root", str(tmp_path)]) == 1
    words = "coop:eurosat has no test images of crème brûlée"
    assert words in capsys.readouterr().out.partition("tune refuses this dataset: ")[2]
    with pytest.raises(InputError, match=words):
        tune(TuneConfig(data="coop:eurosat", root=tmp_path, out=tmp_path / "run", method="zero-shot", device="cpu"))


def test_tune_with_unreadable_images(data, tmp_path):
    bad = [data / split / "cat" / f"bad{number}.png" for number, split in enumerate(("train", "train", "test"))]
    for path in bad:
        path.write_text("no image")
    config = TuneConfig(data=f"imagefolder:{data}", out=tmp_path / "run", **SETTINGS)
    for workers in (0, 1):
        message = r"/cat/bad\d\.png: can't be read as an image .*`skipkernels check` lists all such images, and `unread"
        with pytest.raises(InputError, match=message):
            tune(config, workers=workers)
    metrics = tune(config, unreadable="skip", validation="none")
    assert metrics["images"] == {"train": 18, "tests": {"all": 6}}


def test_unreadable_images_do_not_count_as_held_out(data):
    options = TaskOptions(protocol="few-shot", shots="all", validation=0.5, train_on_validation=True)
    task = load_task(f"imagefolder:{data}", options)
    (data / task.train.names[-1]).write_text("no image")
    readable = without_unreadable(task)
    assert (len(readable.train), readable.held_out) == (len(task.train) - 1, task.held_out - 1)

"""Datasets in CoOp's layout: with a few images, and errors of invalid ones."""

from __future__ import annotations

import shutil

import pytest

from skipkernels.app.data import open_source
from skipkernels.app.data.coop import DATASETS
from tests.app.data.pictures import (
    IMAGENET_NAMES,
    SPLITS,
    WNIDS,
    contents,
    draw_image,
    make_coop,
    raises_input_error,
)


def counts(source, split):
    """Number of images by class name."""
    return {name: len(images) for name, images in contents(source, split).items()}


@pytest.mark.parametrize("name", ["eurosat", "stanford_cars", "fgvc_aircraft"])
def test_open_coop_split_lists(tmp_path, name):
    source = open_source(f"coop:{name}", make_coop(tmp_path, name))
    names = ["apple pie", "baby back ribs", "crème brûlée"]
    assert source.classes == tuple(names) and source.name == f"coop:{name}" and source.notes == ()
    for split, count in SPLITS.items():
        assert counts(source, split) == dict.fromkeys(names, count)


LABELS = {name: [0, 1, 2, 3] for name in ("imagenet", "imagenetv2", "imagenet_sketch")}
LABELS |= {"imagenet_a": [1, 3], "imagenet_r": [0, 1, 2]}


@pytest.mark.parametrize("beside", [True, False], ids=["own names", "names of imagenet"])
@pytest.mark.parametrize("name", LABELS)
def test_open_coop_imagenet_and_variants(tmp_path, name, beside):
    make_coop(tmp_path, name)
    if not beside and name != "imagenet":
        (tmp_path / "imagenet").mkdir()
        shutil.move(tmp_path / DATASETS[name].folder / "classnames.txt", tmp_path / "imagenet" / "classnames.txt")
    source = open_source(f"coop:{name}", tmp_path)
    assert source.classes == tuple(IMAGENET_NAMES[label] for label in LABELS[name])
    assert counts(source, "test") == dict.fromkeys(source.classes, 2)
    assert name != "imagenet" or counts(source, "train") == dict.fromkeys(source.classes, 4)


def test_open_coop_imagenetv2_sorts_folders_as_numbers(tmp_path):
    """Sorted as text, 10 would come before 2."""
    names = [f"n{number:08d}" for number in range(12)]
    folder = tmp_path / "imagenetv2"
    for label in range(12):
        draw_image(folder / "imagenetv2-matched-frequency-format-val" / str(label) / "a.jpeg", label)
    (folder / "classnames.txt").write_text("".join(f"{wnid} class {wnid[-2:]}\n" for wnid in names))
    source = open_source("coop:imagenetv2", tmp_path)
    assert counts(source, "test") == {f"class {number:02d}": 1 for number in range(12)}


def test_open_coop_notes_duplicate_class_names(tmp_path):
    """Two classes of ImageNet are named crane."""
    make_coop(tmp_path, "imagenet")
    (tmp_path / "imagenet/classnames.txt").write_text("".join(f"{wnid} crane\n" for wnid in WNIDS))
    source = open_source("coop:imagenet", tmp_path)
    assert source.notes == ("coop:imagenet: more than one class is named crane; their prompts are equal.",)


@pytest.mark.parametrize("name", ["eurosat", "fgvc_aircraft", "imagenet", "imagenetv2"])
def test_open_coop_missing_file_or_folder(tmp_path, name):
    folder = DATASETS[name].folder
    with raises_input_error(f"coop:{name}: no folder {tmp_path / folder}", "DATASETS.md", argument="root"):
        open_source(f"coop:{name}", tmp_path)
    make_coop(tmp_path, name)
    for inner in sorted((tmp_path / folder).iterdir()):
        inner.rename(tmp_path / "away")
        with raises_input_error(inner.name):
            open_source(f"coop:{name}", tmp_path)
        (tmp_path / "away").rename(inner)
    open_source(f"coop:{name}", tmp_path)

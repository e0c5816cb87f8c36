"""Datasets in CoOp's layout: each of the fifteen with a few images, and errors of invalid ones."""

from __future__ import annotations

import json
import shutil

import pytest
from pictures import IMAGENET_NAMES, JSON_SETS, SPLITS, WNIDS, class_of, draw_image, make_coop, raises_input_error

from skipkernels.app.data import open_source
from skipkernels.app.data.coop import DATASETS, VARIANTS

ELEVEN = [name for name in DATASETS if name not in VARIANTS]


def counts(source, split):
    """Number of images by class name, after a check that every image is of its class."""
    images, found = source.images(split), {}
    for index, label in enumerate(images.labels):
        image, itself = images[index]
        assert class_of(image) == label == itself
        found[source.classes[label]] = found.get(source.classes[label], 0) + 1
    return found


# ---- valid datasets --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*JSON_SETS, "fgvc_aircraft"])
def test_open_coop_split_lists(tmp_path, name):
    source = open_source(f"coop:{name}", make_coop(tmp_path, name))
    names = ["apple pie", "baby back ribs", "crème brûlée"]
    assert source.classes == tuple(names) and source.name == f"coop:{name}" and source.notes == ()
    for split, count in SPLITS.items():
        assert counts(source, split) == dict.fromkeys(names, count)
    few = source.few_shot(2, seed=1)
    assert few.labels == [0, 0, 1, 1, 2, 2] and not set(few.names) & set(source.images("test").names)


def test_open_coop_imagenet(tmp_path):
    source = open_source("coop:imagenet", make_coop(tmp_path, "imagenet"))
    assert source.classes == tuple(IMAGENET_NAMES) and source.class_keys == tuple(WNIDS)
    assert counts(source, "train") == dict.fromkeys(IMAGENET_NAMES, 4)
    assert counts(source, "test") == dict.fromkeys(IMAGENET_NAMES, 2)
    with raises_input_error("coop:imagenet has no val images", "Choose test"):
        source.images("val")


@pytest.mark.parametrize("beside", [True, False], ids=["own names", "names of imagenet"])
@pytest.mark.parametrize(
    ("name", "labels"),
    [
        ("imagenetv2", [0, 1, 2, 3]),
        ("imagenet_sketch", [0, 1, 2, 3]),
        ("imagenet_a", [1, 3]),
        ("imagenet_r", [0, 1, 2]),
    ],
)
def test_open_coop_imagenet_variants(tmp_path, name, labels, beside):
    make_coop(tmp_path, name)
    if not beside:
        names = tmp_path / DATASETS[name].folder / "classnames.txt"
        (tmp_path / "imagenet").mkdir()
        shutil.move(names, tmp_path / "imagenet" / "classnames.txt")
    source = open_source(f"coop:{name}", tmp_path)
    assert source.classes == tuple(IMAGENET_NAMES[label] for label in labels)
    assert source.class_keys == tuple(WNIDS[label] for label in labels)
    assert counts(source, "test") == dict.fromkeys(source.classes, 2)
    for split in ("train", "val"):
        with raises_input_error(f"coop:{name} has no {split} images", "variant of ImageNet", "coop:imagenet"):
            source.images(split)


def test_open_coop_imagenetv2_sorts_folders_as_numbers(tmp_path):
    """Sorted as text, 10 would come before 2."""
    names = [f"n{number:08d}" for number in range(12)]
    folder = tmp_path / "imagenetv2"
    for label in range(12):
        draw_image(folder / "imagenetv2-matched-frequency-format-val" / str(label) / "a.jpeg", label)
    (folder / "classnames.txt").write_text("".join(f"{wnid} class {wnid[-2:]}\n" for wnid in names))
    source = open_source("coop:imagenetv2", tmp_path)
    assert counts(source, "test") == {f"class {number:02d}": 1 for number in range(12)}


@pytest.mark.parametrize(
    "name", ["oxford_pets", "Oxford-Pets", "OxfordPets", "OXFORDPETS", "DescribableTextures", "FGVCAircraft"]
)
def test_open_coop_normalizes_dataset_name(tmp_path, name):
    key = {"d": "dtd", "f": "fgvc_aircraft", "o": "oxford_pets"}[name[0].lower()]
    assert open_source(f"coop:{name}", str(make_coop(tmp_path, key))).name == f"coop:{key}"


def test_open_coop_templates(tmp_path):
    make_coop(tmp_path, "ucf101")
    assert open_source("coop:ucf101", tmp_path).prompts[0][0] == "a photo of a apple pie, a type of sport."
    assert open_source("coop:ucf101", tmp_path, "coop").prompts[0][0] == "a photo of a person doing apple pie."
    both = open_source("coop:ucf101", tmp_path, ["{}.", "the {}."])
    assert [texts[1] for texts in both.prompts] == ["baby back ribs.", "the baby back ribs."]


def test_open_coop_notes_duplicate_class_names(tmp_path):
    """Two classes of ImageNet are named crane."""
    make_coop(tmp_path, "imagenet")
    (tmp_path / "imagenet/classnames.txt").write_text("".join(f"{wnid} crane\n" for wnid in WNIDS))
    source = open_source("coop:imagenet", tmp_path)
    assert source.notes == ("coop:imagenet: several classes are named crane, so no prompt can tell them apart.",)
    assert len(set(source.class_keys)) == 4


def test_open_coop_reads_splits_on_demand(tmp_path):
    """Testing on a dataset does not need its training images."""
    make_coop(tmp_path, "dtd")
    paths = open_source("coop:dtd", tmp_path).images("train").names
    (tmp_path / "dtd/images" / paths[0]).unlink()
    source = open_source("coop:dtd", tmp_path)
    assert len(source.images("test")) == 6
    with raises_input_error(
        "coop:dtd: train: 1 of 12 files are missing", paths[0], tmp_path / "dtd/images", argument="root"
    ):
        source.images("train")


# ---- invalid datasets ------------------------------------------------------------------------------------------------


def test_open_coop_unknown_dataset_or_root(tmp_path):
    with raises_input_error("'cub'", *DATASETS, argument="data"):
        open_source("coop:cub", tmp_path)
    with raises_input_error("coop:dtd needs the folder of all datasets, which contains dtd", argument="root"):
        open_source("coop:dtd")
    with raises_input_error(f"coop:food101: no folder {tmp_path / 'none'}.", argument="root"):
        open_source("coop:food101", tmp_path / "none")


@pytest.mark.parametrize("name", DATASETS)
def test_open_coop_missing_file_or_folder(tmp_path, name):
    folder = DATASETS[name].folder
    with raises_input_error(f"coop:{name}: no folder {tmp_path / folder}", "DATASETS.md", argument="root"):
        open_source(f"coop:{name}", tmp_path)
    make_coop(tmp_path, name)
    for inner in sorted((tmp_path / folder).iterdir()):
        if inner.name.startswith("images_variant") or name == "stanford_cars" and inner.is_dir():
            continue
        inner.rename(tmp_path / "away")
        with raises_input_error(f"coop:{name}", inner, "DATASETS.md", argument="root"):
            open_source(f"coop:{name}", tmp_path)
        (tmp_path / "away").rename(inner)
    open_source(f"coop:{name}", tmp_path)


def entry(path="a.jpg", label=0, name="one"):
    return [path, label, name]


@pytest.mark.parametrize(
    ("train", "words"),
    [
        ("no list", ['expected {"train"']),
        ([["a.jpg", 0]], ["entry 0 of train must be [path, label, class name]"]),
        ([entry(), {"a": 1}], ["entry 1 of train"]),
        ([entry(label="0")], ["entry 0 of train must be [path, label, class name]", "'0'"]),
        ([entry(label=-1)], ["no image of 0"]),
        ([entry(name=" _")], ["label 0 can't be named ' _'", "Rename it"]),
        ([entry(path="../../etc/passwd.jpg")], ["leads out of the folder"]),
        ([entry(), entry(name="two")], ["label 0 is 'one' and 'two'"]),
        ([entry(), entry(label=2, name="three")], ["no image of 1"]),
        ([], ["no image of 0"]),
    ],
)
def test_open_coop_invalid_split_entries(tmp_path, train, words):
    file = make_coop(tmp_path, "eurosat") / "eurosat/split_zhou_EuroSAT.json"
    file.write_text(json.dumps({"train": train, "val": [], "test": []}))
    with raises_input_error(file, *words):
        open_source("coop:eurosat", tmp_path)


@pytest.mark.parametrize("name", ["eurosat", "fgvc_aircraft"])
def test_open_coop_notes_duplicate_images(tmp_path, name):
    make_coop(tmp_path, name)
    assert open_source(f"coop:{name}", tmp_path).notes == ()
    if name == "eurosat":
        file = tmp_path / "eurosat/split_zhou_EuroSAT.json"
        content = json.loads(file.read_text())
        (path, *rest), again = content["train"][0], content["val"][0]
        file.write_text(json.dumps({**content, "test": [*content["test"], ["./" + path, *rest]], "val": [again] * 2}))
    else:
        folder = tmp_path / "fgvc_aircraft"
        of = {split: (folder / f"images_variant_{split}.txt").read_text().splitlines(True) for split in SPLITS}
        path = of["train"][0].split()[0]
        (folder / "images_variant_test.txt").write_text("".join([*of["test"], of["train"][0]]))
        (folder / "images_variant_val.txt").write_text(of["val"][0] * 2)
    twice, both = open_source(f"coop:{name}", tmp_path).notes
    assert twice.startswith(f"coop:{name}: listed twice in val: 1 images, such as ")
    assert both.startswith(f"coop:{name}: in train and in test: 1 images, such as {path}") and both.endswith(".")


def test_open_coop_empty_split(tmp_path):
    file = make_coop(tmp_path, "eurosat") / "eurosat/split_zhou_EuroSAT.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "val": []}))
    with raises_input_error("coop:eurosat has no val images: it has train, test images"):
        open_source("coop:eurosat", tmp_path).images("val")


def test_open_coop_class_without_training_images(tmp_path):
    file = make_coop(tmp_path, "eurosat") / "eurosat/split_zhou_EuroSAT.json"
    content = json.loads(file.read_text())
    content["train"] = [item for item in content["train"] if item[1] != 1]
    file.write_text(json.dumps(content))
    with raises_input_error("coop:eurosat has no training images of baby back ribs"):
        open_source("coop:eurosat", tmp_path).few_shot(1, 0)


@pytest.mark.parametrize(
    ("classnames", "words"),
    [
        ("n01440764 tench\n", ["has no name for n01443537, n01484850, n01491361"]),
        ("n01440764 tench\nn01440764 carp\n", ["'n01440764' is a duplicate"]),
        ("n01440764 tench\n\nn01443537\n", ["'n01443537' has no name"]),
    ],
)
def test_open_coop_invalid_classnames(tmp_path, classnames, words):
    (make_coop(tmp_path, "imagenet") / "imagenet/classnames.txt").write_text(classnames)
    with raises_input_error("classnames.txt", *words):
        open_source("coop:imagenet", tmp_path)


def test_open_coop_incomplete_imagenet(tmp_path):
    images = make_coop(tmp_path, "imagenet") / "imagenet/images"
    shutil.rmtree(images / "val" / WNIDS[2])
    with raises_input_error(
        "coop:imagenet", f"only one of images/train and images/val has {WNIDS[2]}", argument="root"
    ):
        open_source("coop:imagenet", tmp_path)
    shutil.rmtree(images / "val")
    source = open_source("coop:imagenet", tmp_path)
    with raises_input_error("coop:imagenet has no test images: no folder", images / "val"):
        source.images("test")
    for file in (images / "train" / WNIDS[1]).iterdir():
        file.unlink()
    with raises_input_error("coop:imagenet", f"no images in {WNIDS[1]} of {images / 'train'}", argument="root"):
        source.images("train")
    shutil.rmtree(images / "train")
    (images / "train").mkdir()
    with raises_input_error(f"no folders n… in {images / 'train'}"):
        open_source("coop:imagenet", tmp_path)


def test_open_coop_incomplete_imagenetv2(tmp_path):
    images = make_coop(tmp_path, "imagenetv2") / "imagenetv2/imagenetv2-matched-frequency-format-val"
    shutil.rmtree(images / "2")
    with raises_input_error(f"coop:imagenetv2: no images in 2 of {images}", argument="root"):
        open_source("coop:imagenetv2", tmp_path).images("test")


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("variants.txt", "", ["a name in each line"]),
        ("variants.txt", "707\n707\n", ["without duplicates"]),
        ("images_variant_val.txt", "0000001 707-320\n", ["'707-320' is not in variants.txt"]),
        ("images_variant_val.txt", "\n../../x apple_pie\n", ["leads out of the folder"]),
    ],
)
def test_open_coop_invalid_aircraft_lists(tmp_path, file, text, words):
    path = make_coop(tmp_path, "fgvc_aircraft") / "fgvc_aircraft" / file
    path.write_text(text)
    with raises_input_error(path, *words):
        open_source("coop:fgvc_aircraft", tmp_path)

"""Refusals of data, each in one line: what is opened, the files that are there, and words of the error."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from skipkernels.app.data import TaskOptions, from_datasets, load_task, open_source
from skipkernels.app.data.coop import DATASETS
from skipkernels.app.data.images import Images
from skipkernels.app.data.map_style import read_labels
from skipkernels.app.data.templates import resolve_templates
from tests.app.data.pictures import WNIDS, Listed, draw_image, make_coop, raises_input_error

Tree = Mapping[str, Any]


def build(root: Path, tree: Tree) -> None:
    """Make for each path a folder with a number of images, or a file of text; None deletes a folder.

    A name of CoOp's datasets makes that dataset.
    """
    for path, content in tree.items():
        target = root / path
        if path in DATASETS:
            make_coop(root, path)
        elif content is None:
            shutil.rmtree(target)
        elif isinstance(content, int):
            target.mkdir(parents=True, exist_ok=True)
            for number in range(content):
                draw_image(target / f"{number}.png")
        else:
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(content, "utf-8")


def eurosat(train: Any, test: Sequence[list] = ()) -> dict[str, Any]:
    """EuroSAT with other lists of training and test images."""
    return {"eurosat": 0, "eurosat/split_zhou_EuroSAT.json": json.dumps({"train": train, "test": test})}


def table(*lines: str) -> dict[str, Any]:
    return {"images": 2, "table.csv": "".join(f"{line}\n" for line in lines)}


THREE = {"n01": 2, "n02": 2, "n03": 2}
# What is opened, with {} for the folder; the files; the argument that the error names; its words.
OPENED: list[tuple[str, Tree, Any, list[str]]] = [
    ("imagenet", {}, "data", ["no dataset 'imagenet'", "pictograms:TASK", "imagefolder:PATH", "hf:food101"]),
    ("", {}, "data", ["no dataset ''"]),
    ("folder:/x", {}, "data", ["no dataset 'folder:/x'"]),
    ("imagefolder", {}, "data", ["data: imagefolder: needs a path or a name: imagefolder:PATH."]),
    ("imagefolder:~no-such-user/x", {}, "data", ["no folder"]),
    ("imagefolder:" + "a" * 5000, {}, "data", ["no folder"]),
    ("imagefolder:a\0b", {}, "data", ["no folder"]),
    ("imagefolder:{}", {}, "data", ["has no folders in it", "of every class"]),
    ("imagefolder:{}", {"cat": 2, "dog": 0}, "data", ["no images in dog", "Add some"]),
    ("imagefolder:{}", {"train/cat": 1, "train/dog": 1, "test/cat": 1}, "data",
     ["test/ has no folder dog, which another split has"]),
    ("imagefolder:{}", {"train/cat": 1, "other/cat": 1}, "data", ["train and other are side by side", "Move"]),
    ("imagefolder:{}", {"train": 1, "test": 1, "other": 1}, "data", ["test, train and other are side by side"]),
    ("imagefolder:{}", {"test/cat": 1, "testing/cat": 1}, "data", ["two of test, testing have images of one split"]),
    ("imagefolder:{}", {"sea_lion": 2, "sea lion": 2}, ...,
     ["'sea lion' and 'sea_lion' are the same class name", "Rename one"]),
    ("imagefolder:{}", {"Cat": 2, "cat": 2}, ..., ["'Cat' and 'cat' are the same class name"]),
    ("imagefolder:{}", {"K\u00fcche": 2, "Ku\u0308che": 2}, ..., ["are the same class name"]),
    ("imagefolder:{}", {"cat": 2, "K\udcfcche": 2}, ..., ["can't be named", r"K\udcfcche", "classes.json"]),
    ("imagefolder:{}", THREE | {"classes.json": '{"n01": 1}'}, ..., ["['n01']: Input should be a valid string"]),
    ("imagefolder:{}", THREE | {"classes.json": '{"n01": "a"}'}, ..., ["no name for folder n02, n03"]),
    ("imagefolder:{}", THREE | {"classes.json": '{"n01": "a", "n02": "A", "n03": "b"}'}, ...,
     ["'a' and 'A' are the same class name", "name the folders in classes.json"]),
    ("imagefolder:{}", THREE | {"classes.json": '{"n01": " ", "n02": "a", "n03": "b"}'}, ...,
     ["a class can't be named ' '"]),
    ("csv:", {}, "data", ["data: csv: needs a path or a name: csv:PATH."]),
    ("csv:{}/none.csv", {}, "data", ["no file"]),
    ("csv:{}/table.csv", {"table.csv": ""}, ..., ["row 1 must name one column with the path of each image, such as"]),
    ("csv:{}/table.csv", table("path,name", "images/0.png,cat"), ..., ["one column with the label of each image"]),
    ("csv:{}/table.csv", table("path,label,label"), ..., ["must name one column with the label"]),
    ("csv:{}/table.csv", table("path,label"), "data", ["has no images"]),
    ("csv:{}/table.csv", table("path,label", "images/none.png,cat"), ..., ["no file images/none.png in"]),
    ("csv:{}/table.csv", table("path,label", "images,cat"), ..., ["no file images in"]),
    ("csv:{}/table.csv", table("path,label", "..,cat"), ..., ["row 2: .. is not in", "as `root`"]),
    ("csv:{}/table.csv", table("path,label,split,split"), ..., ["must name one column with the split"]),
    ("csv:{}/table.csv", table("path,label", "images/../../x.png,cat"), ...,
     ["row 2: images/../../x.png is not in", "as `root`"]),
    ("csv:{}/table.csv", table("path,label", "/etc/passwd,cat"), ..., ["row 2: /etc/passwd is not in", "as `root`"]),
    ("csv:{}/table.csv", table("path,label", "images/0.png,cat, sitting"), ..., ["row 2 has more columns than row 1"]),
    ("csv:{}/table.csv", table("path,label", "images/0.png, "), ..., ["row 2 needs a path and a label"]),
    ("csv:{}/table.csv", table("path,label", "images/0.png"), ..., ["row 2 needs a path and a label"]),
    ("csv:{}/table.csv", table("path,label", "images/0.png,cat", "images/0.png,dog"), ...,
     ["row 3: images/0.png is listed before"]),
    ("csv:{}/table.csv", table("path,label,split", "images/0.png,cat,dev"), ...,
     ["split must be train, val or test; got 'dev'"]),
    ("csv:{}/table.csv", table("path,label", '"images/0.png,cat'), ..., ["not readable as CSV"]),
    ("csv:{}/table.csv", table("path,label", "images/0.png,Cat", "images/1.png,cat"), ..., ["the same class name"]),
    ("hf:{}", {}, "data", ["must be a folder that save_to_disk wrote"]),
    ("coop:cub", {}, "data", ["'cub'", *DATASETS]),
    ("coop:dtd", {}, "root", ["coop:dtd: no folder", "DATASETS.md"]),
    ("coop:eurosat", eurosat("no list"), ..., ["['train']: Input should be a valid array"]),
    ("coop:eurosat", eurosat([["a.jpg", 0]]), ..., ["['train'][0][2]: Field required"]),
    ("coop:eurosat", eurosat([["../../etc/passwd.jpg", 0, "one"]]), ..., ["leads out of the folder"]),
    ("coop:eurosat", eurosat([["a.jpg", 0, "one"], ["a.jpg", 0, "two"]]), ..., ["label 0 is 'one' and 'two'"]),
    ("coop:eurosat", eurosat([["a.jpg", 0, "one"], ["a.jpg", 2, "three"]]), ...,
     ["labels must be 0, 1, … without a gap; got [0, 2]"]),
    ("coop:imagenet", {"imagenet": 0, "imagenet/classnames.txt": "n01440764 tench\n"}, ...,
     ["has no name for n01443537, n01484850, n01491361"]),
    ("coop:imagenet", {"imagenet": 0, "imagenet/classnames.txt": "n01440764 tench\n\nn01443537\n"}, ...,
     ["classnames.txt: expected a WordNet id"]),
    ("coop:imagenet", {"imagenet": 0, f"imagenet/images/val/{WNIDS[2]}": None}, "root",
     [f"no images in {WNIDS[2]} of", "Is it unpacked completely?"]),
    ("coop:imagenet", {"imagenet": 0, "imagenet/images/val": None, "imagenet/images/train": None}, ...,
     ["no folders n… in"]),
    ("coop:fgvc_aircraft", {"fgvc_aircraft": 0, "fgvc_aircraft/images_variant_val.txt": "0000001 707-320\n"}, ...,
     ["'707-320' is not in variants.txt"]),
    ("coop:fgvc_aircraft", {"fgvc_aircraft": 0, "fgvc_aircraft/images_variant_val.txt": "\n../../x apple_pie\n"}, ...,
     ["leads out of the folder"]),
]  # fmt: skip


def words_of(rows: list[tuple]) -> list[str]:
    """Ids of rows: the words of their errors."""
    return [" ".join(row[-1])[:60] for row in rows]


@pytest.mark.parametrize(("data", "tree", "argument", "words"), OPENED, ids=words_of(OPENED))
def test_open_source_refuses(tmp_path, monkeypatch, data, tree, argument, words):
    if data.startswith("hf:"):
        datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    build(tmp_path, tree)
    with raises_input_error(*words, argument=argument):
        open_source(data.format(tmp_path), tmp_path if data.startswith(("coop:", "csv:")) else None)


def test_a_folder_named_as_a_dataset_in_python(tmp_path, monkeypatch):
    (tmp_path / "dataset").mkdir()
    monkeypatch.chdir(tmp_path)
    with raises_input_error("no dataset 'dataset'; did you mean imagefolder:dataset?"):
        open_source("dataset")


ONE, TWO = ["a.jpg", 0, "one"], ["b.jpg", 1, "two"]
SQUARES = [("image", 0), ("image", 1)]
UNTRAINED = from_datasets("squares", test=SQUARES, classes=["black", "grey"])

# Arguments of load_task beside four pictograms of base-to-new, with {} for the folder, which is `root` of coop:; files;
# argument; words.
LOADED: list[tuple[dict[str, Any], Tree, str, list[str]]] = [
    ({"shots": 0}, {}, "shots", ["shots must be a whole number, at least 1; got 0."]),
    ({"shots": "16"}, {}, "shots", ["shots must be a whole number, at least 1; got '16'."]),
    ({"max_classes": 1}, {}, "max_classes", ["max_classes must be a whole number, at least 2; got 1."]),
    ({"validation": 1.5}, {}, "validation", ["validation must be a share between 0 and 1, or a text; got 1.5."]),
    ({"validation": "nope"}, {}, "validation", ["validation must be one of auto, none, split; got 'nope'."]),
    ({"test": "nope"}, {}, "test", ["test must be one of split, none; got 'nope'."]),
    ({"protocol": "zero-shot"}, {}, "protocol", ["protocol must be one of base-to-new, cross-dataset", "'zero-shot'"]),
    ({"test": "none"}, {}, "test", ["test: none needs `protocol=few-shot`; base-to-new"]),
    ({"data": UNTRAINED, "protocol": "few-shot", "max_classes": None}, {}, "data",
     ["squares has no train images: it has test images"]),
    ({"data": "pictograms:plants"}, {}, "data", ["no task 'plants' of pictograms; choose from animals, food"]),
    ({"data": "imagefolder:{}", "protocol": "few-shot"}, {"cat": 4}, "data", ["fewer than two classes"]),
    ({"data": from_datasets("empty", test=[], classes=[])}, {}, "data", ["empty has fewer than two classes"]),
    ({"data": "imagefolder:{}", "protocol": "few-shot"}, {"test/cat": 2, "test/dog": 1}, "data",
     ["no train images: it has test images"]),
    ({"data": "imagefolder:{}", "protocol": "few-shot", "validation": "split"},
     {"train/cat": 3, "train/dog": 2, "valid/cat": 1, "valid/dog": 1}, "data",
     ["no val images: it has train, test images."]),
    ({"data": "coop:imagenet_a", "protocol": "few-shot"}, {"imagenet_a": 0}, "data",
     ["no train images: it has test images"]),
    ({"data": "coop:imagenet"}, {"imagenet": 0, "imagenet/images/val": None}, "data",
     ["coop:imagenet has no test images: it has train images"]),
    ({"data": "coop:eurosat", "protocol": "few-shot"}, eurosat([ONE], test=[ONE, TWO]), "data",
     ["coop:eurosat has no training images of two"]),
    ({"data": "coop:eurosat"}, eurosat([ONE, TWO], test=[ONE]), "data", ["coop:eurosat has no test images of two"]),
]  # fmt: skip


@pytest.mark.parametrize(("arguments", "tree", "argument", "words"), LOADED, ids=words_of(LOADED))
def test_load_task_refuses(tmp_path, arguments, tree, argument, words):
    build(tmp_path, tree)
    given = {"data": "pictograms", "protocol": "base-to-new", "shots": 2, "max_classes": 4} | arguments
    data = given.pop("data")
    with raises_input_error(*words, argument=argument):
        load_task(data.format(tmp_path) if isinstance(data, str) else data, TaskOptions(root=tmp_path, **given))


def squares(**arguments: Any) -> Callable[[], object]:
    return lambda: from_datasets("squares", **arguments)


# Calls of functions; the argument that the error names; words.
CALLS: list[tuple[Callable[[], object], Any, list[str]]] = [
    (lambda: open_source("coop:dtd"), "root", ["coop:dtd needs the folder of all datasets, which contains dtd"]),
    (squares(classes=["a"]), ..., ["must have a dataset", "train=, val= or test="]),
    (squares(train=Listed([0])), ..., ["no class names", "classes=[…]"]),
    (squares(train=Listed([0, 2]), classes=["a", "b"]), ..., ["from 0 to 1", "2 classes", "got 2 for item 1 of train"]),
    (squares(test=Listed([0], classes=("sea_lion", "sea  lion"))), ..., ["no prompt can tell them apart"]),
    (squares(test=Listed([0]), classes=2), ..., ["classes must be names by label, a list; got 2."]),
    (squares(test=Listed([0]), classes={0: "a"}), ..., ["classes must be names by label, a list; got {0: 'a'}."]),
    (squares(test=Listed([0]), classes=[0, 1]), ..., ["class names must be text; got 0. Write it out"]),
    (squares(test=Listed([0]), classes=["a", "_ "]), ..., ["a class can't be named '_ '", "classes=[…]"]),
    (squares(train=Listed([0], labels=["cat"]), classes=["cat"]), ..., ["Listed", "an integer"]),
    *((lambda wrong=wrong: resolve_templates("dtd", wrong), "templates", ["paper or coop", "a photo of a {}.", wrong])
      for wrong in ("none", "{} and {}", "{name}", "a {} {")),
    (lambda: resolve_templates("dtd", ["a {}", "b"]), "templates", ["paper or coop", "'b'"]),
    (lambda: resolve_templates("dtd", ("a {}", "coop")), "templates", ["paper or coop alone", "got 'coop'."]),
    (lambda: resolve_templates("dtd", []), "templates", ["must have an item", "a photo of a {}."]),
    (lambda: Images([(np.zeros((2, 3), np.int64), 0)])[0], ...,
     ["image 0: pixels must be an array", "of uint8; got int64 [2, 3]"]),
    (lambda: read_labels([{"img": 0, "label": 1}]), ...,
     ["item 0 must be (image, label), or have the keys image and label", "the keys img, label"]),
    (lambda: read_labels(Listed([0, 1], labels=[0, 1, 1])), ..., ["Listed", "2 items have 3 labels"]),
    *((lambda label=label: read_labels(Listed([0, label])), ..., ["Listed", "item 1", "an integer", "Number the"])
      for label in ("cat", 1.0, True, None, torch.tensor([1, 2]))),
    (lambda: list(Images(Listed([0, 1], labels=[0, 2])).each(str)), "dataset", ["Listed: item 1 has the label 1"]),
    (lambda: Images(Listed([0, 1, 2], labels=[0, 2, 2])).subset_classes([2])[0], ...,
     ["Listed: item 1 has the label 1, and the labels of the dataset have 2"]),
]  # fmt: skip


@pytest.mark.parametrize(("call", "argument", "words"), CALLS, ids=words_of(CALLS))
def test_functions_refuse(call, argument, words):
    with raises_input_error(*words, argument=argument):
        call()

"""Tables of images, csv:."""

from __future__ import annotations

from pathlib import Path

import pytest

from skipkernels.app.data import InputError, open_source
from tests.app.data.pictures import class_of, draw_image, raises_input_error

CLASSES = ["cat", "dog", "owl"]
SPLITS = ("train", "val", "test")


@pytest.fixture
def images(tmp_path) -> Path:
    """Folder with ten images of each class in images/."""
    for label, name in enumerate(CLASSES):
        for number in range(10):
            draw_image(tmp_path / "images" / f"{name}{number}.png", label)
    return tmp_path


def table(folder: Path, header: str, row, delimiter: str = ",") -> str:
    """Write table.csv with row(class, number) for each image, and return the name of the dataset."""
    lines = [delimiter.join(row(name, number)) for name in CLASSES for number in range(10)]
    (folder / "table.csv").write_text("\n".join([header.replace(",", delimiter), *lines]) + "\n")
    return f"csv:{folder / 'table.csv'}"


@pytest.mark.parametrize("delimiter", [",", "\t", ";"])
def test_csv_with_splits(images, delimiter):
    """Columns in any order and case, after a byte-order mark."""

    def row(name: str, number: int) -> tuple[str, ...]:
        split = "test" if number > 7 else "Validation" if number > 5 else "train"
        return f"{number}", name, split, f"images/{name}{number}.png"

    source = open_source(table(images, "\ufeffNumber,Label,SPLIT,Path", row, delimiter))
    assert source.classes == tuple(CLASSES) and source.prompts[0][0] == "a photo of a cat."
    assert [len(source.images(split)) for split in SPLITS] == [18, 6, 6]
    assert sorted(source.images("val").names) == [f"images/{name}{number}.png" for name in CLASSES for number in (6, 7)]
    assert all(class_of(image) == label for split in SPLITS for image, label in source.images(split))


def test_csv_blank_rows_are_skipped(images):
    (images / "table.csv").write_text("path,label\nimages/cat0.png,cat\n\n , \nimages/dog0.png,dog\n")
    assert open_source(f"csv:{images / 'table.csv'}").images("train").labels == [0, 1]


def test_csv_captions_are_prompts(images):
    data = table(images, "image,caption", lambda name, n: (f"images/{name}{n}.png", f'"a {name}, sitting"'))
    assert open_source(data).prompts == (["a cat, sitting", "a dog, sitting", "a owl, sitting"],)


def test_csv_without_splits_is_split_by_hash(images):
    source = open_source(table(images, "path,label", lambda name, n: (f"images/{name}{n}.png", name)))
    assert [len(source.images(split)) for split in SPLITS] == [15, 6, 9]
    assert source.notes[0].endswith("by a hash of their names: 15 train, 6 val, 9 test.")


def test_csv_absolute_paths_are_in_the_folder_of_the_table_or_in_root(images):
    data = table(images, "path,label", lambda name, n: (f"{images}/images/{name}{n}.png", name))
    names = open_source(data).images("test").names
    (images / "elsewhere").mkdir()
    (images / "table.csv").rename(images / "elsewhere" / "table.csv")
    moved = f"csv:{images / 'elsewhere' / 'table.csv'}"
    with raises_input_error("Name a folder of all as `root`", argument="root"):
        open_source(moved)
    assert open_source(moved, root=images).images("test").names == names


def test_csv_notes_classes_that_are_numbers(images):
    data = table(images, "path,label", lambda name, n: (f"images/{name}{n}.png", f"{CLASSES.index(name)}"))
    source = open_source(data)
    assert source.classes == ("0", "1", "2") and "numbers and no names" in source.notes[0]


def test_csv_unreadable_image_is_an_error_when_it_is_read(images):
    (images / "images" / "cat3.png").write_bytes(b"no image")
    source = open_source(table(images, "path,label", lambda name, n: (f"images/{name}{n}.png", name)))
    with pytest.raises(InputError, match=r"cat3\.png: can't be read as an image \(not JPEG"):
        for split in SPLITS:
            list(source.images(split))

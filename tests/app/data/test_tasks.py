"""Training images and test sets of each protocol, on pictograms, folders and CoOp's datasets."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest
from PIL import Image

from skipkernels.app.data import TaskOptions, from_datasets, load_task
from skipkernels.app.data.unreadable import without_unreadable
from tests.app.data.pictures import NAMES, class_of, make_coop, make_folders, raises_input_error


def load(data, protocol="base-to-new", **how):
    return load_task(data, TaskOptions(**{"protocol": protocol, "shots": 2, **how}))


def sizes(task):
    return {test.name: len(test.classes) for test in task.tests}


def check(task):
    """Check that the labels of a task agree with its classes, prompts and images."""
    assert len({test.name for test in task.tests}) == len(task.tests)
    for test in task.tests:
        assert {len(texts) for texts in test.prompts} == {len(test.classes)}
        assert all(name in prompt for texts in test.prompts for name, prompt in zip(test.classes, texts, strict=True))
        assert set(test.images.labels) == set(range(len(test.classes)))
        assert test.images[len(test.images) - 1][1] == test.images.labels[-1]
        assert isinstance(test.images[0][0], Image.Image), "not a tensor"
    assert set(task.train.labels) == set(range(len(task.tests[0].classes)))
    return task


# ---- base-to-new -----------------------------------------------------------------------------------------------------


def test_load_task_trains_on_the_first_half_of_classes(tmp_path):
    task = check(load(f"imagefolder:{make_folders(tmp_path, dict.fromkeys(['ant', 'bee', 'cat', 'dog', 'eel'], 10))}"))
    assert [test.classes for test in task.tests] == [["ant", "bee", "cat"], ["dog", "eel"]]
    assert [class_of(task.train[index][0]) for index in range(6)] == [0, 0, 1, 1, 2, 2]
    assert [class_of(image) - label for image, label in map(task.tests[1].images.__getitem__, range(6))] == [3] * 6
    assert len(task.notes) == 2 and "split by a hash" in task.notes[0] and "6 val images train too" in task.notes[1]


# ---- few-shot, and all protocols -------------------------------------------------------------------------------------


def test_load_task_few_shot(tmp_path):
    task = check(load("coop:food101", "few-shot", root=make_coop(tmp_path, "food101"), shots=3))
    assert sizes(task) == {"all": 3} and task.train.labels == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert task.tests[0].prompts == ([f"a photo of the nice {name.replace('_', ' ')}." for name in NAMES],)
    assert task.notes == ()


@pytest.fixture(scope="module")
def unsplit(tmp_path_factory):
    """Folders of 303 images of two classes, and of one image of each of five; the files are empty."""
    counts = {"many": {"cat": 100, "dog": 203}, "single": dict.fromkeys("abcde", 1)}
    root = tmp_path_factory.mktemp("unsplit")
    for name, of_class in counts.items():
        for folder, count in of_class.items():
            (root / name / folder).mkdir(parents=True)
            for number in range(count):
                (root / name / folder / f"{number}.png").touch()
    return root


# Settings, and the images that validate, that test, and that train by shots. A hash splits 303 in 151, 61 and 91.
@pytest.mark.parametrize(("validation", "test", "held", "tested", "trained"), [
    ("auto", "split", 61, 91, {1: 2, 16: 32, "all": 151}),
    ("none", "split", 0, 91, {1: 2, 16: 32, "all": 212}),
    ("auto", "none", 61, 0, {1: 2, 16: 32, "all": 242}),
    ("none", "none", 0, 0, {1: 2, 16: 32, "all": 303}),
    (0.2, "split", 42, 91, {1: 2, 16: 32, "all": 170}),
    (0.2, "none", 61, 0, {1: 2, 16: 32, "all": 242}),
])  # fmt: skip
def test_load_task_unused_images_train(unsplit, validation, test, held, tested, trained):
    for shots, count in trained.items():
        task = load(f"imagefolder:{unsplit}/many", "few-shot", shots=shots, validation=validation, test=test)
        validated = [] if task.validation is None else task.validation.images.names
        names = [*task.train.names, *validated, *task.tests[0].images.names]
        assert (len(task.train), len(validated), len(task.tests[0].images)) == (count, held, tested)
        assert len(set(names)) == len(names), "no image is in two parts"
        assert set(task.train.labels) == {0, 1} and task.tests[0].classes == ["cat", "dog"]
    assert any("images train too" in note for note in task.notes) == ((validation, test) != ("auto", "split"))


@pytest.mark.parametrize("shots", [1, 16, "all"])
def test_load_task_one_image_per_class(unsplit, shots):
    data, how = f"imagefolder:{unsplit}/single", {"shots": shots, "validation": "auto"}
    task = load(data, "few-shot", test="none", **how)
    assert (len(task.train), task.validation, len(task.tests[0].images)) == (5, None, 0)
    with raises_input_error("no test images: classes a, b, c, d, e have 1 image", "with `test=none`"):
        load(data, "few-shot", **how)


def test_load_task_test_none_with_splits(tmp_path):
    counts = {f"{split}/{name}": count for split, count in (("train", 5), ("val", 2), ("test", 3)) for name in "ab"}
    data = f"imagefolder:{make_folders(tmp_path, counts)}"
    assert len(load(data, "few-shot", shots="all", validation="none").train) == 10, "given splits are kept"
    assert len(load(data, "few-shot", shots="all", validation="none", test="none").train) == 20
    assert len(load(data, "few-shot", shots="all", validation="split", test="none").train) == 16
    squares = [("image", 0), ("image", 1)]
    source = from_datasets("squares", train=squares, val=squares, classes=["black", "grey"])
    task = load(source, "few-shot", shots="all", test="none")
    assert sorted(task.train.names) == ["0/0", "0/1", "1/0", "1/1"]


@hypothesis.given(st.integers(2, 30), st.integers(2, 40), st.sampled_from(["base-to-new", "few-shot"]))
def test_load_task_any_number_of_classes(there, classes, protocol):
    names = [f"class {number:02d}" for number in range(there)]
    items = [(Image.new("L", (1, 1), label), label) for label in range(there) for _ in range(2)]
    source = from_datasets("grey", train=items, test=items, classes=names)
    task = check(load(source, protocol, max_classes=classes, shots=1))
    chosen = [name for test in task.tests for name in test.classes]
    assert len(chosen) == min(there, classes) and chosen == sorted(chosen) and len(set(chosen)) == len(chosen)
    for test in task.tests:
        for index in range(len(test.images)):
            image, label = test.images[index]
            assert names[image.getpixel((0, 0))[0]] == test.classes[label]


@pytest.mark.parametrize(
    ("trains", "notes"),
    [
        (False, ["1 of 3 classes have fewer than 16 training images, all of which are used: dog (8).",
                 "validation on 8 images of its train split, which don't train."]),
        (True, ["1 of 3 classes have fewer than 16 training images, all of which are used: dog (8)."]),
    ],
)  # fmt: skip
def test_load_task_notes_on_validation(trains, notes):
    """2, 3 and 3 images of 8, 16 and 19 are held out. A class with 16 has as many as asked for."""
    labels = [label for label, count in enumerate((8, 16, 19)) for _ in range(count)]
    items = [("image", label) for label in labels]
    source = from_datasets("pets", train=items, test=items, classes=["dog", "cat", "owl"])
    task = load(source, "few-shot", shots=16, validation=0.2, train_on_validation=trains)
    assert task.notes == tuple(f"pets: {note}" for note in notes)
    assert (len(task.train), task.held_out, task.validation is None) == ((43, 8, True) if trains else (35, 0, False))


def test_load_task_counts_the_images_of_a_val_split_that_train():
    items = [("image", label) for label in (0, 0, 1, 1, 1)]
    source = from_datasets("pets", train=items, val=items, test=items, classes=["dog", "cat"])
    options = {"shots": 5, "validation": "auto"}
    task = load(source, "few-shot", **options, train_on_validation=True)
    assert task.notes == ("pets: 1 of 2 classes have fewer than 5 training images, all of which are used: dog (4).",)
    assert "dog (2), cat (3)" in load(source, "few-shot", **options).notes[0]


@pytest.mark.parametrize(
    ("validation", "count", "note"),
    [("auto", 6, "validation on 6 images of its val split."), ("split", 6, "validation on 6 images of its val split."),
     (0.4, 9, "validation on 9 images of its train split, which don't train.")],  # of seven of each class
)  # fmt: skip
def test_load_task_validation(tmp_path, validation, count, note):
    data = f"imagefolder:{make_folders(tmp_path, dict.fromkeys(['cat', 'dog', 'owl'], 10))}"
    options = TaskOptions(protocol="few-shot", shots=2, validation=validation)
    task = load_task(data, options, transform=lambda image: "test", train_transform=lambda image: "train")
    assert (len(task.train), len(task.validation.images)) == (6, count)
    assert (task.train[0][0], task.validation.images[0][0]) == ("train", "test")
    assert task.validation.classes == task.tests[0].classes and any(each.endswith(note) for each in task.notes)


def test_without_unreadable_counts_the_images_held_out_that_are_left(tmp_path):
    data = f"imagefolder:{make_folders(tmp_path, dict.fromkeys(['cat', 'dog'], 10))}"
    task = load(data, "few-shot", shots="all", validation=0.4, train_on_validation=True, test="none")
    for name in (task.train.names[0], task.train.names[-1]):
        (tmp_path / name).write_bytes(b"no image")
    left = without_unreadable(task)
    assert (task.held_out, left.held_out) == (8, 7) and left.train.names == task.train.names[1:-1]
    assert left.notes[-1].endswith("The numbers in other notes include them.")


# ---- test images alone -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "classes"), [("imagenet_a", 2), ("imagenetv2", 4), ("dtd", 3)])
def test_load_task_without_training_images(tmp_path, name, classes):
    """`eval` tests a model on other data so; the variants of ImageNet have test images alone."""
    for folder in ("imagenet", name):
        make_coop(tmp_path, folder)
    task = load(f"coop:{name}", "cross-dataset", root=tmp_path, train=False)
    assert sizes(task) == {"source": classes} and len(task.train) == 0 and len(task.tests[0].images) > 0

"""The choice of a few images of each class, and its file."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections import Counter

import hypothesis
import hypothesis.strategies as st
import pytest
from pictures import make_coop, make_folders, raises_input_error, shuffle_listings

from skipkernels.app.data import few_shot, few_shot_note, load_few_shot, open_source, save_few_shot

LABELLED = st.dictionaries(st.text(min_size=1), st.integers(0, 4), min_size=1, max_size=40)


@hypothesis.given(LABELLED, st.integers(1, 6), st.integers(0, 2**40), st.randoms())
def test_few_shot_ignores_order(labelled, shots, seed, chance):
    names = list(labelled)
    chosen = [names[i] for i in few_shot([labelled[name] for name in names], names, shots, seed)]
    counts = Counter(labelled.values())
    assert [labelled[name] for name in chosen] == sorted(labelled[name] for name in chosen)
    assert Counter(labelled[name] for name in chosen) == {label: min(shots, n) for label, n in counts.items()}
    assert len(set(chosen)) == len(chosen)
    chance.shuffle(names)
    assert [names[i] for i in few_shot([labelled[name] for name in names], names, shots, seed)] == chosen


@hypothesis.given(LABELLED, st.integers(1, 6), st.integers(0, 100))
def test_few_shot_is_nested(labelled, shots, seed):
    names, labels = list(labelled), list(labelled.values())
    some, more = (few_shot(labels, names, count, seed) for count in (shots, shots + 3))
    for label in set(labels):
        of_class = [[i for i in chosen if labels[i] == label] for chosen in (some, more)]
        assert of_class[1][: len(of_class[0])] == of_class[0]


@hypothesis.given(LABELLED, st.integers(1, 6))
def test_few_shot_additional_image_changes_one(labelled, shots):
    names, labels = list(labelled), list(labelled.values())
    few = {names[1:][i] for i in few_shot(labels[1:], names[1:], shots, 0)}
    assert len({names[i] for i in few_shot(labels, names, shots, 0)} - few) <= 1


def test_few_shot_seeds_differ():
    names = [f"cat/{number}.jpg" for number in range(1000)]
    one, two = (set(few_shot([0] * 1000, names, 100, seed)) for seed in (1, 2))
    assert len(one & two) < 30


def test_few_shot_fixed_values():
    """A change would make runs of earlier versions irreproducible."""
    names = [f"{animal}/{number}.jpg" for animal in ("cat", "naïve") for number in range(50)]
    chosen = few_shot([0] * 50 + [1] * 50, names, 2, 3)
    assert [names[i] for i in chosen] == ["cat/13.jpg", "cat/1.jpg", "naïve/47.jpg", "naïve/2.jpg"]


def test_few_shot_invalid_shots():
    for shots in (0, -1):
        with raises_input_error("shots must be at least 1", f"got {shots}", argument="shots"):
            few_shot([0], ["a"], shots, 0)


def test_few_shot_note():
    assert few_shot_note([0, 0, 1, 1], ["cat", "dog"], 2) is None
    text = few_shot_note([0, 0, 2], [f"c{i}" for i in range(8)], 2)
    assert text == (
        "7 of 8 classes have fewer than 2 training images, all of which are used: c1 (0), c2 (1), c3 (0), c4 (0), "
        "c5 (0) and 2 more."
    )


@pytest.mark.parametrize("data", ["imagefolder", "coop:imagenet", "coop:dtd"])
def test_few_shot_ignores_listing_order(tmp_path, monkeypatch, data):
    spec = data
    if data == "imagefolder":
        spec = f"imagefolder:{make_folders(tmp_path, {'cat': 20, 'dog': 20})}"
    else:
        make_coop(tmp_path, data.partition(":")[2])
    chosen = open_source(spec, tmp_path).few_shot(2, seed=1).names
    for seed in range(3):
        with monkeypatch.context() as patch:
            shuffle_listings(patch, seed)
            assert open_source(spec, tmp_path).few_shot(2, seed=1).names == chosen
    assert open_source(spec, tmp_path).few_shot(2, seed=2).names != chosen


# ---- the file --------------------------------------------------------------------------------------------------------


def save_chosen(root, file, shots=3):
    source = open_source(f"imagefolder:{root}")
    images = source.few_shot(shots, seed=7)
    save_few_shot(file, images, data=source.name, classes=source.classes, shots=shots, seed=7)
    return images


def load_listed(root, file, **changes):
    """Load the images of a file, after a change of some entries."""
    content = json.loads(file.read_text())
    file.write_text(json.dumps({**content, **changes}))
    source = open_source(f"imagefolder:{root}")
    return source.images("train").subset(load_few_shot(file, source.images("train"), source.classes))


@pytest.fixture
def saved(tmp_path):
    """A folder of images and a file that lists some."""
    root, file = make_folders(tmp_path / "pets", {"sea_lion": 12, "zèbre": 12}), tmp_path / "few_shot.json"
    save_chosen(root, file)
    return root, file


def test_load_few_shot_after_root_moved(tmp_path, saved):
    root, file = saved
    chosen = save_chosen(root, file)
    assert str(root) not in json.dumps(json.loads(file.read_text())["train"])
    shutil.move(root, tmp_path / "moved")
    listed = load_listed(tmp_path / "moved", file)
    assert (listed.names, listed.labels) == (chosen.names, chosen.labels)
    assert all(path.startswith(str(tmp_path / "moved")) for path, _ in listed.samples)


def test_save_few_shot_file_is_readable(saved):
    root, file = saved
    lines = file.read_text().splitlines()
    assert lines[0] == "{" and lines[1] == f'  "data": "imagefolder:{root}",' and lines[4] == '  "train": ['
    content = json.loads(file.read_text())
    assert (content["shots"], content["seed"], len(content["train"])) == (3, 7, 6)
    assert len(lines) == 4 + 1 + 6 + 2, "a line for each image"
    path, label, name = content["train"][0]
    assert path.startswith("sea_lion/") and (label, name) == (0, "sea lion")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda train: None, ['expected {"train"']),
        (lambda train: {"a": train}, ['expected {"train"']),
        (lambda train: [*train, "cat/0.png"], ["every entry must be", "'cat/0.png'"]),
        (lambda train: [["sea_lion/00.png", True, "sea lion"]], ["every entry must be"]),
        (lambda train: [["sea_lion/99.png", 0, "sea lion"]], ["'sea_lion/99.png' with label 0 is not among"]),
        (lambda train: [["../secret.png", 0, "sea lion"]], ["'../secret.png' with label 0 is not among"]),
        (lambda train: [[train[0][0], 1, "zèbre"]], ["with label 1 is not among", "the classes that"]),
        (lambda train: [[*train[0][:2], "walrus"]], ["class 0 is 'walrus' in the file and 'sea lion' in the dataset"]),
        (lambda train: [*train, train[0]], ["is listed twice", "Remove"]),
    ],
)
def test_load_few_shot_invalid_entries(saved, change, words):
    root, file = saved
    train = json.loads(file.read_text())["train"]
    with raises_input_error(file, *words):
        load_listed(root, file, train=change(train))


def test_load_few_shot_missing_file_or_list(tmp_path, saved):
    source = open_source(f"imagefolder:{saved[0]}")
    with raises_input_error(tmp_path / "none.json", "can't be read"):
        load_few_shot(tmp_path / "none.json", source.images("train"), source.classes)
    (tmp_path / "list.json").write_text("[]")
    with raises_input_error("list.json", 'expected {"train"'):
        load_few_shot(tmp_path / "list.json", source.images("train"), source.classes)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_few_shot_reads_no_pickles(tmp_path, monkeypatch):
    """CoOp stores few-shot pickles beside its splits."""
    monkeypatch.chdir(tmp_path)
    make_coop(tmp_path, "dtd")
    for folder in ("split_fewshot", "images/split_fewshot"):
        (tmp_path / "dtd" / folder).mkdir()
        (tmp_path / "dtd" / folder / "shot_2-seed_1.pkl").write_bytes(pickle.dumps(Bomb()))
    for function in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, function, lambda *_, **__: pytest.fail("unpickled"))
    source = open_source("coop:dtd", tmp_path)
    assert len(source.few_shot(2, seed=1)) == 6 and len(source.images("test")) == 6
    file = tmp_path / "dtd/split_fewshot/shot_2-seed_1.pkl"
    with raises_input_error(file, "not"):
        load_few_shot(file, source.images("train"), source.classes)
    assert not (tmp_path / "exploded").exists()

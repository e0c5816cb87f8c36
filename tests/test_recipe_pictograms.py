"""recipes.pictograms: what is held out of pre-training, and which images a task has."""

import numpy as np

from recipes.pictograms import more, pool, sets
from recipes.pictograms.table import Icon


def icon(prefix, name, mono="1", category=""):
    return Icon(prefix, sets.family(prefix), "MIT", name.replace(" ", "-"), name, "", mono, category)


def test_training_rows_hold_out_families_their_drawings_and_words():
    rows = [icon("noto", "cat"), icon("mdi", "cat"), icon("ri", "cat"), icon("ri", "cat"), icon("ph", "dogs")]
    rows += [icon("ph", "hot dog"), icon("noto-v1", "bird"), icon("game-icons", "bird"), icon("ph", "bird")]
    digests = np.array([7, 7, 8, 8, 9, 10, 11, 12, 1], np.uint64)  # mdi's cat is noto's; 1 is blank
    assert pool.training_rows(rows, digests, {"dog"}) == [2]
    assert pool.training_rows(rows, digests, ()) == [2, 4, 5]


def test_arrays_leave_out_blank_and_equal_images():
    def picture(name, value):
        return more.Picture(name, "set", None if value is None else np.full((2, 2, 3), value, np.uint8))

    train = [picture("cat", 1), picture("dog", 2), picture("ox", 3), picture("hen", 4)]
    test = [picture("cat", 5), picture("dog", 2), picture("ox", 6), picture("hen", None), picture("cat", 7)]
    found = more.arrays("photos", {"train": train, "test": test})
    assert found["photos/train/names"].tolist() == ["cat", "ox"]
    assert found["photos/test/names"].tolist() == ["cat", "ox", "cat"]
    assert found["photos/test/images"][:, 0, 0, 0].tolist() == [5, 6, 7]

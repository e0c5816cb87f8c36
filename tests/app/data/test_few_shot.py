"""The choice of a few images of each class, and of others that are held out."""

from __future__ import annotations

from collections import Counter

import hypothesis
import hypothesis.strategies as st

from skipkernels.app.data import few_shot
from skipkernels.app.data.shots import hold_out

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


def test_few_shot_fixed_values():
    """A change would make runs of earlier versions irreproducible."""
    names = [f"{animal}/{number}.jpg" for animal in ("cat", "naïve") for number in range(50)]
    chosen = few_shot([0] * 50 + [1] * 50, names, 2, 3)
    assert [names[i] for i in chosen] == ["cat/13.jpg", "cat/1.jpg", "naïve/47.jpg", "naïve/2.jpg"]


def test_hold_out_keeps_the_choice_of_few_shot():
    """A fifth is held out: of three images that all train one, and of one none."""
    labels, names = [0] * 20 + [1] * 3 + [2], [f"{index}" for index in range(24)]
    train, held = hold_out(labels, names, 4, 7, 0.2)
    chosen = few_shot(labels, names, 4, 7)
    assert not set(train) & set(held)
    assert [index for index in train if labels[index] == 0] == [index for index in chosen if labels[index] == 0]
    counts = [Counter(labels[index] for index in part) for part in (train, held)]
    assert counts == [{0: 4, 1: 2, 2: 1}, {0: 4, 1: 1}]


def test_hold_out_ignores_order():
    labels, names = [0] * 20 + [1] * 3 + [2], [f"{index}" for index in range(24)]
    backward = hold_out(labels[::-1], names[::-1], 4, 7, 0.2)
    assert [[23 - index for index in part] for part in backward] == list(hold_out(labels, names, 4, 7, 0.2))

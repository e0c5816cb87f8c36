"""Samplers: every image once per epoch, divided among processes, and resumed from a state."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from skipkernels.features import BatchSampler

KINDS = ["class_pure", "random", "sequential"]
SETS = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def sampler(labels, batch_size: int, kind: str, *, seed: int = 0, **processes) -> BatchSampler:
    return BatchSampler(torch.tensor(labels), batch_size, kind, torch.Generator().manual_seed(seed), **processes)


@example([0] * 9, 2, "sequential", 4)  # a second batch of one image, which is merged
@given(SETS, st.integers(1, 7), st.sampled_from(KINDS), st.integers(1, 4))
def test_epoch_has_every_image_once_over_all_processes(labels, batch_size, kind, world_size):
    assume(len(labels) >= world_size)
    ranks = [sampler(labels, batch_size, kind, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(2):
        batches = [list(each) for each in ranks]
        assert sorted(sum(sum(batches, []), [])) == list(range(len(labels)))
        assert {len(part) for part in batches} == {len(each) for each in ranks} == {len(batches[0])}
        assert all(batch for part in batches for batch in part), "every rank has work in every step"


@given(SETS, st.integers(1, 7), st.sampled_from(KINDS), st.integers(2, 4))
def test_global_batches_equal_those_of_one_process(labels, batch_size, kind, world_size):
    together = batch_size * world_size
    # A remainder with less than one image per process is merged, which one process would not do.
    assume(len(labels) >= world_size and (len(labels) % together == 0 or len(labels) % together >= world_size))
    ranks = [sampler(labels, batch_size, kind, rank=rank, world_size=world_size) for rank in range(world_size)]
    joined = [sum(parts, []) for parts in zip(*ranks, strict=True)]
    assert joined == list(sampler(labels, together, kind))


def test_balanced_batches_have_each_class_equally_often():
    labels = [0] * 90 + [1] * 9 + [2]
    ranks = [sampler(labels, 5, "balanced", rank=rank, world_size=2) for rank in range(2)]
    drawn = [item for _ in range(30) for each in ranks for batch in each for item in batch]
    assert len(drawn) == 30 * len(labels)
    counts = torch.tensor(labels)[drawn].bincount()
    assert (counts - 1000).abs().max() < 4 * (3000 * 2 / 9) ** 0.5, "four standard deviations of 3,000 draws"
    assert list(sampler(labels, 5, "balanced")) == list(sampler(labels, 5, "balanced"))


@given(SETS, st.integers(1, 7))
def test_class_pure_batches(labels, batch_size):
    batches = list(sampler(labels, batch_size, "class_pure"))
    pure = sum(len(batch) == batch_size and len({labels[item] for item in batch}) == 1 for batch in batches)
    assert pure >= sum(labels.count(label) // batch_size for label in set(labels))
    assert sum(len(batch) < batch_size for batch in batches) <= 1


@pytest.mark.parametrize("kind", ["class_pure", "random"])
def test_epochs_differ_and_seeds_reproduce(kind):
    labels = [item // 4 for item in range(20)]

    def epochs(seed):
        batches = sampler(labels, 4, kind, seed=seed)
        return [list(batches), list(batches)]

    first, second = epochs(0)
    assert first != second and epochs(0) == [first, second]
    assert epochs(1) != [first, second]


# ---- states ----------------------------------------------------------------------------------------------------


@given(SETS, st.integers(1, 7), st.sampled_from([*KINDS, "balanced"]), st.integers(0, 40), st.integers(1, 2))
def test_state_resumes_the_same_batches(labels, batch_size, kind, taken, world_size):
    assume(len(labels) >= world_size)
    processes = {"rank": world_size - 1, "world_size": world_size}
    whole = sampler(labels, batch_size, kind, **processes)
    epochs = [list(whole) for _ in range(4)]
    per_epoch = len(whole)
    started = sampler(labels, batch_size, kind, **processes)
    before, taken = divmod(taken % (2 * per_epoch + 1), per_epoch)
    for _ in range(before):
        list(started)
    iterator = iter(started)
    assert [next(iterator) for _ in range(taken)] == epochs[before][:taken]

    resumed = sampler(labels, batch_size, kind, seed=9, **processes)
    resumed.load_state_dict(started.state_dict())
    assert resumed.state_dict()["batches"] == taken, "a loaded state can be saved again"
    assert list(resumed) == epochs[before][taken:]
    assert list(resumed) == epochs[before + 1]


@pytest.mark.parametrize("kind", KINDS)
def test_state_after_the_last_batch(kind):
    started = sampler([0] * 8, 4, kind)
    iterator = iter(started)
    next(iterator), next(iterator)
    state = started.state_dict()  # the loop has not asked for another batch yet
    resumed = sampler([0] * 8, 4, kind, seed=9)
    resumed.load_state_dict(state)
    assert list(resumed) == []
    assert list(iterator) == [] and list(started) == list(resumed)


def test_unfinished_epoch_is_followed_by_a_complete_one():
    broken = sampler([0] * 12, 2, "random")
    list(itertools.islice(broken, 2))
    assert sorted(sum(broken, [])) == list(range(12))


# ---- invalid arguments -----------------------------------------------------------------------------------------------

OWN = {"labels": [0, 1] * 6, "batch_size": 2, "kind": "class_pure"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 3}, "the state is of batch_size=3, and this sampler has 2. Use the same"),
        ({"kind": "random"}, "the state is of kind='random', and this sampler has 'class_pure'"),
        (None, "the state is of kind=None"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_invalid_state_is_refused(change, message):
    here = sampler(**OWN)
    with pytest.raises(ValueError, match=rf"^BatchSampler\.load_state_dict: .*{message}"):
        here.load_state_dict({} if change is None else here.state_dict() | change)
    assert list(here) == list(sampler(**OWN)), "nothing has changed"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "shuffled"}, r"kind must be one of class_pure, random, balanced, sequential; got 'shuffled'\."),
        ({"batch_size": 0}, r"batch_size must be at least 1, a whole number; got 0\."),
        ({"rank": 2, "world_size": 2}, r"rank must be from 0 to world_size - 1 = 1; got 2\."),
        ({"rank": -1}, r"rank must be from 0 to world_size - 1 = 0; got -1\."),
        ({"world_size": 4}, r"3 images are too few for 4 processes\."),
    ],
    ids=["kind", "batch_size", "rank", "negative rank", "too few"],
)
def test_invalid_argument_is_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^BatchSampler: {message}$"):
        BatchSampler(torch.zeros(3), **{"batch_size": 1, **arguments})

"""The order of images: every one once an epoch, in every process its part, and again the same from the same state."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from skipkernels.features import BatchSampler

KINDS = ["class_pure", "random", "sequential"]
SETS = st.lists(st.integers(0, 3), min_size=1, max_size=40)


def sampler(labels, batch_size: int, kind: str, *, seed: int = 0, **processes) -> BatchSampler:
    return BatchSampler(torch.tensor(labels), batch_size, kind, torch.Generator().manual_seed(seed), **processes)


def take(batches: BatchSampler, count: int) -> list[list[int]]:
    return list(itertools.islice(batches, count))


@given(SETS, st.integers(1, 7), st.sampled_from(KINDS), st.integers(1, 4))
def test_every_image_once_an_epoch_in_one_process(labels, batch_size, kind, world_size):
    assume(len(labels) >= world_size)
    ranks = [sampler(labels, batch_size, kind, rank=rank, world_size=world_size) for rank in range(world_size)]
    for epoch in range(2):
        assert {each.epoch for each in ranks} == {epoch}
        batches = [list(each) for each in ranks]
        assert sorted(sum(sum(batches, []), [])) == list(range(len(labels)))
        assert {len(part) for part in batches} == {len(each) for each in ranks} == {len(batches[0])}
        assert all(batch for part in batches for batch in part), "nobody waits for a rank that has nothing to do"


@given(SETS, st.integers(1, 7), st.sampled_from(KINDS), st.integers(2, 4))
def test_all_processes_together_take_the_batches_of_one(labels, batch_size, kind, world_size):
    together = batch_size * world_size
    # What is left over for less than an image a process goes to the batch before, which one process would not do.
    assume(len(labels) >= world_size and (len(labels) % together == 0 or len(labels) % together >= world_size))
    ranks = [sampler(labels, batch_size, kind, rank=rank, world_size=world_size) for rank in range(world_size)]
    joined = [sum(parts, []) for parts in zip(*ranks, strict=True)]
    assert joined == list(sampler(labels, together, kind))


def test_too_few_for_a_last_batch_of_all_processes_go_to_the_one_before():
    ranks = [list(sampler([0] * 9, 2, "sequential", rank=rank, world_size=4)) for rank in range(4)]
    assert ranks == [[[0, 1, 2]], [[3, 4]], [[5, 6]], [[7, 8]]]


@given(SETS, st.integers(1, 7))
def test_a_batch_is_of_one_class_as_long_as_a_class_fills_one(labels, batch_size):
    batches = list(sampler(labels, batch_size, "class_pure"))
    pure = sum(len(batch) == batch_size and len({labels[item] for item in batch}) == 1 for batch in batches)
    assert pure >= sum(labels.count(label) // batch_size for label in set(labels))
    assert sum(len(batch) < batch_size for batch in batches) <= 1


def test_sequential_is_in_order():
    assert list(sampler([0, 1, 0, 1, 0], 2, "sequential")) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("kind", ["class_pure", "random"])
def test_epochs_differ_and_seeds_repeat(kind):
    labels = [item // 4 for item in range(20)]

    def epochs(seed):
        batches = sampler(labels, 4, kind, seed=seed)
        return [list(batches), list(batches)]

    first, second = epochs(0)
    assert first != second and epochs(0) == [first, second]
    assert epochs(1) != [first, second]


def test_the_batches_of_class_pure_come_in_no_order_of_classes():
    orders = [
        [batch[0] // 4 for batch in sampler([item // 4 for item in range(24)], 4, "class_pure", seed=seed)]
        for seed in range(3)
    ]
    assert all(sorted(order) == list(range(6)) != order for order in orders)


def test_without_a_generator_the_order_is_that_of_seed_0():
    labels = torch.zeros(9, dtype=torch.int64)
    assert list(BatchSampler(labels, 2, "random")) == list(sampler([0] * 9, 2, "random"))


# ---- going on ----------------------------------------------------------------------------------------------------


@given(SETS, st.integers(1, 7), st.sampled_from(KINDS), st.integers(0, 40), st.integers(1, 2))
def test_from_a_state_the_rest_is_that_of_the_run_that_went_on(labels, batch_size, kind, taken, world_size):
    assume(len(labels) >= world_size)
    processes = {"rank": world_size - 1, "world_size": world_size}
    whole = sampler(labels, batch_size, kind, **processes)
    epochs = [list(whole) for _ in range(4)]
    per_epoch = len(whole)
    begun = sampler(labels, batch_size, kind, **processes)
    before, taken = divmod(taken % (2 * per_epoch + 1), per_epoch)
    for _ in range(before):
        list(begun)
    iterator = iter(begun)
    assert [next(iterator) for _ in range(taken)] == epochs[before][:taken]

    going_on = sampler(labels, batch_size, kind, seed=9, **processes)
    going_on.load_state_dict(begun.state_dict())
    assert going_on.epoch == before
    assert going_on.state_dict()["batches"] == taken, "a state that was loaded can be saved again"
    assert list(going_on) == epochs[before][taken:]
    assert going_on.epoch == before + 1
    assert list(going_on) == epochs[before + 1]


@pytest.mark.parametrize("kind", KINDS)
def test_a_state_of_the_last_batch_leaves_nothing_of_its_epoch(kind):
    begun = sampler([0] * 8, 4, kind)
    iterator = iter(begun)
    next(iterator), next(iterator)
    state = begun.state_dict()  # the loop hasn't asked for another batch yet
    going_on = sampler([0] * 8, 4, kind, seed=9)
    going_on.load_state_dict(state)
    assert list(going_on) == [] and going_on.epoch == 1
    assert list(iterator) == [] and list(begun) == list(going_on)


def test_going_on_twice_in_one_epoch():
    expected = list(sampler([0] * 12, 2, "random"))
    first = sampler([0] * 12, 2, "random")
    assert take(first, 2) == expected[:2]
    second = sampler([0] * 12, 2, "random", seed=8)
    second.load_state_dict(first.state_dict())
    assert take(second, 3) == expected[2:5]
    third = sampler([0] * 12, 2, "random", seed=9)
    third.load_state_dict(second.state_dict())
    assert list(third) == expected[5:]


def test_an_epoch_that_was_broken_off_is_followed_by_a_whole_one():
    broken = sampler([0] * 12, 2, "random")
    take(broken, 2)
    assert sorted(sum(broken, [])) == list(range(12))


def test_a_state_survives_a_file_that_may_hold_no_code(tmp_path):
    begun = sampler([0, 1] * 6, 2, "class_pure")
    expected = list(sampler([0, 1] * 6, 2, "class_pure"))[2:]
    take(begun, 2)
    torch.save(begun.state_dict(), tmp_path / "state")
    going_on = sampler([0, 1] * 6, 2, "class_pure", seed=9)
    going_on.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    assert list(going_on) == expected


# ---- what can't be -----------------------------------------------------------------------------------------------

OWN = {"labels": [0, 1] * 6, "batch_size": 2, "kind": "class_pure"}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"batch_size": 3}, "batch_size=2, and this sampler has 3"),
        ({"kind": "random"}, "kind='class_pure', and this sampler has 'random'"),
        ({"world_size": 2}, "world_size=1, and this sampler has 2"),
        ({"labels": [0, 1] * 7}, "images=12, and this sampler has 14"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_state_of_another_sampler_is_refused(other, message):
    begun, here = sampler(**OWN), sampler(**OWN | other)
    take(begun, 2)
    with pytest.raises(ValueError, match=rf"^BatchSampler\.load_state_dict: the state is of {message}\. Go on with"):
        here.load_state_dict(begun.state_dict())
    assert list(here) == list(sampler(**OWN | other)), "nothing has changed"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": 10**6}, "batches from 0 to 6; got 0 and 1000000"),
        ({"batches": -1}, "batches from 0 to 6; got 0 and -1"),
        ({"batches": "2"}, "batches from 0 to 6; got 0 and '2'"),
        ({"epoch": -1}, "epoch must be at least 0, .*; got -1 and 0"),
        ({"epoch": None}, "epoch must be at least 0, .*; got None and 0"),
        ({"generator": torch.zeros(3, dtype=torch.uint8)}, "generator is no state of one: "),
        ({"generator": "seed"}, "generator is no state of one: "),
    ],
    ids=lambda value: "-".join(map(str, next(iter(value.items()))[:1])) if isinstance(value, dict) else "",
)
def test_a_state_that_cannot_be_is_refused(change, message):
    here = sampler(**OWN)
    with pytest.raises(ValueError, match=rf"^BatchSampler\.load_state_dict: .*{message}"):
        here.load_state_dict(here.state_dict() | change)
    assert list(here) == list(sampler(**OWN)), "nothing has changed"


@pytest.mark.parametrize("missing", ["kind", "batch_size", "world_size", "images", "epoch", "batches", "generator"])
def test_a_state_that_lacks_something_is_none(missing):
    here = sampler(**OWN)
    state = here.state_dict()
    del state[missing]
    for none in (state, {}, None, []):
        with pytest.raises(ValueError, match="this is no state of a BatchSampler's state_dict"):
            here.load_state_dict(none)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "shuffled"}, r"kind must be one of class_pure, random, sequential; got 'shuffled'\."),
        ({"batch_size": 0}, r"batch_size must be at least 1; got 0\."),
        ({"rank": 2, "world_size": 2}, r"rank must be from 0 to world_size - 1 = 1; got 2\."),
        ({"rank": -1}, r"rank must be from 0 to world_size - 1 = 0; got -1\."),
        ({"world_size": 4}, r"3 images are too few for 4 processes\."),
    ],
    ids=["kind", "batch_size", "rank", "negative rank", "too few"],
)
def test_an_argument_that_cannot_be_is_named(arguments, message):
    with pytest.raises(ValueError, match=f"^BatchSampler: {message}$"):
        BatchSampler(torch.zeros(3), **{"batch_size": 1, **arguments})

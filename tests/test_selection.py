"""Class selection (CSkip) against the published formulas, written out naively."""

from __future__ import annotations

import math
import pickle
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from skipkernels.selection import RankSampler, base_keep, inclusion_probabilities, systematic_sample, tail_probabilities
from skipkernels.selection.probabilities import Intervals


def published_probabilities(tail: int, decay: float) -> list[float]:
    x = [5 * j / (tail - 1) for j in range(tail)]
    e = [math.exp(-value / decay) for value in x]
    return [(value - min(e)) / (max(e) - min(e)) for value in e]


@pytest.mark.parametrize("decay", [0.05, 0.3, 1.0, 10.0])
@pytest.mark.parametrize("tail", [2, 3, 50, 950])
def test_tail_probabilities_are_published(tail, decay):
    expected = torch.tensor(published_probabilities(tail, decay), dtype=torch.float64)
    torch.testing.assert_close(tail_probabilities(tail, decay), expected, rtol=0, atol=1e-12)


def test_tail_probabilities_of_one_class():
    assert tail_probabilities(1, 0.3).tolist() == [1.0]
    assert RankSampler(keep_ratio=0.5).draw(2, 1).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("classes", "ratio", "max_keep", "m"),
    [(10, 0.5, 50, 5), (11, 0.5, 50, 6), (1000, 0.5, 50, 50), (7, 1.0, 2, 7), (100, 0.07, 50, 7), (9, 3, 50, 3),
     (9, 2.5, 50, 3), (9, 20, 50, 9)],
)  # fmt: skip
def test_base_keep(classes, ratio, max_keep, m):
    assert base_keep(classes, ratio, max_keep) == m


@given(
    classes=st.integers(1, 300),
    batch=st.integers(1, 40),
    ratio=st.one_of(st.floats(0.01, 1.0), st.integers(1, 400)),
    max_keep=st.integers(1, 60),
    decay=st.floats(0.01, 20),
    tail=st.sampled_from(["fixed", "resample"]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_select_keeps_labels_and_top(classes, batch, ratio, max_keep, decay, tail, seed):
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(classes, generator=generator)
    labels = torch.randint(classes, (batch,), generator=generator)
    sampler = RankSampler(ratio, max_keep, decay, tail, generator)
    sizes = set()
    for step_batch in (batch, max(1, batch // 2), batch):
        step_labels = labels[:step_batch]
        ids, targets = sampler.select(scores.scatter(0, step_labels, math.inf), step_labels)
        sizes.add(len(ids))
        assert ids.equal(ids.unique())  # ascending, no duplicates
        assert ids[targets].equal(step_labels)
        present = step_labels.unique()
        others = [c for c in scores.argsort(descending=True, stable=True).tolist() if c not in present.tolist()]
        top = max(base_keep(classes, ratio, max_keep), min(classes, batch)) - len(present)
        assert set(others[:top]) <= set(ids.tolist())
    assert max(sizes) - min(sizes) <= (tail == "resample"), "K changes by more than the rounding of Σq"


@pytest.mark.parametrize("max_tail", [0, 1, 7, 56, 57, 58, 1000])
@pytest.mark.parametrize("tail", ["fixed", "resample"])
def test_max_tail_scales_probabilities(tail, max_tail):
    """C = 1000 keeps 50 classes and 57.4 of the tail on average."""
    published = torch.tensor(published_probabilities(950, 0.3), dtype=torch.float64)
    sampler = RankSampler(tail=tail, max_tail=max_tail)
    law = sampler.law(1000, 4)
    expected = published * min(1, max_tail / sum(published.tolist()))
    torch.testing.assert_close(law.q, expected, rtol=0, atol=1e-12)
    assert law.keep == 50 and sampler.expected_keep(1000, 4) == 50 + min(max_tail, 57)
    sizes = {len(sampler.draw(1000, batch)) for batch in (4, 1, 4)}
    total = sum(expected.tolist())
    assert sizes <= {50 + math.floor(total), 50 + math.ceil(total - 1e-9)} if tail == "resample" else len(sizes) == 1


def test_max_tail_above_the_sum_of_probabilities_changes_nothing():
    assert RankSampler(max_tail=58).law(1000, 4).q.equal(RankSampler().law(1000, 4).q)


@pytest.mark.parametrize(
    ("probabilities", "start", "places"),
    [
        ([1.0, 0.5, 0.5], 0.0, [0, 1]),  # a point at the end of an interval is in the next one
        ([0.1] * 10, 1 - 2**-53, [9]),  # the sum is 1 up to rounding, and the last end is not above the point
        ([1.0, 1.0], 1 - 2**-53, [0, 1]),  # 2 - start is rounded to 1
    ],
)
def test_draw_at_the_end_of_an_interval(probabilities, start, places):
    intervals = Intervals(torch.tensor(probabilities, dtype=torch.float64).cumsum(0), round(sum(probabilities), 9))
    assert intervals.draw(start).tolist() == places


@pytest.mark.parametrize(
    ("classes", "max_tail"), [(4, None), (5, 3), (24, None), (33, None), (37, 3), (199, None), (1000, 3)]
)
def test_resample_keeps_ranks_with_their_probability(classes, max_tail):
    """Within 5 standard errors of 4,000 draws. Each has Σq ranks, rounded down or up."""
    sampler, steps = RankSampler(max_tail=max_tail), 4000
    counts, sizes = torch.zeros(classes, dtype=torch.float64), set()
    for _ in range(steps):
        ranks = sampler.draw(classes, 1)
        counts[ranks] += 1
        sizes.add(len(ranks))
    law = sampler.law(classes, 1)
    keep, q = law.keep, law.q
    rates, total = counts / steps, round(q.sum().item(), 9)
    assert (rates[:keep] == 1).all()
    assert (rates[keep:] - q).abs().le(5 * (q * (1 - q) / steps).sqrt() + 1 / steps).all()
    assert sizes == {keep + math.floor(total), keep + math.ceil(total)}
    assert rates.sum().item() - keep == pytest.approx(total, abs=5 * 0.5 / steps**0.5)


@given(tail=st.integers(1, 400), decay=st.floats(0.01, 20), points=st.integers(1, 20))
@settings(max_examples=60, deadline=None)
def test_systematic_sample_probabilities_are_exact(tail, decay, points):
    """The mean over an even grid of starts is the probability, to within one point of the grid."""
    q = tail_probabilities(tail, decay)
    pi, starts = inclusion_probabilities(q), (torch.arange(points, dtype=torch.float64) + 0.5) / points
    counts = torch.zeros(tail, dtype=torch.float64)
    for start in starts:
        drawn = systematic_sample(pi.cumsum(0), start + torch.arange(round(pi.sum().item()), dtype=torch.float64))
        assert len(drawn) == round(q.sum().item()) and drawn.equal(drawn.unique())
        counts[drawn] += 1
    assert (counts / points - pi).abs().max() <= 1 / points + 1e-9
    assert pi.sum().item() == pytest.approx(round(q.sum().item()), abs=1e-9)
    assert (pi <= 1).all() and (pi - q).abs().sum() <= 0.5 + 1e-9


@pytest.mark.parametrize(("max_tail", "kept"), [(None, 107), (20, 70)])
def test_fixed_keeps_its_number_on_average(max_tail, kept):
    """A sum of 950 independent draws deviates by about 5 at most, the mean of fifty sums by 0.8."""
    counts = [
        len(RankSampler(tail="fixed", max_tail=max_tail, generator=torch.Generator().manual_seed(s)).draw(1000, 4))
        for s in range(50)
    ]
    assert sum(counts) / len(counts) == pytest.approx(kept, abs=3) and max(counts) > kept


def test_fixed_keeps_its_draws_in_a_larger_batch():
    """A batch of 80 keeps the first 80 ranks, and of those behind them at least the ranks drawn before."""
    sampler = RankSampler(tail="fixed")
    before, after = (set(sampler.draw(500, batch).tolist()) for batch in (4, 80))
    assert set(range(80)) < after and {rank for rank in before if rank >= 80} < after


@pytest.mark.parametrize("tail", ["fixed", "resample"])
def test_state_continues_after_a_larger_batch(tail):
    sampler, other = (RankSampler(keep_ratio=5, tail=tail) for _ in range(2))
    sampler.draw(100, 20)
    other.load_state_dict(sampler.state_dict())
    assert other.draw(100, 4).equal(sampler.draw(100, 4))


def test_state_that_is_not_one_changes_nothing():
    sampler, other = RankSampler(), RankSampler(generator=torch.Generator().manual_seed(9))
    for wrong in ({"generator": other.generator.get_state()}, other.state_dict() | {"largest_batch": "many"}, {}):
        with pytest.raises(ValueError, match="^RankSampler: the state is not that of a generator on cpu: "):
            sampler.load_state_dict(wrong)
    assert sampler.draw(100, 4).equal(RankSampler().draw(100, 4))


@pytest.mark.parametrize("labelled", [60, 100])
@pytest.mark.parametrize("tail", ["fixed", "resample"])
def test_counted_labels_of_a_batch_are_of_this_batch_alone(tail, labelled):
    """Dense soft labels, or several labels per image: later steps keep as many classes as without that batch."""
    sampler, other = (RankSampler(tail=tail) for _ in range(2))
    scores, labels = torch.rand(100), torch.rand(2, 100)
    scores[:labelled] = math.inf
    kept = sampler.select(scores, labels)
    assert set(range(labelled)) <= set(kept.class_ids.tolist())
    assert kept.targets.equal(labels[:, kept.class_ids])
    if tail == "resample" and labelled < 100:
        other.draw(100, 2)  # a step advances the generator
    assert sampler.draw(100, 2).equal(other.draw(100, 2))


def draw_of_constant_size(sampler: RankSampler, classes: int, batch: int) -> torch.Tensor:
    """The next ranks, with round(Σq) of the tail."""
    state = torch.Generator().set_state(sampler.generator.get_state())
    ranks = sampler.draw(classes, batch)
    law = sampler.law(classes, batch)
    keep, q = law.keep, law.q
    if sampler.tail == "fixed" or q.sum() == 0:
        return ranks
    pi = inclusion_probabilities(q)
    points = torch.rand((), generator=state, dtype=torch.float64) + torch.arange(round(q.sum().item()))
    return torch.cat([torch.arange(keep), keep + systematic_sample(pi.cumsum(0), points)])


@pytest.mark.parametrize("tail", ["fixed", "resample"])
@pytest.mark.parametrize("max_tail", [None, 5])
def test_draws_of_one_size(tail, max_tail):
    """Batch, classes, state and seed change; each draw advances the generator as one of any size does."""
    ours, theirs = (RankSampler(tail=tail, max_tail=max_tail) for _ in range(2))

    def same_draws(classes: int, batch: int, count: int = 4) -> None:
        sizes = set()
        for _ in range(count):
            ranks = ours.draw(classes, batch, one_size=True)
            sizes.add(len(ranks))
            assert ranks.equal(draw_of_constant_size(theirs, classes, batch))
            assert ours.generator.get_state().equal(theirs.generator.get_state())
        assert len(sizes) == 1

    for classes, batch in ((300, 4), (310, 60), (300, 2), (300, 80), (300, 4), (90, 4), (2, 1), (3, 3)):
        same_draws(classes, batch)
    state = {name: value.clone() for name, value in ours.state_dict().items()}
    same_draws(300, 4)
    for sampler in (ours, theirs):
        sampler.load_state_dict(state)
    same_draws(300, 4)
    for sampler in (ours, theirs):
        sampler.generator.manual_seed(7)
        sampler.decay = 0.5  # also forgets the tail that was drawn once
    same_draws(300, 4)
    assert pickle.loads(pickle.dumps(ours)).draw(300, 4).equal(theirs.draw(300, 4))


@pytest.mark.parametrize(
    ("name", "value"),
    [("keep_ratio", 0.2), ("max_keep", 7), ("decay", 3.0), ("max_tail", 2), ("tail", "fixed"), ("tail", "resample")],
)
@pytest.mark.parametrize("tail", ["fixed", "resample"])
def test_option_set_after_a_draw_is_used(tail, name, value):
    """The next draws are those of a sampler made with the option."""
    changed = RankSampler(tail=tail)
    for one_size in (True, False):
        changed.draw(120, 4, one_size=one_size)
    setattr(changed, name, value)
    made = RankSampler(**{"tail": tail, name: value})
    for sampler in (changed, made):
        sampler.generator.manual_seed(0)
    assert changed.draw(120, 4).equal(made.draw(120, 4))
    assert changed.draw(120, 4, one_size=True).equal(made.draw(120, 4, one_size=True))
    assert changed.expected_keep(120, 4) == made.expected_keep(120, 4)


def test_options_take_numbers_of_numpy():
    plain = RankSampler(0.5, max_keep=3, decay=0.25, max_tail=2)
    numpy = RankSampler(np.float32(0.5), max_keep=np.int64(3), decay=np.float32(0.25), max_tail=np.int64(2))
    assert plain.options() == numpy.options() and plain.draw(100, 2).equal(numpy.draw(100, 2))
    assert RankSampler(decay=Fraction(1, 4)).decay == 0.25


@pytest.mark.parametrize(
    ("name", "value"),
    [("keep_ratio", 0), ("max_keep", 0.5), ("decay", -1.0), ("tail", "none"), ("max_tail", -1)],
    ids=str,
)
def test_option_is_checked_when_set(name, value):
    sampler = RankSampler()
    before = getattr(sampler, name)
    with pytest.raises(ValueError, match=f"^RankSampler: {name} must be .*; got {re.escape(repr(value))}"):
        setattr(sampler, name, value)
    assert getattr(sampler, name) == before

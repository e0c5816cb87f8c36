"""The specification: what `test_reference_equals_eager_in_fp64` of tests/ops/harness.py does not compare."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
import torch.nn.functional as F

from bench.operators.record import small_call
from skipkernels import functional, reference


@pytest.mark.parametrize("name", [name for name in reference.__all__ if name[0].islower()])
def test_defaults_are_those_of_the_public_function(name):
    def defaults(module) -> dict:
        return {x.name: x.default for x in inspect.signature(getattr(module, name)).parameters.values()}

    assert defaults(reference) == defaults(functional)


@pytest.mark.parametrize("name", functional.__all__)
def test_autocast_changes_nothing(name):
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(small_call(name).total(module=reference))
    assert found[0].dtype == found[1].dtype and found[0].equal(found[1])


def test_pairwise_sigmoid_is_the_sum_over_all_pairs():
    rng = torch.Generator().manual_seed(0)
    image, text = (torch.randn(n, 8, generator=rng, dtype=torch.float64) for n in (3, 4))
    logits = reference.class_sampled_logits(image, text, 5.0) - 2.0
    own = torch.zeros(3, 4).double()
    own[0, 2] = own[2, 2] = 1
    ours = reference.pairwise_sigmoid(image, text, torch.tensor([2, -1, 2]), 5.0, -2.0)
    assert torch.allclose(ours, F.binary_cross_entropy_with_logits(logits, own, reduction="sum"), rtol=1e-14)


def test_stochastic_rounding_keeps_updates_that_rounding_to_nearest_loses():
    n, steps, lr = 4096, 64, 1e-5  # bf16 steps above 1 are 2⁻⁷: a hundredth of a half step each time

    def descend(seeds) -> float:
        weight, buffer = torch.ones(n, dtype=torch.bfloat16), torch.zeros(n)
        for seed in seeds:
            reference.sgd_momentum_(weight, torch.full((n,), -1.0), buffer, lr, momentum=0.0, seed=seed)
        return weight.double().mean().item()

    assert descend(itertools.repeat(None, steps)) == 1.0
    # The mean of n·steps coin throws of size 2⁻⁷: its deviation is at most 2⁻⁷·sqrt(steps·p(1−p)/n), p = lr·2⁷.
    deviation = 2**-7 * (steps * lr * 2**7 / n) ** 0.5
    assert abs(descend(range(steps)) - (1.0 + steps * lr)) < 4 * deviation
    with pytest.raises(TypeError, match=r"^sgd_momentum_: seed is for bfloat16 weights; got torch.float32"):
        reference.sgd_momentum_(torch.ones(2), torch.ones(2), torch.zeros(2), 0.1, seed=0)


@pytest.mark.parametrize(("short", "rounded"), [(0, 0x3F810000), (1, 0x3F800000)], ids=["up", "down"])
@pytest.mark.parametrize("first", [0, 3])
def test_the_random_bits_are_splitmix64(short, rounded, first):
    """The first numbers that the published generator gives for seed 1234567, 16 bits for each element.

    The bits are added to the lower half of an fp32 number, of which the upper half is kept: numbers that reach the next
    upper half with them, and numbers that are one short of it.
    """
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    bits = [(number >> 16 * lane) & 0xFFFF for number in known for lane in range(4)][first:]
    assert min(bits) > 0
    exact = torch.tensor([0x3F810000 - each - short for each in bits], dtype=torch.int32).view(torch.float32)
    weight, buffer = torch.zeros(len(bits), dtype=torch.bfloat16), torch.zeros(len(bits))
    reference.sgd_momentum_(weight, -exact, buffer, lr=1.0, momentum=0.0, seed=1234567, offsets=[first])
    assert set(weight.float().view(torch.int32).tolist()) == {rounded}

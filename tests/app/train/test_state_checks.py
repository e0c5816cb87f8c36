"""Validation of values read from a file."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from skipkernels.app.train.state_checks import check_like, check_optimizer


def state_of(name: str) -> tuple[dict, list[nn.Parameter], torch.optim.Optimizer]:
    weights = [nn.Parameter(torch.ones(4, 3)), nn.Parameter(torch.ones(3))]
    optimizer = getattr(torch.optim, name)(weights, lr=0.1)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    fresh = copy.deepcopy(optimizer.state_dict())
    optimizer.step()
    return fresh, weights, optimizer


@pytest.mark.parametrize("name", ["SGD", "AdamW", "Adafactor", "Adagrad", "RMSprop", "ASGD", "NAdam", "Rprop"])
def test_check_optimizer_accepts_own_state(name):
    fresh, weights, optimizer = state_of(name)
    check_optimizer(optimizer.state_dict(), fresh, weights)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("state"), "trainer.optimizer.state is missing"),
        (lambda state: state.update(state=[]), "trainer.optimizer.state must be mapping; got list"),
        (lambda state: state["state"].update({2: {}}), "must have mappings by index of a weight, below 2"),
        (lambda state: state["state"].update({"0": {}}), "must have mappings by index"),
        (lambda state: state["state"][0].update(exp_avg=torch.ones(3, 4)), r"exp_avg does not fit .* float32 \[4, 3\]"),
        (lambda state: state["state"][1].update(exp_avg=torch.ones(3).long()), r"state\[1\].exp_avg does not fit"),
        (lambda state: state["param_groups"].append({}), "param_groups must have 1 values"),
        (lambda state: state["param_groups"][0].pop("lr"), r"param_groups\[0\] must be a mapping of .*lr"),
        (lambda state: state["param_groups"][0].update(lr="high"), r"param_groups\[0\].lr must be float; got str"),
        (lambda state: state["param_groups"][0].update(params=[0]), r"params must have 2 values"),
    ],
)
def test_check_optimizer_names_difference(change, message):
    fresh, weights, optimizer = state_of("AdamW")
    state = copy.deepcopy(optimizer.state_dict())
    change(state)
    with pytest.raises(ValueError, match=message):
        check_optimizer(state, fresh, weights)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"generator": torch.zeros(3), "fixed": None}, r"sampler.generator must be uint8 \[3\]; got float32 \[3\]"),
        ({"generator": torch.zeros(2, dtype=torch.uint8), "fixed": None}, r"must be uint8 \[3\]; got uint8 \[2\]"),
        ({"generator": torch.zeros(3, dtype=torch.uint8)}, "sampler must be a mapping of generator, fixed"),
        ({"generator": torch.zeros(3, dtype=torch.uint8), "fixed": torch.ones(2)}, "fixed must be null or a plain"),
        (None, "sampler must be a mapping"),
    ],
)
def test_check_like_names_difference(value, message):
    like = {"generator": torch.zeros(3, dtype=torch.uint8), "fixed": None}
    check_like(like | {"fixed": torch.tensor([1, 2])}, like, "sampler")
    with pytest.raises(ValueError, match=message):
        check_like(value, like, "sampler")

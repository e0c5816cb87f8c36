"""Registration: direct calls of the operators, and names of their arguments."""

from __future__ import annotations

import pytest
import torch

from skipkernels.ops.add_layer_norm import NormArguments, add_layer_norm_backward
from skipkernels.ops.sgd_momentum import Call, sgd_momentum_
from tests.ops.backends import Backend

LARGEST = 2**63 - 1


def step_at(offset: int) -> None:
    weight, number = torch.zeros(8, dtype=torch.bfloat16), torch.tensor(0.1)
    torch.ops.skipkernels.sgd_momentum_(
        [weight], [weight.clone()], [weight.clone()], number, number, number, torch.tensor(1), [offset], []
    )


def attend(heads: int = 2, offsets: tuple[int, ...] = (0, 6)) -> None:
    packed = torch.zeros(8, 24)
    torch.ops.skipkernels.shared_prefix_attention(packed, heads, 2, torch.tensor(offsets), LARGEST, 1.0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: step_at(-1), "offsets must be at least 0"),
        (lambda: step_at(LARGEST), "offsets must be at least 0"),
        (lambda: attend(heads=(2**64 + 2) // 3), "heads must divide W"),  # 3 · heads is 2 modulo 2⁶⁴
        (lambda: attend(offsets=(0, LARGEST, -LARGEST - 1, -1, 6)), "offsets must go from 0 to at most 6"),
    ],
    ids=["negative_offset", "largest_offset", "heads", "offsets"],
)
@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_integers_that_overflow_are_refused(backend: Backend, call, message):
    """Direct calls; memory out of bounds would be read. `skipkernels.functional` refuses them with its own errors."""
    step_at(0), attend()
    with pytest.raises((ValueError, RuntimeError), match=message):
        call()


@pytest.mark.parametrize(
    ("operator", "call"),
    [(sgd_momentum_, Call), (add_layer_norm_backward, NormArguments)],
    ids=["sgd_momentum_", "add_layer_norm_backward"],
)
def test_a_call_names_the_arguments_of_its_schema(operator, call):
    """Schemas that `arguments_of` cannot make, since types such as `Tensor(a!)[]` are not those of Python."""
    assert call._fields == tuple(argument.name for argument in operator._schema.arguments)

"""The count of specialisations distinguishes what Triton's compiler does."""

from __future__ import annotations

import types

import pytest
import torch

from skipkernels.ops.launching import tl
from tests.ops import specialisations


def kernel(x_ptr, rows, BLOCK: tl.constexpr):
    pass


@pytest.mark.parametrize(
    ("changes", "same"),
    [
        ({"rows": 33}, True),
        ({"rows": 1}, False),
        ({"rows": 48}, False),
        ({"rows": 2**31 + 1}, False),
        ({"BLOCK": 64}, False),
        ({"x_ptr": torch.zeros(64)}, True),
        ({"x_ptr": torch.zeros(64)[1:]}, False),
        ({"x_ptr": torch.zeros(64).bfloat16()}, False),
        ({"x_ptr": None}, False),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_key(changes, same):
    arguments = {"x_ptr": torch.zeros(16), "rows": 17, "BLOCK": 32}
    options = {"num_warps": 4}
    keys = [
        specialisations.key_of(types.SimpleNamespace(fn=kernel), options, x) for x in (arguments, arguments | changes)
    ]
    assert (keys[0] == keys[1]) == same

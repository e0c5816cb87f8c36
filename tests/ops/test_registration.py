"""Registration: direct calls of the operators."""

from __future__ import annotations

import pytest
import torch

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


def score(labels: int = 3) -> None:
    torch.ops.skipkernels.class_scores(torch.ones(3, 8), torch.ones(2, 8), torch.zeros(labels, dtype=torch.int64))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: step_at(-1), "offsets must be at least 0"),
        (lambda: step_at(LARGEST), "offsets must be at least 0"),
        (lambda: attend(heads=(2**64 + 2) // 3), "heads must divide W"),  # 3 · heads is 2 modulo 2⁶⁴
        (lambda: attend(offsets=(0, LARGEST, -LARGEST - 1, -1, 6)), "offsets must go from 0 to at most 6"),
        (lambda: score(labels=4), r"labels must be int64 \[B\]"),
    ],
    ids=["negative_offset", "largest_offset", "heads", "offsets", "labels"],
)
@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_direct_calls_stay_in_memory(backend: Backend, call, message):
    """Direct calls; memory out of bounds would be read. `skipkernels.functional` refuses them with its own errors."""
    step_at(0), attend(), score()
    with pytest.raises((ValueError, RuntimeError), match=message):
        call()

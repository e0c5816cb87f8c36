"""The operators at the shapes of a training step of ViT-B/16 with 4 images and 107 of 1,000 classes, against fp64.

Without a GPU the tests themselves are tested, with the C++ kernels and the interpreter.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from bench.operators.sgd_momentum import upper_half
from skipkernels import reference
from skipkernels.ops.row_sums import column_sums
from skipkernels.testing import SLACK
from tests.ops import test_add_layer_norm as norm
from tests.ops import test_class_sampled_ce as cross_entropy
from tests.ops import test_class_scores as scores
from tests.ops import test_pooled_attention as pooled
from tests.ops import test_shared_prefix_attention as prefix
from tests.ops.backends import GPU, Backend
from tests.ops.harness import Operator
from tests.ops.test_mlp_activation import OPERATOR as ACTIVATION
from tests.ops.test_sgd_momentum import State


def runs(name: str, dtype: torch.dtype) -> pytest.MarkDecorator:
    """Both dtypes on a GPU, and one with a backend of the CPU."""
    on_gpu = [pytest.param("gpu", each, marks=pytest.mark.gpu) for each in (torch.float32, torch.bfloat16)]
    return pytest.mark.parametrize(
        ("backend", "dtype"),
        [(name, dtype), *on_gpu],
        indirect=["backend"],
        ids=lambda value: str(value).split(".")[-1],
    )


in_cpp, in_interpreter = runs("cpp", torch.bfloat16), runs("interpreter", torch.float32)
on_both = pytest.mark.parametrize("backend", ["cpp", GPU], indirect=True)


PREFIX, LONGEST = 5, 13
_COUNTS = {3: 20, 4: 35, 5: 25, 6: 13, 7: 9, 8: 3, 10: 1, LONGEST: 1}  # suffixes by length, of names like ImageNet's
_SORTED = [length for length, count in _COUNTS.items() for _ in range(count)]
LENGTHS = [_SORTED[45 * i % len(_SORTED)] for i in range(len(_SORTED))]
TEXT_ROWS, IMAGE_ROWS = 891, 4 * 197
SPARE = TEXT_ROWS - PREFIX - sum(LENGTHS)  # the layout has room for the longest 107

CASES: dict[str, tuple[Operator, tuple[Any, ...], dict[str, Any]]] = {
    "prefix attention": (prefix.OPERATOR, (None, LONGEST, PREFIX, 8, 64), {"lengths": LENGTHS, "behind": SPARE}),
    "pooled attention": (pooled.OPERATOR, (4, 197, 12, 64), {}),
    "image norm": (norm.OPERATOR, (IMAGE_ROWS, 768), {}),
    "text norm": (norm.OPERATOR, (TEXT_ROWS, 512), {}),
    "pooled text norm": (norm.OPERATOR, (107, 512), {}),
    "image activation": (ACTIVATION, (IMAGE_ROWS, 3072), {"kind": "gelu"}),
    "text activation": (ACTIVATION, (TEXT_ROWS, 2048), {"kind": "gelu"}),
    # Autocast leaves the bias in fp32.
    "image activation, fp32 bias": (ACTIVATION, (IMAGE_ROWS, 3072), {"kind": "gelu", "bias_dtype": torch.float32}),
    "text activation, fp32 bias": (ACTIVATION, (TEXT_ROWS, 2048), {"kind": "gelu", "bias_dtype": torch.float32}),
    "scores": (scores.OPERATOR, (4, 1000, 512), {}),
    "cross-entropy": (cross_entropy.OPERATOR, (4, 107, None, 512), {}),
}


@in_cpp
@pytest.mark.parametrize("name", CASES)
def test_no_worse_than_eager(backend: Backend, name, dtype):
    operator, shape, options = CASES[name]
    operator.check_no_worse_than_eager(operator.case(shape, backend.device, dtype=dtype, **options))


@in_interpreter
def test_column_sums(backend: Backend, dtype):
    x = torch.randn(IMAGE_ROWS, 2304, generator=torch.Generator().manual_seed(0)).to(backend.device, dtype)
    found, terms = column_sums([x], torch.float32), x.double()
    assert ((found - terms.sum(dim=0)).abs() <= SLACK[torch.float32] * terms.abs().sum(dim=0)).all()


@on_both
def test_update_has_the_bits_of_the_reference(backend: Backend):
    """One weight of each shape that is trained."""
    ours = State(dict.fromkeys(upper_half()), torch.float32, device=backend.device)
    theirs = copy.deepcopy(ours)
    assert ours.step() == theirs.step(reference.sgd_momentum_)

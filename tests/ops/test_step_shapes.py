"""The operators at the shapes of a training step of ViT-B/16 with 4 images and 107 of 1,000 classes, against fp64.

Without a GPU the tests themselves are tested, with the C++ kernels and with the interpreter, where a fused block is
given partial sums as on a GPU.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from bench.operators.sgd_momentum import upper_half
from skipkernels import reference
from skipkernels.ops.add_layer_norm import NormResults, add_layer_norm, add_layer_norm_backward
from skipkernels.ops.mlp_activation import KINDS, mlp_activation_backward
from skipkernels.ops.row_sums import column_sums
from skipkernels.testing import SLACK, relative_error
from tests.ops import test_add_layer_norm as norm
from tests.ops import test_class_sampled_ce as cross_entropy
from tests.ops import test_class_scores as scores
from tests.ops import test_mlp_activation as activation
from tests.ops import test_pooled_attention as pooled
from tests.ops import test_shared_prefix_attention as prefix
from tests.ops.conftest import GPU, Backend
from tests.ops.harness import Operator
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


def rows_on(backend: Backend, shape: tuple[int, int]) -> tuple[int, int]:
    """The shape; for the interpreter, which takes seconds for it, with 40 rows."""
    return (40, shape[1]) if backend.name == "interpreter" else shape


PREFIX, LONGEST = 5, 13
_COUNTS = {3: 20, 4: 35, 5: 25, 6: 13, 7: 9, 8: 3, 10: 1, LONGEST: 1}  # suffixes by length, of names like ImageNet's
_SORTED = [length for length, count in _COUNTS.items() for _ in range(count)]
LENGTHS = [_SORTED[45 * i % len(_SORTED)] for i in range(len(_SORTED))]
TEXT_ROWS, IMAGE_ROWS = 891, 4 * 197
SPARE = TEXT_ROWS - PREFIX - sum(LENGTHS)  # the layout has room for the longest 107

CASES: dict[str, tuple[Operator, tuple[Any, ...], dict[str, Any]]] = {
    "prefix attention": (
        prefix.OPERATOR,
        (None, LONGEST, PREFIX, 8, 64),
        {"lengths": LENGTHS, "behind": SPARE},
    ),
    "pooled attention": (pooled.OPERATOR, (4, 197, 12, 64), {}),
    "image norm": (norm.OPERATOR, (IMAGE_ROWS, 768), {}),
    "text norm": (norm.OPERATOR, (TEXT_ROWS, 512), {}),
    "pooled text norm": (norm.OPERATOR, (107, 512), {}),
    "image activation": (activation.OPERATOR, (IMAGE_ROWS, 3072), {"kind": "gelu"}),
    "text activation": (activation.OPERATOR, (TEXT_ROWS, 2048), {"kind": "gelu"}),
    "scores": (scores.OPERATOR, (4, 1000, 512), {}),
    "cross-entropy": (cross_entropy.OPERATOR, (4, 107, None, 512), {}),
}


def test_sizes_are_those_of_the_step():
    assert (len(LENGTHS), sum(LENGTHS), SPARE) == (107, 513, 373)


@in_cpp
@pytest.mark.parametrize("name", CASES)
def test_no_worse_than_eager(backend: Backend, name, dtype):
    operator, shape, options = CASES[name]
    operator.check_no_worse_than_eager(operator.case(shape, backend.device, dtype=dtype, **options))


@on_both
@pytest.mark.parametrize("name", ["image activation", "text activation"])
def test_activation_with_an_fp32_bias(backend: Backend, name):
    """Autocast leaves it in fp32."""
    operator, shape, options = CASES[name]
    operator.check_no_worse_than_eager(
        operator.case(shape, backend.device, dtype=torch.bfloat16, bias_dtype=torch.float32, **options)
    )


@in_interpreter
@pytest.mark.parametrize("shape", [(IMAGE_ROWS, 768), (TEXT_ROWS, 512), (107, 512), (4, 768)], ids=str)
def test_norm_of_a_fused_block(backend: Backend, shape, dtype):
    """Forward from an fp32 stream and a product in `dtype`; backward with all that a block takes from it."""
    shape = rows_on(backend, shape)
    case = norm.make(*shape, dtype=torch.float32, out_dtype=dtype).to(backend.device)
    x, residual, weight, bias = (x.detach() for x in case.inputs.values())
    hidden, normed, mean, rstd = add_layer_norm(x, residual, weight, bias, 1e-5, dtype)
    d_hidden, d_normed = norm.OPERATOR.upstream(case, (hidden, normed))
    cast = None if dtype == torch.float32 else dtype
    saved = d_normed, d_hidden, hidden, mean, rstd, weight, bias
    found = NormResults(*add_layer_norm_backward(*saved, True, True, True, True, True, cast))
    sums = [found.d_weight, found.d_bias, found.d_hidden_sum, found.d_x_sum]
    if found.partial_sums.numel():  # partial sums, which a block completes together with others
        sums = [*column_sums([found.partial_sums], torch.float32).split(shape[1])]

    exact_hidden = x.double() + residual.double()
    leaves = [each.double().requires_grad_() for each in (exact_hidden, weight, bias)]
    exact_normed = F.layer_norm(leaves[0], shape[1:], *leaves[1:])
    d_x, d_weight, d_bias = torch.autograd.grad(exact_normed, leaves, d_normed.double())
    d_x += d_hidden.double()
    fp32 = 10 * SLACK[torch.float32]  # a row has means of up to ten times its deviation
    assert relative_error(hidden, exact_hidden) <= SLACK[torch.float32]
    for value in (normed, found.normed):
        assert value.dtype == dtype and relative_error(value, exact_normed) <= fp32 + (cast is not None) * SLACK[dtype]
    assert relative_error(found.d_x, d_x) <= fp32
    assert cast is None or relative_error(found.d_x_cast, d_x) <= fp32 + SLACK[dtype]
    terms = d_normed.double(), d_hidden.double(), d_x
    sizes = [terms[0].abs().sum(dim=0) * exact_normed.abs().max(), *(each.abs().sum(dim=0) for each in terms)]
    exact = d_weight, d_bias, d_hidden.double().sum(dim=0), d_x.sum(dim=0)
    for value, right, size in zip(sums, exact, sizes, strict=True):
        assert ((value - right).abs() <= fp32 * size).all()


@in_interpreter
@pytest.mark.parametrize("shape", [(IMAGE_ROWS, 3072), (TEXT_ROWS, 2048), (107, 2048)], ids=str)
def test_activation_of_a_fused_block(backend: Backend, shape, dtype):
    """Backward with the recomputed result and the sums over rows."""
    shape = rows_on(backend, shape)
    case = activation.make(*shape, dtype=dtype, kind="gelu", bias_dtype=torch.float32).to(backend.device)
    x, bias = (each.detach() for each in case.inputs.values())
    (d_out,) = activation.OPERATOR.upstream(case, [x])
    d_x, d_bias, out, sums = mlp_activation_backward(d_out, x, bias, KINDS.index("gelu"), True, True, True, True)
    if sums.numel():
        d_bias = column_sums([sums], torch.float32)
    wide = [each.double().requires_grad_() for each in (x, bias)]
    right = reference.mlp_activation(*wide, kind="gelu")
    d_wide, d_bias_wide = torch.autograd.grad(right, wide, d_out.double())
    # A 16-bit sum of x and bias is rounded before the activation, and the result after it.
    slack = 2 * SLACK[dtype]
    for value, exact in ((out, right), (d_x, d_wide)):
        assert relative_error(value, exact) <= slack
    assert ((d_bias - d_bias_wide).abs() <= slack * d_wide.abs().sum(dim=0)).all()


@in_interpreter
def test_column_sums(backend: Backend, dtype):
    x = torch.randn(IMAGE_ROWS, 2304, generator=torch.Generator().manual_seed(0)).to(backend.device, dtype)
    found, terms = column_sums([x], torch.float32), x.double()
    assert ((found - terms.sum(dim=0)).abs() <= SLACK[torch.float32] * terms.abs().sum(dim=0)).all()


@on_both
def test_update_has_the_bits_of_the_reference(backend: Backend):
    """One weight of each shape that is trained."""
    ours = State(dict.fromkeys(upper_half()), torch.float32, device=backend.device)
    theirs = ours.clone()
    assert ours.step() == theirs.step(reference.sgd_momentum_)

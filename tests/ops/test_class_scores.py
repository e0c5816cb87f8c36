"""The scores against fp64 and against eager."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from skipkernels import reference
from skipkernels.functional import class_scores
from skipkernels.ops.class_scores import class_scores as operator
from tests.tolerances import SLACK, relative_error

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def make(B, C, D, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    image = (3 * torch.randn(B, D, generator=rng)).to(dtype)
    prototypes = F.normalize(torch.randn(C, D, generator=rng), dim=1).to(dtype)
    return image, prototypes, torch.randint(0, C, (B,), generator=rng)


def check(image, prototypes, labels):
    scores = class_scores(image, prototypes, labels)
    exact = reference.class_scores(image.double(), prototypes.double(), labels)
    assert scores.dtype == (torch.float64 if image.dtype == torch.float64 else torch.float32)
    eager = (F.normalize(image, dim=1) @ prototypes.T).amax(dim=0).to(scores.dtype)
    eager[labels] = torch.inf
    # Scores are fp32 whatever the features are.
    assert relative_error(scores, exact) <= relative_error(eager, exact) + SLACK[scores.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 1), (1, 7, 7), (4, 1000, 512), (3, 37, 640), (5, 11, 1280), (257, 31, 128), (300, 1031, 96)],
    ids=lambda s: "B{}-C{}-D{}".format(*s),
)
def test_no_worse_than_eager(shape, dtype):
    check(*make(*shape, dtype))


@given(st.integers(1, 40), st.integers(1, 60), st.sampled_from([1, 7, 16, 33, 100]), st.sampled_from(DTYPES))
def test_every_shape(B, C, D, dtype):
    check(*make(B, C, D, dtype, seed=B + C))


def test_any_strides():
    image, prototypes, labels = make(6, 20, 32)
    strided = torch.stack([prototypes, prototypes * torch.nan], dim=2).flatten(1)[:, ::2]
    assert torch.equal(
        class_scores(image.T.contiguous().T, strided, labels.repeat_interleave(2)[::2]),
        class_scores(image, prototypes, labels),
    )


@pytest.mark.parametrize("shape", [(64, 700, 128), (400, 30, 256), (300, 1100, 96)])
def test_any_number_of_threads_gives_the_same_bits(shape):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(class_scores(*make(*shape)))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_zero_image_scores_zero_and_nan_stays_visible():
    image, prototypes, labels = make(1, 9, 16)
    labels[:] = 8
    assert torch.equal(class_scores(image * 0, prototypes, labels)[:8], torch.zeros(8))
    image, prototypes, labels = make(3, 9, 16)
    image[1, 0] = torch.nan
    labels[:] = 8
    assert class_scores(image, prototypes, labels)[:8].isnan().all()


def test_not_differentiable():
    image, prototypes, labels = make(3, 9, 16)
    assert not class_scores(image.requires_grad_(), prototypes, labels).requires_grad


def test_opcheck():
    image, prototypes, labels = make(3, 9, 16)
    torch.library.opcheck(operator, (image, prototypes, labels))


def test_autocast_casts_features():
    image, prototypes, labels = make(3, 9, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = class_scores(image, prototypes, labels)
    assert torch.equal(scores, class_scores(image.bfloat16(), prototypes.bfloat16(), labels))

"""class_scores: the shared tests, and labels."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.operators.class_scores import eager
from skipkernels.functional import class_scores
from tests.ops.backends import Backend
from tests.ops.harness import Case, Operator, shared_tests


def make(B, C, D, *, dtype, seed=0, labels=True) -> Case:
    rng = torch.Generator().manual_seed(seed)
    inputs = {"image": 3 * torch.randn(B, D, generator=rng), "prototypes": torch.randn(C, D, generator=rng)}
    inputs["prototypes"] = F.normalize(inputs["prototypes"], dim=1)
    options = {"labels": torch.randint(0, C, (B,), generator=rng)} if labels else {}
    return Case({name: x.to(dtype) for name, x in inputs.items()}, options)


OPERATOR = Operator(
    name="class_scores",
    make=make,
    eager=eager,
    sizes="B C D",
    shapes=[
        (1, 1, 1),
        (1, 7, 7),
        (4, 100, 512),
        (17, 33, 129),  # one more than a block of Triton's in every size
        (3, 37, 640),
        (5, 11, 1280),
        (257, 31, 128),  # one more than a block of images
        (40, 71, 300),
        (2, 4097, 16),  # many classes: other blocks
        (300, 1031, 96),
    ],
    small=(3, 67, 16),
    large=[(64, 700, 128), (400, 30, 256), (300, 1100, 96)],
    features=("image", "prototypes"),
    variants=[{}, {"labels": False}],
    results=("scores",),
    result_dtype=lambda dtype: torch.promote_types(dtype, torch.float32),
    too_slow=lambda B, C, D: B * C * D > 5_000_000,
)

TestClassScores = shared_tests(OPERATOR)


def test_nan_stays_visible(backend: Backend):
    image, prototypes = OPERATOR.case((20, 40, 16), backend.device).inputs.values()
    labels = torch.full((20,), 8, device=backend.device)
    image[1, 0] = torch.nan
    scores = class_scores(image, prototypes, labels)
    assert scores[8] == torch.inf and scores.isnan().sum() == 39
    image[1, 0] = 1
    prototypes[3, 15] = torch.nan
    assert class_scores(image, prototypes, labels).isnan().nonzero().tolist() == [[3]]


def test_not_differentiable(backend: Backend):
    image, prototypes = OPERATOR.case((3, 9, 16), backend.device).inputs.values()
    assert not class_scores(image.requires_grad_(), prototypes, None).requires_grad

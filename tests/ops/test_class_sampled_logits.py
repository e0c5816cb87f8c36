"""class_sampled_logits: the shared tests, and the gradient of the scale."""

from __future__ import annotations

import torch

from bench.operators.class_sampled_logits import eager
from skipkernels.functional import class_sampled_logits
from tests.ops.backends import Backend
from tests.ops.harness import COSINE, Case, Operator, Results, shared_tests


def make(B, C, K, D, *, dtype, scale=100.0, seed=0) -> Case:
    """The scale is fp32, as a model has it, unless the features are fp64."""
    rng = torch.Generator().manual_seed(seed)
    image, text = 2 * torch.randn(B, D, generator=rng), torch.randn(C, D, generator=rng)
    inputs = {"image": image.to(dtype), "text": text.to(dtype)}
    inputs["logit_scale"] = torch.tensor(scale, dtype=torch.promote_types(dtype, torch.float32))
    ids = None if K is None else torch.randperm(C, generator=rng)[:K]
    return Case({name: x.requires_grad_() for name, x in inputs.items()}, {"class_ids": ids})


def slack(case: Case, exact: Results) -> dict[str, float]:
    """The gradient of the scale sums up terms of either sign, a cosine each, and may nearly cancel."""
    cancelled = COSINE[case.dtype] * exact["out"].numel() ** 0.5 / exact["d_logit_scale"].abs().item()
    return {"d_logit_scale": cancelled}


OPERATOR = Operator(
    name="class_sampled_logits",
    make=make,
    eager=eager,
    sizes="B C K D",
    shapes=[
        (1, 1, None, 1),
        (1, 7, None, 7),
        (4, 100, 50, 512),
        (3, 17, 5, 128),
        (5, 31, 29, 640),
        (2, 13, 3, 1280),
        (33, 65, 34, 127),  # one more than few images, one more than a tile of classes
        (257, 37, None, 129),
        (300, 1031, 1029, 96),  # several blocks, products by the library
    ],
    small=(4, 9, 6, 16),
    large=[(64, 700, None, 128), (300, 1100, 1029, 96)],
    features=("image", "text"),
    variants=[{}, {"scale": 0.0}, {"scale": -20.0}],
    result_dtype=lambda dtype: torch.promote_types(dtype, torch.float32),
    slack=slack,
    saves=lambda case: [4, 6],  # norms of the images and of the kept classes
    too_slow=lambda B, C, K, D: B * C * D > 200_000,
)

TestClassSampledLogits = shared_tests(OPERATOR)


def test_gradient_of_the_scale_is_summed_in_fp64(backend: Backend):
    """Sums over classes that cancel over images: in fp32 their rounding would remain."""
    case = OPERATOR.case((8, 500, None, 16), backend.device)
    image, text, scale = (x.detach() for x in case.inputs.values())
    cosine = class_sampled_logits(image, text, 1.0)
    d_logits = cosine.sign() * torch.tensor([1.0, -1.0], device=cosine.device).repeat(4)[:, None]
    (d_scale,) = torch.autograd.grad(class_sampled_logits(image, text, scale.requires_grad_()), scale, d_logits)
    terms = d_logits.double() * cosine.double()
    assert abs(d_scale.double() - terms.sum()) <= COSINE[torch.float32] * terms.norm()

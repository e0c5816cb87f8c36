"""pairwise_sigmoid: the shared tests, blocks that add up, large logits, and bad labels on a GPU."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from skipkernels import reference
from skipkernels.functional import pairwise_sigmoid
from skipkernels.testing import COSINE, SLACK, relative_error
from tests.ops.conftest import GPU, INTERPRETED, Backend
from tests.ops.harness import Case, Operator, log_probability_slack, shared_tests, shortest


def make(B, N, D, *, dtype, scale=10.0, bias=-10.0, seed=0) -> Case:
    """Two of three images have a text, and are near it. Scale and bias are fp32, unless the features are fp64."""
    rng = torch.Generator().manual_seed(seed)
    text = torch.randn(N, D, generator=rng) + torch.randn(D, generator=rng)
    labels = torch.randint(0, N, (B,), generator=rng)
    image = text[labels] + 2 * torch.randn(B, D, generator=rng)
    labels[2::3] = -1
    wide = torch.promote_types(dtype, torch.float32)
    inputs = {"image": image.to(dtype), "text": text.to(dtype)}
    inputs |= {"logit_scale": torch.tensor(scale, dtype=wide), "logit_bias": torch.tensor(bias, dtype=wide)}
    return Case({name: x.requires_grad_() for name, x in inputs.items()}, {"labels": labels})


def eager(image, text, logit_scale, logit_bias, labels):
    """All in the dtype of the features."""
    logits = F.normalize(image, dim=-1) @ F.normalize(text, dim=-1).T * logit_scale.to(image.dtype)
    own = labels[:, None] == torch.arange(len(text), device=text.device)
    signs = own.to(image.dtype) * 2 - 1
    return -F.logsigmoid(signs * (logits + logit_bias.to(image.dtype))).sum()


def draw(data: st.DataObject, backend: Backend) -> Case:
    return make(
        data.draw(st.integers(1, 40)),
        data.draw(st.integers(1, 60)),
        data.draw(st.sampled_from([1, 2, 7, 16, 31, 64, 100])),
        dtype=data.draw(st.sampled_from(backend.dtypes)),
        scale=data.draw(st.sampled_from([0.0, 1.0, 10.0, 100.0, -20.0])),
        bias=data.draw(st.sampled_from([0.0, -10.0, 3.5, -200.0])),
        seed=data.draw(st.integers(0, 99)),
    )


def bound(case: Case, name: str, right: Tensor) -> float:
    """Errors of the terms of a sum, d_z at most 1, that of rows times scale/|row|: a gradient may cancel to nothing."""
    image, text, scale, bias = case.inputs.values()
    size = 1 + abs(scale.item())
    wide = torch.promote_types(case.dtype, torch.float32)
    logit = 20 * COSINE[case.dtype] * size + SLACK[wide] * abs(bias.item())
    if case.dtype == torch.bfloat16 and image.is_cuda:
        logit += SLACK[torch.bfloat16]  # d_logits are rounded before they are summed up, as eager's are
    terms, factor, own = len(image) * len(text), 1.0, wide
    if name in ("d_image", "d_text"):
        rows = case.inputs[name[2:]]
        terms, factor, own = terms // len(rows), size / min(shortest(rows), 1.0), case.dtype
    upstream = 1.0 if name == "loss" else 3.75
    return SLACK[own] * right.abs().max().item() + upstream * terms * factor * logit


OPERATOR = Operator(
    name="pairwise_sigmoid",
    make=make,
    eager=eager,
    sizes="B N D",
    shapes=[
        (1, 1, 1),
        (1, 7, 7),
        (5, 31, 640),
        (33, 65, 127),
        (64, 64, 512),
        (257, 37, 129),  # one more than a tile of images
        (5, 1200, 64),  # more than a tile of texts
        (300, 1031, 96),  # several blocks, products by the library
    ],
    small=(4, 6, 16),
    large=[(64, 700, 128), (300, 1029, 96)],
    features=("image", "text"),
    variants=({}, {"scale": 100.0, "bias": 0.0}),
    results=("loss",),
    result_dtype=lambda dtype: torch.promote_types(dtype, torch.float32),
    slack=lambda case, exact: log_probability_slack(case, exact, ["loss", "d_logit_bias"]),
    draw=draw,
    bound=bound,
    # The norms; on a CPU also the gradients of the unit rows, and the sums for scale and bias
    saves=lambda case: [4, 6] if case.inputs["image"].is_cuda else [4, 6, 4 * 16, 6 * 16, 2],
    too_slow=lambda B, N, D: B * N * D > 300_000,
)

TestPairwiseSigmoid = shared_tests(OPERATOR)


def test_blocks_add_up(backend: Backend):
    """Blocks of images and of texts, each with the labels that fall into it, have the loss and gradients of all."""
    dtype = torch.float64 if torch.float64 in backend.dtypes else torch.float32
    case = OPERATOR.case((7, 12, 16), backend.device, dtype=dtype)
    labels, (image, text, *numbers) = case.options["labels"], case.inputs.values()
    blocks = []
    for images, start in itertools.product((slice(0, 3), slice(3, 7)), (0, 5)):
        texts = text[start:] if start else text[:5]
        own = labels[images] - start
        own = torch.where((own >= 0) & (own < len(texts)), own, -1)
        blocks.append(pairwise_sigmoid(image[images], texts, own, *numbers))
    whole = pairwise_sigmoid(image, text, labels, *numbers)
    results = [(x, *torch.autograd.grad(x, list(case.inputs.values()))) for x in (sum(blocks), whole)]
    assert all(relative_error(a, b) <= 10 * SLACK[dtype] for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("backend", [INTERPRETED, GPU], indirect=True)
def test_panels_agree(backend: Backend, monkeypatch):
    case = OPERATOR.case((300, 79, 20), backend.device)
    whole = OPERATOR.kernel(case)
    monkeypatch.setattr("skipkernels.ops.unit_rows.PANEL", 1)
    found = OPERATOR.kernel(case)
    assert all(relative_error(found[name], right) <= 1e-4 for name, right in whole.items())


def test_panels_of_cpp_agree():
    """4010 · 2100 logits are two panels; each half of the images is one."""
    case = OPERATOR.case((4010, 2100, 3))
    labels, (image, text, *numbers) = case.options["labels"], case.inputs.values()
    halves = [pairwise_sigmoid(image[part], text, labels[part], *numbers) for part in (slice(2000), slice(2000, None))]
    whole = pairwise_sigmoid(image, text, labels, *numbers)
    results = [(x, *torch.autograd.grad(x, list(case.inputs.values()))) for x in (sum(halves), whole)]
    assert all(relative_error(a, b) <= 1e-5 for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("scale", "bias"), [(100.0, -10.0), (1e4, 0.0), (1e30, -1e30)])
def test_large_logits_do_not_overflow(backend: Backend, scale, bias, sign):
    """Cosines of ±1: a pair that is as wrong as can be costs |z|, one that is right costs nothing."""
    rows = torch.eye(3, device=backend.device)
    for dtype in backend.dtypes:
        case = Case(
            {
                "image": rows.to(dtype).requires_grad_(),
                "text": (sign * rows).to(dtype).requires_grad_(),
                "logit_scale": torch.tensor(scale, device=backend.device, requires_grad=True),
                "logit_bias": torch.tensor(bias, device=backend.device, requires_grad=True),
            },
            {"labels": torch.arange(3, device=backend.device)},
        )
        found, exact = OPERATOR.kernel(case), OPERATOR.truth(case)
        assert all(
            relative_error(found[name].float(), exact[name].float()) <= 1e-5 for name in ("loss", "d_logit_bias")
        )
        assert all(x.isfinite().all() for x in found.values()) or scale == 1e30  # gradients of rows have the factor


def test_unlikely_pairs_keep_their_digits(backend: Backend):
    """log(1 + exp(−30)) is 1e-13, which log(1 + x) in fp32 would lose."""
    image = torch.randn(3, 16, device=backend.device)
    arguments = image, image, torch.full((3,), -1, device=backend.device), torch.zeros((), device=backend.device)
    bias = torch.tensor(-30.0, device=backend.device, requires_grad=True)
    loss = pairwise_sigmoid(*arguments, bias)
    loss.backward()
    exact = reference.pairwise_sigmoid(*arguments, bias.detach().double())
    assert relative_error(loss, torch.full_like(loss, 9 * 9.357622968839737e-14)) <= 1e-5
    assert exact > 0 and relative_error(bias.grad, loss) <= 1e-5


def test_images_without_a_text_and_texts_of_several_images(backend: Backend):
    case = OPERATOR.case((4, 6, 16), backend.device)
    for labels in ([-1] * 4, [2, 2, 2, 5]):
        case.options["labels"] = torch.tensor(labels, device=backend.device)
        OPERATOR.check_no_worse_than_eager(case)


@pytest.mark.parametrize("backend", ["interpreter"], indirect=True)
@pytest.mark.parametrize("label", [6, -2])
def test_bad_labels_fail_a_device_assertion(backend: Backend, label):
    labels = torch.tensor([0, 3, -1, label])
    with pytest.raises(Exception, match="pairwise_sigmoid: labels must be rows of text"):
        pairwise_sigmoid(torch.randn(4, 16), torch.randn(6, 16), labels, 10.0, -10.0)

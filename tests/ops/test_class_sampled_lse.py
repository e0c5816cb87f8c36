"""class_sampled_lse: the shared tests, processes without a class, and the loss of several processes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

from skipkernels import functional, reference
from skipkernels.functional import class_sampled_lse
from skipkernels.testing import SLACK, relative_error
from tests.ops.conftest import GPU, INTERPRETED, Backend
from tests.ops.harness import Case, Operator, Results, log_probability_slack, shared_tests


def make(B, C, K, D, *, dtype, scale=100.0, seed=0) -> Case:
    """Random inputs: every second image has a label (the others −1), and half of these images are near their class.

    The scale is fp32, as a model has it, unless the features are fp64.
    """
    rng = torch.Generator().manual_seed(seed)
    text = torch.randn(C, D, generator=rng) + torch.randn(D, generator=rng)
    class_ids = None if K is None else torch.randperm(C, generator=rng)[:K]
    kept = torch.arange(C) if class_ids is None else class_ids
    labels = torch.full((B,), -1)
    image = 2 * torch.randn(B, D, generator=rng)
    if len(kept) > 0:
        labels[::2] = kept[torch.randint(0, len(kept), (len(labels[::2]),), generator=rng)]
        image[::4] += text[labels[::4]]
    inputs = {"image": image.to(dtype), "text": text.to(dtype)}
    inputs["logit_scale"] = torch.tensor(scale, dtype=torch.promote_types(dtype, torch.float32))
    options = {"labels": labels, "class_ids": class_ids}
    return Case({name: x.requires_grad_() for name, x in inputs.items()}, options)


def eager(image, text, logit_scale, labels, class_ids=None):
    """All in the dtype of the features."""
    kept = torch.arange(len(text), device=text.device) if class_ids is None else class_ids
    logits = F.normalize(image, dim=-1) @ F.normalize(text[kept], dim=-1).T * logit_scale.to(image.dtype)
    return logits.logsumexp(dim=1), (logits * (labels[:, None] == kept)).sum(dim=1)


def upstream(case: Case, results: list[Tensor]) -> list[Tensor]:
    """Gradients of lse and target from a loss over all processes: the share of these classes in the softmax, and −1.

    The share is nearly 1 for the first images.
    """
    lse, target = results
    share = 1 - torch.logspace(-9, -0.01, len(lse), dtype=torch.float64, device=lse.device)
    return [share.to(lse.dtype), torch.full_like(target, -1)]


def slack(case: Case, exact: Results) -> dict[str, float]:
    found = log_probability_slack(case, exact, ["lse", "target"])
    for name in ("lse", "target"):  # fp64, but computed from cosines in the dtype of the arithmetic
        found[name] += SLACK[torch.promote_types(case.dtype, torch.float32)]
    return found


def draw(data: st.DataObject, backend: Backend) -> Case:
    C = data.draw(st.integers(1, 50))
    return make(
        data.draw(st.integers(1, 40)),
        C,
        data.draw(st.none() | st.integers(1, C)),
        data.draw(st.sampled_from([7, 16, 33, 100])),
        dtype=data.draw(st.sampled_from(backend.dtypes)),
        scale=data.draw(st.sampled_from([0.0, 1.0, 100.0, -20.0])),
    )


OPERATOR = Operator(
    name="class_sampled_lse",
    make=make,
    eager=eager,
    sizes="B C K D",
    shapes=[
        (1, 1, None, 1),
        (4, 9, 1, 64),
        (5, 31, 29, 640),
        (33, 65, 33, 127),
        (16, 250, 27, 512),
        (257, 37, None, 129),  # one more than a tile of images
        (5, 1200, 513, 64),  # one more than a tile of classes
    ],
    small=(4, 9, 6, 16),
    large=[(300, 1100, 1029, 96)],
    features=("image", "text"),
    results=("lse", "target"),
    result_dtype=lambda dtype: torch.float64,
    upstream=upstream,
    slack=slack,
    draw=draw,
    saves=lambda case: [4, 4, 6],  # lse, and the norms
    too_slow=lambda B, C, K, D: B * C * D > 300_000,
)

TestClassSampledLse = shared_tests(OPERATOR)


@pytest.mark.parametrize("backend", [INTERPRETED, GPU], indirect=True)
def test_panels_and_splits_agree(backend: Backend, monkeypatch):
    """Several panels of images in backward; one split of the classes; more images than one combining program reads."""
    case = OPERATOR.case((300, 90, 79, 20), backend.device)
    whole = OPERATOR.kernel(case)
    monkeypatch.setattr("skipkernels.ops.unit_rows.PANEL", 1)
    monkeypatch.setattr("skipkernels.ops.class_sampled_ce.PROGRAMS", 1)
    found = OPERATOR.kernel(case)
    assert all(relative_error(found[name], right) <= 1e-4 for name, right in whole.items())


def test_gradients_that_nearly_cancel_are_added_in_fp64(backend: Backend):
    """d_lse + d_target is −1e-9 for images of the only class of a process; in fp32 it would be 0."""
    case = OPERATOR.case((3, 9, 1, 16), backend.device)
    case.options["labels"] = case.options["class_ids"].expand(3)
    found = []
    for each, function in ((case, class_sampled_lse), (case.to(torch.float64), reference.class_sampled_lse)):
        lse, target = function(**each.inputs, **each.options)
        found.append(torch.autograd.grad(((1 - 1e-9) * lse - target).sum(), each.inputs["logit_scale"])[0])
    assert relative_error(*found) < 1e-5


@pytest.mark.parametrize("C", [0, 9])
def test_no_class_contributes_nothing(backend: Backend, C):
    """A process may own no class, or none of the sample; its gradients must exist, since processes wait for them."""
    for dtype in backend.dtypes:
        found = OPERATOR.kernel(OPERATOR.case((3, C, 0 if C > 0 else None, 16), backend.device, dtype=dtype))
        assert torch.equal(found.pop("lse").cpu(), torch.full((3,), -torch.inf).double())
        assert found["d_text"].shape == (C, 16) and not any(x.any() for x in found.values())


def test_gradients_of_one_result_and_of_views(backend: Backend):
    """An undefined upstream gradient counts as 0, and an upstream gradient may be an expanded scalar."""
    case = OPERATOR.case((6, 20, 11, 32), backend.device)
    exact = case.to(torch.float64)
    for total in (lambda lse, _: lse.sum(), lambda _, target: target.sum(), lambda lse, target: (lse - target).mean()):
        ours, theirs = (
            torch.autograd.grad(total(*function(**each.inputs, **each.options)), list(each.inputs.values()))
            for function, each in ((class_sampled_lse, case), (reference.class_sampled_lse, exact))
        )
        assert all(relative_error(a, b) <= 1e-4 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("backend", ["interpreter"], indirect=True)
@pytest.mark.parametrize("bad", [{"labels": 7}, {"labels": 9}, {"labels": -2}, {"class_ids": 9}, {"class_ids": 0}])
def test_bad_ids_fail_a_device_assertion(backend: Backend, bad):
    """A label outside the sample or the bank, an id outside the bank, and a repeated id of a label."""
    arguments = {"labels": [0, 3, -1, 8], "class_ids": [8, 0, 3, 5]}
    arguments = {k: torch.tensor([*v[:-1], bad[k]] if k in bad else v) for k, v in arguments.items()}
    with pytest.raises(Exception, match="class_sampled_lse: (labels|class_ids) must be rows of text"):
        class_sampled_lse(torch.randn(4, 16), torch.randn(9, 16), logit_scale=10.0, **arguments)


# ---- the loss of several processes -----------------------------------------------------------------------------------


def sharded_loss(whole: Case, processes: int, class_weight: Tensor | None = None, label_smoothing: float = 0) -> Tensor:
    """Mean cross-entropy with class c on process c mod W, from `class_sampled_lse` as its documentation says."""
    (image, text, logit_scale), (labels, class_ids) = whole.inputs.values(), whole.options.values()
    weight = torch.ones(len(text)) if class_weight is None else class_weight
    weight = weight.double().to(image.device)
    shares, directions = [], []
    for rank in range(processes):
        own = class_ids[class_ids % processes == rank]
        own_labels = torch.where(labels % processes == rank, labels // processes, -1)
        bank = text[rank::processes]
        shares.append(class_sampled_lse(image, bank, own_labels, logit_scale, class_ids=own // processes))
        directions.append(weight[own] @ F.normalize(text[own].double()))
    lse, target = (torch.stack(x) for x in zip(*shares, strict=True))  # [W, B]
    lse, target = lse.logsumexp(dim=0), target.sum(dim=0)
    logits = logit_scale * (F.normalize(image.double()) @ torch.stack(directions).sum(dim=0))
    spread = (weight[class_ids].sum() * lse - logits) / len(class_ids)
    loss = (1 - label_smoothing) * weight[labels] * (lse - target) + label_smoothing * spread
    return loss.sum() / weight[labels].sum()


OPTIONS = [{}, {"class_weight": torch.rand(13) + 0.5, "label_smoothing": 0.1}]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "weights-and-smoothing"])
@pytest.mark.parametrize("processes", [2, 20])  # 20: most own no class
def test_the_loss_of_several_processes_is_that_of_one(backend: Backend, processes, options):
    dtype = torch.float64 if torch.float64 in backend.dtypes else torch.float32
    case = OPERATOR.case((6, 13, 9, 16), backend.device, dtype=dtype)
    case.options["labels"] = case.options["class_ids"][:6]
    given = {name: x.to(backend.device) if isinstance(x, Tensor) else x for name, x in options.items()}
    one = functional.class_sampled_ce(**case.inputs, **case.options, **given)
    ours = sharded_loss(case, processes, **given)
    results = [(x, *torch.autograd.grad(x, list(case.inputs.values()))) for x in (ours, one)]
    most = 1e-12 if dtype == torch.float64 else 20 * SLACK[dtype]  # the terms of the loss nearly cancel
    assert all(relative_error(a, b) <= most for a, b in zip(*results, strict=True))


def test_confident_images_have_exact_gradients(backend: Backend):
    """p − 1 is as small as 1e-6, with the error of p, and in several processes also of their lse. With an lse in fp32
    the error would be 16 times larger."""
    rng = torch.Generator().manual_seed(0)
    text = torch.eye(8) + 0.1 * torch.randn(8, 8, generator=rng)
    image = torch.cat([text + 0.01 * torch.randn(8, 8, generator=rng), text])
    inputs = {"image": image, "text": text, "logit_scale": torch.tensor(15.0)}
    inputs = {name: x.to(backend.device).requires_grad_() for name, x in inputs.items()}
    case = Case(inputs, {"labels": torch.arange(16) % 8, "class_ids": torch.arange(8)}).to(backend.device)
    wide = case.to(torch.float64)
    one, exact = (functional.class_sampled_ce(**each.inputs, labels=each.options["labels"]) for each in (case, wide))
    exact = torch.autograd.grad(exact, list(wide.inputs.values()))
    one, ours = (torch.autograd.grad(x, list(case.inputs.values())) for x in (one, sharded_loss(case, 2)))
    for a, b, right in zip(ours, one, exact, strict=True):
        assert relative_error(a, right) <= 4 * relative_error(b, right) + SLACK[torch.float32]

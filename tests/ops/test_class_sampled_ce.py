"""class_sampled_ce: the shared tests, confident images, degenerate batches, and bad ids on a GPU."""

from __future__ import annotations

import importlib
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels.testing import peak_bytes, relative_error
from tests.ops.backends import GPU, INTERPRETED, Backend
from tests.ops.harness import COSINE, Case, Operator, Results, log_probability_slack, shared_tests
from tests.ops.test_class_sampled_logits import OPERATOR as LOGITS


def make(B, C, K, D, *, dtype, scale=100.0, noise=2.0, ignored=0.0, seed=0, weighted=False, **options) -> Case:
    """A batch of confident and other images: every second image is near the text of its label.

    The scale is fp32, as a model has it, unless the features are fp64.
    """
    rng = torch.Generator().manual_seed(seed)
    text = torch.randn(C, D, generator=rng) + torch.randn(D, generator=rng)
    kept = torch.arange(C) if K is None else torch.randperm(C, generator=rng)[:K]
    labels = kept[torch.randint(0, len(kept), (B,), generator=rng)]
    image = text[labels] * (torch.arange(B) % 2)[:, None] + noise * torch.randn(B, D, generator=rng)
    options["labels"] = torch.where(torch.rand(B, generator=rng) < ignored, options.get("ignore_index", -100), labels)
    options |= {} if K is None else {"class_ids": kept}
    options |= {"class_weight": torch.rand(C, generator=rng) + 0.1} if weighted else {}
    inputs = {"image": image.to(dtype), "text": text.to(dtype)}
    inputs["logit_scale"] = torch.tensor(scale, dtype=torch.promote_types(dtype, torch.float32))
    return Case({name: x.requires_grad_() for name, x in inputs.items()}, options)


def eager(image, text, logit_scale, labels, class_ids=None, class_weight=None, ignore_index=-100, **options):
    """All in the dtype of the features."""
    rows = text if class_ids is None else text[class_ids]
    logits = F.normalize(image, dim=-1) @ F.normalize(rows, dim=-1).T * logit_scale.to(image.dtype)
    ignored = labels == ignore_index
    if class_ids is not None:
        labels = (labels[:, None] == class_ids).int().argmax(dim=1)
        class_weight = None if class_weight is None else class_weight[class_ids]
    weight = None if class_weight is None else class_weight.to(logits.dtype)
    return F.cross_entropy(logits, torch.where(ignored, -100, labels), weight=weight, **options)


def upstream(case: Case, results: list[Tensor]) -> list[Tensor]:
    return [torch.linspace(0.5, 1.5, x.numel(), dtype=x.dtype, device=x.device).view(x.shape) for x in results]


def slack(case: Case, exact: Results) -> dict[str, float]:
    return log_probability_slack(case, exact, ["loss"])


OPERATOR = Operator(
    name="class_sampled_ce",
    make=make,
    eager=eager,
    sizes="B C K D",
    shapes=[
        (1, 1, None, 1),
        (1, 7, None, 7),
        (4, 100, 50, 512),
        (3, 17, 5, 128),
        (4, 50, 50, 512),
        (5, 31, 29, 640),
        (2, 13, 3, 1280),
        (33, 65, 33, 127),
        (257, 37, None, 129),  # one more than a tile of images
        (5, 1200, 513, 64),  # one more than a tile of classes
        (300, 1031, 1029, 96),  # several blocks, products by the library
    ],
    small=(4, 9, 6, 16),
    large=[(64, 700, None, 128), (3, 5000, 4000, 64), (300, 1100, 1029, 96)],
    features=("image", "text"),
    variants=[
        {"reduction": "sum"},
        {"reduction": "none", "label_smoothing": 0.1, "weighted": True},
        {"weighted": True, "ignored": 0.3, "ignore_index": -1, "label_smoothing": 0.2},
        {"scale": 0.0, "ignored": 0.3},
        {"scale": -20.0, "label_smoothing": 1.0, "reduction": "sum", "ignore_index": 0},
    ],
    results=("loss",),
    result_dtype=lambda dtype: torch.promote_types(dtype, torch.float32),
    upstream=upstream,
    slack=slack,
    too_slow=lambda B, C, K, D: B * C * D > 300_000,
)

TestClassSampledCE = shared_tests(OPERATOR)


def test_all_ignored_is_what_cross_entropy_makes_of_it(backend: Backend):
    case = OPERATOR.case((4, 9, 5, 16), backend.device, ignored=2.0)
    expected = OPERATOR.truth(case)
    assert expected["loss"].isnan()
    for name, found in OPERATOR.kernel(case).items():
        torch.testing.assert_close(found, expected[name].to(found), equal_nan=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
@pytest.mark.parametrize(
    ("zero", "image"),
    [(slice(None), 1.0), (slice(1), torch.nan)],
    ids=["of all classes", "of the class of a NaN image"],
)
def test_class_weights_of_zero_give_nan_where_cross_entropy_does(backend: Backend, zero, image):
    case = OPERATOR.case((4, 9, None, 16), backend.device, weighted=True)
    case.options["labels"] = torch.arange(4, device=backend.device)
    case.options["class_weight"][zero] = 0
    case.inputs["image"].data[0] *= image
    found = OPERATOR.kernel(case)
    assert all(found[name].isnan().equal(right.isnan()) for name, right in OPERATOR.truth(case).items())


@pytest.mark.parametrize("backend", [INTERPRETED, GPU], indirect=True)
def test_large_batches_no_worse_than_eager(backend: Backend):
    # Tiles of 128 images, in one whole group of tiles and a part of one; two tiles of classes.
    OPERATOR.check_no_worse_than_eager(OPERATOR.case((1030, 90, 70, 32), backend.device, dtype=torch.float16))


@pytest.mark.parametrize("scale", [100.0, 1e4])
@pytest.mark.parametrize("image_is", ["on its text", "opposite to its text"])
def test_large_scale_neither_overflows_nor_underflows(backend: Backend, scale, image_is):
    """A constant maximum of 1/τ underflows in the second case: every logit is 2 · scale below it."""
    text = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    text = text * 0.01 + text[:1]  # all near one direction
    image = text[:4] if image_is == "on its text" else -text[:4]
    inputs = {"image": image.clone(), "text": text, "logit_scale": torch.tensor(scale)}
    case = Case(inputs, {"labels": torch.arange(4), "reduction": "none"}).to(backend.device)
    for x in case.inputs.values():
        x.requires_grad_()
    found, right = OPERATOR.kernel(case), OPERATOR.truth(case)["loss"]
    assert torch.allclose(found["loss"].double(), right, rtol=1e-5, atol=scale * COSINE[torch.float32] * 4)
    assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("scale", [2e-39, -1e-30, 1e-29])
def test_gradients_at_a_scale_near_zero(backend: Backend, scale):
    """lse/scale overflows fp32; the gradients are those at a scale of 0."""
    case = OPERATOR.case((4, 9, 6, 16), backend.device, scale=scale)
    right = OPERATOR.truth(OPERATOR.case((4, 9, 6, 16), backend.device, scale=0.0))["d_logit_scale"]
    assert relative_error(OPERATOR.kernel(case)["d_logit_scale"], right) < 1e-5


@pytest.mark.parametrize("operator", [OPERATOR, LOGITS], ids=lambda operator: operator.name)
def test_zero_rows_match_the_reference(backend: Backend, operator):
    """x/max(|x|, 1e-12): a zero row has cosine 0 and passes its gradient on, times 1e12."""
    case = operator.case((4, 9, None, 16), backend.device)
    image, text, _ = case.inputs.values()
    image.data[1] = 0
    text.data[[2, 5]] = 0
    text.data[3] *= 1e-20  # shorter than eps, but not zero
    found = operator.kernel(case)
    assert all(relative_error(found[name], right) < 1e-4 for name, right in operator.truth(case).items())


@pytest.mark.parametrize("zero", ["image", "text", None])
def test_one_class_has_no_loss_and_no_gradient(backend: Backend, zero):
    """A zero row is included: its gradient is divided by 1e-12. In fp32 all results are exactly 0; fp64 shows the
    rounding of lse."""
    for dtype, label_smoothing, reduction in itertools.product(backend.dtypes, (0.0, 0.3), ("mean", "none")):
        options = {"reduction": reduction, "label_smoothing": label_smoothing}
        case = OPERATOR.case((3, 1, None, 16), backend.device, dtype=dtype, **options)
        if zero is not None:
            case.inputs[zero].data[0] = 0
        found = {name: x.detach().double() for name, x in OPERATOR.kernel(case).items()}
        for name in ("image", "text"):
            found[f"d_{name}"] *= case.inputs[name].detach().double().norm(dim=1, keepdim=True).clamp_min(1e-12)
        most = 1e-12 if dtype == torch.float64 else 0  # 100 · 2⁻⁵³ for each of the images
        assert all(x.abs().max() <= most for x in found.values())


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_saves_gradients_for_a_mean_in_cpp(reduction):
    """lse, norms and the divisor of the mean; in C++ for a mean also the gradients of the unit rows."""
    case = OPERATOR.case((16, 300, 200, 64), reduction=reduction)
    gradients = [1, 16 * 64, 200 * 64] if reduction == "mean" else []
    assert sorted(OPERATOR.saved(case)) == sorted([16, 16, 200, 1, *gradients])


def test_rows_outside_the_sample_have_zero_gradient(backend: Backend):
    case = OPERATOR.case((4, 30, 10, 16), backend.device)
    d_text = OPERATOR.kernel(case)["d_text"]
    absent = torch.ones(30, dtype=torch.bool, device=backend.device)
    absent[case.options["class_ids"]] = False
    assert not d_text[absent].any() and d_text[~absent].any(dim=1).all()


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_peak_memory_is_a_panel_of_logits(backend: Backend):
    """[B, K] would be 96 MB."""
    case = OPERATOR.case((1200, 20_000, None, 8))
    peak = peak_bytes(lambda: OPERATOR.kernel(case))
    assert peak < 60e6  # a panel of 34 MB, the gradients, and what the allocator rounds up


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_panels_agree_with_eager(backend: Backend):
    """The cosines of a panel of images are kept, at most 2²³: two panels here."""
    OPERATOR.check_no_worse_than_eager(OPERATOR.case((520, 17_000, None, 2)))


@pytest.mark.parametrize("panel", [1, 65 * 80], ids=["of one tile", "last with fewer tiles"])
@pytest.mark.parametrize("backend", [INTERPRETED, GPU], indirect=True)
def test_panels_and_splits_agree(backend: Backend, panel, monkeypatch, poisoned_memory):
    """The gradient of the text is a sum over panels of images; for few images programs split the classes."""
    case = OPERATOR.case((140, 90, 80, 20), backend.device, label_smoothing=0.1)  # tiles of 64 images
    whole = OPERATOR.kernel(case)
    monkeypatch.setattr("skipkernels.ops.class_sampled_ce.PANEL", panel)
    monkeypatch.setattr("skipkernels.ops.class_sampled_ce.PROGRAMS", 1)
    found = OPERATOR.kernel(case)
    assert all(relative_error(found[name], right) <= 1e-4 for name, right in whole.items())


@pytest.mark.gpu
def test_sizes_share_their_kernels():
    """Triton compiles another kernel for a size of 1, and for multiples of 16, not for each size."""
    module = importlib.import_module("skipkernels.ops.class_sampled_ce")
    kernels = module._class_sampled_ce_fwd_kernel, module._class_sampled_ce_bwd_logits_kernel
    compiled = []
    for B, K in ((5, 37), (6, 39), (7, 41), (9, 43)):
        OPERATOR.kernel(OPERATOR.case((B, 90, K, 100), "cuda"))
        compiled.append(sum(len(entry[0]) for kernel in kernels for entry in kernel.device_caches.values()))
    assert compiled[0] == compiled[-1]

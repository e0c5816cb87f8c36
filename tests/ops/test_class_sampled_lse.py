"""class_sampled_lse and its gradients against fp64 and eager, and the loss of several processes against that of one."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels import functional, reference
from skipkernels.functional import class_sampled_lse
from skipkernels.ops.class_sampled_lse import class_sampled_lse as operator
from skipkernels.ops.class_sampled_lse import class_sampled_lse_backward as backward_operator
from skipkernels.testing import COSINE, SLACK, relative_error
from tests.layouts import LAYOUTS, laid_out
from tests.ops.conftest import BACKENDS, Backend

INTERPRETER = pytest.mark.parametrize(
    "backend", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True
)


class Case(NamedTuple):
    image: Tensor
    text: Tensor
    logit_scale: Tensor
    labels: Tensor
    class_ids: Tensor | None

    def to(self, dtype: torch.dtype) -> Case:
        """Copy to leaf tensors of a dtype; the scale is fp32, or fp64 for fp64 features."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        dtypes = dtype, dtype, wide
        inputs = (x.detach().to(other).requires_grad_() for x, other in zip(self[:3], dtypes, strict=True))
        return Case(*inputs, *self[3:])

    @property
    def kept(self) -> Tensor:
        """The row of the bank of each logit."""
        return torch.arange(len(self.text), device=self.text.device) if self.class_ids is None else self.class_ids


def make(B, C, K, D, dtype=torch.float32, *, scale=100.0, seed=0, device="cpu") -> Case:
    """Random inputs: every second image has a label (the others −1), and half of these images are near their class."""
    rng = torch.Generator().manual_seed(seed)
    text = torch.randn(C, D, generator=rng) + torch.randn(D, generator=rng)
    class_ids = None if K is None else torch.randperm(C, generator=rng)[:K]
    kept = torch.arange(C) if class_ids is None else class_ids
    labels = torch.full((B,), -1)
    image = 2 * torch.randn(B, D, generator=rng)
    if len(kept) > 0:
        labels[::2] = kept[torch.randint(0, len(kept), (len(labels[::2]),), generator=rng)]
        image[::4] += text[labels[::4]]
    moved = (x.to(device) for x in (image.to(dtype), text.to(dtype), torch.tensor(scale), labels))
    return Case(*moved, None if class_ids is None else class_ids.to(device)).to(dtype)


def kernel(case: Case) -> tuple[Tensor, Tensor]:
    return class_sampled_lse(case.image, case.text, case.labels, case.logit_scale, class_ids=case.class_ids)


def truth(case: Case) -> tuple[Tensor, Tensor]:
    return reference.class_sampled_lse(case.image, case.text, case.labels, case.logit_scale, case.class_ids)


def eager(case: Case) -> tuple[Tensor, Tensor]:
    """Eager PyTorch, all in the dtype of the features."""
    rows = F.normalize(case.text[case.kept], dim=-1)
    logits = F.normalize(case.image, dim=-1) @ rows.T * case.logit_scale.to(case.image.dtype)
    hits = case.labels[:, None] == case.kept
    return logits.logsumexp(dim=1), (logits * hits).sum(dim=1)


def upstream_of(case: Case) -> tuple[Tensor, Tensor]:
    """Gradients of lse and target from a loss over all processes: the share of these classes in the softmax, and −1.

    The share is nearly 1 for the first images.
    """
    share = 1 - torch.logspace(-9, -0.01, len(case.image), dtype=torch.float64, device=case.image.device)
    return share, torch.full_like(share, -1)


def results_and_gradients(function: Callable, case: Case) -> list[Tensor]:
    results = function(case)
    upstream = [d.to(x.dtype) for d, x in zip(upstream_of(case), results, strict=True)]
    return [*results, *torch.autograd.grad(results, case[:3], upstream)]


def check_three_ways(case: Case) -> None:
    dtype, scale = case.image.dtype, abs(case.logit_scale.item())
    exact = results_and_gradients(truth, case.to(torch.float64))
    ours, theirs = results_and_gradients(kernel, case), results_and_gradients(eager, case)
    assert ours[0].dtype == ours[1].dtype == torch.float64
    # Rounded cosines give a log-probability an absolute error of scale · COSINE. The results and the gradients of the
    # logits have the same error, the gradients of the rows scale/|row| times that. It dominates where the gradients of
    # a confident image are nearly 0.
    logit = scale * COSINE[dtype]
    sizes = (1.0, 1.0, *(scale / x.detach().double().norm(dim=1).min().item() for x in (case.image, case.text)), 1.0)
    names = ("lse", "target", "image", "text", "logit_scale")
    for name, value, other, right, size in zip(names, ours, theirs, exact, sizes, strict=True):
        # lse and target are fp64, but computed from cosines in the dtype of the arithmetic.
        slack = SLACK[torch.promote_types(dtype, torch.float32) if name in names[:2] else value.dtype]
        slack += logit * (1 + size / max(right.norm().item(), 1e-300))
        error, bound = relative_error(value, right), relative_error(other, right)
        assert error <= bound + slack, f"{name}: {error:.2e} against eager's {bound:.2e} and {slack:.2e}"


SHAPES = [
    (1, 1, None, 1),
    (4, 9, 1, 64),
    (5, 31, 29, 640),
    (16, 250, 27, 512),
    (33, 65, 33, 127),
    (257, 37, None, 129),  # one more than a tile of images
    (5, 1200, 513, 64),  # one more than a tile of classes
]
RUNS = [
    pytest.param(name, shape, dtype, marks=[pytest.mark.gpu] * (name == "gpu"), id=f"{name}-{label}-{str(dtype)[6:]}")
    for name, backend in BACKENDS.items()
    for shape in SHAPES
    for dtype in backend.dtypes
    # The interpreter takes milliseconds for every tile.
    if name != "interpreter" or shape[0] * shape[1] * shape[3] < 300_000
    for label in [f"B{shape[0]}-C{shape[1]}-K{shape[2] or shape[1]}-D{shape[3]}"]
]


@pytest.mark.parametrize(("backend", "shape", "dtype"), RUNS, indirect=["backend"])
def test_no_worse_than_eager(backend: Backend, shape, dtype):
    check_three_ways(make(*shape, dtype, device=backend.device))


@pytest.mark.parametrize("scale", [0.0, -20.0])
def test_any_scale(backend: Backend, scale):
    check_three_ways(make(7, 20, 11, 32, scale=scale, device=backend.device))


@INTERPRETER
def test_panels_and_splits_agree(backend: Backend, monkeypatch):
    """Several panels of images in backward; one split of the classes; more images than one combining program reads."""
    case = make(300, 90, 79, 20, device=backend.device)
    whole = results_and_gradients(kernel, case)
    monkeypatch.setattr("skipkernels.ops.unit_rows.PANEL", 1)
    monkeypatch.setattr("skipkernels.ops.class_sampled_ce.PROGRAMS", 1)
    for value, right in zip(results_and_gradients(kernel, case), whole, strict=True):
        assert relative_error(value, right) <= 1e-4


@pytest.mark.parametrize("C", [0, 9])
def test_no_class_contributes_nothing(backend: Backend, C):
    """A process may own no class, or none of the sample; its gradients must exist, since processes wait for them."""
    for dtype in backend.dtypes:
        case = make(3, C, 0 if C > 0 else None, 16, dtype, device=backend.device)
        lse, target, *gradients = results_and_gradients(kernel, case)
        assert torch.equal(lse.cpu(), torch.full((3,), -torch.inf).double())
        assert torch.equal(target.cpu(), torch.zeros(3).double())
        for gradient, x in zip(gradients, case[:3], strict=True):
            assert torch.equal(gradient, torch.zeros_like(x))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(backend: Backend, layout):
    case = make(6, 20, 11, 32, device=backend.device)
    image, text = laid_out(case.image.detach(), layout), laid_out(case.text.detach(), layout)
    results = []
    for copy in (lambda x: x, lambda x: x.clone(memory_format=torch.contiguous_format)):
        inputs = (copy(x).requires_grad_() for x in (image, text))
        results.append(results_and_gradients(kernel, Case(*inputs, *case[2:])))
    for ours, theirs in zip(*results, strict=True):
        # PyTorch sums columns that are not contiguous in another order.
        assert relative_error(ours, theirs) <= (1e-5 if backend.name == "reference" else 0)


def test_gradients_of_one_result_and_of_views(backend: Backend):
    """An undefined upstream gradient counts as 0, and an upstream gradient may be an expanded scalar."""
    case = make(6, 20, 11, 32, device=backend.device)
    exact = case.to(torch.float64)
    for total in (lambda lse, _: lse.sum(), lambda _, target: target.sum(), lambda lse, target: (lse - target).mean()):
        ours = torch.autograd.grad(total(*kernel(case)), case[:3])
        for value, right in zip(ours, torch.autograd.grad(total(*truth(exact)), exact[:3]), strict=True):
            assert relative_error(value, right) <= 1e-4


def test_gradcheck(backend: Backend):
    backend.skip_unless_supported(torch.float64)
    for K in (None, 1, 6):
        case = make(4, 9, K, 5, torch.float64, scale=7.0)
        assert torch.autograd.gradcheck(lambda *inputs, case=case: kernel(Case(*inputs, *case[3:])), case[:3])


@pytest.mark.parametrize("K", [None, 6])
def test_opcheck(backend: Backend, K):
    case = make(3, 9, K, 5, device=backend.device)
    image, text, scale = case[:3]
    backend.opcheck(operator, (image, text, case.labels, scale, case.class_ids))
    image, text, scale = (x.detach() for x in case[:3])
    lse, target, *norms = operator(image, text, case.labels, scale, case.class_ids)
    for needs in itertools.product([True, False], repeat=3):
        arguments = image, text, case.labels, scale, lse, *norms, lse, target, case.class_ids, *needs
        backend.opcheck(backward_operator, arguments)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1)])
def test_only_needed_gradients_are_computed(backend: Backend, wanted, monkeypatch):
    case = make(4, 9, 6, 16, device=backend.device)
    everything = results_and_gradients(kernel, case)[2:]
    inputs = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(case[:3])]
    calls = []
    monkeypatch.setattr(
        "skipkernels.ops.class_sampled_lse.class_sampled_lse_backward",
        lambda *args: calls.append(backward_operator(*args)) or calls[-1],
    )
    results = kernel(Case(*inputs, *case[3:]))
    torch.autograd.backward(results, upstream_of(case))
    for i, x in enumerate(inputs):
        assert (x.grad is not None) == (calls[0][i].numel() > 0) == (i in wanted)
        assert x.grad is None or torch.equal(x.grad, everything[i])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_casts_features_and_not_the_scale(backend: Backend, dtype):
    backend.skip_unless_supported(dtype)
    case = make(4, 30, 20, 64, scale=100.3, device=backend.device)
    with torch.autocast(backend.device.type, dtype=dtype):
        results = kernel(case)
    rounded = case._replace(image=case.image.detach().to(dtype), text=case.text.detach().to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(results, kernel(rounded), strict=True))
    (d_image,) = torch.autograd.grad(results, case.image, upstream_of(case))
    assert d_image.dtype == torch.float32 and d_image.abs().sum() > 0


def test_compiles_into_one_graph(backend: Backend):
    def step(image, text, labels, scale, class_ids):
        lse, target = class_sampled_lse(image * 2, text, labels, scale.exp(), class_ids=class_ids)
        return (lse - target).mean()

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((4, 30, 20, 16), (7, 31, 11, 16)):
        case = make(*shape, scale=3.0, device=backend.device)
        inputs = case.image, case.text, case.labels, case.logit_scale, case.class_ids
        ours, theirs = compiled(*inputs), step(*inputs)
        assert torch.equal(ours, theirs)
        for a, b in zip(torch.autograd.grad(ours, case[:3]), torch.autograd.grad(theirs, case[:3]), strict=True):
            assert torch.equal(a, b)


def test_every_element_is_written(backend: Backend, request: pytest.FixtureRequest):
    """Unwritten results would be NaN."""
    case = make(37, 61, 40, 33, device=backend.device)
    plain = results_and_gradients(kernel, case)
    request.getfixturevalue("poisoned_memory")
    assert all(torch.equal(a, b) for a, b in zip(plain, results_and_gradients(kernel, case), strict=True))


def test_bits_do_not_depend_on_threads():
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(results_and_gradients(kernel, make(300, 1100, 1029, 96)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", ["interpreter"], indirect=True)
@pytest.mark.parametrize("bad", [{"labels": 7}, {"labels": 9}, {"labels": -2}, {"class_ids": 9}, {"class_ids": 0}])
def test_bad_ids_fail_a_device_assertion(backend: Backend, bad):
    """A label outside the sample or the bank, an id outside the bank, and a repeated id of a label."""
    arguments = {"labels": [0, 3, -1, 8], "class_ids": [8, 0, 3, 5]}
    arguments = {k: [*v[:-1], bad[k]] if k in bad else v for k, v in arguments.items()}
    image, text = torch.randn(4, 16), torch.randn(9, 16)
    tensors = {k: torch.tensor(v) for k, v in arguments.items()}
    with pytest.raises(Exception, match="class_sampled_lse: (labels|class_ids) must be rows of text"):
        class_sampled_lse(image, text, logit_scale=10.0, **tensors)


# ---- the loss of several processes -----------------------------------------------------------------------------------


def sharded_loss(whole: Case, processes: int, class_weight: Tensor | None = None, label_smoothing: float = 0) -> Tensor:
    """Mean cross-entropy with class c on process c mod W, from `class_sampled_lse` as its documentation says."""
    weight = torch.ones(len(whole.text)) if class_weight is None else class_weight
    weight = weight.double().to(whole.image.device)
    shares, directions = [], []
    for rank in range(processes):
        own = whole.class_ids[whole.class_ids % processes == rank]
        labels = torch.where(whole.labels % processes == rank, whole.labels // processes, -1)
        bank = whole.text[rank::processes]
        shares.append(class_sampled_lse(whole.image, bank, labels, whole.logit_scale, class_ids=own // processes))
        directions.append(weight[own] @ F.normalize(whole.text[own].double()))
    lse, target = (torch.stack(x) for x in zip(*shares, strict=True))  # [W, B]
    lse, target = lse.logsumexp(dim=0), target.sum(dim=0)
    logits = whole.logit_scale * (F.normalize(whole.image.double()) @ torch.stack(directions).sum(dim=0))
    spread = (weight[whole.class_ids].sum() * lse - logits) / len(whole.class_ids)
    loss = (1 - label_smoothing) * weight[whole.labels] * (lse - target) + label_smoothing * spread
    return loss.sum() / weight[whole.labels].sum()


OPTIONS = [{}, {"class_weight": torch.rand(13) + 0.5, "label_smoothing": 0.1}]


@pytest.mark.parametrize("options", OPTIONS, ids=["plain", "weights-and-smoothing"])
@pytest.mark.parametrize("processes", [1, 2, 3, 20])  # 20: most own no class
def test_the_loss_of_several_processes_is_that_of_one(backend: Backend, processes, options):
    dtype = torch.float64 if torch.float64 in backend.dtypes else torch.float32
    case = make(6, 13, 9, 16, dtype, device=backend.device)
    case = case._replace(labels=case.class_ids[:6])
    given = {name: x.to(backend.device) if isinstance(x, Tensor) else x for name, x in options.items()}
    image, text, scale, labels, class_ids = case
    one = functional.class_sampled_ce(image, text, labels, scale, class_ids=class_ids, **given)
    ours = sharded_loss(case, processes, **given)
    results = [(x, *torch.autograd.grad(x, case[:3])) for x in (ours, one)]
    most = 1e-12 if dtype == torch.float64 else 20 * SLACK[dtype]  # the terms of the loss nearly cancel
    assert all(relative_error(a, b) <= most for a, b in zip(*results, strict=True))


def test_confident_images_have_exact_gradients(backend: Backend):
    """p − 1 is as small as 1e-6, with the error of p, and in several processes also of their lse. With an lse in fp32
    the error would be 16 times larger."""
    rng = torch.Generator().manual_seed(0)
    text = torch.eye(8) + 0.1 * torch.randn(8, 8, generator=rng)
    image = torch.cat([text + 0.01 * torch.randn(8, 8, generator=rng), text])
    tensors = image, text, torch.tensor(15.0), torch.arange(16) % 8, torch.arange(8)
    case = Case(*(x.to(backend.device) for x in tensors)).to(torch.float32)

    def loss(case: Case) -> Tensor:
        return functional.class_sampled_ce(case.image, case.text, case.labels, case.logit_scale)

    wide = case.to(torch.float64)
    exact = torch.autograd.grad(loss(wide), wide[:3])
    one, ours = (torch.autograd.grad(x, case[:3]) for x in (loss(case), sharded_loss(case, 2)))
    for a, b, right in zip(ours, one, exact, strict=True):
        assert relative_error(a, right) <= 4 * relative_error(b, right) + SLACK[torch.float32]

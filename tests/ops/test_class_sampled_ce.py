"""class_sampled_ce and its gradients against fp64 and eager, for every implementation."""

from __future__ import annotations

import importlib
import itertools
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipkernels import reference
from skipkernels.functional import class_sampled_ce
from skipkernels.ops.class_sampled_ce import REDUCTIONS
from skipkernels.ops.class_sampled_ce import class_sampled_ce as operator
from skipkernels.ops.class_sampled_ce import class_sampled_ce_backward as backward_operator
from skipkernels.testing import COSINE, SLACK, peak_bytes, relative_error
from tests.layouts import LAYOUTS, laid_out
from tests.ops.conftest import BACKENDS, Backend
from tests.ops.parameters import pairs


class Case(NamedTuple):
    image: Tensor
    text: Tensor
    labels: Tensor
    logit_scale: Tensor
    options: dict

    def to(self, dtype: torch.dtype) -> Case:
        """Fresh leaves; the scale stays in fp32, as a model has it, unless the features are fp64."""
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        image, text = (x.detach().to(dtype).requires_grad_() for x in (self.image, self.text))
        return self._replace(image=image, text=text, logit_scale=self.logit_scale.detach().to(wide).requires_grad_())

    def on(self, device: torch.device) -> Case:
        """Fresh leaves on a device."""
        tensors = [x.detach().to(device) for x in self[:4]]
        options = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in self.options.items()}
        return Case(*tensors, options).to(self.image.dtype)


def make(
    B, C, K, D, dtype=torch.float32, *, scale=100.0, noise=2.0, ignored=0.0, seed=0, device="cpu", **options
) -> Case:
    """A batch of confident and other images: every second image is near the text of its label."""
    rng = torch.Generator().manual_seed(seed)
    text = torch.randn(C, D, generator=rng) + torch.randn(D, generator=rng)
    if K is not None:
        options["class_ids"] = torch.randperm(C, generator=rng)[:K]
    kept = options.get("class_ids", torch.arange(C))
    labels = kept[torch.randint(0, len(kept), (B,), generator=rng)]
    image = text[labels] * (torch.arange(B) % 2)[:, None] + noise * torch.randn(B, D, generator=rng)
    ignore_index = options.get("ignore_index", -100)
    labels = torch.where(torch.rand(B, generator=rng) < ignored, ignore_index, labels)
    # Rounded to the dtype, so that all three start from the same numbers.
    return Case(image.to(dtype), text.to(dtype), labels, torch.tensor(scale), options).on(torch.device(device))


def eager(case: Case) -> Tensor:
    """Eager PyTorch, all in the dtype of the features."""
    options = dict(case.options)
    class_ids, weight = options.pop("class_ids", None), options.pop("class_weight", None)
    text = case.text if class_ids is None else case.text[class_ids]
    logits = F.normalize(case.image, dim=-1) @ F.normalize(text, dim=-1).T * case.logit_scale.to(case.image.dtype)
    labels, ignore_index = case.labels, options.pop("ignore_index", -100)
    ignored = labels == ignore_index
    if class_ids is not None:
        labels = (labels[:, None] == class_ids).int().argmax(dim=1)
        weight = None if weight is None else weight[class_ids]
    labels = torch.where(ignored, -100, labels)
    return F.cross_entropy(logits, labels, weight=None if weight is None else weight.to(logits.dtype), **options)


def kernel(case: Case) -> Tensor:
    return class_sampled_ce(case.image, case.text, case.labels, case.logit_scale, **case.options)


def truth(case: Case) -> Tensor:
    return reference.class_sampled_ce(case.image, case.text, case.labels, case.logit_scale, **case.options)


def loss_and_gradients(function, case: Case) -> list[Tensor]:
    loss = function(case)
    d_loss = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype, device=loss.device).view(loss.shape)
    return [loss, *torch.autograd.grad(loss, (case.image, case.text, case.logit_scale), d_loss)]


def check_three_ways(case: Case) -> None:
    dtype, scale = case.image.dtype, abs(case.logit_scale.item())
    exact = loss_and_gradients(truth, case.to(torch.float64))
    ours, theirs = loss_and_gradients(kernel, case), loss_and_gradients(eager, case)
    # A log-probability is known to scale · COSINE, absolutely, and with it the loss and the gradient of each logit;
    # those of the rows are that times scale/|row|. It counts where a confident image makes them vanish.
    logit = scale * COSINE[dtype]
    sizes = (1.0, *(scale / x.detach().double().norm(dim=1).min().item() for x in (case.image, case.text)), 1.0)
    names = ("loss", "image", "text", "logit_scale")
    for name, value, other, right, size in zip(names, ours, theirs, exact, sizes, strict=True):
        slack = SLACK[value.dtype] + logit * (1 + size / max(right.norm().item(), 1e-300))
        error, bound = relative_error(value, right), relative_error(other, right)
        assert error <= bound + slack, f"{name}: {error:.2e} against eager's {bound:.2e} and {slack:.2e}"


SHAPES = [
    (1, 1, None, 1),
    (1, 7, None, 7),
    (4, 100, 50, 512),
    (4, 50, 50, 512),
    (3, 17, 5, 128),
    (5, 31, 29, 640),
    (2, 13, 3, 1280),
    (33, 65, 33, 127),
    (257, 37, None, 129),  # one more than a tile of images
    (5, 1200, 513, 64),  # one more than a tile of classes
    (300, 1031, 1029, 96),  # several blocks, products by the library
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


@st.composite
def cases(draw, backend: Backend) -> Case:
    B, C, D = draw(st.integers(1, 40)), draw(st.integers(1, 60)), draw(st.sampled_from([1, 2, 7, 16, 31, 64, 100]))
    options: dict = {"reduction": draw(st.sampled_from(["mean", "sum", "none"]))}
    if draw(st.booleans()):
        options["label_smoothing"] = draw(st.sampled_from([0.1, 0.5, 1.0]))
    if draw(st.booleans()):
        options["class_weight"] = torch.rand(C, generator=torch.Generator().manual_seed(C)) + 0.1
    if draw(st.booleans()):
        options["ignore_index"] = draw(st.sampled_from([-1, 0]))
    return make(
        B,
        C,
        draw(st.none() | st.integers(1, C)),
        D,
        draw(st.sampled_from(backend.dtypes)),
        scale=draw(st.sampled_from([0.0, 1.0, 14.3, 100.0, -20.0])),
        ignored=draw(st.sampled_from([0.0, 0.3])),
        seed=draw(st.integers(0, 99)),
        device=backend.device,
        **options,
    )


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_option_and_shape(backend: Backend, data):
    case = data.draw(cases(backend))
    if case.options["reduction"] == "mean":  # all ignored is 0/0, in eager as well
        case = case._replace(labels=case.labels.clone())
        case.labels[0] = case.options.get("class_ids", torch.zeros(1))[0]
        if case.labels[0] == case.options.get("ignore_index", -100):
            return
    dtype = case.image.dtype
    exact, ours = loss_and_gradients(truth, case.to(torch.float64)), loss_and_gradients(kernel, case)
    # Absolute, for a gradient may cancel to nothing: what its terms are known to, each at most 1 times scale/|row|.
    logits = (1 + abs(case.logit_scale.item())) * (COSINE[dtype] * 20)
    if dtype == torch.bfloat16 and backend.name not in ("cpp", "reference"):
        logits += SLACK[dtype]  # d_logits are rounded before they are summed up, as eager's are
    lengths = [1.0, case.image.norm(dim=1).min().item(), case.text.norm(dim=1).min().item(), 1.0]
    for value, right, length in zip(ours, exact, lengths, strict=True):
        terms = max(right.abs().max().item(), 1.0) * (1 + abs(case.logit_scale.item())) / min(length, 1.0)
        assert (value.double() - right).abs().max() <= SLACK[value.dtype] * right.abs().max() + logits * terms


def test_all_ignored_is_what_cross_entropy_makes_of_it(backend: Backend):
    case = make(4, 9, 5, 16, ignored=2.0, device=backend.device)
    loss, *gradients = loss_and_gradients(kernel, case)
    assert loss.isnan() and eager(case).isnan()
    assert all(torch.equal(gradient, torch.zeros_like(gradient)) for gradient in gradients)


@pytest.mark.parametrize("backend", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
def test_large_batches_no_worse_than_eager(backend: Backend):
    # Tiles of 128 images, in one whole group of tiles and a part of one; two tiles of classes.
    check_three_ways(make(1030, 90, 70, 32, torch.float16, device=backend.device))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(backend: Backend, layout):
    case = make(6, 20, 11, 32, device=backend.device)

    image, text = laid_out(case.image.detach(), layout), laid_out(case.text.detach(), layout)
    strided = case._replace(image=image.requires_grad_(), text=text.requires_grad_())
    plain = case._replace(
        image=image.detach().clone(memory_format=torch.contiguous_format).requires_grad_(),
        text=text.detach().clone(memory_format=torch.contiguous_format).requires_grad_(),
    )
    for ours, theirs in zip(loss_and_gradients(kernel, strided), loss_and_gradients(kernel, plain), strict=True):
        if backend.name == "reference":  # PyTorch sums columns that are apart in another order
            assert relative_error(ours, theirs) <= 1e-5
        else:
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "shape", [(64, 700, None, 128), (400, 30, 20, 256), (3, 5000, 4000, 64), (300, 1100, 1029, 96)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_bits_do_not_depend_on_threads(shape, dtype):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(loss_and_gradients(kernel, make(*shape, dtype, label_smoothing=0.1)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("scale", [100.0, 1000.0, 1e4])
@pytest.mark.parametrize("image_is", ["on its text", "opposite to its text"])
def test_large_scale_neither_overflows_nor_underflows(backend: Backend, scale, image_is):
    """A constant maximum of 1/τ underflows in the second case: every logit is 2 · scale below it."""
    text = torch.randn(50, 64, generator=torch.Generator().manual_seed(0))
    text = text * 0.01 + text[:1]  # all near one direction
    image = text[:4] if image_is == "on its text" else -text[:4]
    case = Case(image, text, torch.arange(4), torch.tensor(scale), {"reduction": "none"}).on(backend.device)
    loss, *gradients = loss_and_gradients(kernel, case)
    right = truth(case.to(torch.float64))
    assert torch.allclose(loss.double(), right, rtol=1e-5, atol=scale * COSINE[torch.float32] * 4)
    assert all(gradient.isfinite().all() for gradient in gradients)


def test_zero_rows_match_the_reference(backend: Backend):
    """x/max(|x|, 1e-12): a zero row has cosine 0 and passes its gradient on, times 1e12."""
    case = make(4, 9, None, 16, device=backend.device)
    case.image.data[1] = 0
    case.text.data[[2, 5]] = 0
    case.text.data[3] *= 1e-20  # shorter than eps, but not zero
    for ours, right in zip(
        loss_and_gradients(kernel, case), loss_and_gradients(truth, case.to(torch.float64)), strict=True
    ):
        assert relative_error(ours, right) < 1e-4
    assert case.image.grad is None  # autograd.grad leaves the leaves alone


@pytest.mark.parametrize(("reduction", "zero", "K"), pairs(["mean", "sum", "none"], ["image", "text", None], [None, 1]))
def test_one_class_has_no_loss_and_no_gradient(backend: Backend, K, zero, reduction):
    """A zero row is included: its gradient is divided by 1e-12. In fp32 all results are exactly 0; fp64 shows the
    rounding of lse."""
    for dtype, label_smoothing in itertools.product(backend.dtypes, (0.0, 0.3)):
        options = {"reduction": reduction, "label_smoothing": label_smoothing}
        case = make(3, 1, K, 16, dtype, device=backend.device, **options)
        if zero is not None:
            getattr(case, zero).data[0] = 0
        loss, d_image, d_text, d_scale = (x.detach().double() for x in loss_and_gradients(kernel, case))
        d_image *= case.image.detach().double().norm(dim=1, keepdim=True).clamp_min(1e-12)
        d_text *= case.text.detach().double().norm(dim=1, keepdim=True).clamp_min(1e-12)
        most = 1e-12 if dtype == torch.float64 else 0  # 100 · 2⁻⁵³ for each of the images
        assert all(x.abs().max() <= most for x in (loss, d_image, d_text, d_scale))


def test_gradcheck(backend: Backend):
    backend.skip_unless_supported(torch.float64)
    for options in ({}, {"label_smoothing": 0.2, "class_weight": torch.rand(9) + 0.1, "reduction": "none"}):
        case = make(3, 9, 6, 5, torch.float64, scale=7.0, ignored=0.3, **options)
        assert torch.autograd.gradcheck(
            lambda image, text, scale, case=case: kernel(case._replace(image=image, text=text, logit_scale=scale)),
            (case.image, case.text, case.logit_scale),
        )


def arguments(case: Case, keep: bool = False) -> tuple:
    defaults = {"class_ids": None, "class_weight": None, "label_smoothing": 0.0, "ignore_index": -100}
    options = {**defaults, "reduction": "mean", **case.options}
    options["reduction"] = REDUCTIONS.index(options["reduction"])
    return case.image, case.text, case.labels, case.logit_scale, *options.values(), *[keep] * 3


@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1, "class_weight": torch.ones(9), "reduction": "none"}], ids=["plain", "all"]
)
@pytest.mark.parametrize("K", [None, 6])
def test_opcheck(backend: Backend, K, options):
    case = make(3, 9, K, 5, **options).on(backend.device)
    backend.opcheck(operator, arguments(case))
    if "reduction" not in options and backend.name == "cpp":  # others do not write what is kept
        backend.opcheck(operator, arguments(case, keep=True))
    with torch.no_grad():
        loss, *statistics = operator(*arguments(case))
        image, text, labels, scale, *rest = arguments(case)[:-3]
        for needs in ((True, True, True), (True, False, False), (False, True, False), (False, False, True)):
            backend.opcheck(
                backward_operator,
                (
                    torch.ones_like(loss),
                    image.detach(),
                    text.detach(),
                    labels,
                    scale.detach(),
                    *statistics,
                    *rest,
                    *needs,
                ),
            )


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (0, 1)])
def test_only_needed_gradients_are_computed(backend: Backend, wanted, reduction, monkeypatch):
    case = make(4, 9, 6, 16, reduction=reduction, device=backend.device)
    everything = loss_and_gradients(kernel, case)[1:]
    inputs = [x.detach().requires_grad_(i in wanted) for i, x in enumerate((case.image, case.text, case.logit_scale))]
    calls = []
    monkeypatch.setattr(
        "skipkernels.ops.class_sampled_ce.class_sampled_ce_backward",
        lambda *args: calls.append(backward_operator(*args)) or calls[-1],
    )
    loss = kernel(case._replace(image=inputs[0], text=inputs[1], logit_scale=inputs[2]))
    loss.backward(torch.linspace(0.5, 1.5, loss.numel(), device=loss.device).view(loss.shape))
    for i, x in enumerate(inputs):
        assert (x.grad is not None) == (i in wanted)
        assert (calls[0][i].numel() > 0) == (i in wanted)
        if i in wanted:
            assert torch.equal(x.grad, everything[i])


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_saves_the_documented_tensors(reduction):
    """lse, norms and the divisor of the mean; for a mean also the gradients of the unit rows."""
    case = make(16, 300, 200, 64, reduction=reduction)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        kernel(case)
    inputs = {x.data_ptr() for x in (case.image, case.text, case.labels, case.logit_scale, case.options["class_ids"])}
    own = [x.numel() for x in saved if x.data_ptr() not in inputs and x.numel() > 0]
    gradients = [1, 16 * 64, 200 * 64] if reduction == "mean" else []
    assert sorted(own) == sorted([16, 16, 200, 1, *gradients])


def test_rows_outside_the_sample_have_zero_gradient(backend: Backend):
    case = make(4, 30, 10, 16, device=backend.device)
    _, _, d_text, _ = loss_and_gradients(kernel, case)
    absent = torch.ones(30, dtype=torch.bool, device=backend.device)
    absent[case.options["class_ids"]] = False
    assert torch.equal(d_text[absent].cpu(), torch.zeros(20, 16))
    assert (d_text[~absent] != 0).any(dim=1).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast_casts_features_and_not_the_scale(backend: Backend, dtype):
    backend.skip_unless_supported(dtype)
    case = make(4, 30, 20, 64, scale=100.3, device=backend.device)
    with torch.autocast(backend.device.type, dtype=dtype):
        loss = kernel(case)
    assert loss.dtype == torch.float32
    rounded = case._replace(image=case.image.detach().to(dtype), text=case.text.detach().to(dtype))
    assert torch.equal(loss, kernel(rounded))
    loss.backward()
    assert case.image.grad.dtype == torch.float32 and case.image.grad.abs().sum() > 0

    in_fp64 = make(4, 30, 20, 64, torch.float64, device=backend.device)
    with torch.autocast(backend.device.type, dtype=dtype):
        assert torch.equal(kernel(in_fp64), kernel(in_fp64.to(torch.float64)))
        assert kernel(in_fp64).dtype == torch.float64


def test_compiles_into_one_graph(backend: Backend):
    def step(image, text, labels, scale, class_ids):
        return class_sampled_ce(image * 2, text, labels, scale.exp(), class_ids=class_ids)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    for shape in ((4, 30, 20, 16), (7, 31, 11, 16)):
        case = make(*shape, device=backend.device)
        log_scale = torch.tensor(3.0, device=backend.device, requires_grad=True)
        inputs = (case.image, case.text, case.labels, log_scale, case.options["class_ids"])
        ours, theirs = compiled(*inputs), step(*inputs)
        assert torch.equal(ours, theirs)
        wanted = (inputs[0], inputs[1], inputs[3])
        for a, b in zip(torch.autograd.grad(ours, wanted), torch.autograd.grad(theirs, wanted), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_peak_memory_is_a_panel_of_logits(backend: Backend):
    """[B, K] would be 160 MB."""
    case = make(2000, 20_000, None, 8)
    peak = peak_bytes(lambda: loss_and_gradients(kernel, case))
    assert peak < 80e6  # a panel of 34 MB, the gradients, and what the allocator rounds up


def test_every_element_is_written(backend: Backend, request: pytest.FixtureRequest):
    """Unwritten results would be NaN."""
    cases = [
        make(37, 61, 40, 33, device=backend.device),
        make(4, 61, 40, 33, reduction="none", label_smoothing=0.1).on(backend.device),
    ]
    plain = [loss_and_gradients(kernel, case) for case in cases]
    request.getfixturevalue("poisoned_memory")
    for case, expected in zip(cases, plain, strict=True):
        poisoned = loss_and_gradients(kernel, case)
        assert all(torch.equal(a, b) for a, b in zip(expected, poisoned, strict=True))


@pytest.mark.parametrize("backend", ["interpreter", pytest.param("gpu", marks=pytest.mark.gpu)], indirect=True)
def test_panels_and_splits_agree(backend: Backend, monkeypatch):
    """The gradient of the text is a sum over panels of images; for few images programs split the classes."""
    case = make(70, 90, 80, 20, label_smoothing=0.1, device=backend.device)
    whole = loss_and_gradients(kernel, case)
    monkeypatch.setattr("skipkernels.ops.unit_rows.PANEL", 1)
    monkeypatch.setattr("skipkernels.ops.class_sampled_ce.PROGRAMS", 1)
    for value, right in zip(loss_and_gradients(kernel, case), whole, strict=True):
        assert relative_error(value, right) <= 1e-4


@pytest.mark.parametrize("backend", ["interpreter"], indirect=True)
@pytest.mark.parametrize("bad", [{"labels": 7}, {"labels": 9}, {"class_ids": 9}, {"class_ids": 0}])
def test_bad_ids_fail_a_device_assertion(backend: Backend, bad):
    """A label outside the sample or the bank, an id outside the bank, and a repeated id of a label."""
    arguments = {"labels": [0, 3, 5, 8], "class_ids": [8, 0, 3, 5]}
    arguments = {k: [*v[:-1], bad[k]] if k in bad else v for k, v in arguments.items()}
    image, text = torch.randn(4, 16), torch.randn(9, 16)
    tensors = {k: torch.tensor(v) for k, v in arguments.items()}
    with pytest.raises(Exception, match="class_sampled_ce: (labels|class_ids) must be rows of text"):
        class_sampled_ce(image, text, logit_scale=10.0, **tensors)


@pytest.mark.gpu
def test_batches_of_any_size_share_their_kernels():
    """Sizes of batch and sample are not constants of a kernel, which would be compiled for each size."""
    kernels = importlib.import_module("skipkernels.ops.class_sampled_ce")
    compiled = []
    for B, K in ((5, 37), (6, 39), (7, 41), (9, 43)):
        loss_and_gradients(kernel, make(B, 90, K, 100, device="cuda"))
        caches = (
            kernels._class_sampled_ce_fwd_kernel.device_caches,
            kernels._class_sampled_ce_bwd_logits_kernel.device_caches,
        )
        compiled.append(sum(len(entry[0]) for cache in caches for entry in cache.values()))
    assert compiled[0] == compiled[-1]


@pytest.mark.gpu
def test_a_graph_replays_forward_and_backward():
    case = make(4, 100, 50, 512, device="cuda")
    inputs = case.image, case.text, case.logit_scale
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        loss_and_gradients(kernel, case)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = kernel(case)
        captured = [loss, *torch.autograd.grad(loss, inputs)]
    other = make(4, 100, 50, 512, seed=1, device="cuda")
    for x, y in zip(
        (*inputs, case.labels, case.options["class_ids"]),
        (other.image, other.text, other.logit_scale, other.labels, other.options["class_ids"]),
        strict=True,
    ):
        x.data.copy_(y)
    graph.replay()
    loss = kernel(other)
    right = [loss, *torch.autograd.grad(loss, (other.image, other.text, other.logit_scale))]
    assert all(torch.equal(a, b) for a, b in zip(captured, right, strict=True))


@pytest.mark.gpu
def test_inductor_compiles_into_one_graph():
    def step(image, text, labels, scale, class_ids):
        return class_sampled_ce(image * 2, text, labels, scale, class_ids=class_ids)

    compiled = torch.compile(step, fullgraph=True, dynamic=True)
    for shape in ((4, 30, 20, 16), (7, 31, 11, 16)):
        case = make(*shape, device="cuda")
        inputs = case.image, case.text, case.labels, case.logit_scale, case.options["class_ids"]
        assert torch.equal(compiled(*inputs), step(*inputs))

"""class_sampled_logits and its gradients against fp64 and eager, for every implementation."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipkernels import reference
from skipkernels.functional import class_sampled_logits
from skipkernels.ops.class_sampled_logits import class_sampled_logits as operator
from skipkernels.ops.class_sampled_logits import class_sampled_logits_backward
from skipkernels.testing import COSINE, SLACK, relative_error
from tests.layouts import LAYOUTS, laid_out
from tests.ops.conftest import BACKENDS, Backend

Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None]


def make(B, C, K, D, dtype=torch.float32, *, scale=100.0, seed=0, device="cpu") -> Inputs:
    """Image, text, scale (in fp32, as a model has it, unless the features are fp64) and class ids."""
    rng = torch.Generator().manual_seed(seed)
    image, text = 2 * torch.randn(B, D, generator=rng), torch.randn(C, D, generator=rng)
    class_ids = None if K is None else torch.randperm(C, generator=rng)[:K].to(device)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    leaves = (image.to(dtype), text.to(dtype), torch.tensor(scale, dtype=wide))
    return *(x.to(device).requires_grad_() for x in leaves), class_ids


def eager(image, text, scale, class_ids) -> Tensor:
    """Eager PyTorch, all in the dtype of the features."""
    rows = text if class_ids is None else text[class_ids]
    return scale.to(image.dtype) * (F.normalize(image, dim=-1) @ F.normalize(rows, dim=-1).T)


def kernel(image, text, scale, class_ids) -> Tensor:
    return class_sampled_logits(image, text, scale, class_ids=class_ids)


def logits_and_gradients(function, inputs: Inputs) -> list[Tensor]:
    logits = function(*inputs)
    rng = torch.Generator().manual_seed(1)
    d_logits = torch.randn(logits.shape, generator=rng).to(logits)
    return [logits, *torch.autograd.grad(logits, inputs[:3], d_logits)]


def in_fp64(inputs: Inputs) -> Inputs:
    return *(x.detach().double().requires_grad_() for x in inputs[:3]), inputs[3]


def check(inputs: Inputs) -> None:
    exact = logits_and_gradients(reference.class_sampled_logits, in_fp64(inputs))
    ours, theirs = logits_and_gradients(kernel, inputs), logits_and_gradients(eager, inputs)
    assert ours[0].dtype == (torch.float64 if inputs[0].dtype == torch.float64 else torch.float32)
    # The gradient of the scale sums up terms of either sign, a cosine each, and may nearly cancel.
    cancelled = [0.0, 0.0, 0.0, COSINE[inputs[0].dtype] * exact[0].numel() ** 0.5 / exact[3].abs().item()]
    for number, (value, other, right, more) in enumerate(zip(ours, theirs, exact, cancelled, strict=True)):
        assert relative_error(value, right) <= relative_error(other, right) + SLACK[value.dtype] + more, number


SHAPES = [
    (1, 1, None, 1),
    (1, 7, None, 7),
    (4, 100, 50, 512),
    (3, 17, 5, 128),
    (5, 31, 29, 640),
    (2, 13, 3, 1280),
    (33, 65, 34, 127),  # one more than few images, one more than a tile of classes
    (257, 37, None, 129),
    (300, 1031, 1029, 96),  # several blocks, products by the library
]
RUNS = [
    pytest.param(name, shape, dtype, marks=[pytest.mark.gpu] * (name == "gpu"), id=f"{name}-{label}-{str(dtype)[6:]}")
    for name, backend in BACKENDS.items()
    for shape in SHAPES
    for dtype in backend.dtypes
    # The interpreter takes milliseconds for every tile.
    if name != "interpreter" or shape[0] * shape[1] * shape[3] < 200_000
    for label in [f"B{shape[0]}-C{shape[1]}-K{shape[2] or shape[1]}-D{shape[3]}"]
]


@pytest.mark.parametrize(("backend", "shape", "dtype"), RUNS, indirect=["backend"])
def test_no_worse_than_eager(backend: Backend, shape, dtype):
    check(make(*shape, dtype, device=backend.device))


def test_gradient_of_the_scale_is_summed_in_fp64(backend: Backend):
    """Sums over classes that cancel over images: in fp32 their rounding would remain."""
    image, text, scale, _ = make(8, 500, None, 16, device=backend.device)
    cosine = kernel(image.detach(), text.detach(), torch.ones_like(scale), None).detach()
    d_logits = cosine.sign() * torch.tensor([1.0, -1.0], device=cosine.device).repeat(4)[:, None]
    (d_scale,) = torch.autograd.grad(kernel(image.detach(), text.detach(), scale, None), scale, d_logits)
    terms = d_logits.double() * cosine.double()
    assert abs(d_scale.double() - terms.sum()) <= COSINE[torch.float32] * terms.norm()


@pytest.mark.parametrize("backend", ["cpp"], indirect=True)
def test_gradient_of_the_scale_no_worse_than_eager_over_draws(backend: Backend):
    errors: dict[str, list[float]] = {"kernel": [], "eager": []}
    for seed in range(20):
        inputs = make(8, 500, None, 16, seed=seed, device=backend.device)
        exact = logits_and_gradients(reference.class_sampled_logits, in_fp64(inputs))[3]
        for function in (kernel, eager):
            error = (logits_and_gradients(function, inputs)[3].double() - exact).abs().item()
            errors[function.__name__].append(error)
    assert sum(errors["kernel"]) <= 1.1 * sum(errors["eager"])


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 40), st.integers(1, 50), st.data())
def test_every_shape_and_scale(backend: Backend, B, C, data):
    K = data.draw(st.none() | st.integers(1, C))
    D, dtype = data.draw(st.sampled_from([1, 7, 16, 33, 100])), data.draw(st.sampled_from(backend.dtypes))
    inputs = make(B, C, K, D, dtype, scale=data.draw(st.sampled_from([0.0, 1.0, 14.3, -20.0])), device=backend.device)
    exact = logits_and_gradients(reference.class_sampled_logits, in_fp64(inputs))
    # Absolute, for a gradient may cancel to nothing: what a sum of its terms is known to.
    scale = 1 + abs(inputs[2].item())
    lengths = [1.0, inputs[0].double().norm(dim=1).min().item(), inputs[1].double().norm(dim=1).min().item(), 1.0]
    for value, right, length in zip(logits_and_gradients(kernel, inputs), exact, lengths, strict=True):
        terms = max(right.abs().max().item(), 1.0, (B * (K or C)) ** 0.5 / min(length, 1.0))
        narrow = SLACK[torch.bfloat16] if dtype == torch.bfloat16 and value.numel() > 1 else 0
        # Twice, for a step is up to twice as large beside a number as the slack, which is an average, has it.
        bound = 2 * SLACK[value.dtype] * right.abs().max() + (20 * COSINE[dtype] + narrow) * scale * terms
        assert (value.double() - right).abs().max() <= bound


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(backend: Backend, layout):
    image, text, scale, class_ids = make(6, 20, 11, 32, device=backend.device)

    strided = [laid_out(x.detach(), layout).requires_grad_() for x in (image, text)]
    plain = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in strided]
    for ours, theirs in zip(
        logits_and_gradients(kernel, (*strided, scale, class_ids.repeat_interleave(2)[::2])),
        logits_and_gradients(kernel, (*plain, scale, class_ids)),
        strict=True,
    ):
        if backend.name == "reference":  # PyTorch sums columns that are apart in another order
            assert relative_error(ours, theirs) <= SLACK[ours.dtype]
        else:
            assert torch.equal(ours, theirs)


def test_zero_rows_match_the_reference(backend: Backend):
    image, text, scale, class_ids = make(4, 9, None, 16, device=backend.device)
    image.data[1] = 0
    text.data[[2, 5]] = 0
    inputs = image, text, scale, class_ids
    exact = logits_and_gradients(reference.class_sampled_logits, in_fp64(inputs))
    for ours, right in zip(logits_and_gradients(kernel, inputs), exact, strict=True):
        assert relative_error(ours, right) < 1e-4


def test_gradcheck(backend: Backend):
    backend.skip_unless_supported(torch.float64)
    *leaves, class_ids = make(3, 9, 6, 5, torch.float64, scale=7.0)
    assert torch.autograd.gradcheck(lambda *x: kernel(*x, class_ids), leaves)


@pytest.mark.parametrize("K", [None, 6])
def test_opcheck(backend: Backend, K):
    inputs = make(3, 9, K, 5, device=backend.device)
    backend.opcheck(operator, inputs)
    with torch.no_grad():
        logits, *norms = operator(*inputs)
        image, text, scale, class_ids = inputs
        detached = image.detach(), text.detach(), scale.detach()
        for needs in itertools.product([True, False], repeat=3):
            arguments = torch.ones_like(logits), *detached, *norms, class_ids, *needs
            backend.opcheck(class_sampled_logits_backward, arguments)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (0, 1)])
def test_only_needed_gradients_are_computed(backend: Backend, wanted, monkeypatch):
    inputs = make(4, 9, 6, 16, device=backend.device)
    everything = torch.autograd.grad(kernel(*inputs).sum(), inputs[:3])
    leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(inputs[:3])]
    calls = []
    monkeypatch.setattr(
        "skipkernels.ops.class_sampled_logits.class_sampled_logits_backward",
        lambda *args: calls.append(class_sampled_logits_backward(*args)) or calls[-1],
    )
    kernel(*leaves, inputs[3]).sum().backward()
    for i, x in enumerate(leaves):
        assert (x.grad is not None) == (i in wanted)
        assert (calls[0][i].numel() > 0) == (i in wanted)
        if i in wanted and i < 2:
            assert torch.equal(x.grad, everything[i])
        elif i in wanted:  # it may come from the image's gradient, where that is computed
            assert torch.allclose(x.grad, everything[i], rtol=1e-4)


def test_two_backward_passes_and_none_of_a_gradient(backend: Backend):
    inputs = make(4, 30, 20, 64, device=backend.device)
    loss = kernel(*inputs).logsumexp(dim=1).sum()
    once, twice = (torch.autograd.grad(loss, inputs[:3], retain_graph=True) for _ in "ab")
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))
    (d_image,) = torch.autograd.grad(loss, inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match=r"class_sampled_logits_backward: the gradient of a gradient"):
        d_image.sum().backward()


def test_saves_the_inputs_and_norms():
    inputs = make(16, 300, 200, 64)
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        kernel(*inputs)
    own = {x.data_ptr() for x in inputs}
    assert sorted(x.numel() for x in saved if x.data_ptr() not in own) == [16, 200]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(64, 700, None, 128), (400, 30, 20, 256), (300, 1100, 1029, 96)])
def test_bits_do_not_depend_on_threads(shape, dtype):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(logits_and_gradients(kernel, make(*shape, dtype)))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_every_element_is_written(backend: Backend, request: pytest.FixtureRequest):
    inputs = make(37, 61, 40, 33, device=backend.device)
    plain = logits_and_gradients(kernel, inputs)
    request.getfixturevalue("poisoned_memory")
    poisoned = logits_and_gradients(kernel, inputs)
    assert all(torch.equal(a, b) for a, b in zip(plain, poisoned, strict=True))


def test_autocast_casts_features_and_not_the_scale(backend: Backend):
    dtype = torch.float16 if backend.name == "interpreter" else torch.bfloat16
    image, text, scale, class_ids = make(4, 30, 20, 64, scale=100.3, device=backend.device)
    with torch.autocast(backend.device.type, dtype=dtype):
        logits = kernel(image, text, scale, class_ids)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, kernel(image.to(dtype), text.to(dtype), scale, class_ids))
    logits.sum().backward()
    assert image.grad.dtype == torch.float32 and image.grad.abs().sum() > 0


def test_compiles_into_one_graph(backend: Backend):
    compiled = torch.compile(
        lambda *inputs: kernel(inputs[0] * 2, *inputs[1:]), fullgraph=True, backend="aot_eager", dynamic=True
    )
    for shape in ((4, 30, 20, 16), (7, 31, 11, 16)):
        inputs = make(*shape, device=backend.device)
        ours, theirs = compiled(*inputs), kernel(inputs[0] * 2, *inputs[1:])
        assert torch.equal(ours, theirs)
        gradients = (torch.autograd.grad(logits.sum(), inputs[:3]) for logits in (ours, theirs))
        assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([8, 0, 9], r"class_ids must be rows of text, 0 to 8; got"),
        ([8, -1, 3], r"class_ids must be rows of text, 0 to 8; got"),
        ([8, 0, 8], r"class_ids must have no duplicates; got"),
    ],
)
@pytest.mark.parametrize("backend", ["cpp", "reference"], indirect=True)
def test_refuses_class_ids(backend: Backend, ids, message):
    image, text, scale, _ = make(4, 9, None, 16)
    with pytest.raises(ValueError, match=f"^class_sampled_logits: {message}"):
        kernel(image, text, scale, torch.tensor(ids))

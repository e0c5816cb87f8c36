"""class_scores against fp64 and eager, for every implementation."""

from __future__ import annotations

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from skipkernels import reference
from skipkernels.functional import class_scores
from skipkernels.ops.class_scores import class_scores as operator
from skipkernels.testing import SLACK, relative_error
from tests.ops.conftest import Backend

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def make(B, C, D, dtype=torch.float32, device="cpu", seed=0):
    rng = torch.Generator().manual_seed(seed)
    image = (3 * torch.randn(B, D, generator=rng)).to(dtype)
    prototypes = F.normalize(torch.randn(C, D, generator=rng), dim=1).to(dtype)
    labels = torch.randint(0, C, (B,), generator=rng)
    return image.to(device), prototypes.to(device), labels.to(device)


def check(image, prototypes, labels):
    scores = class_scores(image, prototypes, labels)
    exact = reference.class_scores(image.double(), prototypes.double(), labels)
    assert scores.dtype == (torch.float64 if image.dtype == torch.float64 else torch.float32)
    eager = (F.normalize(image, dim=1) @ prototypes.T).amax(dim=0).to(scores.dtype)
    if labels is not None:
        eager[labels] = torch.inf
    # Scores are fp32 whatever the features are.
    assert relative_error(scores, exact) <= relative_error(eager, exact) + SLACK[scores.dtype]


SHAPES = [
    (1, 1, 1),
    (1, 7, 7),
    (4, 100, 512),
    (3, 37, 640),
    (5, 11, 1280),
    (17, 33, 129),  # one more than a block of Triton's in every size
    (257, 31, 128),  # one more than a block of images
    (40, 71, 300),
    (2, 4097, 16),  # many classes: other blocks
    (300, 1031, 96),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype)[6:])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-C{}-D{}".format(*s))
def test_no_worse_than_eager(backend: Backend, shape, dtype):
    backend.skip_unless_supported(dtype)
    if backend.name == "interpreter" and shape == (300, 1031, 96):
        pytest.skip("takes the interpreter seconds")
    check(*make(*shape, dtype, backend.device))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_shape(backend: Backend, data):
    B, C, D = (
        data.draw(st.integers(1, 40)),
        data.draw(st.integers(1, 60)),
        data.draw(st.sampled_from([1, 7, 16, 33, 100])),
    )
    check(*make(B, C, D, data.draw(st.sampled_from(backend.dtypes)), backend.device, seed=B + C))


def test_any_strides(backend: Backend):
    image, prototypes, labels = make(6, 20, 32, device=backend.device)
    strided = torch.stack([prototypes, prototypes * torch.nan], dim=2).flatten(1)[:, ::2]
    check(image.T.contiguous().T, strided, labels.repeat_interleave(2)[::2])


def test_rows_of_wider_tensors(backend: Backend):
    """Contiguous rows are not copied, also at an address that is not a multiple of 16 bytes."""
    image, prototypes, labels = make(6, 20, 33, device=backend.device)
    within = [F.pad(x, (1, 2), value=torch.nan)[:, 1:-2] for x in (image, prototypes)]
    check(*within, labels)


def test_without_labels(backend: Backend):
    image, prototypes, _ = make(5, 37, 33, device=backend.device)
    check(image, prototypes, None)


@pytest.mark.parametrize("shape", [(64, 700, 128), (400, 30, 256), (300, 1100, 96)])
def test_bits_do_not_depend_on_threads(shape):
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(class_scores(*make(*shape)))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_zero_image_scores_zero(backend: Backend):
    image, prototypes, labels = make(1, 9, 16, device=backend.device)
    labels[:] = 8
    assert torch.equal(class_scores(image * 0, prototypes, labels)[:8].cpu(), torch.zeros(8))


def test_nan_stays_visible(backend: Backend):
    image, prototypes, labels = make(20, 40, 16, device=backend.device)
    labels[:] = 8
    image[1, 0] = torch.nan
    scores = class_scores(image, prototypes, labels)
    assert scores[8] == torch.inf and scores.isnan().sum() == 39
    image[1, 0] = 1
    prototypes[3, 15] = torch.nan
    assert class_scores(image, prototypes, labels).isnan().nonzero().tolist() == [[3]]


def test_every_score_is_written(backend: Backend, monkeypatch):
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))
    check(*make(3, 67, 16, device=backend.device))


@pytest.mark.parametrize("label", [9, -1])
def test_refuses_labels_that_are_no_classes(backend: Backend, label):
    if backend.name == "gpu":
        pytest.skip("the assertion would leave the device unusable")
    image, prototypes, labels = make(3, 9, 16)
    labels[1] = label
    error = importlib.import_module("triton.runtime.errors").InterpreterError
    with pytest.raises((ValueError, error), match="class_scores: labels must be rows of prototypes"):
        class_scores(image, prototypes, labels)


def test_not_differentiable(backend: Backend):
    image, prototypes, labels = make(3, 9, 16, device=backend.device)
    assert not class_scores(image.requires_grad_(), prototypes, labels).requires_grad


def test_opcheck(backend: Backend):
    backend.opcheck(operator, make(3, 9, 16, device=backend.device))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=lambda dtype: str(dtype)[6:])
def test_autocast_casts_features(backend: Backend, dtype):
    backend.skip_unless_supported(dtype)
    image, prototypes, labels = make(3, 9, 16, device=backend.device)
    with torch.autocast(backend.device.type, dtype=dtype):
        scores = class_scores(image, prototypes, labels)
    assert torch.equal(scores, class_scores(image.to(dtype), prototypes.to(dtype), labels))


@pytest.mark.gpu
def test_graph_replays():
    image, prototypes, labels = make(4, 100, 512, device="cuda")
    class_scores(image, prototypes, labels)  # compiled before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores = class_scores(image, prototypes, labels)
    other, _, other_labels = make(4, 100, 512, device="cuda", seed=1)
    image.copy_(other), labels.copy_(other_labels)
    graph.replay()
    assert torch.equal(scores, class_scores(image, prototypes, labels))


@pytest.mark.gpu
def test_compiles_with_any_shape():
    compiled = torch.compile(class_scores, fullgraph=True, dynamic=True)
    for shape in ((4, 100, 512), (7, 31, 512)):
        arguments = make(*shape, device="cuda")
        assert torch.equal(compiled(*arguments), class_scores(*arguments))


@pytest.mark.gpu
def test_runs_on_the_device_of_its_tensors():
    if torch.cuda.device_count() < 2:
        pytest.skip("one device")
    check(*make(4, 100, 512, device="cuda:1"))

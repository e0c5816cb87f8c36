"""Refusals of the public functions: function, changed arguments, error, and the argument that it names.

Values are compared by the C++ kernels and by their fallback, to which Triton's launchers leave fp64. Triton's kernels
stop at a device assertion.
"""

from __future__ import annotations

import importlib
import math

import pytest
import torch

from skipkernels import functional
from tests.ops.backends import Backend

B, C, D = 4, 9, 16


def good() -> dict:
    return {
        "image": torch.randn(B, D),
        "text": torch.randn(C, D),
        "labels": torch.tensor([0, 3, 5, 8]),
        "logit_scale": 100.0,
        "class_ids": torch.tensor([8, 0, 3, 5]),
        "class_weight": torch.ones(C),
    }


def trained() -> dict:
    lists = {name: [torch.ones(3), torch.ones(2, 2)] for name in ("weight", "grad", "momentum_buffer")}
    return {**lists, "lr": 0.1}


def in_bf16() -> dict:
    lists = ("weight", "grad", "momentum_buffer")
    return {name: [x.bfloat16() for x in trained()[name]] for name in lists}


GOOD = {
    "class_sampled_ce": good,
    "class_sampled_logits": lambda: {k: v for k, v in good().items() if k not in ("labels", "class_weight")},
    "pairwise_sigmoid": lambda: (
        {k: good()[k] for k in ("image", "text", "labels", "logit_scale")} | {"logit_bias": -10.0}
    ),
    "class_scores": lambda: {"image": torch.randn(B, D), "prototypes": torch.randn(C, D), "labels": torch.arange(B)},
    "add_layer_norm": lambda: {
        **{name: torch.randn(B, D) for name in ("x", "residual")},
        **{name: torch.ones(D) for name in ("weight", "bias")},
    },
    "add_rms_norm": lambda: {**{name: torch.randn(B, D) for name in ("x", "residual")}, "weight": torch.ones(D)},
    "mlp_activation": lambda: {"x": torch.randn(B, D), "bias": torch.ones(D)},
    "rotary_embedding": lambda: {
        "x": torch.randn(6, 12),
        **{name: torch.ones(3, 2) for name in ("cos", "sin")},
        "heads": 2,
    },
    "pooled_attention": lambda: {"query": QUERY, "key": KEY, "value": KEY},
    "shared_prefix_attention": lambda: {"packed": torch.randn(8, 24), "heads": 2, "prefix_length": 2, "max_length": 3},
    "sgd_momentum_": trained,
}
QUERY, KEY = torch.randn(3, 2, 4), torch.randn(3, 5, 2, 4)


def meta(*size: int) -> torch.Tensor:
    return torch.ones(size, device="meta")


def ids(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int64)


OUT_OF_RANGE: dict[str, list[dict]] = {
    "class_sampled_ce": [
        *({"labels": ids(0, 3, 5, label)} for label in (9, -1, 7)),  # 7 is not in the sample
        {"labels": ids(0, 3, 5, -100), "ignore_index": -1},
        *({"class_ids": ids(8, 0, 3, 5, *more)} for more in ((9,), (-1,), (0,), (7, 7))),  # 7 is no label
    ],
    "class_sampled_logits": [{"class_ids": ids(8, 0, 3, 5, *more)} for more in ((9,), (-1,), (0,), (7, 7))],
    "class_scores": [{"labels": ids(0, 3, 5, label)} for label in (-100, -1, 9)],
    "shared_prefix_attention": [
        {"offsets": ids(*offsets), "max_length": 5} for offsets in ((0, 5, 7), (1, 6), (0, 6), (0, 4, 3))
    ],
}
NOT_FINITE = (math.inf, math.nan, 1e39, 10**400, torch.tensor(math.nan), torch.tensor(2e38, dtype=torch.float64) * 2)

BAD = {
    "class_sampled_ce": [
        ({"image": torch.randn(D)}, ValueError, "image"),
        ({"image": torch.ones(B, D).long()}, TypeError, "image"),
        ({"text": torch.randn(C, 7)}, ValueError, "text"),
        ({"text": torch.randn(C, D).double()}, TypeError, "text"),
        ({"text": meta(C, D)}, ValueError, "text"),
        ({"labels": ids(0, 3)}, ValueError, "labels"),
        ({"labels": torch.zeros(B)}, TypeError, "labels"),
        ({"class_ids": ids()}, ValueError, "class_ids"),
        ({"class_weight": torch.ones(C, requires_grad=True)}, ValueError, "class_weight"),
        ({"logit_scale": torch.ones(2)}, ValueError, "logit_scale"),
        *(({"logit_scale": scale}, ValueError, "logit_scale") for scale in NOT_FINITE),
        ({"label_smoothing": 1.5}, ValueError, "label_smoothing"),
        ({"reduction": "max"}, ValueError, "reduction"),
    ],
    "class_sampled_logits": [
        ({"text": torch.randn(C, 7)}, ValueError, "text"),
        ({"class_ids": torch.ones(2)}, TypeError, "class_ids"),
        *(({"logit_scale": scale}, ValueError, "logit_scale") for scale in NOT_FINITE),
    ],
    "pairwise_sigmoid": [
        ({"text": torch.randn(C, 7)}, ValueError, "text"),
        ({"labels": ids(0, 3, 5, 9)}, ValueError, "labels"),
        ({"labels": ids(0, 3, 5, -2)}, ValueError, "labels"),
        ({"labels": ids(0, 3)}, ValueError, "labels"),
        ({"logit_bias": torch.ones(2)}, ValueError, "logit_bias"),
        ({"logit_bias": -math.inf}, ValueError, "logit_bias"),
    ],
    "class_scores": [
        ({"prototypes": torch.randn(C, 7)}, ValueError, "prototypes"),
        ({"image": torch.eye(B, D).to_sparse()}, TypeError, "image"),
    ],
    "add_layer_norm": [
        ({"x": torch.randn(B, 0)}, ValueError, "x"),
        ({"residual": torch.randn(D)}, ValueError, "residual"),
        ({"x": torch.randn(B, D).half()}, TypeError, "residual"),
        ({"out_dtype": torch.int8}, TypeError, "out_dtype"),
        ({"weight": torch.ones(D).long()}, TypeError, "weight"),
        ({"bias": torch.randn(7)}, ValueError, "bias"),
        ({"eps": -1e-5}, ValueError, "eps"),
    ],
    "add_rms_norm": [
        ({"residual": torch.randn(D)}, ValueError, "residual"),
        ({"weight": torch.randn(7)}, ValueError, "weight"),
        ({"eps": math.inf}, ValueError, "eps"),
    ],
    "mlp_activation": [
        ({"bias": torch.randn(7)}, ValueError, "bias"),
        ({"kind": "relu"}, ValueError, "kind"),
        ({"x": torch.randn(B, 7), "bias": None, "kind": "swiglu"}, ValueError, "x"),
    ],
    "rotary_embedding": [
        ({"x": torch.randn(7, 12)}, ValueError, "x"),
        ({"x": torch.randn(6, 10)}, ValueError, "x"),
        ({"x": torch.randn(2, 3, 12)}, ValueError, "x"),
        ({"x": torch.randn(6, 12).double()}, TypeError, "cos"),
        ({"cos": torch.ones(3)}, ValueError, "cos"),
        ({"cos": torch.ones(3, 2).half()}, TypeError, "cos"),
        ({"sin": torch.ones(3, 3)}, ValueError, "sin"),
        ({"heads": 4}, ValueError, "heads"),
        *(({name: torch.ones(3, 2, requires_grad=True)}, ValueError, name) for name in ("cos", "sin")),
    ],
    "pooled_attention": [
        ({"query": KEY}, ValueError, "query"),
        ({"key": KEY[:, :0]}, ValueError, "key"),
        ({"key": KEY.half()}, TypeError, "key"),
        ({"value": KEY[:, :4]}, ValueError, "value"),
    ],
    "shared_prefix_attention": [
        ({"packed": torch.randn(8, 2, 12)}, ValueError, "packed"),
        ({"heads": 3}, ValueError, "heads"),
        ({"prefix_length": 8}, ValueError, "prefix_length"),
        ({"max_length": 0}, ValueError, "max_length"),
        ({"max_length": 4}, ValueError, "max_length"),
        ({"offsets": ids(6)}, ValueError, "offsets"),
    ],
    "sgd_momentum_": [
        ({"grad": [torch.ones(3)]}, ValueError, "weight, grad and momentum_buffer"),
        ({"weight": [torch.ones(3), torch.ones(2, 2).half()]}, TypeError, "weight"),
        ({"weight": [torch.ones(3), meta(2, 2)]}, ValueError, "weight"),
        *(
            ({name: [torch.ones(3), torch.ones(2).expand(2, 2)]}, ValueError, name)
            for name in ("weight", "momentum_buffer")
        ),
        *(({"offsets": at}, ValueError, "offsets") for at in ([0], [0, -1], [0, 2**63 - 4], [0, 2**64])),
        ({"lr": 10**400}, ValueError, "lr"),
        ({"grad": [torch.ones(3), torch.ones(4)]}, ValueError, "grad"),
        ({"lr": -0.1}, ValueError, "lr"),
        ({"weight_decay": math.nan}, ValueError, "weight_decay"),
        ({"seed": 3}, TypeError, "weight"),
        (in_bf16() | {"seed": torch.tensor(1.0)}, TypeError, "seed"),
        ({name: torch.eye(2) for name in trained()} | {"grad": torch.eye(2).to_sparse(), "lr": 0.1}, TypeError, "grad"),
        ({"casts": []}, ValueError, "casts"),
        ({"casts": [None, torch.ones(2, 2)]}, TypeError, "casts"),
        ({"casts": [None, torch.ones(4).bfloat16()]}, ValueError, "casts"),
        ({"casts": [None, torch.ones(2, 2).bfloat16().T]}, ValueError, "casts"),
        (in_bf16() | {"casts": [None, torch.ones(2, 2).bfloat16()]}, TypeError, "weight"),
        ({"casts": [torch.ones(3).half(), torch.ones(2, 2).bfloat16()]}, TypeError, "casts"),
    ],
}
for _name, _cases in OUT_OF_RANGE.items():
    BAD[_name] += [(bad, ValueError, next(iter(bad))) for bad in _cases]


on_cpu = pytest.mark.parametrize("backend", ["cpp", "reference"], indirect=True)


@on_cpu
@pytest.mark.parametrize("name", BAD)
def test_good_arguments_are_accepted(backend: Backend, name):
    getattr(functional, name)(**GOOD[name]())


@on_cpu
@pytest.mark.parametrize(
    ("name", "bad", "error", "argument"),
    [pytest.param(name, *case, id=f"{name}: {case[2]}") for name, cases in BAD.items() for case in cases],
)
def test_arguments_are_refused(backend: Backend, name, bad, error, argument):
    with pytest.raises(error, match=rf"^{name}: {argument} (must .*; got .*|is a constant; .*)\.$"):
        getattr(functional, name)(**{**GOOD[name](), **bad})


SENTENCES: list[tuple[dict, str]] = [
    ({"text": torch.randn(C, 7)}, "text must be [C, D=16] with C ≥ 1 to match image [4, 16]; got [9, 7]."),
    ({"text": torch.ones(C, D).double()}, "text must be float32; got torch.float64. Convert one of text and image."),
    ({"text": meta(C, D)}, "text must be on cpu, where image is; got meta. Use text.to('cpu')."),
    (
        {"image": torch.eye(B, D).to_sparse()},
        "image must be a dense tensor; got torch.sparse_coo. Use image.to_dense().",
    ),
]


@pytest.mark.parametrize(("bad", "sentence"), SENTENCES, ids=["shape", "dtype", "device", "layout"])
def test_refusal_says_what_is_expected_and_given(bad, sentence):
    with pytest.raises((ValueError, TypeError)) as refused:
        functional.class_sampled_ce(**{**good(), **bad})
    assert str(refused.value) == f"class_sampled_ce: {sentence}"


@pytest.mark.parametrize("backend", ["interpreter"], indirect=True)
@pytest.mark.parametrize(("name", "bad"), [(name, bad) for name, cases in OUT_OF_RANGE.items() for bad in cases])
def test_ids_fail_a_device_assertion(backend: Backend, name, bad):
    """In the kernels; in fp64 in their fallback, of which the assertion is an error on the CPU."""
    arguments, message = {**GOOD[name](), **bad}, f"{name}: {next(iter(bad))} must "
    error = importlib.import_module("triton.runtime.errors").InterpreterError
    with pytest.raises(error, match=message):
        getattr(functional, name)(**arguments)
    for key, x in arguments.items():
        if isinstance(x, torch.Tensor) and x.is_floating_point():
            arguments[key] = x.double()
    with pytest.raises(ValueError, match=f"^{message}.*; got "):
        getattr(functional, name)(**arguments)

"""Refusals of the public functions: function, changed arguments, error, and words of it.

Values are compared by the C++ kernels and by their fallback. Triton's kernels stop at a device assertion.
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
    "add_rms_norm": lambda: {
        **{name: torch.randn(B, D) for name in ("x", "residual")},
        "weight": torch.ones(D),
    },
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


BAD = {
    "class_sampled_ce": [
        ({"image": torch.randn(D)}, ValueError, r"image must be \[B, D\] with B, D ≥ 1; got \[16\]"),
        ({"image": torch.ones(B, D).long()}, TypeError, r"image must be float32, .* got torch.int64"),
        ({"text": torch.randn(C, 7)}, ValueError, r"text must be \[C, D=16\] with C ≥ 1 to match image \[4, 16\]; got"),
        ({"text": torch.randn(C, D).double()}, TypeError, r"text must be float32; got torch.float64. Convert one"),
        ({"text": meta(C, D)}, ValueError, r"text must be on cpu, where image is; got meta"),
        ({"labels": ids(0, 3)}, ValueError, r"labels must be \[B=4\] to match image \[4, 16\]; got \[2\]"),
        ({"labels": torch.zeros(B)}, TypeError, r"labels must be int64; got torch.float32. Use labels.long\(\)"),
        ({"labels": ids(0, 3, 5, 9)}, ValueError, r"labels must be rows of text, 0 to 8, .*; got 9"),
        ({"labels": ids(0, 3, 5, -1)}, ValueError, r"labels must be rows of text, 0 to 8, .*\(-100\); got -1"),
        ({"labels": ids(0, 3, 5, 7)}, ValueError, r"labels must be among class_ids; got 7"),
        ({"class_ids": ids()}, ValueError, r"class_ids must be \[K\] with K ≥ 1; got \[0\]"),
        ({"class_ids": ids(8, 0, 3, 5, 9)}, ValueError, r"class_ids must be rows of text, 0 to 8; got"),
        ({"class_weight": torch.ones(C, requires_grad=True)}, ValueError, r"class_weight is a constant; .*detach\(\)"),
        ({"logit_scale": torch.ones(2)}, ValueError, r"logit_scale must be a number, \[\] or \[1\]; got \[2\]"),
        ({"logit_scale": torch.tensor(torch.inf)}, ValueError, r"logit_scale must be finite; got inf"),
        ({"logit_scale": 1e39}, ValueError, r"logit_scale must be finite"),  # beyond fp32
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\]; got 1.5"),
        ({"reduction": "max"}, ValueError, r'reduction must be "mean", "sum" or "none"; got \'max\''),
    ],
    "class_sampled_logits": [
        ({"text": torch.randn(C, 7)}, ValueError, r"text must be \[C, D=16\]"),
        ({"class_ids": torch.ones(2)}, TypeError, r"class_ids must be int64"),
    ],
    "pairwise_sigmoid": [
        ({"text": torch.randn(C, 7)}, ValueError, r"text must be \[N, D=16\] with N ≥ 1 to match image \[4, 16\]; got"),
        ({"labels": ids(0, 3, 5, 9)}, ValueError, r"labels must be rows of text, 0 to 8, or no text \(-1\); got 9"),
        ({"labels": ids(0, 3, 5, -2)}, ValueError, r"labels must be rows of text, .* got -2"),
        ({"labels": ids(0, 3)}, ValueError, r"labels must be \[B=4\]"),
        ({"logit_bias": torch.ones(2)}, ValueError, r"logit_bias must be a number, \[\] or \[1\]; got \[2\]"),
    ],
    "class_scores": [
        ({"prototypes": torch.randn(C, 7)}, ValueError, r"prototypes must be \[C, D=16\] with C ≥ 1 to match"),
        *(
            ({"labels": ids(0, 3, 5, label)}, ValueError, rf"labels must be rows of prototypes, 0 to 8; got .*{label}")
            for label in (-100, -1, 9)
        ),
        (
            {"image": torch.eye(B, D).to_sparse()},
            TypeError,
            r"image must be a dense tensor; got torch.sparse_coo. Use image.to_dense\(\)",
        ),
    ],
    "add_layer_norm": [
        ({"x": torch.randn(B, 0)}, ValueError, r"x must be \[\.\.\., W\] with W ≥ 1; got \[4, 0\]"),
        ({"residual": torch.randn(D)}, ValueError, r"residual must be \[4, 16\], the shape of x; got \[16\]"),
        ({"x": torch.randn(B, D).half()}, TypeError, r"residual must be float16; got torch.float32. Convert one"),
        ({"out_dtype": torch.int8}, TypeError, r"out_dtype must be float32, .* got torch.int8"),
        ({"weight": torch.ones(D).long()}, TypeError, r"weight must be float32, .* got torch.int64. Use weight.float"),
        ({"bias": torch.randn(7)}, ValueError, r"bias must be \[16\], the shape of weight; got \[7\]"),
        ({"eps": -1e-5}, ValueError, r"eps must be finite and at least 0"),
    ],
    "add_rms_norm": [
        ({"residual": torch.randn(D)}, ValueError, r"residual must be \[4, 16\], the shape of x; got \[16\]"),
        ({"weight": torch.randn(7)}, ValueError, r"weight must be \[W=16\] to match x \[4, 16\]; got \[7\]"),
        ({"eps": math.inf}, ValueError, r"eps must be finite and at least 0; got inf"),
    ],
    "mlp_activation": [
        ({"bias": torch.randn(7)}, ValueError, r"bias must be \[W=16\] to match x \[4, 16\]; got \[7\]"),
        ({"kind": "relu"}, ValueError, r'kind must be "quick_gelu", "gelu", "gelu_tanh" or "swiglu"; got \'relu\''),
        (
            {"x": torch.randn(B, 7), "bias": None, "kind": "swiglu"},
            ValueError,
            r"x must be \[\.\.\., 2W\] .*; got \[4, 7",
        ),
    ],
    "rotary_embedding": [
        ({"x": torch.randn(7, 12)}, ValueError, r"x must be \[R, W\] with R a multiple of T=3 and W of E=4 .*; got"),
        ({"x": torch.randn(6, 10)}, ValueError, r"x must be \[R, W\] .* to match cos \[3, 2\]; got \[6, 10\]"),
        ({"x": torch.randn(2, 3, 12)}, ValueError, r"x must be \[R, W\] with .*; got \[2, 3, 12\]"),
        ({"x": torch.randn(6, 12).double()}, TypeError, r"cos must be float64; got torch.float32. Use cos.to"),
        ({"cos": torch.ones(3)}, ValueError, r"cos must be \[T, E/2\] with T, E/2 ≥ 1; got \[3\]"),
        ({"cos": torch.ones(3, 2).half()}, TypeError, r"cos must be float32; got torch.float16"),
        ({"sin": torch.ones(3, 3)}, ValueError, r"sin must be \[3, 2\], the shape of cos; got \[3, 3\]"),
        ({"heads": 4}, ValueError, r"heads must be 1 to 3, with x \[6, 12\]; got 4"),
        *(
            ({name: torch.ones(3, 2, requires_grad=True)}, ValueError, rf"{name} is a constant; .* Use {name}.detach")
            for name in ("cos", "sin")
        ),
    ],
    "pooled_attention": [
        ({"query": KEY}, ValueError, r"query must be \[B, H, E\] with B, H, E ≥ 1; got \[3, 5, 2, 4\]"),
        ({"key": KEY[:, :0]}, ValueError, r"key must be \[B=3, N, H=2, E=4\] with N ≥ 1 to match query .*; got \[3, 0"),
        ({"key": KEY.half()}, TypeError, r"key must be float32; got torch.float16. Convert one"),
        ({"value": KEY[:, :4]}, ValueError, r"value must be \[B=3, N=5, H=2, E=4\] to match query .*; got \[3, 4"),
    ],
    "shared_prefix_attention": [
        ({"packed": torch.randn(8, 2, 12)}, ValueError, r"packed must be \[R, 3W\] with R, 3W ≥ 1; got \[8, 2, 12\]"),
        ({"heads": 3}, ValueError, r"heads must divide W, with packed \[R, 3W\]; got 3 and \[8, 24\]"),
        ({"prefix_length": 8}, ValueError, r"prefix_length must be 0 to 7, .* got 8"),
        ({"max_length": 0}, ValueError, r"max_length must be at least 1; got 0"),
        ({"max_length": 4}, ValueError, r"max_length must divide the 6 rows behind the prefix; got 4. Pass offsets"),
        ({"offsets": ids(6)}, ValueError, r"offsets must be \[K \+ 1\] with K ≥ 1; got \[1\]"),
        *(
            ({"offsets": ids(*offsets), "max_length": 5}, ValueError, rf"offsets must {words}")
            for offsets, words in (
                ((0, 5, 7), "go from 0 to at most 6.*; got 0 to 7"),
                ((1, 6), "go from 0 to at most 6.*; got 1 to 6"),
                ((0, 6), r"rise by 0 to max_length \(5\); .* 6 t"),
                ((0, 4, 3), r"rise by 0 to .*; got .* -1 tokens"),
            )
        ),
    ],
    "sgd_momentum_": [
        ({"grad": [torch.ones(3)]}, ValueError, r"weight, grad and momentum_buffer must be lists .*; got 2, 1 and 2"),
        (
            {"weight": [torch.ones(3), torch.ones(2, 2).half()]},
            ValueError,
            r"the weights of a list must have one dtype",
        ),
        ({"grad": [torch.ones(3), torch.ones(4)]}, ValueError, r"grad must be \[2, 2\] to match its weight; got"),
        ({"lr": -0.1}, ValueError, r"lr must be finite and at least 0; got -0.1"),
        ({"weight_decay": math.nan}, ValueError, r"weight_decay must be finite and at least 0; got nan"),
        ({"seed": 3}, TypeError, r"weight must be bfloat16; got torch.float32. Leave out seed"),
        (in_bf16() | {"seed": torch.tensor(1.0)}, TypeError, r"seed must be int64; got torch.float32. Use seed.to"),
        (
            {name: torch.eye(2) for name in trained()} | {"grad": torch.eye(2).to_sparse(), "lr": 0.1},
            TypeError,
            "grad must be a dense tensor",
        ),
        ({"casts": []}, ValueError, "casts must have a tensor or None for each of 2 weights; got 0"),
        ({"casts": [None, torch.ones(2, 2)]}, TypeError, "casts must be bfloat16 or float16"),
        *(
            (arguments, ValueError, "casts must be contiguous copies, in one dtype, of contiguous fp32 weights")
            for arguments in (
                {"casts": [None, torch.ones(4).bfloat16()]},
                {"casts": [None, torch.ones(2, 2).bfloat16().T]},
                in_bf16() | {"casts": [None, torch.ones(2, 2).bfloat16()]},
            )
        ),
    ],
}


on_cpu = pytest.mark.parametrize("backend", ["cpp", "reference"], indirect=True)


@on_cpu
@pytest.mark.parametrize("name", BAD)
def test_good_arguments_are_accepted(backend: Backend, name):
    getattr(functional, name)(**GOOD[name]())


@on_cpu
@pytest.mark.parametrize(
    ("name", "bad", "error", "message"),
    [pytest.param(name, *case, id=f"{name}: {case[2]}") for name, cases in BAD.items() for case in cases],
)
def test_arguments_are_refused(backend: Backend, name, bad, error, message):
    with pytest.raises(error, match=rf"^{name}: {message}"):
        getattr(functional, name)(**{**GOOD[name](), **bad})


@pytest.mark.parametrize("backend", ["interpreter"], indirect=True)
@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("class_sampled_ce", {"labels": ids(0, 3, 5, 7)}),  # not in the sample
        ("class_sampled_ce", {"labels": ids(0, 3, 5, 9)}),
        ("class_sampled_ce", {"class_ids": ids(8, 0, 3, 9)}),
        ("class_sampled_ce", {"class_ids": ids(8, 0, 3, 0)}),  # of a label, twice
        ("class_scores", {"labels": ids(0, 3, 5, 9)}),
        ("class_scores", {"labels": ids(0, 3, 5, -1)}),
    ],
)
def test_ids_fail_a_device_assertion(backend: Backend, name, bad):
    error = importlib.import_module("triton.runtime.errors").InterpreterError
    with pytest.raises(error, match=f"{name}: (labels|class_ids) must be rows of"):
        getattr(functional, name)(**{**GOOD[name](), **bad})

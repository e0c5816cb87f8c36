"""Invalid inputs: each error names the function, the argument, the expected and actual value, and a remedy.

tests/ops has the errors of attention, and those of values that the operators themselves refuse.
"""

from __future__ import annotations

import functools
import math

import pytest
import torch

from skipkernels import functional
from skipkernels.ops import registration

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
    "sgd_momentum_": trained,
}


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
        ({"labels": ids(0, 3, 5, -100)}, ValueError, r"labels must be rows of prototypes, 0 to 8; got"),
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
    ],
}


@pytest.mark.parametrize("name", BAD)
def test_good_arguments_are_accepted(name):
    getattr(functional, name)(**GOOD[name]())


@pytest.mark.parametrize(
    ("name", "bad", "error", "message"),
    [pytest.param(name, *case, id=f"{name}: {case[2]}") for name, cases in BAD.items() for case in cases],
)
def test_refuses(name, bad, error, message):
    with pytest.raises(error, match=rf"^{name}: {message}"):
        getattr(functional, name)(**{**GOOD[name](), **bad})


def test_sgd_momentum_refuses_a_fractional_seed():
    bf16 = {name: torch.ones(2).bfloat16() for name in ("weight", "grad", "momentum_buffer")}
    with pytest.raises(TypeError, match=r"^sgd_momentum_: seed must be int64; got torch.float32. Use seed.to"):
        functional.sgd_momentum_(**bf16, lr=0.1, seed=torch.tensor(1.0))


def test_a_number_and_a_tensor_are_the_same_scale():
    numbers = {**good(), "logit_scale": 14.25}
    for scale in (torch.tensor(14.25), torch.tensor([14.25]), torch.tensor(14.25, dtype=torch.float64)):
        assert torch.equal(
            functional.class_sampled_ce(**numbers),
            functional.class_sampled_ce(**{**numbers, "logit_scale": scale}),
        )


def test_gradient_of_the_scale_has_its_shape_and_dtype():
    for scale in (torch.tensor([3.0]), torch.tensor(3.0, dtype=torch.bfloat16), torch.tensor(3.0, dtype=torch.float64)):
        scale.requires_grad_()
        functional.class_sampled_ce(**{**good(), "logit_scale": scale}).backward()
        assert scale.grad.shape == scale.shape and scale.grad.dtype == scale.dtype


# ---- unsupported calls ---------------------------------------------------------------------------------------------


def test_forward_mode_is_refused():
    """A tangent of zero would be silently wrong."""
    x = torch.randn(2, 3)
    with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
        torch.func.jvp(lambda x: functional.mlp_activation(x), (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        functional.mlp_activation(x)  # no tangent: no error
        with pytest.raises(NotImplementedError, match="forward-mode derivatives"):
            functional.class_sampled_logits(torch.autograd.forward_ad.make_dual(x, x), x, 1.0)


def test_sparse_tensors_are_refused():
    x = torch.eye(3)
    with pytest.raises(TypeError, match=r"image must be a dense tensor; got torch.sparse_coo. Use image.to_dense\(\)"):
        functional.class_scores(x.to_sparse(), x, torch.tensor([0, 1, 2]))
    with pytest.raises(TypeError, match="grad must be a dense tensor"):
        functional.sgd_momentum_(x, x.to_sparse(), torch.zeros(3, 3), 0.1)


def test_autocast_casts_no_integers_and_no_fp64():
    x, labels = torch.randn(3, 4), torch.tensor([0, 1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        functional.class_scores(x, x.bfloat16(), labels)
        for other in (x.long(), x.double()):
            with pytest.raises(TypeError, match="prototypes must be"):
                functional.class_scores(x, other, labels)
            with pytest.raises(TypeError, match="residual must be"):
                functional.add_layer_norm(x, other, torch.ones(4), torch.zeros(4))


def test_meta_tensors_have_shapes():
    x, labels = torch.empty(3, 4, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    assert functional.class_sampled_ce(x, x, labels, 10.0).shape == ()
    assert functional.class_scores(x, x, labels).shape == (3,)
    assert functional.add_layer_norm(x, x, x[0], x[0])[1].shape == (3, 4)


def test_max_length_may_be_any_number():
    """Scratch memory depends on the longest suffix, not on max_length."""
    packed, offsets = torch.randn(11, 24), torch.tensor([0, 2, 6])
    attend = functools.partial(functional.shared_prefix_attention, packed, heads=2, prefix_length=5, offsets=offsets)
    exact = attend(max_length=4)
    assert attend(max_length=2**58).equal(exact)
    if registration.has_cpp("shared_prefix_attention"):
        direct, _ = torch.ops.skipkernels.shared_prefix_attention(packed, 2, 5, offsets, 2**58, 0.5)
        assert direct.equal(exact)


def test_refused_values_are_value_errors_if_pytorch_raises_runtime_error(monkeypatch):
    """PyTorch 2.15 turns every exception of a C++ kernel into a RuntimeError."""

    class Failing:
        _opname = "class_scores"

        def __call__(self, *args):
            raise RuntimeError("failed")

    x = torch.eye(3)
    monkeypatch.setattr(functional, "_class_scores", Failing())
    with pytest.raises(ValueError, match="^class_scores: labels must be rows of prototypes"):
        functional.class_scores(x, x, torch.tensor([0, 1, 3]))
    with pytest.raises(RuntimeError, match="failed"):
        functional.class_scores(x, x, torch.tensor([0, 1, 2]))

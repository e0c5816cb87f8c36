"""Invalid inputs: each error names the function, the argument, the expected and actual value, and a remedy."""

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


CROSS_ENTROPY = [
    ({"image": torch.randn(D)}, ValueError, r"image must be \[B, D\] with B, D ≥ 1; got \[16\]"),
    ({"image": torch.randn(0, D)}, ValueError, r"image must be \[B, D\] with B, D ≥ 1; got \[0, 16\]"),
    ({"image": torch.ones(B, D, dtype=torch.int64)}, TypeError, r"image must be float32, .* got torch.int64"),
    ({"text": torch.randn(C, 7)}, ValueError, r"text must be \[C, D=16\] with C ≥ 1 to match image \[4, 16\]; got \[9"),
    ({"text": torch.randn(0, D)}, ValueError, r"text must be \[C, D=16\]"),
    ({"text": torch.randn(C, D).double()}, TypeError, r"text must be float32; got torch.float64. Convert one"),
    ({"text": torch.randn(C, D, device="meta")}, ValueError, r"text must be on cpu, where image is; got meta"),
    ({"labels": torch.tensor([0, 3])}, ValueError, r"labels must be \[B=4\] to match image \[4, 16\]; got \[2\]"),
    ({"labels": torch.zeros(B, 1).long()}, ValueError, r"labels must be \[B=4\] to match image .*; got \[4, 1\]"),
    ({"labels": torch.zeros(B)}, TypeError, r"labels must be int64; got torch.float32. Use labels.long\(\)"),
    ({"labels": torch.tensor([0, 3, 5, 9])}, ValueError, r"labels must be rows of text, 0 to 8, .*; got 9"),
    ({"labels": torch.tensor([0, 3, 5, -1])}, ValueError, r"labels must be rows of text, 0 to 8, .*\(-100\); got -1"),
    ({"labels": torch.tensor([0, 3, 5, 7])}, ValueError, r"labels must be among class_ids; got 7"),
    ({"class_ids": torch.tensor([]).long()}, ValueError, r"class_ids must be \[K\] with K ≥ 1; got \[0\]"),
    ({"class_ids": torch.tensor([8, 0, 3, 5]).int()}, TypeError, r"class_ids must be int64; got torch.int32"),
    ({"class_ids": torch.tensor([8, 0, 3, 5, 3])}, ValueError, r"class_ids must have no duplicates; got"),
    ({"class_ids": torch.tensor([8, 0, 3, 5, 9])}, ValueError, r"class_ids must be rows of text, 0 to 8; got"),
    ({"class_ids": torch.tensor([8, 0, 3, 5, -1])}, ValueError, r"class_ids must be rows of text, 0 to 8; got"),
    ({"class_weight": torch.ones(C - 1)}, ValueError, r"class_weight must be \[C=9\] to match text .*; got \[8\]"),
    ({"class_weight": torch.ones(C).long()}, TypeError, r"class_weight must be float32, .* got torch.int64"),
    ({"class_weight": torch.ones(C, requires_grad=True)}, ValueError, r"class_weight is a constant; .*detach\(\)"),
    ({"logit_scale": torch.ones(2)}, ValueError, r"logit_scale must be a number, \[\] or \[1\]; got \[2\]"),
    ({"logit_scale": torch.tensor(3)}, TypeError, r"logit_scale must be float32, .* got torch.int64"),
    ({"logit_scale": torch.tensor(torch.inf)}, ValueError, r"logit_scale must be finite; got inf"),
    ({"logit_scale": float("nan")}, ValueError, r"logit_scale must be finite; got -?nan"),
    ({"logit_scale": torch.tensor(1.0, device="meta")}, ValueError, r"logit_scale must be on cpu, .* got meta"),
    ({"label_smoothing": 1.5}, ValueError, r"label_smoothing must be in \[0, 1\]; got 1.5"),
    ({"reduction": "max"}, ValueError, r'reduction must be "mean", "sum" or "none"; got \'max\''),
]


@pytest.mark.parametrize(("bad", "error", "message"), CROSS_ENTROPY, ids=lambda x: x if isinstance(x, str) else "")
def test_class_sampled_ce_refuses(bad, error, message):
    functional.class_sampled_ce(**good())
    with pytest.raises(error, match=rf"^class_sampled_ce: {message}"):
        functional.class_sampled_ce(**{**good(), **bad})


SCORES = [
    ({"prototypes": torch.randn(C, 7)}, ValueError, r"prototypes must be \[C, D=16\] with C ≥ 1 to match"),
    ({"labels": torch.tensor([0, 3, 5])}, ValueError, r"labels must be \[B=4\] to match image"),
    ({"labels": torch.tensor([0, 3, 5, 9])}, ValueError, r"labels must be rows of prototypes, 0 to 8; got"),
    ({"labels": torch.tensor([0, 3, 5, -100])}, ValueError, r"labels must be rows of prototypes, 0 to 8; got"),
]


@pytest.mark.parametrize(("bad", "error", "message"), SCORES, ids=lambda x: x if isinstance(x, str) else "")
def test_class_scores_refuses(bad, error, message):
    arguments = {"image": torch.randn(B, D), "prototypes": torch.randn(C, D), "labels": torch.tensor([0, 3, 5, 8])}
    functional.class_scores(**arguments)
    with pytest.raises(error, match=rf"^class_scores: {message}"):
        functional.class_scores(**{**arguments, **bad})


W = 16
LAYER_NORM = [
    ({"x": torch.tensor(1.0)}, ValueError, r"x must be \[\.\.\., W\] with W ≥ 1; got \[\]"),
    ({"x": torch.randn(B, 0)}, ValueError, r"x must be \[\.\.\., W\] with W ≥ 1; got \[4, 0\]"),
    ({"x": torch.ones(B, W, dtype=torch.int64)}, TypeError, r"x must be float32, .* got torch.int64"),
    ({"residual": torch.randn(W)}, ValueError, r"residual must be \[4, 16\], the shape of x; got \[16\]"),
    (
        {"residual": torch.randn(B, W).double()},
        TypeError,
        r"residual must be float32, .* got torch.float64",
    ),
    ({"x": torch.randn(B, W).half()}, TypeError, r"residual must be float16; got torch.float32. Convert one"),
    ({"out_dtype": torch.int8}, TypeError, r"out_dtype must be float32, .* got torch.int8"),
    ({"residual": torch.randn(B, W, device="meta")}, ValueError, r"residual must be on cpu, where x is; got meta"),
    ({"weight": torch.randn(7)}, ValueError, r"weight must be \[W=16\] to match x \[4, 16\]; got \[7\]"),
    ({"weight": torch.ones(W).long()}, TypeError, r"weight must be float32, .* got torch.int64. Use weight.float"),
    ({"weight": torch.randn(W, device="meta")}, ValueError, r"weight must be on cpu, where x is; got meta"),
    ({"bias": torch.randn(7)}, ValueError, r"bias must be \[16\], the shape of weight; got \[7\]"),
    ({"bias": torch.randn(W).double()}, TypeError, r"bias must be float32; got torch.float64. Convert one of bias and"),
]


@pytest.mark.parametrize(("bad", "error", "message"), LAYER_NORM, ids=lambda x: x if isinstance(x, str) else "")
def test_add_layer_norm_refuses(bad, error, message):
    arguments = {"x": torch.randn(B, W), "residual": torch.randn(B, W), "weight": torch.ones(W), "bias": torch.ones(W)}
    functional.add_layer_norm(**arguments)
    with pytest.raises(error, match=rf"^add_layer_norm: {message}"):
        functional.add_layer_norm(**{**arguments, **bad})


ACTIVATION = [
    ({"x": torch.randn(B, 0)}, ValueError, r"x must be \[\.\.\., W\] with W ≥ 1; got \[4, 0\]"),
    ({"x": torch.ones(B, W, dtype=torch.int64)}, TypeError, r"x must be float32, .* got torch.int64"),
    ({"bias": torch.randn(7)}, ValueError, r"bias must be \[W=16\] to match x \[4, 16\]; got \[7\]"),
    ({"bias": torch.ones(W).long()}, TypeError, r"bias must be float32, .* got torch.int64. Use bias.float"),
    ({"bias": torch.randn(W, device="meta")}, ValueError, r"bias must be on cpu, where x is; got meta"),
    ({"kind": "relu"}, ValueError, r'kind must be "quick_gelu", "gelu" or "gelu_tanh"; got \'relu\''),
]


@pytest.mark.parametrize(("bad", "error", "message"), ACTIVATION, ids=lambda x: x if isinstance(x, str) else "")
def test_mlp_activation_refuses(bad, error, message):
    arguments = {"x": torch.randn(B, W), "bias": torch.ones(W)}
    functional.mlp_activation(**arguments)
    with pytest.raises(error, match=rf"^mlp_activation: {message}"):
        functional.mlp_activation(**{**arguments, **bad})


def stored() -> dict:
    return {
        "rows": torch.ones(5, 3, 4, dtype=torch.int8),
        "index": torch.tensor([0, 4]),
        "token_scale": torch.ones(5, 3),
    }


GATHER = [
    (
        {"rows": torch.ones(5, 4, dtype=torch.int8)},
        ValueError,
        r"rows must be \[R, N, W\] with .* ≥ 1; got \[5, 4\]",
    ),
    ({"rows": torch.ones(5, 3, 4).long()}, TypeError, r"rows must be float32, .* or int8; got torch.int64"),
    ({"index": torch.tensor(3)}, ValueError, r"index must be \[B\] with B ≥ 1; got \[\]"),
    ({"index": torch.tensor([3.0])}, TypeError, r"index must be int64; got torch.float32. Use index.long\(\)"),
    ({"index": torch.tensor([0, 5])}, ValueError, r"index must be rows of rows, 0 to 4; got 5"),
    ({"index": torch.tensor([0], device="meta")}, ValueError, r"index must be on cpu, where rows is; got meta"),
    ({"token_scale": None}, ValueError, r"token_scale must be given for int8 .* got rows of torch.int8 without"),
    (
        {"rows": torch.ones(5, 3, 4)},
        ValueError,
        r"token_scale must be given .* torch.float32 with token_scale",
    ),
    ({"token_scale": torch.ones(5, 4)}, ValueError, r"token_scale must be \[R=5, N=3\] to match rows .*; got \[5, 4\]"),
    ({"token_scale": torch.ones(5, 3).half()}, TypeError, r"token_scale must be float32; got torch.float16. Use"),
    ({"dtype": torch.int8}, TypeError, r"dtype must be float32, bfloat16, float16 or float64; got torch.int8"),
    ({"out": torch.ones(2, 3, 5)}, ValueError, r"out must be contiguous \[B=2, N=3, W=4\]; got \[2, 3, 5\]"),
    ({"out": torch.ones(2, 4, 3).mT}, ValueError, r"out must be contiguous .* strides \[12, 1, 3\]"),
    ({"out": torch.ones(2, 3, 4).long()}, TypeError, r"out must be float32, .* got torch.int64"),
    ({"out": torch.ones(2, 3, 4), "dtype": torch.float32}, ValueError, "dtype and pin_memory must not be given with"),
    ({"out_index": torch.tensor([0, 1])}, ValueError, r"out_index selects rows of out; got no out\. Pass out too"),
    *(
        ({"out": torch.ones(7, 3, 4), "out_index": torch.tensor([6, 0])} | bad, error, message)
        for bad, error, message in (
            (
                {"out_index": torch.tensor([6])},
                ValueError,
                r"out_index must be \[B=2\] to match index \[2\]; got \[1\]",
            ),
            (
                {"out_index": torch.tensor([6, 0]).int()},
                TypeError,
                r"out_index must be int64; .* Use out_index.long\(\)",
            ),
            ({"out_index": torch.tensor([6, 0], device="meta")}, ValueError, r"out_index must be on cpu, .* got meta"),
            ({"out_index": torch.tensor([6, 7])}, ValueError, r"out_index must be rows of out, 0 to 6; got 7"),
            (
                {"out_index": torch.tensor([6, 6])},
                ValueError,
                r"out_index must have no duplicates; got 6 more than once",
            ),
            ({"out": torch.ones(7, 3, 5)}, ValueError, r"out must be contiguous \[M, N=3, W=4\] .* got \[7, 3, 5\]"),
            ({"out": torch.ones(0, 3, 4)}, ValueError, r"out must be contiguous .* with M ≥ 1; got \[0, 3, 4\]"),
            ({"out": torch.ones(())}, ValueError, r"out must be contiguous \[M, N=3, W=4\] with M ≥ 1; got \[\]"),
            ({"out": torch.ones(7, 4, 3).mT}, ValueError, r"out must be contiguous .* strides \[12, 1, 3\]"),
        )
    ),
]


@pytest.mark.parametrize(("bad", "error", "message"), GATHER, ids=lambda x: x if isinstance(x, str) else "")
def test_gather_rows_refuses(bad, error, message):
    functional.gather_rows(**stored())
    with pytest.raises(error, match=rf"^gather_rows: {message}"):
        functional.gather_rows(**{**stored(), **bad})


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_pinned_memory_needs_a_gpu():
    with pytest.raises(ValueError, match=r"^gather_rows: pin_memory needs .* on cpu and no GPU. Leave it out"):
        functional.gather_rows(**stored(), pin_memory=True)


def trained() -> dict:
    return {
        "weight": [torch.ones(3), torch.ones(2, 2)],
        "grad": [torch.ones(3), torch.ones(2, 2)],
        "momentum_buffer": [torch.zeros(3), torch.zeros(2, 2)],
        "lr": 0.1,
    }


SGD = [
    ({"grad": [torch.ones(3)]}, ValueError, r"weight, grad and momentum_buffer must be lists .*; got 2, 1 and 2"),
    ({"weight": [torch.ones(3).long(), torch.ones(2, 2)]}, TypeError, r"weight must be float32, .* got torch.int64"),
    ({"weight": [torch.ones(3), torch.ones(2, 2).half()]}, ValueError, r"the weights of a list must have one dtype"),
    (
        {"grad": [torch.ones(3), torch.ones(4)]},
        ValueError,
        r"grad must be \[2, 2\] to match weight number 1; got",
    ),
    (
        {"momentum_buffer": [torch.ones(1), torch.ones(2, 2)]},
        ValueError,
        r"momentum_buffer must be \[3\].*; got \[1\]",
    ),
    ({"grad": [torch.ones(3), torch.ones(2, 2).long()]}, TypeError, r"grad must be float32, .* got torch.int64"),
    ({"grad": [torch.ones(3), torch.ones(2, 2, device="meta")]}, ValueError, r"grad must be on cpu, where weight is"),
    ({"lr": -0.1}, ValueError, r"lr must be finite and at least 0; got -0.1"),
    ({"lr": float("nan")}, ValueError, r"lr must be finite and at least 0; got nan"),
    ({"lr": torch.ones(2)}, ValueError, r"lr must be a number, \[\] or \[1\]; got \[2\]"),
    ({"lr": torch.tensor(1)}, TypeError, r"lr must be float32, .* got torch.int64"),
    ({"lr": torch.tensor(0.1, device="meta")}, ValueError, r"lr must be on cpu, where weight is; got meta"),
    ({"momentum": -1.0}, ValueError, r"momentum must be finite and at least 0; got -1.0"),
    ({"weight_decay": -1.0}, ValueError, r"weight_decay must be finite and at least 0; got -1.0"),
    ({"seed": 3}, TypeError, r"weight must be bfloat16; got torch.float32. Leave out seed"),
]


@pytest.mark.parametrize(("bad", "error", "message"), SGD, ids=lambda x: x if isinstance(x, str) else "")
def test_sgd_momentum_refuses(bad, error, message):
    functional.sgd_momentum_(**trained())
    with pytest.raises(error, match=rf"^sgd_momentum_: {message}"):
        functional.sgd_momentum_(**{**trained(), **bad})


def test_sgd_momentum_refuses_a_fractional_seed():
    bf16 = {name: torch.ones(2).bfloat16() for name in ("weight", "grad", "momentum_buffer")}
    with pytest.raises(TypeError, match=r"^sgd_momentum_: seed must be int64; got torch.float32. Use seed.to"):
        functional.sgd_momentum_(**bf16, lr=0.1, seed=torch.tensor(1.0))


def test_class_sampled_logits_refuses():
    with pytest.raises(ValueError, match=r"^class_sampled_logits: text must be \[C, D=16\]"):
        functional.class_sampled_logits(torch.randn(B, D), torch.randn(C, 7), 1.0)
    with pytest.raises(TypeError, match=r"^class_sampled_logits: class_ids must be int64"):
        functional.class_sampled_logits(torch.randn(B, D), torch.randn(C, D), 1.0, class_ids=torch.ones(2))


LSE = [
    ({"labels": torch.tensor([0, 3, 5, -2])}, ValueError, r"labels must be rows of text, .*process \(-1\); got -2"),
    ({"labels": torch.tensor([0, 3, 5, 9])}, ValueError, r"labels must be rows of text, 0 to 8, .*; got 9"),
    ({"labels": torch.tensor([0, 3, 5, 7])}, ValueError, r"labels must be among class_ids; got 7"),
    ({"class_ids": torch.tensor([8, 0, 3, 5, 3])}, ValueError, r"class_ids must have no duplicates; got"),
    ({"class_ids": torch.tensor([]).long()}, ValueError, r"labels must be among class_ids; got 0"),
    ({"class_ids": torch.ones(0, 1).long()}, ValueError, r"class_ids must be \[K\] with K ≥ 1; got \[0, 1\]"),
    ({"text": torch.randn(0, D), "class_ids": None}, ValueError, r"labels must be rows of text, .*; got 0"),
    (
        {"text": torch.randn(0, D), "class_ids": None, "logit_scale": math.nan},
        ValueError,
        r"logit_scale must be finite",
    ),
]


@pytest.mark.parametrize(("bad", "error", "message"), LSE, ids=lambda x: x if isinstance(x, str) else "")
def test_class_sampled_lse_refuses(bad, error, message):
    arguments = {name: x for name, x in good().items() if name != "class_weight"}
    functional.class_sampled_lse(**arguments)
    with pytest.raises(error, match=rf"^class_sampled_lse: {message}"):
        functional.class_sampled_lse(**{**arguments, **bad})


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


def test_logits_are_fp32_under_autocast():
    """Autocast casts only the features: bf16 logits have steps of 0.5 at this scale."""
    image, text, scale = torch.randn(B, D), torch.randn(C, D), 100.3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = functional.class_sampled_logits(image, text, scale)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, functional.class_sampled_logits(image.bfloat16(), text.bfloat16(), scale))


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


@pytest.mark.parametrize("eps", [-1e-5, math.nan, math.inf])
def test_add_layer_norm_refuses_eps(eps):
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="eps must be finite and at least 0"):
        functional.add_layer_norm(x, x, torch.ones(4), torch.zeros(4), eps)


def test_a_logit_scale_beyond_fp32_is_not_finite():
    x = torch.randn(3, 4)
    with pytest.raises(ValueError, match="logit_scale must be finite"):
        functional.class_sampled_ce(x, x, torch.tensor([0, 1, 2]), 1e39)


def test_gather_rows_does_not_gather_into_its_rows():
    rows = torch.randn(4, 2, 3)
    with pytest.raises(ValueError, match="out must not share memory with rows"):
        functional.gather_rows(rows, torch.tensor([3, 2, 1, 0]), out=rows)
    with pytest.raises(ValueError, match="out must not share memory with rows"):
        functional.gather_rows(rows[:2], torch.tensor([1]), out=rows[2:], out_index=torch.tensor([0]))


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

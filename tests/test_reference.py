"""The specification against PyTorch's own functions, in fp64."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from timm.layers.pos_embed_sincos import apply_rot_embed_cat

from skipkernels import reference

torch_double = {"dtype": torch.float64}


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_class_sampled_ce_matches_cross_entropy_of_gathered_logits(rng, reduction, label_smoothing, weighted):
    image, text = torch.randn(5, 8, generator=rng, **torch_double), torch.randn(9, 8, generator=rng, **torch_double)
    class_ids, labels = torch.tensor([7, 2, 4, 0]), torch.tensor([4, 7, -1, 2, 4])
    weight = torch.rand(9, generator=rng, **torch_double) if weighted else None
    ours = reference.class_sampled_ce(image, text, labels, 5.0, class_ids, weight, label_smoothing, -1, reduction)
    logits = 5.0 * F.normalize(image) @ F.normalize(text[class_ids]).T
    theirs = F.cross_entropy(
        logits,
        torch.tensor([2, 0, -100, 1, 2]),
        weight=None if weight is None else weight[class_ids],
        label_smoothing=label_smoothing,
        reduction=reduction,
    )
    assert torch.allclose(ours, theirs, rtol=1e-14)


def test_pairwise_sigmoid_is_the_sum_over_all_pairs(rng):
    image, text = (torch.randn(n, 8, generator=rng, **torch_double) for n in (3, 4))
    logits = reference.class_sampled_logits(image, text, 5.0) - 2.0
    own = torch.zeros(3, 4, **torch_double)
    own[0, 2] = own[2, 2] = 1
    ours = reference.pairwise_sigmoid(image, text, torch.tensor([2, -1, 2]), 5.0, -2.0)
    assert torch.allclose(ours, F.binary_cross_entropy_with_logits(logits, own, reduction="sum"), rtol=1e-14)


@pytest.mark.parametrize("label", [3, -2, 9])
def test_a_label_outside_the_sample_is_refused(label):
    image, text, labels = torch.ones(1, 2), torch.ones(9, 2), torch.tensor([label])
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        reference.class_sampled_ce(image, text, labels, 1.0, torch.tensor([0, 8]))


def test_half_precision_is_computed_in_fp32(rng):
    image, text = torch.randn(4, 8, generator=rng), torch.randn(9, 8, generator=rng)
    for dtype in (torch.bfloat16, torch.float16):
        logits = reference.class_sampled_logits(image.to(dtype), text.to(dtype), 100.0)
        assert logits.dtype == torch.float32
        assert torch.equal(
            logits, reference.class_sampled_logits(image.to(dtype).float(), text.to(dtype).float(), 100.0)
        )


def test_add_layer_norm_matches_torch(rng):
    x, residual = (torch.randn(3, 5, 16, generator=rng, **torch_double) for _ in "xr")
    weight, bias = (torch.randn(16, generator=rng, **torch_double) for _ in "wb")
    hidden, normed = reference.add_layer_norm(x, residual, weight, bias)
    assert torch.equal(hidden, x + residual)
    assert torch.equal(normed, F.layer_norm(x + residual, (16,), weight, bias))
    hidden, normed = reference.add_layer_norm(x, None, weight, bias)
    assert hidden is x and torch.equal(normed, F.layer_norm(x, (16,), weight, bias))
    hidden, normed = reference.add_layer_norm(x.bfloat16(), residual.bfloat16(), weight.bfloat16(), bias.bfloat16())
    assert hidden.dtype == normed.dtype == torch.bfloat16


def test_add_rms_norm_matches_torch(rng):
    x, residual = (torch.randn(3, 5, 16, generator=rng, **torch_double) for _ in "xr")
    weight = torch.randn(16, generator=rng, **torch_double)
    hidden, normed = reference.add_rms_norm(x, residual, weight)
    assert torch.equal(hidden, x + residual) and torch.equal(normed, F.rms_norm(hidden, (16,), weight, 1e-6))
    mean_square = hidden.square().mean(dim=-1, keepdim=True)
    assert torch.allclose(normed, hidden / (mean_square + 1e-6).sqrt() * weight, rtol=1e-14)


def test_mlp_activation(rng):
    x, bias = torch.randn(3, 16, generator=rng, **torch_double), torch.randn(16, generator=rng, **torch_double)
    u = x + bias
    assert torch.allclose(reference.mlp_activation(x, bias), u / (1 + torch.exp(-1.702 * u)), rtol=1e-13)
    assert torch.equal(reference.mlp_activation(x, bias, "gelu"), F.gelu(u))
    assert torch.equal(reference.mlp_activation(u, None, "gelu_tanh"), F.gelu(u, approximate="tanh"))
    gate, linear = u.chunk(2, dim=-1)
    assert torch.allclose(reference.mlp_activation(x, bias, "swiglu"), gate * torch.sigmoid(gate) * linear, rtol=1e-13)
    with pytest.raises(ValueError, match=r"^mlp_activation: kind must be .* got 'relu'"):
        reference.mlp_activation(x, bias, "relu")


@pytest.mark.parametrize("interleaved", [True, False])
def test_rotary_embedding_matches_timm(rng, interleaved):
    """timm has query and key as [B, H, T, E], and the sine and cosine of each column."""
    B, T, H, E = 2, 5, 3, 8
    angles = torch.randn(T, E // 2, generator=rng, **torch_double)
    columns = angles.repeat_interleave(2, dim=1) if interleaved else angles.repeat(1, 2)
    table = torch.cat([columns.sin(), columns.cos()], dim=1)
    qkv = torch.randn(B, T, 3, H, E, generator=rng, **torch_double)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    theirs = [*(apply_rot_embed_cat(x, table, half=not interleaved) for x in (query, key)), value]
    rows = qkv.reshape(B * T, 3 * H * E)
    ours = reference.rotary_embedding(rows, angles.cos(), angles.sin(), 2 * H, interleaved)
    assert torch.equal(ours.view_as(qkv).permute(2, 0, 3, 1, 4), torch.stack(theirs))


def test_shared_prefix_attention_is_sdpa_on_the_whole_sequence(rng):
    K, P, S, H, E = 3, 4, 5, 2, 8
    packed = torch.randn(P + K * S, 3 * H * E, generator=rng, **torch_double, requires_grad=True)
    ours = reference.shared_prefix_attention(packed, H, P, S)
    prefix, suffixes = packed.unflatten(1, (3, H, E)).split([P, K * S])
    whole = torch.cat([prefix.expand(K, P, 3, H, E), suffixes.unflatten(0, (K, S))], dim=1)
    theirs = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in whole.unbind(2)), is_causal=True)
    theirs = theirs.transpose(1, 2).flatten(2)
    theirs = torch.cat([theirs[0, :P], theirs[:, P:].flatten(0, 1)])
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=1e-14)
    d_out = torch.randn(ours.shape, generator=rng, **torch_double)
    gradients = (torch.autograd.grad(x, packed, d_out)[0] for x in (ours, theirs))
    assert torch.allclose(*gradients, rtol=1e-11, atol=1e-13)


def test_packed_suffixes_are_independent(rng):
    lengths, P, H, E = [3, 0, 1, 5], 2, 2, 4
    packed = torch.randn(P + sum(lengths) + 2, 3 * H * E, generator=rng, **torch_double)
    offsets = torch.tensor([0, *itertools.accumulate(lengths)])
    ours = reference.shared_prefix_attention(packed, H, P, 5, offsets)
    assert not ours[P + sum(lengths) :].any()
    for begin, end in itertools.pairwise((P + offsets).tolist()):
        if begin < end:
            alone = reference.shared_prefix_attention(torch.cat([packed[:P], packed[begin:end]]), H, P, end - begin)
            assert torch.allclose(ours[begin:end], alone[P:], rtol=1e-13)


def test_pooled_attention_is_one_row_of_sdpa(rng):
    B, N, H, E = 3, 6, 2, 8
    query = torch.randn(B, H, E, generator=rng, **torch_double)
    key, value = (torch.randn(B, N, H, E, generator=rng, **torch_double) for _ in "kv")
    theirs = F.scaled_dot_product_attention(query[:, :, None], key.transpose(1, 2), value.transpose(1, 2))[:, :, 0]
    assert torch.allclose(reference.pooled_attention(query, key, value), theirs, rtol=1e-12, atol=1e-14)
    lengths = torch.tensor([1, 4, 6])
    ours = reference.pooled_attention(query, key, value, lengths)
    for b, length in enumerate(lengths):
        alone = reference.pooled_attention(query[b : b + 1], key[b : b + 1, :length], value[b : b + 1, :length])
        assert torch.allclose(ours[b], alone[0], rtol=1e-13)


def test_sgd_momentum_matches_torch(rng):
    start, grads = torch.randn(7, generator=rng), torch.randn(3, 7, generator=rng)
    theirs = start.clone().requires_grad_()
    optimizer = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, weight_decay=0.01)
    ours, buffer = start.clone(), torch.zeros(7)
    for grad in grads:
        theirs.grad = grad.clone()
        optimizer.step()
        reference.sgd_momentum_(ours, grad, buffer, lr=0.1, momentum=0.9, weight_decay=0.01)
    assert torch.allclose(ours, theirs, rtol=1e-6)


def test_stochastic_rounding_keeps_updates_that_rounding_to_nearest_loses():
    n, steps, lr = 4096, 64, 1e-5  # bf16 steps above 1 are 2⁻⁷: a hundredth of a half step each time

    def descend(seeds) -> float:
        weight, buffer = torch.ones(n, dtype=torch.bfloat16), torch.zeros(n)
        for seed in seeds:
            reference.sgd_momentum_(weight, torch.full((n,), -1.0), buffer, lr, momentum=0.0, seed=seed)
        return weight.double().mean().item()

    assert descend(itertools.repeat(None, steps)) == 1.0
    # The mean of n·steps coin throws of size 2⁻⁷: its deviation is at most 2⁻⁷·sqrt(steps·p(1−p)/n), p = lr·2⁷.
    deviation = 2**-7 * (steps * lr * 2**7 / n) ** 0.5
    assert abs(descend(range(steps)) - (1.0 + steps * lr)) < 4 * deviation
    with pytest.raises(TypeError, match=r"^sgd_momentum_: seed is for bfloat16 weights; got torch.float32"):
        reference.sgd_momentum_(torch.ones(2), torch.ones(2), torch.zeros(2), 0.1, seed=0)


def test_the_random_bits_are_splitmix64():
    """The first numbers that the published generator gives for seed 1234567, 16 bits for each element."""
    known = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    sixteenths = [(number >> 16 * lane) & 0xFFFF for number in known for lane in range(4)]
    expected = [(0x3F800000 + bits) & 0xFFFF0000 for bits in sixteenths]  # 1.0
    rounded = reference._round_at_random(torch.ones(20), seed=1234567, first=0)
    assert rounded.view(torch.int32).tolist() == expected
    later = reference._round_at_random(torch.ones(17), seed=torch.tensor([1234567]), first=3)
    assert later.view(torch.int32).tolist() == expected[3:]

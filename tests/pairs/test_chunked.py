"""Pair losses in chunks of a batch: memory, gradients, hooks and random numbers of the whole batch."""

from __future__ import annotations

import collections

import pytest
import torch
import torch.nn.functional as F

import skipkernels as sk
from skipkernels.testing import gradients, relative_error, saved_bytes
from tests.allocations import allocated_bytes
from tests.models import tiny_batch, tiny_clip, tiny_tokens


def pair_batch(dtype=torch.float64):
    """Five images, and the ids of their captions among 13, one of them twice."""
    return tiny_batch(5, 13, dtype)[0], torch.tensor([7, 0, 12, 7, 3])


def test_forward_of_chunks_saves_the_batch_and_gradients_of_embeddings(monkeypatch):
    clip = sk.SkipCLIP(tiny_clip(torch.float32), tiny_tokens(24), skip_layers=1, memory="fast")
    features, ids = clip.encode_lower(tiny_batch(24, 24, torch.float32)[0]), torch.arange(24)
    whole, chunked = (saved_bytes(lambda c=c: sk.pairs.pair_loss(clip, features, ids, chunk=c)) for c in (None, 4))
    assert chunked < whole / 4
    rows, encode = [], clip.images.encode
    monkeypatch.setattr(clip.images, "encode", lambda x: rows.append(len(x)) or encode(x))
    loss = sk.pairs.pair_loss(clip, features, ids, chunk=4)
    kept = features.nbytes + ids.nbytes + 2 * 24 * clip.prototypes.shape[1] * 4
    assert sum(x.nbytes for x in loss.grad_fn.saved_tensors) == kept
    loss.backward()
    assert rows == [4] * 12, "six chunks, twice"


def test_peak_of_chunks_does_not_grow_with_the_batch():
    """Backward has the activations of one chunk; gradients of parameters are twice in memory, since they are summed."""
    clip = sk.SkipCLIP(tiny_clip(torch.float32), tiny_tokens(40), skip_layers=1, memory="fast")
    features, ids = clip.encode_lower(tiny_batch(40, 40, torch.float32)[0]), torch.arange(40)

    def peak(count: int, chunk: int | None) -> int:
        return allocated_bytes(lambda: sk.pairs.pair_loss(clip, features[:count], ids[:count], chunk=chunk).backward())

    peak(4, None)  # gradients exist from here on
    small, whole, chunked = peak(4, None), peak(40, None), peak(40, 4)
    assert whole > 4 * small and chunked < 2 * small


HALF = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])


@HALF
def test_chunks_under_autocast_are_close_to_the_whole_batch(dtype):
    clip = sk.SkipCLIP(tiny_clip(torch.float32), tiny_tokens(13), skip_layers=1)
    images, ids = pair_batch(torch.float32)
    with torch.autocast("cpu", dtype):
        whole, loss = (sk.pairs.pair_loss(clip, images, ids, chunk=chunk) for chunk in (None, 2))
    torch.testing.assert_close(loss, whole, rtol=1e-3, atol=1e-3)
    expected = gradients(clip, whole)
    assert max(relative_error(g, expected[name]) for name, g in gradients(clip, loss).items()) < 0.1


@HALF
def test_both_passes_have_the_same_autocast_and_random_numbers(dtype, monkeypatch):
    clip = sk.SkipCLIP(tiny_clip(torch.float32), tiny_tokens(13), skip_layers=1)
    images, ids = pair_batch(torch.float32)
    passes, encode = [], clip.images.encode

    def recorded(x):
        embedding = F.dropout(encode(x), 0.5)
        passes.append(embedding.detach())
        return embedding

    monkeypatch.setattr(clip.images, "encode", recorded)
    with torch.autocast("cpu", dtype):
        loss = sk.pairs.pair_loss(clip, images, ids, chunk=2)
        found = gradients(clip, clip(images, ids).loss)
    assert len(found) == len(clip.trainable_parameters()), "no cast without a graph is left"
    torch.rand(3)
    state = torch.get_rng_state()
    loss.backward()
    assert torch.get_rng_state().equal(state)
    first, second = passes[:3], passes[-3:]
    assert all(a.equal(b) and a.dtype == dtype for a, b in zip(first, second, strict=True))


def test_hooks_of_parameters_are_called_once_and_a_second_backward_is_equal():
    """`DistributedDataParallel` and updates inside backward need it."""
    clip = sk.SkipCLIP(tiny_clip(), tiny_tokens(13), skip_layers=1, train_logit_scale=True)
    images, ids = pair_batch()
    calls = collections.Counter()
    trained = {name: p for name, p in clip.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.update([name]))
    loss = sk.pairs.pair_loss(clip, images, ids, chunk=2)
    once = gradients(clip, loss, retain_graph=True)
    assert calls == dict.fromkeys(trained, 1) and once.keys() == trained.keys()
    assert all(gradient.equal(once[name]) for name, gradient in gradients(clip, loss).items())


def test_random_numbers_of_texts_do_not_depend_on_images_that_do_not_train(monkeypatch):
    model = tiny_clip()
    model.visual.requires_grad_(False)
    clip = sk.SkipCLIP(model, tiny_tokens(13), skip_layers=1, trainable="as_is")
    passes, encode_image, encode_text = [], clip.images.encode, clip.texts.encode

    def recorded(*arguments, **options):
        embedding = F.dropout(encode_text(*arguments, **options), 0.5)
        passes.append(embedding.detach())
        return embedding

    monkeypatch.setattr(clip.images, "encode", lambda x: F.dropout(encode_image(x), 0.5))
    monkeypatch.setattr(clip.texts, "encode", recorded)
    sk.pairs.pair_loss(clip, *pair_batch(), chunk=2).backward()
    half = len(passes) // 2
    assert half > 1 and all(a.equal(b) for a, b in zip(passes[:half], passes[half:], strict=True))


def test_chunks_of_a_tower_that_does_not_train_and_without_gradients():
    clip = sk.SkipCLIP(tiny_clip(), tiny_tokens(13), skip_layers=1, train_text=False)
    images, ids = pair_batch()
    expected = gradients(clip, sk.pairs.pair_loss(clip, images, ids))
    found = gradients(clip, sk.pairs.pair_loss(clip, images, ids, chunk=2))
    assert found.keys() == expected.keys()
    assert all(relative_error(x, expected[name]) < 1e-10 for name, x in found.items())
    with torch.no_grad():
        loss = sk.pairs.pair_loss(clip.eval(), images, ids, chunk=2)
    assert not loss.requires_grad


def test_backward_after_a_change_of_the_weights_is_refused():
    clip = sk.SkipCLIP(tiny_clip(), tiny_tokens(13), skip_layers=1)
    loss = sk.pairs.pair_loss(clip, *pair_batch(), chunk=2)
    with torch.no_grad():
        clip.model.ln_final.weight.mul_(2)
    with pytest.raises(RuntimeError, match="pair_loss: weights changed between the loss"):
        loss.backward()


def test_chunks_refuse_what_they_would_change():
    clip, (images, ids) = sk.SkipCLIP(tiny_clip(), tiny_tokens(13), skip_layers=1), pair_batch()
    features = clip.encode_lower(images)
    with pytest.raises(ValueError, match=r"pair_loss: with chunk, pixel_values get no gradient"):
        sk.pairs.pair_loss(clip, features.requires_grad_(), ids, chunk=2)
    clip.model.visual.ln_post = torch.nn.Sequential(clip.model.visual.ln_post, torch.nn.BatchNorm1d(1))
    with pytest.raises(ValueError, match="chunk must be None, since batch norms above the cut are in training mode"):
        sk.pairs.pair_loss(clip, images, ids, chunk=2)

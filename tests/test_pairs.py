"""Contrastive loss of pairs, SkipCLIP.pair_loss, and recall at k."""

from __future__ import annotations

import copy
import functools
import runpy
from pathlib import Path

import naive
import open_clip
import pytest
import torch
import torch.nn.functional as F
from models import tiny_batch, tiny_clip, tiny_tokens

import skipkernels as sk
from skipkernels import functional, reference
from skipkernels.testing import SLACK, relative_error, saved_bytes

EXAMPLES = Path(__file__).parents[1] / "examples"


# ---- functional.contrastive_loss ---------------------------------------------------------------------------------


def make_pairs(B, D, dtype=torch.float64, seed=0):
    rng = torch.Generator().manual_seed(seed)
    image, text = (torch.randn(B, D, generator=rng, dtype=torch.float64).mul(3).to(dtype) for _ in range(2))
    scale = torch.tensor(10.0, dtype=torch.promote_types(dtype, torch.float32))
    return tuple(x.requires_grad_() for x in (image, text, scale))


def plain_loss(image, text, scale, reduction="mean"):
    logits = scale * F.normalize(image, dim=1) @ F.normalize(text, dim=1).T
    labels = torch.arange(len(image))
    return sum(F.cross_entropy(z, labels, reduction=reduction) for z in (logits, logits.T)) / 2


def loss_and_gradients(function, inputs, reduction):
    loss = function(*inputs, reduction=reduction)
    upstream = torch.arange(1, loss.numel() + 1, dtype=loss.dtype).view(loss.shape)
    return loss, *torch.autograd.grad(loss, inputs, upstream)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(1, 7), (5, 16), (33, 129)], ids=lambda s: "B{}-D{}".format(*s))
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_contrastive_loss_no_worse_than_eager(dtype, shape, reduction):
    inputs = make_pairs(*shape, dtype)
    exact = loss_and_gradients(plain_loss, [x.detach().double().requires_grad_() for x in inputs], reduction)
    eager = loss_and_gradients(plain_loss, inputs, reduction)
    for function in (functional.contrastive_loss, reference.contrastive_loss):
        for ours, theirs, right in zip(loss_and_gradients(function, inputs, reduction), eager, exact, strict=True):
            assert relative_error(ours, right) <= relative_error(theirs, right) + SLACK[ours.dtype]


def test_contrastive_loss_does_not_save_the_logits():
    assert saved_bytes(lambda: functional.contrastive_loss(*make_pairs(300, 8, torch.float32))) < 4 * 300 * 300


def test_contrastive_loss_equals_clip_loss_of_open_clip():
    image, text, scale = make_pairs(6, 16)
    theirs = open_clip.ClipLoss()(F.normalize(image, dim=1), F.normalize(text, dim=1), scale)
    torch.testing.assert_close(functional.contrastive_loss(image, text, scale), theirs, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"text": torch.ones(4, 8)}, ValueError, r"text must be \[B=3, D=8\] to match image \[3, 8\]; got \[4, 8\]"),
        ({"text": torch.ones(3, 7)}, ValueError, r"text must be \[C, D=8\]"),
        ({"image": torch.ones(3, 8).long()}, TypeError, "image must be float32"),
    ],
)
def test_contrastive_loss_refuses(bad, error, message):
    with pytest.raises(error, match=rf"^contrastive_loss: {message}"):
        functional.contrastive_loss(**{"image": torch.ones(3, 8), "text": torch.ones(3, 8), "logit_scale": 1.0, **bad})


# ---- SkipCLIP.pair_loss ------------------------------------------------------------------------------------------


def pair_batch(dtype=torch.float64):
    """Five images, 13 captions, and the caption of each image, one of them twice."""
    return tiny_batch(5, 13, dtype)[0], tiny_tokens(13), torch.tensor([7, 0, 12, 7, 3])


def naive_pair_loss(model, images, tokens, skip):
    image, text = naive.embed_images(model, images, skip[0], False), naive.embed_texts(model, tokens, skip[1], False)
    return plain_loss(image, text, model.logit_scale.exp())


@pytest.mark.parametrize("kind", ["ids", "tokens"])
@pytest.mark.parametrize("skip", [0, 1, 3, (2, 1)], ids=lambda skip: f"skip{skip}")
def test_pair_loss_equals_naive_step(skip, kind):
    model, (images, tokens, ids) = tiny_clip(), pair_batch()
    plain = copy.deepcopy(model).requires_grad_(True)
    clip = sk.SkipCLIP(model, tokens, skip_layers=skip, train_logit_scale=True)
    loss = clip.pair_loss(images, ids if kind == "ids" else tokens[ids])
    loss.backward()
    expected = naive_pair_loss(plain, images, tokens[ids], skip if isinstance(skip, tuple) else (skip, skip))
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # fp64: rounding of two orders of summation, as in test_clip.py
            right = plain.get_parameter(name).grad
            assert (parameter.grad - right).norm() <= 1e-9 * right.norm() + 1e-15, name


def test_pair_loss_takes_new_captions_features_and_smaller_batches():
    model, (images, tokens, ids) = tiny_clip(), pair_batch()
    plain = copy.deepcopy(model)
    clip = sk.SkipCLIP(model, tiny_tokens(2, seed=3), skip_layers=1)
    before = clip._text.prompts
    for count in (5, 1, 3):
        loss = clip.pair_loss(clip.encode_lower(images[:count]), tokens[ids[:count]].int())
        torch.testing.assert_close(loss, naive_pair_loss(plain, images[:count], tokens[ids[:count]], (1, 1)))
    assert clip._text.prompts is before, "the classes stay"


@pytest.mark.parametrize("kind", ["ids", "tokens"])
def test_pair_loss_in_every_mode(kind, tmp_path):
    model, (images, tokens, ids) = tiny_clip(torch.float32), pair_batch(torch.float32)
    captions = ids if kind == "ids" else tokens[ids]
    losses, bytes_of = {}, {}
    for memory in ("fast", "min"):
        clip = sk.SkipCLIP(model, tokens, skip_layers=1, memory=memory, text_cache=tmp_path)
        bytes_of[memory] = saved_bytes(functools.partial(clip.pair_loss, images, captions))
        losses[memory] = clip.pair_loss(images, captions)
    torch.testing.assert_close(losses["fast"], losses["min"])
    assert bytes_of["min"] < bytes_of["fast"]
    with torch.autocast("cpu", torch.bfloat16):
        half = clip.pair_loss(images, captions)
    half.backward()
    # bf16 has 8 bits: the error of cosines is about 2^-8, and the temperature multiplies it by 14.
    assert half.dtype == torch.float32 and half.item() == pytest.approx(losses["fast"].item(), abs=14 * 2**-6)
    clip.eval()
    torch.testing.assert_close(clip.pair_loss(images, captions), losses["fast"])


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (["a cat"] * 5, r"captions must be int64, ids \[B=5\] or tokens .* got list"),
        (torch.zeros(5, 2, 77, dtype=torch.int64), r"got torch.int64 \[5, 2, 77\]"),
        (torch.full((5,), 13), r"captions must be in \[0, C=13\); got 13 to 13"),
        (torch.full((5, 77), 60), r"captions must be ids in \[0, 60\)"),
        (torch.zeros(5, 20, dtype=torch.int64), r"as long as the model's context; got \[5, 20\]"),
    ],
)
def test_pair_loss_refuses(captions, message):
    images, tokens, _ = pair_batch(torch.float32)
    clip = _clip_of_13_captions()
    with pytest.raises(ValueError, match=message):
        clip.pair_loss(images, captions)


@functools.cache
def _clip_of_13_captions() -> sk.SkipCLIP:
    return sk.SkipCLIP(tiny_clip(torch.float32), tiny_tokens(13), skip_layers=1)


# ---- recall ------------------------------------------------------------------------------------------------------


def brute_force_recall(image, text, image_of_text, ks):
    """Ranks by sorting every list, with right candidates after wrong ones of the same score."""
    scores = (F.normalize(image, dim=1) @ F.normalize(text, dim=1).T).tolist()
    owner = image_of_text.tolist()

    def found(row, right, k):
        order = sorted(range(len(row)), key=lambda j: (-row[j], right[j]))
        return any(right[j] for j in order[:k])

    images = sorted(set(owner))
    by_image = {k: sum(found(scores[i], [o == i for o in owner], k) for i in images) / len(images) for k in ks}
    columns = list(zip(*scores, strict=True))
    by_text = {
        k: sum(found(columns[j], [i == o for i in range(len(image))], k) for j, o in enumerate(owner)) / len(owner)
        for k in ks
    }
    return by_image, by_text


@pytest.mark.parametrize("rows", [1, 7, 1000])
def test_recall_equals_brute_force(rows, monkeypatch):
    rng = torch.Generator().manual_seed(0)
    image_of_text = torch.randint(0, 20, (50,), generator=rng)  # a few images without a caption
    # Unit vectors of one entry ±1 have exact cosines with many ties.
    axes, signs = torch.randint(0, 6, (70,), generator=rng), torch.randint(0, 2, (70, 1), generator=rng) * 2.0 - 1
    exact = signs * F.one_hot(axes, 6)
    monkeypatch.setattr(sk.retrieval, "_SCORES", rows * 20)
    for image, text in (exact.split([20, 50]), torch.randn(70, 6, generator=rng).split([20, 50])):
        ours = sk.retrieval.recall(image, text, image_of_text, ks=(1, 3, 10))
        assert tuple(ours) == brute_force_recall(image, text, image_of_text, (1, 3, 10))


def test_recall_of_useless_embeddings_is_zero():
    owner = torch.arange(20) % 10
    for value in (1.0, torch.nan):
        found = sk.retrieval.recall(torch.full((10, 4), value), torch.full((20, 4), value), owner, ks=(1, 9))
        assert found == ({1: 0.0, 9: 0.0}, {1: 0.0, 9: 0.0})


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"text": torch.ones(6, 5)}, ValueError, r"text must be \[m, D=4\]"),
        ({"image": [[1.0] * 4] * 3}, TypeError, "image must be a tensor; got list"),
        ({"text": torch.ones(6, 4).long()}, TypeError, "text must be float32"),
        ({"image_of_text": torch.arange(6)}, ValueError, "image_of_text must be rows of image, 0 to 2; got 0 to 5"),
        ({"image_of_text": torch.zeros(3).long()}, ValueError, r"image_of_text must be \[m=6\]"),
        ({"ks": (0, 1)}, ValueError, r"ks must be at least 1; got \[0, 1\]"),
    ],
)
def test_recall_refuses(bad, error, message):
    arguments = {"image": torch.ones(3, 4), "text": torch.ones(6, 4), "image_of_text": torch.arange(6) // 2}
    with pytest.raises(error, match=f"^recall: {message}"):
        sk.retrieval.recall(**{**arguments, **bad})


# ---- example -----------------------------------------------------------------------------------------------------


def test_example_improves_recall(capsys):
    main = runpy.run_path(str(EXAMPLES / "tune_pairs.py"))["main"]
    before, after = main(["--epochs", "2"])
    for then, now in zip(before, after, strict=True):
        assert now[5] > then[5] + 0.03
    assert "image to text" in capsys.readouterr().out

"""Contrastive loss of pairs, SkipCLIP.pair_loss, and recall at k."""

from __future__ import annotations

import collections
import copy
import functools
import itertools
import runpy
from pathlib import Path

import naive
import open_clip
import pytest
import torch
import torch.nn.functional as F
from models import tiny_batch, tiny_clip, tiny_tokens
from open_clip.loss import SigLipLoss

import skipkernels as sk
from skipkernels import functional, reference
from skipkernels.pairs.chunked import check_chunk
from skipkernels.testing import SLACK, allocated_bytes, relative_error, saved_bytes

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


@pytest.fixture(params=[None, 1, 70], ids=["whole", "rows", "chunks"])
def chunks(request, monkeypatch):
    """The loss of all pairs at once, of one image at a time, and of chunks of which the last is smaller."""
    if request.param is not None:
        monkeypatch.setattr(functional, "PAIRS_IN_MEMORY", request.param)


@pytest.mark.parametrize("shape", [(1, 7), (5, 16), (33, 640)], ids=lambda s: "B{}-D{}".format(*s))
@pytest.mark.parametrize(("scale", "bias"), [(10.0, -10.0), (100.0, 3.5)])
def test_pairwise_sigmoid_loss_equals_siglip_loss_of_open_clip(shape, scale, bias, chunks):
    image, text, _ = make_pairs(*shape)
    numbers = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in (scale, bias)]
    theirs = SigLipLoss()(F.normalize(image, dim=1), F.normalize(text, dim=1), *numbers)
    theirs = theirs, *torch.autograd.grad(theirs, [image, text, *numbers])
    for function in (functional.pairwise_sigmoid_loss, reference.pairwise_sigmoid_loss):
        loss = function(image, text, *numbers)
        ours = loss, *torch.autograd.grad(loss, [image, text, *numbers])
        for own, right in zip(ours, theirs, strict=True):
            torch.testing.assert_close(own, right, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype)[6:])
def test_pairwise_sigmoid_loss_no_worse_than_eager(dtype, chunks):
    """Gradients of the text are sums over chunks, which bf16 would round each time."""
    image, text, scale = make_pairs(33, 129, dtype)
    inputs = image, text, scale, torch.tensor(-10.0, requires_grad=True)

    def plain(image, text, scale, bias):
        return SigLipLoss()(F.normalize(image, dim=1), F.normalize(text, dim=1), scale.to(dtype), bias.to(dtype))

    def results(function, inputs):
        loss = function(*inputs)
        return loss, *torch.autograd.grad(loss, inputs)

    exact = results(reference.pairwise_sigmoid_loss, [x.detach().double().requires_grad_() for x in inputs])
    three = results(functional.pairwise_sigmoid_loss, inputs), results(plain, inputs), exact
    for ours, theirs, right in zip(*three, strict=True):
        assert relative_error(ours, right) <= relative_error(theirs, right) + SLACK[ours.dtype]


def test_pairwise_sigmoid_loss_saves_no_more_than_a_chunk_of_logits(monkeypatch):
    """Nor has backward, which computes the logits of a chunk again; all of them would be 1.4 MB."""
    inputs = *make_pairs(600, 8, torch.float32), -10.0
    monkeypatch.setattr(functional, "PAIRS_IN_MEMORY", 10 * 600)
    assert saved_bytes(lambda: functional.pairwise_sigmoid_loss(*inputs)) < 600 * 600
    assert allocated_bytes(lambda: functional.pairwise_sigmoid_loss(*inputs).backward()) < 600 * 600


def test_blocks_of_pairs_add_up(chunks):
    """Blocks of images and of texts, each with the labels that are in it, have the loss of all."""
    image, text, scale = make_pairs(7, 16)
    labels = torch.tensor([3, -1, 6, 6, 0, -1, 2])  # images without a text, and two with the same
    blocks = []
    for images, texts in itertools.product((slice(0, 3), slice(3, 7)), (slice(0, 5), slice(5, 7))):
        own = labels[images] - texts.start
        own = torch.where((own >= 0) & (own < len(text[texts])), own, -1)
        blocks.append(functional.pairwise_sigmoid(image[images], text[texts], own, scale, -3.0))
    whole = reference.pairwise_sigmoid(image, text, labels, scale, -3.0)
    torch.testing.assert_close(sum(blocks), whole, rtol=1e-13, atol=0)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize(("scale", "bias"), [(100.0, -10.0), (1e4, 0.0), (0.0, -30.0)])
def test_pairwise_sigmoid_of_extreme_logits(sign, scale, bias):
    """A pair that is as wrong as can be costs |z|, and one that is right exp(−|z|), which 1 + x would lose in fp32."""
    rows = torch.eye(3)
    numbers = [torch.tensor(x, requires_grad=True) for x in (scale, bias)]
    wide = [x.detach().double().requires_grad_() for x in numbers]
    for labels in (torch.arange(3), torch.full((3,), -1)):
        loss = functional.pairwise_sigmoid(rows, sign * rows, labels, *numbers)
        exact = reference.pairwise_sigmoid(rows.double(), sign * rows.double(), labels, *wide)
        gradients = torch.autograd.grad(loss, numbers), torch.autograd.grad(exact, wide)
        for ours, right in zip((loss, *gradients[0]), (exact, *gradients[1]), strict=True):
            torch.testing.assert_close(ours, right.float(), rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("bad", "error", "message"),
    [
        ({"text": torch.ones(4, 8)}, ValueError, r"text must be \[B=3, D=8\] to match image \[3, 8\]; got \[4, 8\]"),
        ({"text": torch.ones(3, 7)}, ValueError, r"text must be \[C, D=8\]"),
        ({"image": torch.ones(3, 8).long()}, TypeError, "image must be float32"),
    ],
)
@pytest.mark.parametrize("name", ["contrastive_loss", "pairwise_sigmoid_loss"])
def test_losses_of_pairs_refuse(name, bad, error, message):
    arguments = {"image": torch.ones(3, 8), "text": torch.ones(3, 8), "logit_scale": 1.0, **bad}
    arguments |= {"logit_bias": 0.0} if name == "pairwise_sigmoid_loss" else {}
    with pytest.raises(error, match=rf"^{name}: {message}"):
        getattr(functional, name)(**arguments)


# ---- SkipCLIP.pair_loss ------------------------------------------------------------------------------------------


def pair_batch(dtype=torch.float64):
    """Five images, 13 captions, and the caption of each image, one of them twice."""
    return tiny_batch(5, 13, dtype)[0], tiny_tokens(13), torch.tensor([7, 0, 12, 7, 3])


def naive_pair_loss(model, images, tokens, skip, bias=None):
    image, text = naive.embed_images(model, images, skip[0], False), naive.embed_texts(model, tokens, skip[1], False)
    if bias is None:
        return plain_loss(image, text, model.logit_scale.exp())
    return SigLipLoss()(F.normalize(image, dim=1), F.normalize(text, dim=1), model.logit_scale.exp(), bias)


@pytest.mark.parametrize(
    ("skip", "kind", "loss", "chunk"),
    [
        *((skip, kind, "softmax", None) for skip in (0, 1, 3, (2, 1)) for kind in ("ids", "tokens")),
        (1, "ids", "sigmoid", None),
        (1, "tokens", "softmax", 3),  # of 5 pairs
        ((2, 1), "ids", "softmax", 8),
        (0, "tokens", "sigmoid", 1),
        (3, "ids", "sigmoid", 2),
    ],
    ids=str,
)
def test_pair_loss_equals_naive_step(skip, kind, loss, chunk):
    model, (images, tokens, ids) = tiny_clip(), pair_batch()
    plain = copy.deepcopy(model).requires_grad_(True)
    clip = sk.SkipCLIP(model, tokens, skip_layers=skip, train_logit_scale=True)
    ours, theirs = (torch.tensor([-1.5]).double().requires_grad_() if loss == "sigmoid" else None for _ in "ab")
    captions = ids if kind == "ids" else tokens[ids]
    found = sk.pairs.pair_loss(clip, images, captions, loss=loss, logit_bias=ours, chunk=chunk)
    (2 * found).backward()
    skip = skip if isinstance(skip, tuple) else (skip, skip)
    expected = naive_pair_loss(plain, images, tokens[ids], skip, theirs)
    (2 * expected).backward()
    assert found.item() == pytest.approx(expected.item(), rel=1e-12)
    assert loss == "softmax" or ours.grad.item() == pytest.approx(theirs.grad.item(), rel=1e-10)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            # fp64: rounding of two orders of summation, as in test_clip.py
            right = plain.get_parameter(name).grad
            assert (parameter.grad - right).norm() <= 1e-9 * right.norm() + 1e-15, name


def test_pair_loss_takes_new_captions_features_and_smaller_batches():
    model, (images, tokens, ids) = tiny_clip(), pair_batch()
    plain = copy.deepcopy(model)
    clip = sk.SkipCLIP(model, tiny_tokens(2, seed=3), skip_layers=1)
    before = clip.texts.templates[0]
    for count in (5, 1, 3):
        loss = sk.pairs.pair_loss(clip, clip.encode_lower(images[:count]), tokens[ids[:count]].int())
        torch.testing.assert_close(loss, naive_pair_loss(plain, images[:count], tokens[ids[:count]], (1, 1)))
    assert clip.texts.templates[0] is before, "the classes stay"


@pytest.mark.parametrize("kind", ["ids", "tokens"])
def test_pair_loss_in_every_mode(kind, tmp_path):
    model, (images, tokens, ids) = tiny_clip(torch.float32), pair_batch(torch.float32)
    captions = ids if kind == "ids" else tokens[ids]
    losses, bytes_of = {}, {}
    for memory in ("fast", "min"):
        clip = sk.SkipCLIP(model, tokens, skip_layers=1, memory=memory, text_cache=tmp_path)
        bytes_of[memory] = saved_bytes(functools.partial(sk.pairs.pair_loss, clip, images, captions))
        losses[memory] = sk.pairs.pair_loss(clip, images, captions)
    torch.testing.assert_close(losses["fast"], losses["min"])
    assert bytes_of["min"] < bytes_of["fast"]
    with torch.autocast("cpu", torch.bfloat16):
        half = sk.pairs.pair_loss(clip, images, captions)
    half.backward()
    # bf16 has 8 bits: the error of cosines is about 2^-8, and the temperature multiplies it by 14.
    assert half.dtype == torch.float32 and half.item() == pytest.approx(losses["fast"].item(), abs=14 * 2**-6)
    clip.eval()
    torch.testing.assert_close(sk.pairs.pair_loss(clip, images, captions), losses["fast"])


@pytest.mark.parametrize(
    ("captions", "message"),
    [
        (["a cat"] * 5, r"captions must be int64 or int32, ids \[B=5\] or tokens .* got list"),
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
        sk.pairs.pair_loss(clip, images, captions)


@functools.cache
def _clip_of_13_captions() -> sk.SkipCLIP:
    return sk.SkipCLIP(tiny_clip(torch.float32), tiny_tokens(13), skip_layers=1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss": "hinge"}, "loss must be one of softmax, sigmoid; got 'hinge'"),
        ({"logit_bias": -10.0}, 'logit_bias is for loss="sigmoid"'),
        ({"loss": "sigmoid", "logit_bias": torch.ones(2)}, r"logit_bias must be a number .*; got \[2\]"),
        ({"chunk": 0}, "chunk must be a whole number of pairs, at least 1, or None; got 0"),
        ({"chunk": True}, "chunk must be a whole number .* got True"),
    ],
)
def test_pair_loss_refuses_options(options, message):
    images, _, ids = pair_batch(torch.float32)
    with pytest.raises(ValueError, match=f"^pair_loss: {message}"):
        sk.pairs.pair_loss(_clip_of_13_captions(), images, ids, **options)


# ---- chunks of a batch -------------------------------------------------------------------------------------------


def gradients_of(clip) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in clip.named_parameters() if p.grad is not None}


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


def test_both_passes_have_the_same_autocast_and_random_numbers(monkeypatch):
    clip = sk.SkipCLIP(tiny_clip(torch.float32), tiny_tokens(13), skip_layers=1)
    images, _, ids = pair_batch(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype):
            whole = sk.pairs.pair_loss(clip, images, ids)
        whole.backward()
        expected = gradients_of(clip)
        clip.zero_grad()
        passes, encode = [], clip.images.encode

        def recorded(x, rate, encode=encode, passes=passes):
            embedding = F.dropout(encode(x), rate)
            passes.append(embedding.detach())
            return embedding

        for dropped in (0.0, 0.5):
            monkeypatch.setattr(clip.images, "encode", functools.partial(recorded, rate=dropped))
            passes.clear()
            with torch.autocast("cpu", dtype):
                loss = sk.pairs.pair_loss(clip, images, ids, chunk=2)
                assert not dropped or clip(images, ids).loss.requires_grad, "no cast without a graph is left"
            torch.rand(3)
            state = torch.get_rng_state()
            loss.backward()
            assert torch.get_rng_state().equal(state)
            first, second = [passes[:3], passes[-3:]]
            assert all(a.equal(b) and a.dtype == dtype for a, b in zip(first, second, strict=True))
            if not dropped:
                torch.testing.assert_close(loss, whole, rtol=1e-3, atol=1e-3)
                assert max(relative_error(g, expected[name]) for name, g in gradients_of(clip).items()) < 0.1
            clip.zero_grad()
        monkeypatch.undo()


def test_hooks_of_parameters_are_called_once_and_a_second_backward_is_equal():
    """`DistributedDataParallel` and updates inside backward need it."""
    clip = sk.SkipCLIP(tiny_clip(), tiny_tokens(13), skip_layers=1, train_logit_scale=True)
    images, _, ids = pair_batch()
    calls = collections.Counter()
    trained = {name: p for name, p in clip.named_parameters() if p.requires_grad}
    for name, parameter in trained.items():
        parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.update([name]))
    loss = sk.pairs.pair_loss(clip, images, ids, chunk=2)
    loss.backward(retain_graph=True)
    once = gradients_of(clip)
    assert calls == dict.fromkeys(trained, 1) and once.keys() == trained.keys()
    loss.backward()
    assert all(gradient.equal(2 * once[name]) for name, gradient in gradients_of(clip).items())


def test_updates_inside_backward_are_those_of_the_whole_batch():
    weights = []
    for chunk in (None, 2):
        clip = sk.SkipCLIP(tiny_clip(), tiny_tokens(13), skip_layers=1)
        images, _, ids = pair_batch()
        optimizer = sk.FusedSGD(clip.parameter_groups(text_lr=0.1, image_lr=0.1))
        for _ in range(2):
            sk.pairs.pair_loss(clip, images, ids, chunk=chunk).backward()
            optimizer.step()
        weights.append(clip.model.state_dict())
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-10, atol=1e-12)


def test_chunks_of_a_tower_that_does_not_train_and_without_gradients():
    clip = sk.SkipCLIP(tiny_clip(), tiny_tokens(13), skip_layers=1, train_text=False)
    images, _, ids = pair_batch()
    sk.pairs.pair_loss(clip, images, ids).backward()
    expected = gradients_of(clip)
    clip.zero_grad()
    sk.pairs.pair_loss(clip, images, ids, chunk=2).backward()
    found = gradients_of(clip)
    assert found.keys() == expected.keys()
    assert all(relative_error(x, expected[name]) < 1e-10 for name, x in found.items())
    with torch.no_grad():
        loss = sk.pairs.pair_loss(clip.eval(), images, ids, chunk=2)
    assert not loss.requires_grad


def test_chunks_refuse_changed_weights_and_what_they_would_change():
    clip, (images, _, ids) = sk.SkipCLIP(tiny_clip(), tiny_tokens(13), skip_layers=1), pair_batch()
    features = clip.encode_lower(images)
    with pytest.raises(ValueError, match=r"pair_loss: with chunk, pixel_values get no gradient"):
        sk.pairs.pair_loss(clip, features.requires_grad_(), ids, chunk=2)
    loss = sk.pairs.pair_loss(clip, images, ids, chunk=2)
    with torch.no_grad():
        clip.model.ln_final.weight.mul_(2)
    with pytest.raises(RuntimeError, match="pair_loss: weights changed between the loss"):
        loss.backward()
    clip.model.visual.ln_post = torch.nn.Sequential(clip.model.visual.ln_post, torch.nn.BatchNorm1d(1))
    with pytest.raises(ValueError, match="chunk must be None, since batch norms above the cut are in training mode"):
        check_chunk(2, images, [clip.images.tower])


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

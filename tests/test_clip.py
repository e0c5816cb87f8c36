"""SkipCLIP: its step against the naive one of `naive.py`, prediction, and refused arguments."""

from __future__ import annotations

import copy
import pickle

import naive
import open_clip
import pytest
import torch
import torch.nn.functional as F
from models import tiny_batch, tiny_clip, tiny_tokens
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

import skipkernels as sk
from skipkernels.selection import RankSampler
from skipkernels.testing import allocated_bytes, relative_error, saved_bytes

# Largest error of a gradient relative to its norm. fp64: rounding of two orders of summation. fp32: the same times
# 2^29, through six blocks of random weights at a temperature of 14.
GRADIENT_TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-3}
LOSS_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.mark.parametrize(("tail", "quick_gelu"), [("resample", False), ("fixed", True)])
@pytest.mark.parametrize("skip", [0, 1, 2, 3, (1, 2), (3, 0)], ids=lambda skip: f"skip{skip}")
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["fp64", "fp32"])
def test_forward_equals_naive_step(dtype, skip, tail, quick_gelu):
    classes, batch = 13, 4
    model = tiny_clip(dtype, quick_gelu=quick_gelu)
    reference = copy.deepcopy(model).requires_grad_(True)
    tokens, (images, labels) = tiny_tokens(classes), tiny_batch(batch, classes, dtype)
    pair = skip if isinstance(skip, tuple) else (skip, skip)

    generator = torch.Generator().manual_seed(7)
    clip = sk.SkipCLIP(model, tokens, skip_layers=skip, keep_ratio=0.4, tail=tail, generator=generator)
    out = clip(images, labels)
    out.loss.backward()

    with torch.no_grad():
        prototypes = naive.embed_texts(reference, tokens, 0, quick_gelu)
        prototypes = prototypes / prototypes.norm(dim=1, keepdim=True)
    ranking = naive.class_ranking(reference, images, labels, prototypes, quick_gelu)
    ranks = RankSampler(0.4, tail=tail, generator=torch.Generator().manual_seed(7)).draw(classes, batch)
    kept = sorted(ranking[rank] for rank in ranks.tolist())
    assert out.class_ids.tolist() == kept
    assert set(labels.tolist()) <= set(kept)

    targets = torch.tensor([kept.index(label) for label in labels.tolist()])
    assert out.targets.equal(targets)
    loss = naive.step_loss(reference, images, tokens[kept], targets, pair, quick_gelu)
    loss.backward()
    assert out.loss.item() == pytest.approx(loss.item(), rel=LOSS_TOLERANCE[dtype])

    gradients = {name: p.grad for name, p in model.named_parameters()}
    for name, parameter in reference.named_parameters():
        if gradients[name] is None:
            frozen = parameter.grad is None or name == "logit_scale" or not model.get_parameter(name).requires_grad
            assert frozen, f"{name} has no gradient but should"
        else:
            assert relative_error(gradients[name], parameter.grad) < GRADIENT_TOLERANCE[dtype], name


@pytest.mark.parametrize("skip", [0, 1, 3])
def test_backward_trains_parameters_above_the_cut(skip):
    model, (images, labels) = tiny_clip(), tiny_batch(4, 9)
    clip = sk.SkipCLIP(model, tiny_tokens(9), skip_layers=skip, keep_ratio=1.0)
    clip(images, labels).loss.backward()
    trained = {name for name, p in model.named_parameters() if p.grad is not None}
    expected = {
        name
        for name, _ in model.named_parameters()
        if "resblocks" in name and int(name.split("resblocks.")[1].split(".")[0]) >= skip
    } | {"visual.ln_post.weight", "visual.ln_post.bias", "visual.proj"}
    expected |= {"ln_final.weight", "ln_final.bias", "text_projection"}
    if skip == 0:
        expected |= {"token_embedding.weight", "positional_embedding", "visual.class_embedding"}
        expected |= {"visual.positional_embedding", "visual.conv1.weight", "visual.ln_pre.weight", "visual.ln_pre.bias"}
    assert trained == expected
    assert {id(p) for p in clip.trainable_parameters()} == {id(model.get_parameter(name)) for name in expected}


def test_forward_features_equal_images():
    model, (images, labels) = tiny_clip(), tiny_batch(4, 9)
    losses = []
    for cached in (False, True):
        clip = sk.SkipCLIP(model, tiny_tokens(9), skip_layers=2)
        losses.append(clip(clip.encode_lower(images) if cached else images, labels).loss)
    assert losses[0].equal(losses[1])


def test_step_tunes_the_model_in_place():
    model, (images, labels) = tiny_clip(), tiny_batch(4, 9)
    keys, before = list(model.state_dict()), copy.deepcopy(model.state_dict())
    clip = sk.SkipCLIP(model, tiny_tokens(9), skip_layers=1)
    optimizer = torch.optim.SGD(clip.parameter_groups(text_lr=0.1, image_lr=0.1))
    clip(images, labels).loss.backward()
    optimizer.step()
    assert list(model.state_dict()) == keys
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert "visual.transformer.resblocks.2.mlp.c_fc.weight" in changed
    assert "visual.transformer.resblocks.0.mlp.c_fc.weight" not in changed


def test_forward_keeps_every_label_of_a_large_batch():
    model, tokens = tiny_clip(), tiny_tokens(20)
    images, labels = tiny_batch(16, 20)[0], torch.arange(16)
    clip = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=3, max_keep=3)
    out = clip(images, labels)
    assert out.class_ids[out.targets].equal(labels)
    smaller = clip(images[:5], labels[:5])
    assert len(smaller.class_ids) == len(out.class_ids), "K must not change within a run"


@pytest.mark.parametrize("classes", [1, 2, 3, 5])
@pytest.mark.parametrize("tail", ["resample", "fixed"])
def test_forward_few_classes(classes, tail):
    images, labels = tiny_batch(1, classes)
    out = sk.SkipCLIP(tiny_clip(), tiny_tokens(classes), skip_layers=1, tail=tail)(images, labels)
    assert out.loss.isfinite()


def test_forward_return_logits():
    model, (images, labels) = tiny_clip(), tiny_batch(3, 9)
    clip = sk.SkipCLIP(model, tiny_tokens(9), skip_layers=1)
    with pytest.raises(AttributeError, match=r"^SkipOutput.logits: .*return_logits=True.*clip.predict"):
        clip(images, labels).logits  # noqa: B018
    out = clip(images, labels, return_logits=True)
    loss = torch.nn.functional.cross_entropy(out.logits, out.targets)
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-12)


def test_output_without_logits_is_an_ordinary_named_tuple():
    """`DistributedDataParallel`, accelerate and `Trainer` take it apart and rebuild it."""
    clip = sk.SkipCLIP(tiny_clip(), tiny_tokens(9), skip_layers=1)
    out = clip(*tiny_batch(3, 9))
    loss, logits, class_ids, targets = out
    assert logits is None and out[1:] == (None, class_ids, targets) and out[0] is loss
    leaves, spec = tree_flatten(out)
    for rebuilt in (
        tree_unflatten(leaves, spec),
        tree_map(lambda x: x, out),
        type(out)(*list(out)),
        copy.copy(out),
        out._replace(loss=loss),
        pickle.loads(pickle.dumps(out._replace(loss=loss.detach()))),
    ):
        assert type(rebuilt) is sk.SkipOutput and rebuilt.loss.equal(loss) and not hasattr(rebuilt, "logits")
    assert list(out._asdict()) == ["loss", "kept_logits", "class_ids", "targets"]


def test_predict_equals_model_logits():
    model, tokens, (images, _) = tiny_clip(), tiny_tokens(9), tiny_batch(5, 9)
    clip = sk.SkipCLIP(model, tokens, skip_layers=1)
    own = model.get_logits(images, tokens)[0]
    torch.testing.assert_close(clip.predict(images), own.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(clip.predict(clip.encode_lower(images)), own.detach(), rtol=1e-10, atol=1e-10)
    cached = clip.texts.kept_embeddings
    assert cached() is cached(), "computed once while the weights are the same"
    clip.class_embeddings().zero_()
    torch.testing.assert_close(clip.predict(images), own.detach(), rtol=1e-10, atol=1e-10)
    model.transformer.resblocks[2].mlp.c_fc.weight.data[0, 0] += 0.5  # bypasses the version counter
    moved = model.get_logits(images, tokens)[0]
    assert not torch.allclose(moved, own)
    torch.testing.assert_close(clip.predict(images), moved.detach(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("shared", [True, False])
def test_text_features_are_packed_by_chunks(shared):
    """Hidden states [C, L, W] of whole prompts are never in memory."""
    tokens = tiny_tokens(600)
    if not shared:
        tokens[1, 0] = 58
    clip = sk.SkipCLIP(tiny_clip(), tokens, skip_layers=1, chunk=7)
    texts, prompts = clip.texts, clip.texts.templates[0]
    before, whole = texts.table().features, texts.tower.lower(prompts.tokens, prompts)
    assert (prompts.prefix_length > 0) == shared
    assert before.equal(prompts.select(torch.arange(600), count_rows=True).pack(whole))
    texts.drop()
    peak = allocated_bytes(texts.table)
    assert texts.table().features.equal(before) and before.nbytes <= peak < before.nbytes + whole.nbytes / 2


def test_forward_under_autocast():
    model, (images, labels) = tiny_clip(torch.float32), tiny_batch(4, 9, torch.float32)
    clip = sk.SkipCLIP(model, tiny_tokens(9), skip_layers=1)
    with torch.autocast("cpu", torch.bfloat16):
        out = clip(images, labels)
    out.loss.backward()
    assert out.loss.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert clip.predict(images).dtype == torch.float32
    full = sk.SkipCLIP(model, tiny_tokens(9), skip_layers=1)(images, labels)
    # bf16 has 8 bits: the error of cosines is about 2^-8, and the temperature multiplies it by 14.
    assert out.loss.item() == pytest.approx(full.loss.item(), abs=14 * 2**-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_features_give_the_result_of_images_under_autocast(dtype):
    """Features may be in 16 bits, as those of open_clip are; the residual stream above the cut is in fp32 for both."""
    images, labels = tiny_batch(4, 9, torch.float32)
    clip = sk.SkipCLIP(tiny_clip(torch.float32), tiny_tokens(9), skip_layers=1).eval()
    with torch.autocast("cpu", dtype):
        features = clip.encode_lower(images)
        assert features.dtype == dtype and clip(features, labels).loss.equal(clip(images, labels).loss)
        assert clip.encode_upper(features).equal(clip.encode_image(images))


def test_construction_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        clip = sk.SkipCLIP(tiny_clip(torch.float32), tiny_tokens(9), skip_layers=1)
        half = clip.class_embeddings()
    torch.testing.assert_close(clip.prototypes, clip.class_embeddings())
    assert not half.equal(clip.class_embeddings()), "embeddings from autocast are not reused in fp32"


def test_lower_device():
    model, (images, labels) = tiny_clip(), tiny_batch(4, 9)
    expected = sk.SkipCLIP(model, tiny_tokens(9), skip_layers=1)(images, labels).loss
    clip = sk.SkipCLIP(model, tiny_tokens(9), skip_layers=1, lower_device="cpu")
    assert clip(images, labels).loss.equal(expected)


def test_global_random_state_is_unchanged():
    model, tokens, (images, labels) = tiny_clip(), tiny_tokens(30), tiny_batch(2, 30)
    before = torch.get_rng_state()
    sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=3)(images, labels)
    assert torch.get_rng_state().equal(before)


# ---- variants of models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"skip_layers": 4}, "skip_layers must be a whole number from 0 to 3"),
        ({"skip_layers": float("nan")}, "skip_layers must be"),
        ({"skip_layers": (1, 2, 3)}, "skip_layers must be one number or a pair"),
        ({"skip_layers": 1, "keep_ratio": 0.0}, "keep_ratio must be above 0"),
        ({"skip_layers": 1, "chunk": "a"}, "chunk must be a whole number, at least 1; got 'a'"),
        ({"skip_layers": 1, "generator": 0}, "generator must be a torch.Generator; got 0"),
        ({"skip_layers": 1, "model": (tiny_clip(), None)}, "model must be a CLIP, .*; got tuple. Pass its first"),
    ],
)
def test_construction_bad_arguments(arguments, message):
    with pytest.raises((ValueError, TypeError), match=f"^(SkipCLIP|RankSampler): {message}"):
        sk.SkipCLIP(**{"model": tiny_clip(), "tokens": tiny_tokens(4)} | arguments)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda clip, x, y: clip.encode_upper(x), ValueError, r"be .* \[B, 5, 24\]; got .* \[3, 3, 16, 16\]"),
        (
            lambda clip, x, y: sk.pairs.sigmoid_loss(clip, x, F.one_hot(y, 4), max_labels=1, logit_bias=torch.zeros(4)),
            ValueError,
            r"logit_bias must be a number or a tensor of one element; got \[4\]",
        ),
        (lambda clip, x, y: sk.graphed(clip, None, batch_size=4), TypeError, "optimizer must be .*; got NoneType"),
        (lambda clip, x, y: torch.export.export(clip, (x, y)), RuntimeError, r"Export .* clip.classifier\(\)"),
        (lambda clip, x, y: sk.FeatureCache.build("x", clip.model, [(x[0], 0)]), TypeError, "clip must be a SkipC"),
    ],
    ids=["images", "bias", "optimizer", "export", "build"],
)  # fmt: skip
def test_wrong_use(call, error, message):
    clip, (images, labels) = sk.SkipCLIP(tiny_clip(), tiny_tokens(4), skip_layers=1).eval(), tiny_batch(3, 4)
    with pytest.raises(error, match=message):
        call(clip, images, labels)


@pytest.mark.parametrize(
    ("alter", "error", "message"),
    [
        (lambda x, y: ((255 * x).to(torch.uint8), y), TypeError, r"images must be floating-point, .*got torch.uint8"),
        (lambda x, y: (torch.full_like(x, torch.nan), y), ValueError, r"NaN or infinity in images \[0, 1, 2\]"),
        (lambda x, y: (x[:0], y[:0]), ValueError, r"at least one image; got \[0, 3, 16, 16\]"),
        (lambda x, y: (x.repeat(1, 1, 2, 2), y), ValueError, r"must be \[B, 3, 16, 16\].*got \[3, 3, 32, 32\]"),
        (lambda x, y: (list(x), y), TypeError, "got list. Stack a list of images"),
        (lambda x, y: (x[0], y), ValueError, r"must be images \[B, 3, height, width\] .* got \[3, 16, 16\]"),
        (lambda x, y: (x, None), TypeError, r"got NoneType. Without labels use clip.predict"),
        (lambda x, y: (x, y[:2]), ValueError, r"int64 \[B=3\], or .*; got torch.int64 \[2\]"),
        (lambda x, y: (x, torch.eye(4).long()[y]), ValueError, r"int64 \[3, 4\]. .*one-hot.*labels.argmax\(dim=1\)"),
        (lambda x, y: (x, y - 100), ValueError, r"SkipCLIP: labels must be in \[0, C=4\); got -"),
    ],
    ids=["uint8", "nan", "empty", "size", "list", "one_image", "no_labels", "fewer", "one_hot", "range"],
)  # fmt: skip
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_forward_bad_batch(alter, error, message, training):
    clip, (images, labels) = sk.SkipCLIP(tiny_clip(), tiny_tokens(4), skip_layers=1), tiny_batch(3, 4)
    with pytest.raises(error, match=message) as caught:
        clip.train(training)(*alter(images, labels))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["encode_lower", "encode_image", "predict"])
def test_bad_images(name):
    clip, (images, _) = sk.SkipCLIP(tiny_clip(), tiny_tokens(4), skip_layers=1), tiny_batch(3, 4)
    for wrong in (images[:0], images.repeat(1, 1, 2, 2), torch.full((3, 5, 24), torch.nan).double()):
        with pytest.raises(ValueError, match="SkipCLIP: "):
            getattr(clip, name)(wrong)


@pytest.mark.parametrize("number", [60, -1])
def test_construction_token_outside_vocabulary(number):
    tokens = tiny_tokens(4)
    tokens[2, 3] = number
    with pytest.raises(ValueError, match=r"tokens must be ids in \[0, 60\), the model's vocabulary; got "):
        sk.SkipCLIP(tiny_clip(), tokens, skip_layers=1)


def test_forward_features_of_wrong_shape():
    clip, (images, labels) = sk.SkipCLIP(tiny_clip(), tiny_tokens(4), skip_layers=1), tiny_batch(3, 4)
    features = clip.encode_lower(images)
    with pytest.raises(ValueError, match=r"features at the cut \[B, 5, 24\]; got \[3, 4, 24\]"):
        clip(features[:, :4], labels)
    with pytest.raises(ValueError, match=r"got \[3, 24, 24\]"):  # a single image, as wide as the tower
        clip(torch.zeros(3, 24, 24).double(), labels)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([[1, 2]], "tokens must be an int64 or int32 tensor .* got list"),
        (tiny_tokens(4)[:, :0], "L ≥ 1"),
        (tiny_tokens(4, context=80), r"must be \[C, L=77\], as long as the model's context; got \[4, 80\]"),
    ],
    ids=["list", "empty", "long"],
)
def test_construction_bad_tokens(tokens, message):
    with pytest.raises(ValueError, match=message):
        sk.SkipCLIP(tiny_clip(), tokens, skip_layers=1)


def test_parameter_groups_replaced_parameters():
    model = tiny_clip()
    clip = sk.SkipCLIP(model, tiny_tokens(4), skip_layers=1)
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    groups = clip.parameter_groups(text_lr=0.1, image_lr=0.1)
    assert {id(p) for group in groups for p in group["params"]} == {
        id(p) for p in model.parameters() if p.requires_grad
    }


def test_skip_layers_fraction_and_pair():
    clip = sk.SkipCLIP(tiny_clip(text={"layers": 2}), tiny_tokens(4), skip_layers=(2, 0.5))
    assert (clip.images.tower.skip, clip.texts.tower.skip) == (2, 1)


def test_saved_bytes_shrink_with_the_cut():
    images, labels = tiny_batch(4, 9)
    saved = []
    for skip in (0, 1, 2, 3):
        clip = sk.SkipCLIP(tiny_clip(), tiny_tokens(9), skip_layers=skip)
        saved.append(saved_bytes(lambda clip=clip: clip(images, labels)))
    assert saved == sorted(saved, reverse=True) and saved[3] < saved[0] / 5


def test_state_dict_loads_into_open_clip(tmp_path):
    model = tiny_clip()
    sk.SkipCLIP(model, tiny_tokens(4), skip_layers=1)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    fresh = tiny_clip(seed=5)
    open_clip.load_checkpoint(fresh, str(tmp_path / "model.pt"))
    assert all(a.equal(b) for a, b in zip(model.state_dict().values(), fresh.state_dict().values(), strict=True))


def test_loaded_lower_weights_give_new_text_features():
    """The next step uses weights that were loaded after construction."""
    model, tokens, (images, labels) = tiny_clip(torch.float64), tiny_tokens(6), tiny_batch(2, 6, torch.float64)
    clip = sk.SkipCLIP(model, tokens, skip_layers=1, keep_ratio=1.0)
    before, embeddings = clip(images, labels).loss, clip.class_embeddings()
    other = tiny_clip(torch.float64)
    for parameter in other.parameters():
        parameter.data.mul_(1.1)
    model.load_state_dict(other.state_dict())
    fresh = sk.SkipCLIP(other, tokens, skip_layers=1, keep_ratio=1.0)
    assert not torch.allclose(before, clip(images, labels).loss)
    assert torch.equal(clip(images, labels).loss, fresh(images, labels).loss)
    assert torch.equal(clip.class_embeddings(), fresh.class_embeddings())
    assert not torch.allclose(embeddings, clip.class_embeddings())


@pytest.mark.parametrize("class_ids", [[0, 1], torch.tensor([0.0]), torch.tensor([[0]]), torch.tensor([0, 5])])
def test_encode_classes_refuses(class_ids):
    clip = sk.SkipCLIP(tiny_clip(torch.float32), tiny_tokens(5), skip_layers=1)
    with pytest.raises(ValueError, match="SkipCLIP: class_ids must be"):
        clip.encode_classes(class_ids)

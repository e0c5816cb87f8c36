"""LoRA above the cut: equal to W + BA written out, to the caller's model and to PEFT; its cost; merging and saving."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable

import peft
import pytest
import torch
from torch import nn

import skipkernels as sk
from skipkernels.testing import saved_bytes
from skipkernels.towers.base import UnsupportedModel
from skipkernels.towers.low_rank import LowRankUpdate
from tests.hugging_face_models import hugging_face_clip, siglip
from tests.models import openai_clip, tiny_batch, tiny_clip, tiny_tokens
from tests.reference_step import assert_matches_reference_step
from tests.timm_models import EVA02, eva, vit

C = 7


def with_lora(model: nn.Module, targets="all-linear", *, rank: int = 2, alpha: float = 3.0, **settings) -> sk.SkipCLIP:
    """SkipCLIP on a model with random A and B, so that no gradient is zero."""
    clip = sk.SkipCLIP(model, tiny_tokens(C), **({"skip_layers": 1, "keep_ratio": 1.0} | settings))
    sk.add_lora(clip, rank, targets, alpha=alpha)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in clip.trainable_parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return clip


# ---- the step --------------------------------------------------------------------------------------------------------


def test_update_of_q_and_v_changes_their_rows_of_the_joint_weight():
    """By alpha/rank · B · A; those of the keys stay."""
    plain = tiny_clip()
    clip = with_lora(copy.deepcopy(plain), ("q", "v"), rank=2, alpha=3.0)
    for model, tuned in ((plain, clip.model), (plain.visual, clip.model.visual)):
        attention, before = tuned.transformer.resblocks[2].attn, model.transformer.resblocks[2].attn.in_proj_weight
        update = attention.parametrizations.in_proj_weight[0]
        (query, value), keys = update.lora_B @ update.lora_A, torch.zeros_like(before.chunk(3)[1])  # [2, W, W]
        assert attention.in_proj_weight.allclose(before + 1.5 * torch.cat([query, keys, value]), rtol=1e-12, atol=1e-12)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "layer scale": lambda: tiny_clip(vision={"ls_init_value": 0.5}, text={"ls_init_value": 0.5}),
    "openai": openai_clip,
    "timm": lambda: vit(init_values=0.1),
    "eva02": lambda: eva(**EVA02),  # SwiGLU in two layers, three projections, rotary positions
    "hugging face": hugging_face_clip,
    "siglip": siglip,
}


STEPS = {
    **{name: (make, ("q", "v", "out", "fc", "proj"), {}) for name, make in MODELS.items()},
    "q-v": (tiny_clip, ("q", "v"), {"skip_layers": (1, 2)}),
    "k-min": (tiny_clip, ("k",), {"skip_layers": (2, 1), "memory": "min"}),
    "fc-all_skipped": (tiny_clip, ("fc",), {"skip_layers": (1, 3)}),
    "all-min": (tiny_clip, "all-linear", {"skip_layers": 0, "memory": "min"}),
}


@pytest.mark.parametrize(("make", "targets", "settings"), STEPS.values(), ids=STEPS)
def test_step_equals_callers_model(make, targets, settings):
    model = make()
    clip = with_lora(model, targets, **settings)
    images, labels = tiny_batch(3, C, next(model.parameters()).dtype)
    assert all(clip.reductions[f"{tower}.fused_block"].enabled for tower in ("image", "text"))
    assert_matches_reference_step(clip, images, tiny_tokens(C), labels)


# ---- cost ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def formed(monkeypatch) -> list[LowRankUpdate]:
    """Updates in the order in which W + BA is computed."""
    calls: list[LowRankUpdate] = []
    forward = LowRankUpdate.forward
    monkeypatch.setattr(LowRankUpdate, "forward", lambda self, weight: calls.append(self) or forward(self, weight))
    return calls


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_weights_are_computed_once_a_pass(formed, autocast):
    clip, (images, labels) = with_lora(tiny_clip(torch.float32), chunk=2), tiny_batch(3, C, torch.float32)
    once = sorted(id(update) for update in clip.model.modules() if isinstance(update, LowRankUpdate))
    assert len(once) == 2 * 2 * 4  # towers, blocks, weights

    def calls(function: Callable[[], object]) -> list[int]:
        formed.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            function()
        return sorted(map(id, formed))

    assert calls(lambda: clip(images, labels).loss.backward()) == once
    other = clip.texts.tokens.long().roll(1, dims=0)
    clip.set_classes(torch.stack([clip.texts.tokens.long(), other], dim=1))  # two templates
    assert calls(lambda: clip(images, labels).loss.backward()) == once
    clip.set_grad_checkpointing()
    assert calls(lambda: clip(images, labels).loss.backward()) == once
    clip.eval()
    assert calls(lambda: clip.predict(images)) == once  # for all four chunks of classes
    assert set(calls(lambda: clip.predict(images))) < set(once)  # class embeddings are kept


def test_saved_bytes_are_those_of_the_step_and_the_updated_weights():
    images, labels = tiny_batch(3, C, torch.float32)
    full, lora = tiny_clip(torch.float32), tiny_clip(torch.float32)
    plain = sk.SkipCLIP(full, tiny_tokens(C), skip_layers=1, keep_ratio=1.0, memory="fast")
    clip = with_lora(lora, memory="fast")
    updated = sum(
        p.nbytes for name, p in lora.named_parameters() if name.endswith("original") and "resblocks.0" not in name
    )
    saved = saved_bytes(lambda: clip(images, labels))
    assert updated < saved <= saved_bytes(lambda: plain(images, labels)) + updated
    with torch.autocast("cpu", torch.bfloat16):  # saves the bf16 copies of the updated weights only
        casts = [saved_bytes(lambda clip=clip: clip(images, labels)) for clip in (clip, plain)]
    assert casts[0] <= casts[1]
    clip.set_grad_checkpointing()
    assert saved_bytes(lambda: clip(images, labels)) < saved


def test_half_precision_weights_have_fp32_updates():
    clip, (images, labels) = with_lora(tiny_clip(torch.bfloat16)), tiny_batch(3, C, torch.bfloat16)
    clip(images, labels).loss.backward()
    assert {p.dtype for p in clip.trainable_parameters()} == {torch.float32}
    assert all(p.grad.isfinite().all() and p.grad.any() for p in clip.trainable_parameters())
    before = clip.predict(images)
    sk.merge_lora(clip)
    assert clip.predict(images).equal(before)


# ---- around training -------------------------------------------------------------------------------------------------


def test_add_lora_changes_nothing_before_training():
    model, (images, labels) = tiny_clip(), tiny_batch(3, C)
    clip = sk.SkipCLIP(model, tiny_tokens(C), skip_layers=(1, 2))
    features, identity, logits = clip.encode_lower(images), clip.images.tower.lower_identity(), clip.predict(images)
    sk.add_lora(clip, 2, generator=torch.Generator().manual_seed(4))
    assert clip.images.tower.lower_identity() == identity
    assert clip.predict(features).equal(logits)
    text, image = (group["params"] for group in clip.parameter_groups(text_lr=0.0, image_lr=0.0))
    assert [tuple(p.shape) for p in text] == [(2, 2, 16), (2, 16, 2)]  # of q and v: A, then B
    assert [tuple(p.shape) for p in image] == 2 * [(2, 2, 24), (2, 24, 2)]
    assert {id(p) for p in (*text, *image)} == {id(p) for p in model.parameters() if p.requires_grad}
    assert image[0].abs().max() <= 24**-0.5 and not image[1].any()
    clip(features, labels).loss.backward()
    torch.optim.SGD(clip.trainable_parameters(), 1.0).step()
    assert not clip.predict(features).allclose(logits)  # with new class embeddings too


def test_image_features_stay_valid_or_stale():
    clip = sk.SkipCLIP(tiny_clip(), tiny_tokens(C), skip_layers=1)
    features = clip.encode_lower(tiny_batch(3, C)[0])
    with torch.no_grad():
        clip.model.visual.conv1.weight.mul_(1.1)
    for change in (lambda: sk.add_lora(clip, 2), lambda: sk.merge_lora(clip)):
        change()
        with pytest.raises(RuntimeError, match="weights below the cut have changed since features"):
            clip.predict(features)


def test_merge_lora_restores_the_model():
    model, (images, labels) = tiny_clip(), tiny_batch(3, C)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("resblocks.2" in name or name == "visual.proj")
    clip = sk.SkipCLIP(model, tiny_tokens(C), skip_layers=1, trainable="as_is")

    def state() -> list:
        parameters = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
        return [parameters, list(model.state_dict()), list(map(type, model.modules()))]

    before = state()
    sk.add_lora(clip, 2, "all-linear")
    assert state() != before
    with torch.no_grad():
        for parameter in clip.trainable_parameters():
            parameter.add_(0.1)
    logits, embeddings = clip.predict(images), model.encode_image(images)
    sk.merge_lora(clip)
    assert state() == before
    assert clip.predict(images).equal(logits) and model.encode_image(images).allclose(embeddings, rtol=1e-12)
    clip(images, labels).loss.backward()
    assert model.visual.proj.grad is not None and model.text_projection.grad is None
    sk.add_lora(clip, 1)


def test_copies_and_state_dicts():
    images, labels = tiny_batch(3, C)
    clip = with_lora(tiny_clip())
    logits = clip.predict(images)
    copied = copy.deepcopy(clip)
    averaged = torch.optim.swa_utils.AveragedModel(clip.model)
    sk.merge_lora(copied)
    assert all(p.requires_grad for name, p in copied.model.named_parameters() if "resblocks.2" in name)
    for one in (copied, clip):  # merging the copy does not change the classes of the original's modules
        assert one.predict(images).equal(logits)
        one(images, labels).loss.backward()
    assert averaged.module.encode_image(images).allclose(clip.model.encode_image(images), rtol=1e-12)
    with pytest.raises(RuntimeError, match="only supported through state_dict"):
        pickle.dumps(clip)
    other = sk.SkipCLIP(tiny_clip(), tiny_tokens(C), skip_layers=1)
    sk.add_lora(other, 2, "all-linear", alpha=3.0)
    other.load_state_dict(clip.state_dict())
    assert other.predict(images).equal(logits)
    sk.merge_lora(other)
    sk.add_lora(other, 2, "all-linear", alpha=4.0)
    with pytest.raises(ValueError, match="updates have alpha 3 .*, those of this model have 4"):
        other.load_state_dict(clip.state_dict())
    queries, values = with_lora(tiny_clip(), "q"), with_lora(tiny_clip(), "v")  # of different rows of a weight
    with pytest.raises(ValueError, match=r"are of the parts \[0.0\] of a weight, those .* are of \[2.0\]"):
        values.load_state_dict(queries.state_dict())


def test_second_skipclip_on_a_model_with_updates():
    model, (images, labels) = with_lora(tiny_clip()).model, tiny_batch(3, C)
    with pytest.raises(UnsupportedModel, match='is an adapter.*Pass trainable="as_is"'):
        sk.SkipCLIP(model, tiny_tokens(C), skip_layers=1)
    clip = sk.SkipCLIP(model, tiny_tokens(C), skip_layers=1, keep_ratio=1.0, trainable="as_is")
    assert clip.reductions["text.fused_block"].enabled
    assert_matches_reference_step(clip, images, tiny_tokens(C), labels)
    with pytest.warns(UserWarning, match="nothing trains"):
        sk.merge_lora(clip)


def test_updates_beside_trained_weights():
    """The projection of keys trains, one weight trains with its update, and the norms of the first block train."""
    model, (images, labels) = with_lora(hugging_face_clip(), ("q", "out", "fc")).model, tiny_batch(3, C)
    for name, parameter in model.named_parameters():
        trains = "k_proj.weight" in name or "2.self_attn.out_proj.parametrizations.weight.original" in name
        if trains or "1.layer_norm" in name:
            parameter.requires_grad_()
    clip = sk.SkipCLIP(model, tiny_tokens(C), skip_layers=1, keep_ratio=1.0, trainable="as_is")
    # Per tower: A and B of three targets in two blocks, weights of keys, the weight with its update, norms.
    assert len(clip.trainable_parameters()) == 2 * (2 * 3 * 2 + 2 + 1 + 4)
    assert_matches_reference_step(clip, images, tiny_tokens(C), labels)


# ---- PEFT ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [hugging_face_clip, siglip])
def test_save_lora_round_trip_through_peft(make, tmp_path):
    """PEFT's layers with the saved A and B have the same embeddings, loss and gradients."""
    clip, (images, labels) = with_lora(make(), ("q", "v", "fc")), tiny_batch(3, C)
    sk.save_lora(clip, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["lora_alpha"] == 3.0
    theirs = peft.PeftModel.from_pretrained(make(), tmp_path / "adapter", is_trainable=True)
    assert {p.dtype for p in theirs.parameters()} == {torch.float64}
    output = theirs(input_ids=tiny_tokens(C), pixel_values=images)
    logits = theirs.logit_scale.exp() * output.image_embeds @ output.text_embeds.T
    assert clip.predict(images).allclose(logits, rtol=1e-9)
    out = clip(images, labels)
    out.loss.backward()
    loss = nn.functional.cross_entropy(logits, labels)
    loss.backward()
    assert out.loss.item() == pytest.approx(loss.item(), rel=1e-10)
    expected = [p.grad for name, p in theirs.named_parameters() if p.requires_grad]
    got = [p.grad[0] for p in clip.model.parameters() if p.requires_grad]
    assert len(got) == len(expected) == 2 * 2 * 3 * 2
    for x, y in zip(got, expected, strict=True):
        assert x.allclose(y, rtol=1e-7, atol=1e-10)


def test_add_lora_of_the_text_tower_alone():
    """The blocks of a ResNet are not fused; nothing of it is above this cut."""
    resnet = tiny_clip(vision={"layers": (1, 1, 1, 1), "width": 8, "image_size": 32, "head_width": 8})
    sk.add_lora(sk.SkipCLIP(resnet, tiny_tokens(C), skip_layers=(1.0, 1)), 2)
    assert all("transformer" in name for name, p in resnet.named_parameters() if p.requires_grad)


@pytest.mark.parametrize("templates", [1, 2])
def test_add_lora_to_blocks_that_backward_calls_again(templates):
    """Low-rank updates that forward kept would not be those of the second call."""
    tokens = torch.stack([tiny_tokens(C)] * templates, dim=1)
    clip = sk.SkipCLIP(tiny_clip(), tokens, skip_layers=1, memory="min")
    sk.add_lora(clip, 2)
    clip.texts.tower.blocks[-1].attn.register_forward_hook(lambda *_: None)  # the block runs its own forward
    clip(*tiny_batch(3, C)).loss.backward()
    assert all(p.grad is not None for p in clip.trainable_parameters())


def test_failed_add_lora_restores_the_model(monkeypatch):
    model = tiny_clip()
    clip = sk.SkipCLIP(model, tiny_tokens(C), skip_layers=1)
    before = [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]

    def refresh(self) -> None:
        raise RuntimeError("interrupted")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="interrupted"):
        patch.setattr(sk.SkipCLIP, "refresh", refresh)
        sk.add_lora(clip, 2)
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == before
    clip(*tiny_batch(3, C)).loss.backward()
    assert not any(isinstance(module, LowRankUpdate) for module in model.modules())

"""Feature sensitivity against a reference that stores every hidden state."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
from models import tiny_clip, tiny_tokens
from timm.models.vision_transformer import VisionTransformer
from timm_models import timm_clip
from torch import Tensor, nn

from skipkernels.data import InputError
from skipkernels.experiments.sensitivity import FeatureSensitivity, measure_feature_sensitivity

DEPTH = 3
TOKENS = tiny_tokens(7)
IMAGES = torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
# fp64 sums in another order.
CLOSE = {"rel": 1e-10}


@pytest.fixture
def before() -> nn.Module:
    return tiny_clip().eval()


def perturbed(model: nn.Module, *names: str, by: float = 0.1) -> nn.Module:
    """Copy a model and add noise to the parameters with names that start with `names`."""
    after = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in after.named_parameters():
            if name.startswith(names):
                parameter.add_(by * torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype))
    return after


def image_states(model) -> list[Tensor]:
    """Input of the first image block and output of each block, for all images."""
    states = [model.visual._embeds(IMAGES.to(model.visual.conv1.weight.dtype))]
    for block in model.visual.transformer.resblocks:
        states.append(block(states[-1]))
    return states


def text_states(model) -> list[Tensor]:
    """Input of the first text block and output of each block, for the tokens up to the end of each prompt."""
    text = getattr(model, "text", model)
    states = [text.token_embedding(TOKENS) + text.positional_embedding]
    for block in text.transformer.resblocks:
        states.append(block(states[-1], attn_mask=text.attn_mask))
    ends = TOKENS.argmax(dim=1)
    return [torch.cat([rows[: end + 1] for rows, end in zip(state, ends, strict=True)]) for state in states]


def relative(before: Tensor, after: Tensor) -> float:
    """Mean relative distance over rows."""
    return ((after - before).norm(dim=-1) / before.norm(dim=-1)).mean().item()


@torch.no_grad()
def naive(before: nn.Module, after: nn.Module) -> FeatureSensitivity:
    """Compute FS from all hidden states of both models, in fp64."""
    found = []
    for states in (image_states, text_states):
        old, new = ([state.double() for state in states(model)] for model in (before, after))
        added = [[right - left for left, right in zip(s, s[1:], strict=False)] for s in (old, new)]
        found.append(
            (
                [relative(*pair) for pair in zip(old[1:], new[1:], strict=True)],
                [relative(*pair) for pair in zip(*added, strict=True)],
                relative(old[0], new[0]),
            )
        )
    (image, image_added, image_entered), (text, text_added, text_entered) = found
    return FeatureSensitivity(image, text, image_added, text_added, image_entered, text_entered)


def assert_same(found: FeatureSensitivity, expected: FeatureSensitivity) -> None:
    for name, values in vars(expected).items():
        assert getattr(found, name) == pytest.approx(values, **CLOSE, abs=1e-14), name


def test_measure_feature_sensitivity_same_model_is_zero(before):
    zero = [0.0] * DEPTH
    sensitivity = measure_feature_sensitivity(before, copy.deepcopy(before), IMAGES.split(2), TOKENS)
    assert sensitivity == FeatureSensitivity(zero, zero, zero, zero, 0.0, 0.0)


@pytest.mark.parametrize("block", range(DEPTH))
def test_measure_feature_sensitivity_one_changed_block(before, block):
    names = f"visual.transformer.resblocks.{block}.", f"transformer.resblocks.{block}."
    after = perturbed(before, *names)
    sensitivity = measure_feature_sensitivity(before, after, IMAGES.split(2), TOKENS)
    for values in (sensitivity.image, sensitivity.text, sensitivity.image_added, sensitivity.text_added):
        assert [value > 0 for value in values] == [number >= block for number in range(DEPTH)]
        assert all(value == 0 for value in values[:block])
    assert sensitivity.image_entered == sensitivity.text_entered == 0.0
    assert_same(sensitivity, naive(before, after))


def test_measure_feature_sensitivity_any_batch_size(before, monkeypatch):
    after = perturbed(before, "", by=0.03)
    expected = naive(before, after)
    assert_same(measure_feature_sensitivity(before, after, IMAGES.split(5), TOKENS), expected)
    monkeypatch.setattr("skipkernels.experiments.sensitivity.feature_sensitivity.TEXT_CHUNK", 3)
    assert_same(measure_feature_sensitivity(before, after, IMAGES.split(2), TOKENS), expected)


def test_measure_feature_sensitivity_towers_are_independent(before):
    sensitivity = measure_feature_sensitivity(before, perturbed(before, "visual."), IMAGES.split(5), TOKENS)
    assert min(sensitivity.image) > 0 and max(sensitivity.text) == sensitivity.text_entered == 0


def test_measure_feature_sensitivity_ignores_causal_padding(before):
    after, last = copy.deepcopy(before), int(TOKENS.argmax(dim=1).max())
    with torch.no_grad():
        after.positional_embedding[last + 1 :] += 1.0
    assert max(measure_feature_sensitivity(before, after, IMAGES.split(5), TOKENS).text) == 0
    with torch.no_grad():
        after.positional_embedding[last] += 1.0
    assert min(measure_feature_sensitivity(before, after, IMAGES.split(5), TOKENS).text) > 0


def test_measure_feature_sensitivity_no_causal_mask_counts_padding():
    before = tiny_clip(family=open_clip.CustomTextCLIP, text={"no_causal_mask": True}).eval()
    after = copy.deepcopy(before)
    with torch.no_grad():
        after.text.positional_embedding[-1] += 1.0
    sensitivity = measure_feature_sensitivity(before, after, IMAGES.split(5), TOKENS)
    assert min(sensitivity.text) > 0 and sensitivity.text_entered > 0


def test_measure_feature_sensitivity_timm_tower():
    trunk = VisionTransformer(img_size=16, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=12)
    before = timm_clip(trunk)
    sensitivity = measure_feature_sensitivity(
        before, perturbed(before, "visual.trunk.blocks.1."), IMAGES.split(2), TOKENS
    )
    assert sensitivity.image[0] == 0 < sensitivity.image[1]


def test_measure_feature_sensitivity_bf16_compares_in_fp32():
    """Norms in bf16 would have a relative error of 2⁻⁹."""
    before = tiny_clip(torch.bfloat16).eval()
    after = perturbed(before, "")
    expected = naive(before, after)
    sensitivity = measure_feature_sensitivity(before, after, IMAGES.bfloat16().split(5), TOKENS)
    for name, values in vars(expected).items():
        assert getattr(sensitivity, name) == pytest.approx(values, rel=1e-5), name


def test_measure_feature_sensitivity_progress(before):
    done: list[int] = []
    measure_feature_sensitivity(before, before, IMAGES.split(2), TOKENS, progress=done.append)
    assert done == [2, 2, 1, 7]


def test_measure_feature_sensitivity_restores_models(before):
    after = perturbed(before, "").train()
    measure_feature_sensitivity(before, after, IMAGES.split(5), TOKENS)
    assert after.training and not before.training
    assert not any(module._forward_hooks for model in (before, after) for module in model.modules())
    assert all(parameter.grad is None for parameter in after.parameters())


def test_measure_feature_sensitivity_training_mode():
    before = tiny_clip(vision={"patch_dropout": 0.5})
    after = perturbed(before, "visual.")
    sensitivity = measure_feature_sensitivity(before.train(), after.train(), IMAGES.split(5), TOKENS)
    assert sensitivity == measure_feature_sensitivity(before.eval(), after.eval(), IMAGES.split(5), TOKENS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda before: {"before": nn.Linear(1, 1), "after": nn.Linear(1, 1)}, "open_clip's CLIP or CustomTextCLIP"),
        (lambda before: {"after": tiny_clip(vision={"layers": 2})}, "after must have the same parameters as before"),
        (lambda before: {"images": IMAGES}, "images must be batches"),
        (lambda before: {"images": []}, "there must be at least one image input"),
        (lambda before: dict.fromkeys(("before", "after"), resnet()), "image blocks must all return"),
    ],
    ids=["other model", "other depth", "no batches", "no images", "convolutions"],
)
def test_measure_feature_sensitivity_bad_input(before, change, message):
    arguments = {"before": before, "after": before, "images": IMAGES.split(5), "tokens": TOKENS} | change(before)
    if isinstance(arguments["before"], open_clip.CLIP) and not hasattr(arguments["before"].visual, "transformer"):
        arguments["images"] = torch.zeros(2, 3, 32, 32, dtype=torch.float64).split(2)
    with pytest.raises(InputError, match=message):
        measure_feature_sensitivity(**arguments)


def resnet() -> nn.Module:
    return tiny_clip(vision={"layers": (1, 1, 1, 1), "width": 8, "image_size": 32, "head_width": 8}).eval()

"""Models that are altered after construction: followed or refused."""

from __future__ import annotations

import copy

import open_clip
import pytest
import torch
from open_clip.transformer import ResidualAttentionBlock as Block
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.flop_counter import FlopCounterMode

import skipkernels as sk
from skipkernels.towers.fused_classes import unfused
from tests.clip.clips import insert_lora, make_clip
from tests.models import tiny_clip
from tests.towers.families import LABELS, OPEN_CLIP, TOKENS

IMAGES = OPEN_CLIP.images()


def _in_place(model: nn.Module) -> None:
    model.attn_mask[0, 1] = 0.0


REFUSED = {
    "mask": lambda m: setattr(m, "attn_mask", torch.zeros_like(m.attn_mask)),
    "mask_in_place": _in_place,
    "reordered": lambda m: setattr(m.transformer, "resblocks", m.transformer.resblocks[::-1]),
    "without_a_block": lambda m: m.transformer.resblocks.__delitem__(-1),
    "tower_forward": lambda m: setattr(m.visual, "forward", lambda x: torch.ones(len(x), 12).double()),
    "encode_text": lambda m: setattr(m, "encode_text", lambda x, normalize=False: torch.ones(len(x), 12).double()),
    "class": lambda m: setattr(m.visual, "__class__", type("Other", (type(m.visual),), {})),
    "hook_on_tower": lambda m: m.visual.register_full_backward_hook(lambda mod, d_in, d_out: (9 * d_in[0],)),
    "hook_on_blocks": lambda m: m.transformer.register_forward_hook(lambda mod, args, out: 2 * out),
}


WAYS = {"same": lambda clip: clip, "move": lambda clip: clip.double(), "copy": copy.deepcopy}


@pytest.mark.parametrize(("name", "way"), [*((name, "same") for name in REFUSED), ("mask", "move"), ("mask", "copy")])
def test_altered_container_is_an_error(name, way):
    clip = OPEN_CLIP.cut(1)
    clip(clip.encode_lower(IMAGES), LABELS)
    REFUSED[name](clip.model)
    clip = WAYS[way](clip)
    for _ in range(2):  # the mode stays, so the next switch compares again
        with pytest.raises(RuntimeError, match="was altered after SkipCLIP was made"):
            clip.eval()


@pytest.mark.parametrize(
    ("kind", "method"),
    [
        (open_clip.transformer.VisionTransformer, "forward"),
        (open_clip.transformer.Transformer, "forward"),
        (open_clip.CLIP, "encode_text"),
    ],
    ids=lambda x: getattr(x, "__name__", x),
)
def test_method_of_a_container_patched_on_its_class(kind, method, monkeypatch):
    clip = OPEN_CLIP.cut(1)
    own = getattr(kind, method)
    monkeypatch.setattr(kind, method, lambda *arguments, **options: 2 * own(*arguments, **options))
    with pytest.raises(RuntimeError, match="was altered .* the class of a container, or a method of it, was replaced"):
        clip.eval()
    monkeypatch.undo()
    clip.eval()


def test_features_after_method_patched_on_a_class(monkeypatch):
    clip = OPEN_CLIP.cut(1)
    features, own = clip.encode_lower(IMAGES), nn.GELU.forward
    monkeypatch.setattr(nn.GELU, "forward", lambda self, x: 0.9 * own(self, x))
    with pytest.warns(UserWarning, match=r"forward\(\) of the class GELU was replaced"):
        clip.eval().predict(IMAGES)  # a mode switch compares
    clip.train()
    with pytest.raises(RuntimeError, match="modules or weights below the cut have changed"):
        clip(features, LABELS)
    OPEN_CLIP.check_step(clip)
    assert "class GELU" in clip.reductions["text.fused_block"].reason


def _both(alter):
    """Alter a block above the cut of each tower."""
    return lambda m: [alter(stack.resblocks[2]) for stack in (m.visual.transformer, m.transformer)]


def _scale(module: nn.Module, args: tuple, out: torch.Tensor) -> torch.Tensor:
    return out + 0.1 * out.sin()


FOLLOWED = {
    "heads": _both(lambda b: vars(b.attn).update(num_heads=1, head_dim=b.attn.num_heads * b.attn.head_dim)),
    "eps": _both(lambda b: setattr(b.ln_2, "eps", 0.1)),
    "activation": _both(lambda b: setattr(b.mlp, "gelu", open_clip.transformer.QuickGELU())),
    "unknown_activation": _both(lambda b: setattr(b.mlp, "gelu", nn.SiLU())),
    "peft": _both(lambda b: insert_lora(b, "c_proj")),
    "weight_norm": _both(lambda b: torch.nn.utils.parametrizations.weight_norm(b.mlp.c_fc)),
    "hook": _both(lambda b: b.register_forward_hook(_scale)),
    "pre_hook": _both(lambda b: b.register_forward_pre_hook(lambda mod, args: (1.1 * args[0], *args[1:]))),
    "backward_hook": _both(lambda b: b.register_full_backward_hook(lambda mod, d_in, d_out: (2 * d_in[0],))),
    "hook_on_child": _both(lambda b: b.mlp.c_fc.register_forward_hook(_scale)),
    "forward": _both(lambda b: setattr(b, "forward", lambda x, **rest: 1.1 * x)),
    "forward_of_child": _both(lambda b: setattr(b.ln_1, "forward", lambda x: x)),
    "attention": _both(lambda b: setattr(b, "attention", lambda q_x, **rest: q_x)),
    "replaced": lambda m: m.transformer.resblocks.__setitem__(2, copy.deepcopy(m.transformer.resblocks[1])),
    "lower_replaced": lambda m: m.transformer.resblocks.__setitem__(
        0, copy.deepcopy(m.transformer.resblocks[1]).requires_grad_(False)
    ),
    "image_pooling": lambda m: setattr(m.visual, "pool_type", "avg"),
    "projection": lambda m: setattr(m.visual, "proj", nn.Parameter(m.visual.proj.detach().roll(1, 0))),
    "final_norm": lambda m: setattr(m, "ln_final", nn.Identity()),
    "lower_eps": lambda m: setattr(m.transformer.resblocks[0].ln_1, "eps", 0.1),
    "lower_hook": lambda m: m.transformer.resblocks[0].mlp.register_forward_hook(_scale),
    "hook_on_embedding": lambda m: m.token_embedding.register_forward_hook(lambda mod, args, out: 1.3 * out),
    "new_embedding": lambda m: setattr(
        m.token_embedding, "weight", nn.Parameter(1.3 * m.token_embedding.weight.detach(), requires_grad=False)
    ),
    "eps_of_head": lambda m: setattr(m.ln_final, "eps", 0.3),
    "hook_on_head": lambda m: m.ln_final.register_forward_pre_hook(lambda mod, args: (args[0] + args[0].sin(),)),
    "adapter_scale": lambda m: m.transformer.resblocks[2].mlp.c_proj.scale.update(one=3.0),
    "assign": lambda m: m.load_state_dict({k: 1.1 * v.clone() for k, v in m.state_dict().items()}, assign=True),
}


class Scaled(nn.Linear):
    """A layer with a setting in a dictionary."""

    def forward(self, x):
        return super().forward(x) * self.scale["one"]


@pytest.mark.filterwarnings("ignore:skipkernels. a block is not fused")
@pytest.mark.parametrize("name", FOLLOWED)
def test_alteration_is_followed(name):
    model = tiny_clip()
    layer = model.transformer.resblocks[2].mlp.c_proj
    if name == "adapter_scale":
        layer.__class__, layer.scale = Scaled, {"one": 1.0}
    clip = OPEN_CLIP.cut(1, model, memory="min")
    clip(IMAGES, LABELS)
    before = clip.predict(IMAGES)
    FOLLOWED[name](model)
    with unfused(model.modules()):
        expected = model.get_logits(IMAGES, TOKENS)[0].detach()
    torch.testing.assert_close(clip.predict(IMAGES), expected, rtol=1e-9, atol=1e-9)
    assert before.allclose(expected) == (name in ("backward_hook", "weight_norm"))  # no effect on logits
    for parameter in model.parameters():  # `assign` and PEFT set it
        parameter.requires_grad_(False)
    for part in (*clip.images.tower.upper_parameters(), *clip.texts.tower.upper_parameters()):
        part.requires_grad_(True)
    OPEN_CLIP.check_step(clip)


def _scale_norms(module: nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor | None:
    return 1.1 * output if isinstance(module, nn.LayerNorm) else None


def _scale_blocks(module: nn.Module, inputs: tuple) -> tuple | None:
    return (1.1 * inputs[0], *inputs[1:]) if isinstance(module, Block) else None


def _clip_gradients(module: nn.Module, d_inputs: tuple, d_outputs: tuple) -> tuple | None:
    if not isinstance(module, nn.LayerNorm):
        return None
    return tuple(None if d is None else d.clamp(-1e-5, 1e-5) for d in d_inputs)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # PyTorch's, of frozen modules
@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize(
    ("register", "hook"),
    [
        (nn.modules.module.register_module_forward_hook, _scale_norms),
        (nn.modules.module.register_module_forward_pre_hook, _scale_blocks),
        (nn.modules.module.register_module_full_backward_hook, _clip_gradients),
    ],
    ids=["forward", "forward_pre", "backward"],
)
def test_global_hook_is_followed(register, hook, skip):
    clip = OPEN_CLIP.cut(skip)
    OPEN_CLIP.check_step(clip)
    plain = clip.eval().predict(IMAGES), dict(clip.reductions)
    handle = register(hook)
    try:
        with pytest.warns(UserWarning, match="global module hooks"):
            logits = clip.predict(IMAGES)
        OPEN_CLIP.check_step(clip.train())
        reductions = clip.reductions
        with pytest.warns(UserWarning, match="global module hooks"):
            before = OPEN_CLIP.cut(skip)
        OPEN_CLIP.check_step(before)
    finally:
        handle.remove()
    for name in ("image.fused_block", "image.pooled_last_block", "text.fused_block", "text.shared_prefix"):
        assert "global module hooks" in reductions[name].reason
    assert torch.allclose(logits, plain[0], atol=1e-9) == (hook is _clip_gradients), "it alters only gradients"
    for clip_of_hook in (clip, before):
        OPEN_CLIP.check_step(clip_of_hook.eval().train())
    assert torch.allclose(clip.eval().predict(IMAGES), plain[0], atol=1e-12) and dict(clip.reductions) == plain[1]


def test_global_hooks_of_torch_tools_keep_blocks_fused(recwarn):
    clip = OPEN_CLIP.cut(1)
    with FlopCounterMode(display=False):
        clip(IMAGES, LABELS)
        assert clip.reductions["image.fused_block"].enabled
    assert not recwarn.list


@pytest.mark.parametrize("name", ["mask", "reordered"])
def test_refresh_follows_alteration(name):
    clip = OPEN_CLIP.cut(1)
    REFUSED[name](clip.model)
    clip.refresh()
    OPEN_CLIP.check_step(clip)


def test_refresh_watches_replaced_lower_text_block(tmp_path):
    clip, images = OPEN_CLIP.cut(1, tiny_clip(torch.float32), text_cache=tmp_path), IMAGES.float()
    blocks = clip.model.transformer.resblocks
    blocks[0] = copy.deepcopy(blocks[0])
    clip.refresh()
    clip(images, LABELS)
    with torch.no_grad():
        blocks[0].ln_1.weight.mul_(1.1)
    with pytest.raises(sk.CacheError, match="holds a cache that differs in lower blocks"):
        clip(images, LABELS)


def test_harmless_changes_are_no_alteration():
    clip = OPEN_CLIP.cut(1)
    model, before = clip.model, clip.predict(IMAGES)
    model.my_note = "kept"
    model.visual.transformer.resblocks[2].mlp.name = "mlp"
    model.train().eval()
    clip.double()
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    clip(clip.encode_lower(IMAGES), LABELS)
    assert clip.predict(IMAGES).equal(before)


def test_average_of_buffers_is_refused():
    clip = make_clip(dtype=torch.float32)
    average = AveragedModel(clip, use_buffers=True)
    for _ in range(2):
        average.update_parameters(clip)
    with pytest.raises(RuntimeError, match=r"altered .*: the attention mask .*average with use_buffers=False"):
        average.module.eval()

"""Every family of models: how to make a small one, where to cut it, what is reduced; rows of test_each_family.py."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import open_clip
import torch
import transformers
from open_clip.hf_configs import arch_dict
from timm.models.vision_transformer import ParallelScalingBlock
from torch import Tensor, nn

import skipkernels as sk
from tests.hugging_face_models import SMALL, hugging_face_clip, metaclip_2, siglip, siglip_2
from tests.models import TEXT, VISION, openai_clip, random_weights, tiny_clip, tiny_coca, tiny_tokens
from tests.reference_step import assert_matches_reference_step
from tests.timm_models import (
    CLIP,
    EVA02,
    GRID,
    PE,
    ROTARY,
    convnext,
    eva,
    fastvit,
    fused_fastvit,
    mobile_clip,
    naflex,
    openai_resnet,
    relative,
    resnet,
    swin,
    vit,
    vit_siglip,
    vitamin,
)

CLASSES = 7
TOKENS = tiny_tokens(CLASSES)
LABELS = torch.tensor([1, 5, 2])


class Family(NamedTuple):
    """A model with its images and prompts, and what SkipCLIP makes of it."""

    make: Callable[[], nn.Module]
    without: Mapping[str, str] = {}  # reductions that it does not have, and words of the reason; it has all others
    cuts: tuple[Any, ...] = (0, 1, 3, (2, 1))  # values of skip_layers
    size: int = 16  # height and width of the images
    depth: int = 3  # blocks of the image tower
    tokens: Tensor = TOKENS

    def images(self, dtype: torch.dtype = torch.float64) -> Tensor:
        generator = torch.Generator().manual_seed(1)
        return torch.randn(3, 3, self.size, self.size, generator=generator, dtype=torch.float64).to(dtype)

    def cut(self, skip: Any, model: nn.Module | None = None, **options: Any) -> sk.SkipCLIP:
        """SkipCLIP of this model, or of another one, which keeps all classes."""
        model = self.make() if model is None else model
        return sk.SkipCLIP(model, self.tokens, skip_layers=skip, **{"keep_ratio": 1.0, **options})

    def check_step(self, clip: sk.SkipCLIP) -> None:
        """Compare loss and gradients of a step with those of the caller's model."""
        assert_matches_reference_step(clip, self.images(clip.model.logit_scale.dtype), self.tokens, LABELS)


def with_encoder(config: transformers.PretrainedConfig, pooler: str, projection: str = "linear") -> nn.Module:
    """Open_clip model with a text encoder of transformers."""
    text = {"hf_model_pretrained": False, "hf_pooler_type": pooler, "hf_proj_type": projection}
    torch.manual_seed(0)
    with TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return random_weights(open_clip.CustomTextCLIP(12, VISION, {**text, "hf_model_name": folder})).eval()


def bert(config: type[transformers.PretrainedConfig], pooler: str, projection: str = "linear") -> nn.Module:
    chosen = config(**SMALL, vocab_size=60, max_position_embeddings=30, pad_token_id=1, type_vocab_size=1)
    return with_encoder(chosen, pooler, projection)


def mt5() -> nn.Module:
    sizes = {"d_model": 24, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 3}
    return with_encoder(transformers.MT5Config(**sizes, vocab_size=60, pad_token_id=1), "mean_pooler")


def nllb(layerdrop: float = 0.0) -> nn.Module:
    encoder = {"encoder_layers": 3, "encoder_ffn_dim": 48, "encoder_attention_heads": 3, "encoder_layerdrop": layerdrop}
    decoder = {"decoder_layers": 1, "decoder_ffn_dim": 48, "decoder_attention_heads": 3}
    sizes = {"d_model": 24, "vocab_size": 60, "max_position_embeddings": 30, "pad_token_id": 1}
    return with_encoder(transformers.M2M100Config(**sizes, **encoder, **decoder), "cls_pooler")


def modern_text(**options: Any) -> nn.Module:
    """Open_clip model with its modern text tower: padding 0, start of text 57 and end of text 59."""
    text = {"context_length": 30, "mlp_ratio": 2.5, "eos_id": 59, "pad_id": 0, "bos_id": 57, "variable_text": True}
    torch.manual_seed(0)
    return random_weights(open_clip.CustomTextCLIP(12, VISION, {**TEXT, **text, "text_arch": "modern", **options}))


def modern_bert() -> nn.Module:
    """Windows of two tokens on both sides; in fp32, as its rotations are."""
    ids = {"pad_token_id": 0, "cls_token_id": 57, "sep_token_id": 59, "bos_token_id": 57, "eos_token_id": 59}
    sizes = {"hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 4, "num_attention_heads": 3}
    windows = {"local_attention": 4, "global_attn_every_n_layers": 3, "max_position_embeddings": 30, "vocab_size": 60}
    return with_encoder(transformers.ModernBertConfig(**sizes, **windows, **ids), "cls_pooler").float()


def encoder_tokens(padding: int = 1) -> Tensor:
    """Prompts [CLASSES, 20] of four to seven tokens."""
    tokens = torch.full((CLASSES, 20), padding)
    for i, row in enumerate(tokens):
        row[: 4 + i % 4] = torch.tensor([0, 5, *range(10 + i, 11 + i + i % 4), 2])
    return tokens


# ---- reductions that families do not have ----------------------------------------------------------------------------

FUSED, POOLED = "image.fused_block", "image.pooled_last_block"
POOLS = {POOLED: "the tower pools over all tokens"}
STAGES = {FUSED: "blocks in stages run their own forward", POOLED: "blocks in stages run their own forward"}
NOT_CAUSAL = {"text.text_crop": "lets a token see later ones", "text.shared_prefix": "is not the causal one"}
POOLS_FIRST = {"text.shared_prefix": "a pooled token is the first"}
NO_SELF = {"text.shared_prefix": "does not see itself"}
NO_MASK = {"text.text_crop": "every token sees every other", "text.shared_prefix": "there is no mask"}


def unfused(why: str) -> dict[str, str]:
    return {FUSED: why, POOLED: why}


def unfused_text(why: str, shared_prefix: str | None = None) -> dict[str, str]:
    return {"text.fused_block": why, "text.pooled_last_block": why, "text.shared_prefix": shared_prefix or why}


# ---- rows ------------------------------------------------------------------------------------------------------------


def variant(vision: dict[str, Any], text: dict[str, Any], without: Mapping[str, str] = {}) -> Family:
    """Open_clip's own towers with options."""
    return Family(lambda: tiny_clip(vision=vision, text=text), without, (1,))


def encoder(make: Callable[[], nn.Module], kind: str) -> Family:
    without = unfused_text(f"{kind}, which runs its own forward", "a token sees later ones")
    return Family(make, without, (0, 2, (1, 3)), tokens=encoder_tokens())


def image_tower(make: Callable[[], nn.Module], without: Mapping[str, str] = {}, *, size=16, depth=3) -> Family:
    """An image tower at every cut, beside open_clip's text tower at one."""
    return Family(make, without, tuple((skip, 1) for skip in range(depth + 1)), size, depth)


def like_another(make: Callable[[], nn.Module], without: Mapping[str, str] = {}, *, size=16, depth=3) -> Family:
    """An image tower with the blocks of another row."""
    return Family(make, without, ((2, 1),), size, depth)


OWN = "CustomResidualAttentionBlock, which runs its own forward"
SIGLIP = POOLS | NO_MASK
COCA_TOKENS = tiny_tokens(CLASSES, context=76)
FIRST_DIFFERS = torch.cat([torch.arange(50, 57)[:, None], TOKENS[:, 1:]], dim=1)
ATTENTIONAL = {"attentional_pool": True, "attn_pooler_heads": 4}
TOKEN = {"class_token": True, "global_pool": "token"}

OPEN_CLIP = Family(tiny_clip)
WHOLE = {
    "openai": Family(openai_clip),
    "hf": Family(hugging_face_clip),
    "hf_eos": Family(lambda: hugging_face_clip(end=59, activation="gelu")),
    "hf_eager": Family(lambda: hugging_face_clip(attn_implementation="eager").float()),  # its softmax is in fp32
    "siglip": Family(siglip, SIGLIP),
    "siglip_eager": Family(lambda: siglip(attn_implementation="eager").float(), SIGLIP),
    "metaclip_2": Family(metaclip_2),
    "siglip_2": Family(siglip_2, SIGLIP),
    "coca": Family(tiny_coca, POOLS | NO_SELF, tokens=COCA_TOKENS),
    "coca_correct": Family(lambda: tiny_coca(correct=True), POOLS, tokens=COCA_TOKENS),
    "avg-last": variant({"pool_type": "avg"}, {"pool_type": "last", "no_causal_mask": True}, POOLS | NOT_CAUSAL),
    "no_ln_pre-first": variant({"no_ln_pre": True}, {"pool_type": "first"}, POOLS_FIRST)._replace(tokens=FIRST_DIFFERS),
    "final_ln-eos": variant({"final_ln_after_pool": True}, {"pool_type": "eos", "eos_id": 59}),
    "layer_scale": variant({"ls_init_value": 0.3}, {"ls_init_value": 0.2}),
    "attn_pool-linear": variant(ATTENTIONAL, {"proj_bias": True, "proj_type": "linear"}, POOLS),
    "custom_block": variant({"qk_norm": True}, {"scale_heads": True}, unfused(OWN) | unfused_text(OWN)),
}
ENCODERS = {
    "roberta": encoder(lambda: bert(transformers.RobertaConfig, "mean_pooler", "mlp"), "RobertaLayer"),
    "xlm_roberta": encoder(lambda: bert(transformers.XLMRobertaConfig, "mean_pooler"), "XLMRobertaLayer"),
    "xlm_roberta_cls": encoder(lambda: bert(transformers.XLMRobertaConfig, "cls_pooler"), "XLMRobertaLayer"),
    "bert": encoder(lambda: bert(transformers.BertConfig, "cls_last_hidden_state_pooler"), "BertLayer"),
    "mt5": encoder(mt5, "MT5Block"),
    "nllb": encoder(nllb, "M2M100EncoderLayer"),
}
TIMM = {
    "clip": image_tower(partial(vit, **CLIP)),
    "vit_layer_scale": like_another(partial(vit, init_values=0.1, act_layer="quick_gelu", reg_tokens=2)),
    "vit_siglip": image_tower(vit_siglip, POOLS),
    "mean": like_another(partial(vit, global_pool="avg", class_token=False), POOLS),
    "mobile_clip": image_tower(mobile_clip),
    "qk_norm": like_another(partial(vit, qk_norm=True)),
    "parallel": like_another(partial(vit, block_fn=ParallelScalingBlock), unfused("ParallelScalingBlock")),
    "diff": like_another(partial(vit, attn_layer="diff"), unfused("DiffAttention of timm for its attn")),
    "eva": image_tower(eva),
    "eva02": image_tower(partial(eva, **EVA02)),
    "perception_encoder": image_tower(partial(eva, **PE, **GRID), POOLS),
    "rope_dinov3": like_another(partial(eva, **ROTARY, attn_type="rope", rope_type="dinov3")),
    "mrope": like_another(partial(eva, **ROTARY, attn_type="rope", rope_type="mrope", rope_mrope_section=(2, 1, 1))),
    "eva_post_norm": like_another(partial(eva, use_post_norm=True), unfused("EvaBlockPostNorm")),
    "rope_mixed": like_another(partial(eva, **ROTARY, rope_type="mixed"), unfused("rotary positions of its own")),
    "relpos": image_tower(partial(relative, global_pool="avg"), unfused("RelPosBlock") | POOLS),
    "relpos_bias": like_another(partial(relative, **TOKEN, rel_pos_type="bias"), unfused("RelPosBlock")),
    "naflex": image_tower(naflex, POOLS),
    "naflex_map": image_tower(lambda: naflex(global_pool="map", swiglu_mlp=True, reg_tokens=1), POOLS),
    "naflex_interpolated": like_another(lambda: naflex(pos_embed_grid_size=(3, 3), pos_embed="factorized"), POOLS),
    "naflex_token": image_tower(lambda: naflex(**TOKEN, reg_tokens=1, pre_norm=True)),
}
STAGED = {
    "convnext": image_tower(convnext, STAGES, size=32, depth=5),
    "convnext_projected": like_another(lambda: convnext(projection=True), STAGES, size=32, depth=5),
    "convnext_without_stage": like_another(lambda: convnext(depths=(1, 0, 2, 1)), STAGES, size=32, depth=4),
    "fastvit": image_tower(fastvit, STAGES, size=32, depth=5),
    "fused_fastvit": like_another(fused_fastvit, STAGES, size=32, depth=5),
    "swin": image_tower(swin, STAGES, size=32, depth=4),
    "vitamin": image_tower(vitamin, STAGES | POOLS, size=32, depth=5),
    "vitamin_token": like_another(partial(vitamin, **TOKEN, reg_tokens=1), STAGES, size=32, depth=5),
    "resnet": image_tower(resnet, STAGES, size=32, depth=5),
    "openai_resnet": image_tower(openai_resnet, STAGES, size=32, depth=5),
}
FAMILIES = WHOLE | ENCODERS | TIMM | STAGED


# ---- text towers of open_clip 4, of which CI tests the development version -------------------------------------------


def modern(shared_prefix: str | None = None, **options: Any) -> Family:
    without = unfused_text("ModernTextBlock, which runs its own forward", shared_prefix)
    return Family(partial(modern_text, **options), without, (0, 1, 2), tokens=SHORT_TOKENS)


SHORT_TOKENS = tiny_tokens(CLASSES, context=30)
LONG_NAME = SHORT_TOKENS.clone()
LONG_NAME[1, 3:20] = torch.arange(6, 23)  # behind the others the window of ModernBERT has padding only
LATER, MEAN = "a token sees later ones", "the tower pools over all tokens"
MAP = {"pool_type": "map", "attention_mode": "bidirectional"}
if hasattr(open_clip.transformer, "ModernTextTransformer"):
    FAMILIES |= {
        "modern_eos": modern(pool_type="eos"),
        "modern_gated": modern(pool_type="eos", attn_gated=True, qk_norm=True, attention_bias=True, mlp_bias=True),
        "modern_sandwich": modern(pool_type="argmax", norm_placement="sandwich", ls_init_value=0.3, mlp_type="relu2"),
        "modern_map": modern(LATER, **MAP, qk_norm=True, attn_gated=True),
        "modern_mean": modern(MEAN, pool_type="mean", pos_embed="none", pre_norm=True, norm_type="layernorm"),
        "modern_values": modern(pool_type="eos", value_residual=True),
        "modern_values_map": modern(LATER, **MAP, value_residual=True),
        "modern_without_padding": modern(LATER, **MAP, pad_id=None),
    }
if "modernbert" in arch_dict:
    own = unfused_text("ModernBertEncoderLayer, which runs its own forward", LATER)
    FAMILIES["modern_bert"] = Family(modern_bert, own, tuple((1, skip) for skip in (0, 1, 3, 4)), tokens=LONG_NAME)

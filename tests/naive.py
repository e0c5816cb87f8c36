"""The published step, written out from the paper: every token, every block, dense logits.

It reads the weights of an open_clip `CLIP` by name and shares no code with the package. Gradients are from autograd;
`detach` cuts off frozen parts.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def _layer_norm(hidden: Tensor, norm: torch.nn.Module) -> Tensor:
    centred = hidden - hidden.mean(-1, keepdim=True)
    return centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias


def _gelu(x: Tensor, quick: bool) -> Tensor:
    return x * torch.sigmoid(1.702 * x) if quick else x * (1 + torch.erf(x / math.sqrt(2))) / 2


def _block(hidden: Tensor, block: torch.nn.Module, causal: bool, quick: bool) -> Tensor:
    n, tokens, width = hidden.shape
    heads = block.attn.num_heads
    projected = _layer_norm(hidden, block.ln_1) @ block.attn.in_proj_weight.T + block.attn.in_proj_bias
    query, key, value = projected.view(n, tokens, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    weights = query @ key.transpose(-1, -2) / math.sqrt(width // heads)
    if causal:
        weights = weights + torch.full_like(weights, -math.inf).triu(1)
    mixed = (weights.softmax(-1) @ value).transpose(1, 2).reshape(n, tokens, width)
    hidden = hidden + mixed @ block.attn.out_proj.weight.T + block.attn.out_proj.bias
    inner = _gelu(_layer_norm(hidden, block.ln_2) @ block.mlp.c_fc.weight.T + block.mlp.c_fc.bias, quick)
    return hidden + inner @ block.mlp.c_proj.weight.T + block.mlp.c_proj.bias


def _cut(hidden: Tensor, blocks: torch.nn.ModuleList, skip: int, causal: bool, quick: bool) -> Tensor:
    for depth, block in enumerate(blocks):
        if depth == skip and skip > 0:
            hidden = hidden.detach()
        hidden = _block(hidden, block, causal, quick)
    return hidden.detach() if skip == len(blocks) else hidden


def embed_images(model: torch.nn.Module, images: Tensor, skip: int, quick: bool) -> Tensor:
    visual = model.visual
    patch = visual.conv1.kernel_size[0]
    patches = images.unfold(2, patch, patch).unfold(3, patch, patch)  # [B, 3, rows, columns, patch, patch]
    patches = patches.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    hidden = patches @ visual.conv1.weight.flatten(1).T
    hidden = torch.cat([visual.class_embedding.expand(len(images), 1, -1), hidden], dim=1)
    hidden = _layer_norm(hidden + visual.positional_embedding, visual.ln_pre)
    hidden = _cut(hidden, visual.transformer.resblocks, skip, causal=False, quick=quick)
    return _layer_norm(hidden, visual.ln_post)[:, 0] @ visual.proj


def embed_texts(model: torch.nn.Module, tokens: Tensor, skip: int, quick: bool) -> Tensor:
    hidden = model.token_embedding.weight[tokens] + model.positional_embedding
    hidden = _cut(hidden, model.transformer.resblocks, skip, causal=True, quick=quick)
    end = (tokens == tokens.max(dim=1, keepdim=True).values).int().argmax(dim=1)
    return _layer_norm(hidden, model.ln_final)[torch.arange(len(tokens)), end] @ model.text_projection


def class_ranking(model: torch.nn.Module, images: Tensor, labels: Tensor, prototypes: Tensor, quick: bool) -> list[int]:
    """Classes by descending score, with the labels first."""
    image = embed_images(model, images, 0, quick).detach()
    image = image / image.norm(dim=1, keepdim=True)
    scores = (image @ prototypes.T).amax(dim=0)
    scores[labels] = math.inf
    return scores.argsort(descending=True, stable=True).tolist()


def class_embeddings(model: torch.nn.Module, tokens: Tensor, skip: int, quick: bool) -> Tensor:
    """Unit-norm embeddings [K, D] of classes of one prompt, [K, L], or means over T templates, [K, T, L]."""
    templates = tokens[:, None] if tokens.ndim == 2 else tokens
    texts = [embed_texts(model, templates[:, t], skip, quick) for t in range(templates.shape[1])]
    text = sum(text / text.norm(dim=1, keepdim=True) for text in texts)
    return text / text.norm(dim=1, keepdim=True)


def cosine_logits(
    model: torch.nn.Module, images: Tensor, tokens: Tensor, skip: tuple[int, int], quick: bool = False
) -> Tensor:
    """Scaled cosines [B, K] of images with classes."""
    image = embed_images(model, images, skip[0], quick)
    image = image / image.norm(dim=1, keepdim=True)
    return model.logit_scale.exp() * image @ class_embeddings(model, tokens, skip[1], quick).T

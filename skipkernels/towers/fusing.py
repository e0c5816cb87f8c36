"""Fused blocks in the caller's model: `sk.fuse`, `sk.unfuse`."""

from __future__ import annotations

from typing import TypeVar, get_args

from torch import nn

from ..checks import warn_caller
from ..options import FusedMemory
from .base import UnsupportedModel
from .block import FAMILIES, FusedBlock, fuse_blocks

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model, *, memory: FusedMemory = "fast") -> Model:
    """Make the transformer blocks of a model fused blocks, in place: the same results from less memory for backward.

    Parameters, their names, `state_dict`, `isinstance` and hooks stay, and copies and pickles have the model's own
    classes. A block that is altered later (an adapter, a hook on one of its modules) runs its own forward, with a
    warning. Works under autocast, `DistributedDataParallel`, gradient accumulation and `torch.compile` of the model,
    which breaks the graph at each block. Call it before `fully_shard`.

    Args:
        model: A model with blocks of open_clip, OpenAI's clip, CLIP or SigLIP of transformers, or timm's
            `VisionTransformer` or `Eva` (EVA-02, Perception Encoder).
        memory: Saved for backward per token and block, W the width of the tower: "fast", 10·W values (12·W with SwiGLU
            and the norms of EVA-02), where backward repeats no matrix product; "balanced", 6·W, where it repeats the
            first product of the MLP; "min", W, where it repeats the block. PyTorch saves 16·W, or 20·W with QuickGELU.

    Returns:
        The model.

    Raises:
        UnsupportedModel: If no block can be fused.

    Example:
        >>> import torch, skipkernels as sk
        >>> from skipkernels.app.demo import pictogram_tiny
        >>> model, _, _ = pictogram_tiny.load()
        >>> sk.fuse(model).encode_image(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 128])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"fuse: model must be an nn.Module; got {type(model).__name__}.")
    if memory not in get_args(FusedMemory):
        raise ValueError(f'fuse: memory must be "fast", "balanced" or "min"; got {memory!r}.')
    unfuse(model)  # of another `memory`
    blocks = fuse_blocks(model.modules(), memory)
    reasons = [block.why_not_fused() for block in blocks]
    for block, reason in zip(blocks, reasons, strict=True):
        if reason is not None:
            block.__class__ = block._own
    found = "; ".join(dict.fromkeys(filter(None, reasons))) or f"the model has none of {', '.join(FAMILIES)}"
    if None not in reasons:
        raise UnsupportedModel(f"fuse: no block of {type(model).__name__} can be fused: {found}.")
    if any(reasons):
        warn_caller(f"fuse: {len(reasons) - reasons.count(None)} of {len(reasons)} blocks are not fused: {found}.")
    return model


def unfuse(model: Model) -> Model:
    """Give the blocks of a model their own classes again, in place, and return the model."""
    for module in model.modules():
        if isinstance(module, FusedBlock):
            module.__class__ = module._own
    return model

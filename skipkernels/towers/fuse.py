"""Fused blocks in the caller's model: `sk.fuse`, `sk.unfuse`."""

from __future__ import annotations

from typing import Any, TypeVar, get_args

from torch import nn

from ..checks import warn_caller
from ..options import FusedMemory
from .base import UnsupportedModel
from .block import FusedBlock
from .comparison import compare_with_own_forward
from .families import BLOCKS, type_name
from .fused_classes import fuse_blocks, unfused_class

Model = TypeVar("Model", bound=nn.Module)
_PEFT_REMEDY = (
    " A block with an adapter of PEFT runs its own forward. SkipCLIP's add_lora updates the weights of fused blocks, "
    "and a merged model (merge_and_unload) can be fused."
)


def fuse(model: Model, *, memory: FusedMemory = "fast") -> Model:
    """Make the transformer blocks of a model fused blocks, in place: the same results from less memory for backward.

    Parameters, their names, `state_dict`, `isinstance` and hooks stay, and copies and pickles have the model's own
    classes. A block that is altered later (an adapter, a hook on one of its modules, a method replaced on a class) runs
    its own forward, with a warning. Works under autocast, `DistributedDataParallel`, gradient accumulation and
    `torch.compile` of the model, which breaks the graph at each block. Call it before `fully_shard`.

    One block of each kind is compared with its own forward, with random weights and a small random input.

    Args:
        model: A model with blocks of open_clip, OpenAI's clip, CLIP or SigLIP of transformers, or timm's
            `VisionTransformer` or `Eva` (EVA-02, Perception Encoder).
        memory: Saved for backward per token and block, W the width of the tower: "fast", 10·W values (12·W with SwiGLU
            and the norms of EVA-02), where backward repeats no matrix product; "balanced", 6·W, where it repeats the
            first product of the MLP; "min", W, where it repeats the block up to the activation.
            PyTorch saves 16·W, or 20·W with QuickGELU.

    Returns:
        The model.

    Raises:
        UnsupportedModel: If no block can be fused.
        RuntimeError: If output or gradients of a fused block differ from those of its own forward.

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
    if any(hasattr(module, "unshard") for module in model.modules()):  # of FSDP2
        raise UnsupportedModel("fuse: the model is sharded. Call fuse first, then fully_shard.")
    for name in {type_name(type(module)) for module in model.modules()} & BLOCKS.keys():
        if (reason := BLOCKS[name].why_unavailable()) is not None:
            raise UnsupportedModel(f"fuse: {name} {reason}")
    unfuse(model)  # of another `memory`
    fused, reasons = [], []
    for block in fuse_blocks(model.modules(), memory):
        if (reason := block.why_not_fused()) is None:
            fused.append(block)
        else:
            unfuse(block)
            reasons.append(reason)
    found = "; ".join(dict.fromkeys(reasons)) or f"the model has none of {', '.join(BLOCKS)}"
    if not fused:
        remedy = _PEFT_REMEDY if " of peft " in found else ""
        raise UnsupportedModel(f"fuse: no block of {type(model).__name__} can be fused: {found}.{remedy}")
    try:
        compare_with_own_forward(fused)
    except BaseException:
        unfuse(model)
        raise
    if reasons:
        warn_caller(f"fuse: {len(reasons)} of {len(fused) + len(reasons)} blocks are not fused: {found}.")
    return model


def unfuse(model: Model) -> Model:
    """Give the blocks of a model their own classes again, in place, and return the model."""
    for module in model.modules():
        if isinstance(module, FusedBlock):
            kind: Any = type(module)
            module.__class__ = unfused_class(kind)
    return model

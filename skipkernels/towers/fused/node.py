"""A fused block as an autograd node: a `torch.autograd.Function` around `forward` and `backward` of `stages.py`.

Autograd takes, saves and returns lists of tensors: those of the weights part by part, each with the name of its weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ... import casts as casts_of_step
from ...reference import without_autocast
from . import stages
from .gradients import Gradients, NeededGradients, PendingSums, sums_together
from .records import BlockCall, BlockSettings, BlockWeights, Hidden, PreparedWeights, RowsOptions

# Fields of `BlockWeights` that products read, in the dtype of the products. The operators upcast the others: that of
# the activation adds mlp_in_bias.
CAST_FIELDS = ("in_proj", "in_proj_bias", "out_proj", "out_proj_bias", "mlp_in", "mlp_out", "mlp_out_bias")

# Arguments of `_BlockFunction` in front of its tensors
CONSTANTS = 4


@torch.compiler.disable  # the node holds an autograd graph, which would cause graph breaks
def fused_block(weights: BlockWeights, settings: BlockSettings, hidden: Hidden, options: RowsOptions) -> Hidden:
    """Run one block over rows [R, W], and return [Q, W].

    Products run in the dtype of the weights or of autocast, which is the dtype of the branches. The stream keeps its.
    """
    device = hidden.stream.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else weights.mlp_out.dtype
    names, tensors = weights.named_parts()
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*hidden, *tensors)):
        return Hidden(*_BlockFunction.apply(settings, options, dtype, names, *hidden, *tensors))
    with without_autocast(device):
        call = BlockCall(settings, options, prepare(weights, dtype), dtype)
        return stages.forward(call, hidden, record=False)[0]


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: BlockSettings,
        options: RowsOptions,
        dtype: torch.dtype,
        names: Sequence[str],
        stream: Tensor,
        branch: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        record = options.memory != "min"
        weights = BlockWeights.from_parts(names, tensors)
        with without_autocast(stream.device):
            call = BlockCall(settings, options, prepare(weights, dtype), dtype)
            out, saved = stages.forward(call, Hidden(stream, branch), record)
        ctx.settings, ctx.options, ctx.dtype = settings, options, dtype
        ctx.has_branch, ctx.names, ctx.dtypes = branch is not None, names, [x.dtype for x in tensors]
        if record and weights.mlp_out.dtype != dtype:  # backward reads the casts, and need not cast again
            weights = replace(weights, **{name: getattr(call.weights, name) for name in CAST_FIELDS})
        ctx.saved_names, weights_to_save = weights.named_parts()
        ctx.save_for_backward(*weights_to_save, *stages.to_save(call, saved))
        # The graph of attention is no tensor. Backward frees it; a second backward records another.
        ctx.attention_graph = saved.attention_graph
        return out.stream, out.branch

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_mid: Tensor, d_branch: Tensor) -> tuple[Tensor | None, ...]:
        # 1. Put the saved tensors into records again
        saved_tensors, count = ctx.saved_tensors, len(ctx.saved_names)
        weights = BlockWeights.from_parts(ctx.saved_names, saved_tensors[:count])
        graph, ctx.attention_graph = ctx.attention_graph, None
        # 2. Find the gradients that are needed
        needs_stream, needs_branch, *needs_parts = ctx.needs_input_grad[CONSTANTS:]
        fields = frozenset(name for name, need in zip(ctx.names, needs_parts, strict=True) if need)
        dtype_of = dict(zip(ctx.names, ctx.dtypes, strict=True))
        matrices, norms = dtype_of["mlp_out"], dtype_of["norm_1"]
        sums_dtype = max(matrices, norms, key=lambda x: x.itemsize)  # norms may be fp32 beside fp16 matrices
        gradients = Gradients(
            NeededGradients(needs_stream or needs_branch, fields),
            matrices,
            sums_dtype,
            PendingSums(sums_dtype) if sums_together(d_mid.device) else None,
        )
        with without_autocast(d_mid.device):
            call = BlockCall(ctx.settings, ctx.options, prepare(weights, ctx.dtype), ctx.dtype)
            # 3. Repeat what was not saved
            saved = stages.restore(call, saved_tensors[count:], graph)
            # 4. Run the stages from the last to the first
            d_hidden = stages.backward(call, saved, Hidden(d_mid, d_branch), gradients)
            d_parts = gradients.of_parts(ctx.names)
        # 5. Return the gradients in the order of the inputs, each in the dtype of its input
        d_stream, d_branch_in = d_hidden if d_hidden is not None else (None, None)
        d_tensors = (
            d_part.to(dtype) if need and d_part is not None else None
            for d_part, dtype, need in zip(d_parts, ctx.dtypes, needs_parts, strict=True)
        )
        return *[None] * CONSTANTS, d_stream, d_branch_in if ctx.has_branch else None, *d_tensors


# ---- copies of weights -----------------------------------------------------------------------------------------------


def prepare(weights: BlockWeights, dtype: torch.dtype) -> PreparedWeights:
    """Join weights in parts, and cast those of products to their dtype, all by one launch.

    A captured step, and the eager ones before its capture, take the casts that their update renews (`casts.active`).
    """
    fields: dict[str, Any] = dict(vars(weights))
    if isinstance(weights.mlp_in_bias, tuple):
        fields["mlp_in_bias"] = torch.cat(weights.mlp_in_bias)
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for name, parts in weights.parts().items():
        if name not in CAST_FIELDS or (len(parts) == 1 and parts[0].dtype == dtype):
            continue
        cast = None if casts_of_step.active is None else casts_of_step.active.of_product(parts, dtype)
        if cast is None:
            lengths = [len(part) for part in parts]
            cast = parts[0].new_empty(sum(lengths), *parts[0].shape[1:], dtype=dtype)
            targets += cast.split(lengths)
            sources += parts
        fields[name] = cast
    if sources:
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)
    return PreparedWeights(**fields)

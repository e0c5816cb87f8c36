"""A fused block as an autograd node: a `torch.autograd.Function` around `forward` and `backward` of `stages.py`.

Autograd takes, saves and returns lists of tensors: those of the weights part by part, each with the name of its weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...ops.launching import launches_on
from ...reference import autocast_dtype, without_autocast
from . import Hidden, RowsOptions, stages
from .gradients import Gradients, NeededGradients, PendingSums
from .stages import BlockCall
from .weights import BlockSettings, BlockWeights, prepare


def fused_block(weights: BlockWeights, settings: BlockSettings, hidden: Hidden, options: RowsOptions) -> Hidden:
    """Run one block over rows [R, W], and return [Q, W].

    Products run in the dtype of the weights or of autocast, which is the dtype of the branches. The stream keeps its.
    """
    device, dtype = hidden.stream.device, weights.mlp_out.dtype
    if dtype != torch.float64:  # which autocast leaves as it is
        dtype = autocast_dtype(device) or dtype
    names, parts = weights.named_parts()
    with without_autocast(device):
        call = BlockCall(settings, options, dtype, prepare(weights, dtype))
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*hidden, *parts)):
            return Hidden(*_BlockFunction.apply(call, names, *hidden, *parts))
        return stages.forward(call, hidden, record=False)[0]


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: BlockCall, names: Sequence[str], stream: Tensor, branch: Tensor | None, *parts: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        record = call.options.memory != "min"
        out, saved = stages.forward(call, Hidden(stream, branch), record)
        ctx.settings, ctx.options, ctx.dtype = call.settings, call.options, call.dtype
        ctx.has_branch, ctx.names, ctx.dtypes = branch is not None, names, [x.dtype for x in parts]
        # Weights are saved as they were given, or as casts, which backward then need not make again.
        weights = BlockWeights.from_parts(names, parts)
        casts = record and weights.mlp_out.dtype != call.dtype
        ctx.saved_names, saved_parts = (call.weights if casts else weights).named_parts()
        ctx.save_for_backward(*saved_parts, *stages.to_save(call, saved))
        # The graph of attention is no tensor. Backward frees it; a second backward records another.
        ctx.attention_graph = saved.attention_graph
        return out.stream, out.branch

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_mid: Tensor, d_branch: Tensor) -> tuple[Tensor | None, ...]:
        # 1. Put the saved tensors into records again
        tensors, count = ctx.saved_tensors, len(ctx.saved_names)
        weights = BlockWeights.from_parts(ctx.saved_names, tensors[:count])
        graph, ctx.attention_graph = ctx.attention_graph, None
        # 2. Find the gradients that are needed
        _, _, needs_stream, needs_branch, *needs_parts = ctx.needs_input_grad
        fields = frozenset(name for name, need in zip(ctx.names, needs_parts, strict=True) if need)
        dtype_of = dict(zip(ctx.names, ctx.dtypes, strict=True))
        matrix_dtype, norm_dtype = dtype_of["mlp_out"], dtype_of["norm_1"]
        sums_dtype = max(matrix_dtype, norm_dtype, key=lambda x: x.itemsize)  # norms may be fp32 beside fp16 matrices
        gradients = Gradients(
            NeededGradients(needs_stream or needs_branch, fields),
            matrix_dtype,
            sums_dtype,
            PendingSums(sums_dtype) if launches_on(d_mid.device) else None,
        )
        with without_autocast(d_mid.device):
            call = BlockCall(ctx.settings, ctx.options, ctx.dtype, prepare(weights, ctx.dtype))
            # 3. Repeat what was not saved
            saved = stages.restore(call, tensors[count:], graph)
            # 4. Run the stages from the last to the first
            d_hidden = stages.backward(call, saved, Hidden(d_mid, d_branch), gradients)
            d_parts = gradients.of_parts(ctx.names)
        # 5. Return the gradients in the order of the inputs, each in the dtype of its input
        d_stream, d_branch_in = d_hidden if d_hidden is not None else (None, None)
        d_given = (
            None if d_part is None or not need else d_part.to(dtype)
            for d_part, dtype, need in zip(d_parts, ctx.dtypes, needs_parts, strict=True)
        )
        return None, None, d_stream, d_branch_in if ctx.has_branch else None, *d_given

"""A fused block as an autograd node: a `torch.autograd.Function` around `forward` and `backward` of `stages.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ...dtypes import autocast_dtype, without_autocast
from ...ops.launching import launches_on
from ..rows import Hidden, RowsOptions
from . import stages
from .gradients import Gradients
from .stages import BlockCall
from .weights import BlockSettings, GivenWeights, join_and_cast


def fused_block(given: GivenWeights, settings: BlockSettings, hidden: Hidden, options: RowsOptions) -> Hidden:
    """Run one block over rows [R, W], and return [Q, W].

    Products run in the dtype of the weights or of autocast, which is the dtype of the branches. The stream keeps its.
    """
    device, dtype = hidden.stream.device, given["mlp_out"].dtype
    if dtype != torch.float64:  # which autocast leaves as it is
        dtype = autocast_dtype(device) or dtype
    with without_autocast(device):
        call = BlockCall(join_and_cast(given, dtype), settings, options, dtype)
        if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*hidden, *given.values())):
            return Hidden(*_BlockFunction.apply(call, tuple(given), *hidden, *given.values()))
        return stages.forward(call, hidden, record=False)[0]


class _BlockFunction(torch.autograd.Function):
    """Autograd takes, saves and returns lists of tensors: those of the given weights in the order of their names."""

    @staticmethod
    def forward(
        ctx: Any, call: BlockCall, names: Sequence[str], stream: Tensor, branch: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        record = call.options.memory != "min"
        out, saved = stages.forward(call, Hidden(stream, branch), record)
        given = dict(zip(names, tensors, strict=True))
        ctx.names, ctx.weight_dtype = names, given["mlp_out"].dtype
        # Backward reads the weights in the dtype of the products. If they were cast, their casts are saved, by the
        # fields of `BlockWeights`; else the weights as given, which are no copies. "min" casts them again.
        saved_weights = given
        if record and ctx.weight_dtype != call.dtype:
            saved_weights = {name: x for name, x in vars(call.weights).items() if x is not None}
        ctx.options = call.settings, call.options, call.dtype
        ctx.saved_names = tuple(saved_weights)
        ctx.save_for_backward(*saved_weights.values(), *stages.to_save(call, saved))
        # The graph of attention is no tensor. Backward frees it; a second backward records another.
        ctx.attention_graph = saved.attention_graph
        return out.stream, out.branch

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_stream: Tensor, d_branch: Tensor) -> tuple[Tensor | None, ...]:
        # Stream and branch are terms of one sum, so that d_stream and d_branch are one gradient, in two dtypes.
        # 1. The saved tensors by name
        tensors, count = ctx.saved_tensors, len(ctx.saved_names)
        saved_weights = dict(zip(ctx.saved_names, tensors[:count], strict=True))
        graph, ctx.attention_graph = ctx.attention_graph, None
        # 2. The gradients that are needed
        _, _, needs_stream, needs_branch, *needs = ctx.needs_input_grad
        gradients = Gradients(
            dict(zip(ctx.names, needs, strict=True)),
            needs_hidden=needs_stream or needs_branch,
            dtype=ctx.weight_dtype,
            # Norms may be fp32 beside fp16 matrices
            sums_dtype=max(ctx.weight_dtype, saved_weights["norm_1"].dtype, key=lambda x: x.itemsize),
            partial=launches_on(d_stream.device),
        )
        with without_autocast(d_stream.device):
            settings, options, dtype = ctx.options
            call = BlockCall(join_and_cast(saved_weights, dtype), settings, options, dtype)
            # 3. What was not saved, computed again; then the stages from the last to the first
            saved = stages.restore(call, tensors[count:], graph)
            d_inputs = stages.backward(call, saved, d_stream, d_branch, gradients)
            d_weights = gradients.complete()
        # 4. The gradients in the order of the inputs. Autograd casts each to the dtype of its input.
        d_stream_in, d_branch_in = (None, None) if d_inputs is None else d_inputs
        return None, None, d_stream_in, d_branch_in if needs_branch else None, *d_weights

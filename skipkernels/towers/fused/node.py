"""A fused block as an autograd node: a `torch.autograd.Function` around `forward` and `backward` of `stages.py`.

Autograd takes, saves and returns lists of tensors. Those of weights are in the order of their names, (field of
`BlockWeights`, part); A and B of a low-rank update of a part follow, as ("FIELD.A", part) and ("FIELD.B", part).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ... import casts as casts_of_step
from ...reference import without_autocast
from . import stages
from .gradients import Gradients, sums_together
from .records import (
    BlockCall,
    BlockSettings,
    BlockWeights,
    Hidden,
    LowRankFactors,
    PreparedWeights,
    RowsOptions,
    TensorName,
)

# Fields of `BlockWeights` that products read, in the dtype of the products. The operators upcast the others: that of
# the activation adds mlp_in_bias.
CAST_FIELDS = ("in_proj", "in_proj_bias", "out_proj", "out_proj_bias", "mlp_in", "mlp_out", "mlp_out_bias")

# Arguments of `_BlockFunction` in front of its tensors
CONSTANTS = 5


@torch.compiler.disable  # the node holds an autograd graph, which would cause graph breaks
def fused_block(
    weights: BlockWeights, settings: BlockSettings, hidden: Hidden, options: RowsOptions, dtype: torch.dtype
) -> Hidden:
    """Run one block over rows [R, W], and return [Q, W].

    Weights are in the dtype of the stream; products run in `dtype`, which is the dtype of the branches.
    """
    tensors = weights.named_tensors()
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*hidden, *tensors.values())):
        # The gradient of an updated weight goes to its factors; `low_rank` is set in `towers/low_rank.py`.
        updates = weights.low_rank_updates()
        tensors = {name: x.detach() if hasattr(x, "low_rank") else x for name, x in tensors.items()}
        for field, of_field in updates.items():
            for update in of_field:
                tensors |= {(f"{field}.A", update.part): update.down, (f"{field}.B", update.part): update.up}
        scales = {field: [(x.part, x.scale) for x in of_field] for field, of_field in updates.items()}
        out = _BlockFunction.apply(settings, options, dtype, list(tensors), scales, *hidden, *tensors.values())
        return Hidden(*out)
    with without_autocast(hidden.stream.device):
        call = BlockCall(settings, options, prepare(weights, dtype), dtype)
        return stages.forward(call, hidden, record=False)[0]


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: BlockSettings,
        options: RowsOptions,
        dtype: torch.dtype,
        names: Sequence[TensorName],
        scales: Mapping[str, Sequence[tuple[int, float]]],  # of low-rank updates by field: (part, scale)
        stream: Tensor,
        branch: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        named, record = dict(zip(names, tensors, strict=True)), options.memory != "min"
        weights = BlockWeights.from_named_tensors(named)
        with without_autocast(stream.device):
            call = BlockCall(settings, options, prepare(weights, dtype), dtype)
            out, saved = stages.forward(call, Hidden(stream, branch), record)
        ctx.settings, ctx.options, ctx.dtype, ctx.has_branch = settings, options, dtype, branch is not None
        ctx.input_dtypes, ctx.scales = {name: x.dtype for name, x in named.items()}, scales
        if record and weights.mlp_out.dtype != dtype:  # backward reads the casts, and need not cast again
            casts = replace(weights, **{name: getattr(call.weights, name) for name in CAST_FIELDS})
            named = casts.named_tensors() | {name: x for name, x in named.items() if name[0].endswith((".A", ".B"))}
        # The graph of attention is no tensor. Backward frees it; a second backward records another.
        ctx.attention_graph, ctx.saved_names = saved.attention_graph, list(named)
        ctx.save_for_backward(*named.values(), *stages.to_save(call, saved))
        return out.stream, out.branch

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_mid: Tensor, d_branch: Tensor) -> tuple[Tensor | None, ...]:
        # 1. Put the saved tensors into records again
        tensors, count = ctx.saved_tensors, len(ctx.saved_names)
        named, of_stages = dict(zip(ctx.saved_names, tensors[:count], strict=True)), tensors[count:]
        weights = BlockWeights.from_named_tensors(named)
        updates = {
            field: [LowRankFactors(p, scale, named[f"{field}.A", p], named[f"{field}.B", p]) for p, scale in of_field]
            for field, of_field in ctx.scales.items()
        }
        graph, ctx.attention_graph = ctx.attention_graph, None
        # 2. Find the gradients that are needed
        needs_stream, needs_branch, *needs_tensors = ctx.needs_input_grad[CONSTANTS:]
        needs = dict(zip(ctx.input_dtypes, needs_tensors, strict=True))
        gradients = Gradients(
            needs_hidden=needs_stream or needs_branch,
            needed=frozenset(field for (field, _), need in needs.items() if need),
            updates=updates,
            dtype=ctx.input_dtypes["mlp_out", 0],
            # Norms may be fp32 beside fp16 matrices.
            sums_dtype=max(ctx.input_dtypes["mlp_out", 0], ctx.input_dtypes["norm_1", 0], key=lambda x: x.itemsize),
            partial=sums_together(d_mid.device),
        )
        with without_autocast(d_mid.device):
            call = BlockCall(ctx.settings, ctx.options, prepare(weights, ctx.dtype), ctx.dtype)
            # 3. Repeat what was not saved
            saved = stages.restore(call, of_stages, graph)
            # 4. Run the stages from the last to the first
            d_hidden = stages.backward(call, saved, Hidden(d_mid, d_branch), gradients)
            gradients.complete()
        # 5. Return the gradients in the order of the inputs, each in the dtype of its input
        d_stream, d_branch_in = d_hidden if d_hidden is not None else (None, None)
        found = _named_gradients(gradients, Counter(field for field, _ in needs))
        d_tensors = (found[name].to(ctx.input_dtypes[name]) if need else None for name, need in needs.items())
        return *[None] * CONSTANTS, d_stream, d_branch_in if ctx.has_branch else None, *d_tensors


def _named_gradients(found: Gradients, parts: Mapping[str, int]) -> dict[TensorName, Tensor]:
    """Gradients by the name of their tensor, given the number of parts of each field."""
    named = dict(found.factors)
    for field, gradient in found.weights.items():
        of_parts = gradient.chunk(parts[field]) if parts[field] > 1 else (gradient,)
        named |= {(field, part): x for part, x in enumerate(of_parts)}
    return named


# ---- copies of weights -----------------------------------------------------------------------------------------------


def prepare(weights: BlockWeights, dtype: torch.dtype) -> PreparedWeights:
    """Join weights in parts, and cast those of products to their dtype, all by one launch.

    In a captured step its update has made the casts (`casts.active`, None in other steps).
    """
    fields: dict[str, Any] = dict(vars(weights))
    if isinstance(weights.mlp_in_bias, tuple):
        fields["mlp_in_bias"] = torch.cat(weights.mlp_in_bias)
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for name, parts in weights.parts():
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

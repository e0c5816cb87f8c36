"""A fused block as an autograd node: `forward` and `backward` as a `torch.autograd.Function`.

Autograd takes and saves flat lists of tensors. They are made from dataclasses, and these from them, in this file
only: `_pack` replaces each tensor in a dataclass by its index in a list.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...ops.autocast import without_autocast
from .backward import backward, recompute
from .forward import Saved, forward
from .gradients import Gradients, Needed, Sums, sums_together
from .weights import PRODUCTS, BlockCall, BlockSettings, BlockWeights, Hidden, parts_of, prepare


@torch.compiler.disable  # the node holds an autograd graph, which would cause graph breaks
def fused_block(
    settings: BlockSettings, hidden: Hidden, weights: BlockWeights, query_rows: Tensor | slice | None = None
) -> Hidden:
    """Run one block over rows [R, W], or those of `query_rows`: int64 [Q], without duplicates, or a slice.

    `weights` are in the dtype of the stream; products run in `settings.dtype`, which is the dtype of the branches.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*hidden, *weights.tensors())):
        tensors: list[Tensor] = []
        layout = _pack((weights, weights.low_rank_updates()), tensors)
        # The gradient of an updated weight goes to its factors.
        tensors = [x.detach() if hasattr(x, "low_rank") else x for x in tensors]
        return Hidden(*_FusedBlock.apply(settings, query_rows, layout, *hidden, *tensors))
    with without_autocast(hidden.stream.device):
        call = BlockCall(settings, prepare(weights, settings.dtype), query_rows)
        return forward(call, hidden, record=False)[0]


class _FusedBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        settings: BlockSettings,
        query_rows: Tensor | slice | None,
        layout: Any,
        stream: Tensor,
        branch: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        record = not settings.save_inputs_only
        weights: BlockWeights = _unpack(layout[0], tensors)
        with without_autocast(stream.device):
            prepared = prepare(weights, settings.dtype)
            out, hidden, saved = forward(BlockCall(settings, prepared, query_rows), Hidden(stream, branch), record)
        ctx.attention = saved.attention if saved else None  # its graph cannot be saved as tensors
        casts: dict[str, Tensor] = {}
        if saved:
            saved = replace(saved, attention=None, inner=None if settings.recompute_mlp else saved.inner)
            if weights.proj.dtype != settings.dtype:
                casts = {name: getattr(prepared, name) for name in PRODUCTS}
                tensors = _without_computed(tensors, len(weights.tensors()))
        kept = list(tensors)
        ctx.settings, ctx.has_branch, ctx.inputs = settings, branch is not None, layout
        ctx.kept = _pack((casts, query_rows, saved or hidden), kept)
        ctx.save_for_backward(*kept)
        return out.stream, out.branch

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_mid: Tensor, d_branch: Tensor) -> tuple[Tensor | None, ...]:
        settings, tensors = ctx.settings, ctx.saved_tensors
        weights, updates = _unpack(ctx.inputs, tensors)
        casts, query_rows, saved = _unpack(ctx.kept, tensors)
        attention, ctx.attention = ctx.attention, None  # frees its graph; a second backward records another
        *_, needs_stream, needs_branch = ctx.needs_input_grad[:5]
        needs = ctx.needs_input_grad[5:]  # of weights and factors
        fields = ctx.inputs[0].fields.items()
        trained = frozenset(name for name, x in fields if any(needs[i] for i in parts_of(x) if i is not None))
        gradients = _gradients(Needed(needs_stream or needs_branch, trained, updates), weights)
        with without_autocast(d_mid.device):
            call = BlockCall(settings, prepare(weights, settings.dtype, casts), query_rows)
            if isinstance(saved, Saved):
                saved = recompute(call, replace(saved, attention=attention))
            else:  # only the inputs
                saved = forward(call, Hidden(saved), record=True)[2]
            backward(call, saved, Hidden(d_mid, d_branch), gradients)
            gradients.complete()
        d_branch_in = gradients.branch if ctx.has_branch else None
        return None, None, None, gradients.stream, d_branch_in, *_in_order(gradients, ctx.inputs, tensors, needs)


def _gradients(needed: Needed, weights: BlockWeights) -> Gradients:
    """Gradients of these weights, none of which is computed yet."""
    dtype, device = weights.proj.dtype, weights.proj.device
    sums_dtype = max(dtype, weights.norm_1.dtype, key=lambda x: x.itemsize)  # norms may be fp32 beside fp16 matrices
    return Gradients(needed, dtype, Sums(sums_dtype, sums_together(device)))


def _in_order(gradients: Gradients, layout: Any, tensors: Sequence[Tensor], needs: Sequence[bool]) -> Iterator[Any]:
    """Yield the gradients of the tensors of weights and updates, each in the dtype of its tensor, or None."""
    weights, updates = layout
    found: dict[int, Tensor] = {}
    for name in gradients.needed.weights:
        indices, gradient = parts_of(weights.fields[name]), gradients.weights[name]
        found |= zip(indices, gradient.chunk(len(indices)) if len(indices) > 1 else (gradient,), strict=True)
    for name, packed in updates.items():
        for update in packed:
            factors = update.fields["down"], update.fields["up"]
            found |= zip(factors, gradients.factors[name, update.fields["part"]], strict=True)
    for i, need in enumerate(needs):
        yield found[i].to(tensors[i].dtype) if need else None


def _without_computed(tensors: Sequence[Tensor], count: int) -> tuple[Tensor, ...]:
    """Empty tensors for the computed matrices (updated, scaled) among the first `count`, the weights.

    They would be saved beside their casts, although backward reads only the casts.
    """
    return tuple(
        x.new_empty(0) if i < count and x.ndim == 2 and not isinstance(x, nn.Parameter) else x
        for i, x in enumerate(tensors)
    )


# ---- flat lists ------------------------------------------------------------------------------------------------------


class _Index(int):
    """Index of a tensor in a flat list."""


class _Packed(NamedTuple):
    """A dataclass with indices in the place of tensors."""

    kind: type
    fields: dict[str, Any]


def _pack(record: Any, tensors: list[Tensor]) -> Any:
    """Append the tensors in a dataclass, tuple, list or dictionary to a list, and return it with their indices."""
    if isinstance(record, Tensor):
        tensors.append(record)
        return _Index(len(tensors) - 1)
    if isinstance(record, dict):
        return {name: _pack(x, tensors) for name, x in record.items()}
    if isinstance(record, (tuple, list)):
        return tuple(_pack(x, tensors) for x in record)
    if record is not None and is_dataclass(record):
        return _Packed(type(record), _pack(vars(record), tensors))
    return record


def _unpack(packed: Any, tensors: Sequence[Tensor]) -> Any:
    """Put tensors in the place of their indices."""
    if isinstance(packed, _Index):
        return tensors[packed]
    if isinstance(packed, dict):
        return {name: _unpack(x, tensors) for name, x in packed.items()}
    if isinstance(packed, _Packed):
        return packed.kind(**_unpack(packed.fields, tensors))
    if isinstance(packed, tuple):
        return tuple(_unpack(x, tensors) for x in packed)
    return packed

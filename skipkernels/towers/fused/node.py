"""A fused block as an autograd node: a `torch.autograd.Function` around the stages of `forward.py` and `backward.py`.

Autograd takes and saves flat lists of tensors. They are made from records, and these from them, in this file only:
`_pack` moves the tensors of a record to a list and leaves their indices in it, and `_unpack` puts tensors back.
Names of packed records begin with `packed_`: in their fields of type Tensor is an index.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...reference import without_autocast
from . import backward as backward_stages
from . import forward as forward_stages
from .forward import Saved
from .gradients import Gradients, Needed, PendingSums, sums_together
from .records import CAST_FIELDS, BlockCall, BlockReading, BlockWeights, Hidden, LowRankFactors, RowsCall, prepare

Updates = Mapping[str, Sequence[LowRankFactors]]


@torch.compiler.disable  # the node holds an autograd graph, which would cause graph breaks
def fused_block(block: BlockReading, hidden: Hidden, how: RowsCall, dtype: torch.dtype) -> Hidden:
    """Run one block over rows [R, W], and return [Q, W].

    Weights are in the dtype of the stream; products run in `dtype`, which is the dtype of the branches.
    """
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (*hidden, *block.weights.tensors())):
        tensors: list[Tensor] = []
        inputs = _Inputs(*_pack((block, block.weights.low_rank_updates()), tensors))
        # The gradient of an updated weight goes to its factors; `low_rank` is set in `towers/low_rank.py`.
        tensors = [x.detach() if hasattr(x, "low_rank") else x for x in tensors]
        return Hidden(*_BlockFunction.apply(inputs, how, dtype, *hidden, *tensors))
    with without_autocast(hidden.stream.device):
        call = BlockCall(block, how, prepare(block.weights, dtype), dtype)
        return forward_stages.forward(call, hidden, record=False).out


class _Inputs(NamedTuple):
    """Tensors that the node takes, as packed records."""

    packed_block: Any  # `BlockReading`
    packed_updates: Any  # low-rank updates by field, `Updates`

    def needed_fields(self, needs: Sequence[bool]) -> frozenset[str]:
        """Fields of weights of which a part needs a gradient, given which tensors need one."""
        return frozenset(name for name, indices in self.packed_block.weights.parts() if any(needs[i] for i in indices))

    def gradients(self, found: Gradients) -> dict[int, Tensor]:
        """Gradients by the index of their tensor."""
        by_index: dict[int, Tensor] = {}
        for name, indices in self.packed_block.weights.parts():
            if name in found.needed.fields:
                gradient = found.weights[name]
                parts = gradient.chunk(len(indices)) if len(indices) > 1 else (gradient,)
                by_index |= zip(indices, parts, strict=True)
        for name, updates in self.packed_updates.items():
            for update in updates:
                by_index[update.down], by_index[update.up] = found.factors[name, update.part]
        return by_index


@dataclass(frozen=True)
class _Saved:
    """Tensors that are saved for backward: weights, and what the stages saved, or else the input alone."""

    block: BlockReading
    updates: Updates
    casts: dict[str, Tensor | None]  # casts of weights by field, if they were cast
    query_rows: Tensor | slice | None
    recorded: Saved | None  # without the graph of attention
    hidden: Tensor | None  # with memory="min"


class _BlockFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: _Inputs,
        how: RowsCall,
        dtype: torch.dtype,
        stream: Tensor,
        branch: Tensor | None,
        *tensors: Tensor,
    ) -> tuple[Tensor, Tensor | None]:
        block, updates = _unpack(inputs.packed_block, tensors), _unpack(inputs.packed_updates, tensors)
        with without_autocast(stream.device):
            call = BlockCall(block, how, prepare(block.weights, dtype), dtype)
            out, hidden, recorded = forward_stages.forward(call, Hidden(stream, branch), record=how.memory != "min")
        # The graph cannot be saved as tensors.
        ctx.attention_graph = None if recorded is None else recorded.attention_graph
        to_save: list[Tensor] = []
        ctx.packed_saved = _pack(_to_save(call, updates, recorded, hidden), to_save)
        ctx.save_for_backward(*to_save)
        # query_rows may be a tensor: it is among the saved ones, and backward puts it back.
        ctx.inputs, ctx.how, ctx.dtype = inputs, how._replace(query_rows=None), dtype
        ctx.dtypes, ctx.has_branch = [x.dtype for x in tensors], branch is not None
        return out.stream, out.branch

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_mid: Tensor, d_branch: Tensor) -> tuple[Tensor | None, ...]:
        # 1. Put the saved tensors into records again
        saved: _Saved = _unpack(ctx.packed_saved, ctx.saved_tensors)
        weights, dtype = saved.block.weights, ctx.dtype
        how = ctx.how._replace(query_rows=saved.query_rows)
        graph, ctx.attention_graph = ctx.attention_graph, None  # frees it; a second backward records another
        # 2. Find the gradients that are needed
        _, _, _, needs_stream, needs_branch, *needs = ctx.needs_input_grad
        needed = Needed(needs_stream or needs_branch, ctx.inputs.needed_fields(needs), saved.updates)
        gradients = _gradients(needed, weights)
        with without_autocast(d_mid.device):
            call = BlockCall(saved.block, how, prepare(weights, dtype, saved.casts), dtype)
            # 3. Recompute what was not saved
            if saved.recorded is None:
                assert saved.hidden is not None
                recorded = forward_stages.forward(call, Hidden(saved.hidden), record=True).saved
            else:
                recorded = backward_stages.recompute(call, replace(saved.recorded, attention_graph=graph))
            assert recorded is not None
            # 4. Run the stages from the last to the first
            d_hidden = backward_stages.backward(call, recorded, Hidden(d_mid, d_branch), gradients)
            gradients.complete()
        # 5. Return the gradients in the order of the inputs, each in the dtype of its input
        d_stream, d_branch_in = d_hidden if d_hidden is not None else (None, None)
        return None, None, None, d_stream, d_branch_in if ctx.has_branch else None, *_in_order(ctx, gradients, needs)


def _to_save(call: BlockCall, updates: Updates, recorded: Saved | None, hidden: Tensor) -> _Saved:
    """Select what `memory` saves; the table is in `forward.py`."""
    block, query_rows = call.block, call.how.query_rows
    if recorded is None:  # "min"
        return _Saved(block, updates, {}, query_rows, None, hidden)
    # "balanced": without inner; "fast": everything
    inner = None if call.how.memory == "balanced" else recorded.inner
    recorded, casts = replace(recorded, attention_graph=None, inner=inner), {}
    if block.weights.proj.dtype != call.dtype:
        casts = {name: getattr(call.weights, name) for name in CAST_FIELDS}
        block = replace(block, weights=_without_computed(block.weights))
    return _Saved(block, updates, casts, query_rows, recorded, None)


def _gradients(needed: Needed, weights: BlockWeights) -> Gradients:
    """Gradients of these weights, none of which is computed yet."""
    dtype, device = weights.proj.dtype, weights.proj.device
    sums_dtype = max(dtype, weights.norm_1.dtype, key=lambda x: x.itemsize)  # norms may be fp32 beside fp16 matrices
    return Gradients(needed, dtype, PendingSums(sums_dtype, sums_together(device)))


def _in_order(ctx: Any, gradients: Gradients, needs: Sequence[bool]) -> Iterator[Tensor | None]:
    """Yield the gradient of each tensor, or None if it needs none."""
    found = ctx.inputs.gradients(gradients)
    for i, (need, dtype) in enumerate(zip(needs, ctx.dtypes, strict=True)):
        yield found[i].to(dtype) if need else None


def _without_computed(weights: BlockWeights) -> BlockWeights:
    """Weights with empty tensors for those that were computed (updated, scaled) and then cast.

    Backward reads their casts. Saving them as well would keep them in memory; a parameter is there in any case.
    """

    def kept(x: Tensor) -> Tensor:
        return x if isinstance(x, nn.Parameter) else x.new_empty(0)

    fields = {name: tuple(map(kept, parts)) for name, parts in weights.parts() if name in CAST_FIELDS}
    changes: dict[str, Any] = {name: parts if len(parts) > 1 else parts[0] for name, parts in fields.items()}
    return replace(weights, **changes)


# ---- flat lists ------------------------------------------------------------------------------------------------------


class _Index(int):
    """Index of a tensor in a flat list."""


def _pack(record: Any, tensors: list[Tensor]) -> Any:
    """Append the tensors in a record to a list, and return the record with their indices in their place.

    tensors = [a]; _pack({"x": b, "eps": 1e-5}, tensors) returns {"x": _Index(1), "eps": 1e-5}, and tensors is [a, b].
    _unpack({"x": _Index(1), "eps": 1e-5}, tensors) returns {"x": b, "eps": 1e-5}.
    """
    if isinstance(record, Tensor):
        tensors.append(record)
        return _Index(len(tensors) - 1)
    return _rebuilt(record, lambda x: _pack(x, tensors))


def _unpack(record: Any, tensors: Sequence[Tensor]) -> Any:
    """Return a packed record with tensors in the place of their indices."""
    if isinstance(record, _Index):
        return tensors[record]
    return _rebuilt(record, lambda x: _unpack(x, tensors))


def _rebuilt(record: Any, function: Callable[[Any], Any]) -> Any:
    """Return a dataclass, dictionary, tuple or list with a function of each of its elements; anything else as it is.

    Lists and NamedTuples become tuples.
    """
    if isinstance(record, dict):
        return {name: function(x) for name, x in record.items()}
    if isinstance(record, (tuple, list)):
        return tuple(map(function, record))
    if is_dataclass(record) and not isinstance(record, type):
        return type(record)(**{name: function(x) for name, x in vars(record).items()})
    return record

"""Loss of a batch that is encoded in chunks, with the activation memory of one chunk (GradCache).

1. Encode all chunks without a graph, and compute the loss and its gradients with respect to the embeddings [B, D].
2. In backward, encode chunk after chunk again, and propagate the gradients of its embeddings to the parameters.

The gradients are those of the whole batch. Saved for backward: the inputs, and the gradients of the embeddings. The
loss is one node of the graph, with the parameters as inputs: each parameter gets its gradient once in a backward, so
hooks on parameters, as of `DistributedDataParallel` and of `FusedSGD`, are called as without chunks.

Source: Gao et al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup", arXiv 2101.06983.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dtypes import autocast_dtype, without_autocast


class Part(NamedTuple):
    """A batch, and the function that encodes rows of it to embeddings [n, D]."""

    encode: Callable[[Tensor], Tensor]
    batch: Tensor


def encoded_loss(
    parts: Sequence[Part],
    loss_of: Callable[..., Tensor],
    numbers: Iterable[Tensor | float | None],
    parameters: Iterable[Tensor],
    chunk: int | None,
) -> Tensor:
    """Compute `loss_of` the embeddings [B, D] of each part, from at most `chunk` rows at a time; None: from all.

    `numbers` are what `loss_of` depends on besides, a scale and a bias; `parameters` are what the encoders depend on.
    """
    if chunk is None:
        return loss_of(*(part.encode(part.batch) for part in parts))
    # 1. Embeddings of all chunks, without a graph
    encoders, embeddings = [], []
    for part in parts:
        encoders.append(encoder := _Encoder(part.encode, chunk, part.batch.device))
        embeddings.append(encoder.first_pass(part.batch))
    if not torch.is_grad_enabled():
        return loss_of(*embeddings)
    # 2. The loss, and its gradients with respect to embeddings and numbers. Those of fp16 embeddings are fp32: they
    #    have no factor of a GradScaler yet, and could underflow.
    widens = any(x.dtype == torch.float16 for x in embeddings)
    leaves = [(x.float() if widens else x).detach().requires_grad_() for x in embeddings]
    with without_autocast(leaves[0].device) if widens else contextlib.nullcontext():
        loss = loss_of(*leaves)
    trained_numbers = [x for x in numbers if isinstance(x, Tensor) and x.requires_grad]
    trained = [x for x in parameters if x.requires_grad and not any(x is number for number in trained_numbers)]
    gradients = torch.autograd.grad(loss, [*leaves, *trained_numbers], materialize_grads=True)
    # 3. A node of the graph that encodes the chunks again in backward
    batches = [part.batch for part in parts]
    return _Chunked.apply(encoders, trained, loss.detach(), batches, gradients, *trained_numbers, *trained)


class _Encoder:
    """Encodes a batch in chunks, twice with the same random numbers and autocast, those at construction."""

    def __init__(self, encode: Callable[[Tensor], Tensor], chunk: int, device: torch.device):
        self.encode, self.chunk, self.device = encode, chunk, device
        self.autocast_dtype = autocast_dtype(device)
        self.cpu_state = torch.get_rng_state()
        # Of the device, if it has a generator of its own. torch.utils.checkpoint saves it too, but not on MPS.
        self.devices = [] if device.type == "cpu" else [device]
        self.device_states = [torch.get_device_module(x).get_rng_state(x) for x in self.devices]

    def first_pass(self, batch: Tensor) -> Tensor:
        """Embeddings [B, D] of a batch, without a graph."""
        with torch.no_grad(), self._autocast():
            return torch.cat([self.encode(x) for x in batch.split(self.chunk)])

    def second_pass(self, batch: Tensor, d_embedding: Tensor, trained: Sequence[Tensor]) -> list[Tensor | None]:
        """Gradients of the trained parameters, from those of the embeddings [B, D]."""
        sums: list[Tensor | None] = [None] * len(trained)
        with torch.random.fork_rng(self.devices, device_type=self.device.type):
            torch.set_rng_state(self.cpu_state)
            for device, state in zip(self.devices, self.device_states, strict=True):
                torch.get_device_module(device).set_rng_state(state, device)
            for x, d_rows in zip(batch.split(self.chunk), d_embedding.split(self.chunk), strict=True):
                with torch.enable_grad(), self._autocast():
                    embedding = self.encode(x)
                if not embedding.requires_grad:  # of a tower that does not train
                    break
                sums = _add(
                    sums, torch.autograd.grad(embedding, trained, d_rows.to(embedding.dtype), allow_unused=True)
                )
        return sums

    def _autocast(self) -> torch.autocast:
        # Casts are not cached, since those made without a graph must not be used by later calls.
        dtype = self.autocast_dtype
        return torch.autocast(self.device.type, dtype, enabled=dtype is not None, cache_enabled=False)


class _Chunked(torch.autograd.Function):
    """A loss with known gradients of embeddings and numbers, as a function of numbers and trained parameters."""

    @staticmethod
    def forward(
        ctx: Any,
        encoders: list[_Encoder],
        trained: list[Tensor],
        loss: Tensor,
        batches: list[Tensor],
        gradients: list[Tensor],
        *inputs: Tensor,
    ) -> Tensor:
        ctx.encoders, ctx.trained, ctx.versions = encoders, trained, [x._version for x in trained]
        ctx.save_for_backward(*batches, *gradients)
        return loss.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        encoders, trained = ctx.encoders, ctx.trained
        saved, count = ctx.saved_tensors, len(encoders)
        batches, d_embeddings, d_numbers = saved[:count], saved[count : 2 * count], saved[2 * count :]
        if ctx.versions != [x._version for x in trained]:
            raise RuntimeError(
                "pair_loss: weights changed between the loss with chunk and its backward, which encodes the "
                "batch again. Call backward before the optimizer's step."
            )
        sums: list[Tensor | None] = [None] * len(trained)
        for encoder, batch, d_embedding in zip(encoders, batches, d_embeddings, strict=True):
            sums = _add(sums, encoder.second_pass(batch, d_loss * d_embedding, trained))
        return None, None, None, None, None, *(d_loss * x for x in d_numbers), *sums


def _add(sums: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Add gradients, of which None is zero; not in place, since two parameters may share a gradient."""
    return [a if b is None else b if a is None else a + b for a, b in zip(sums, gradients, strict=True)]

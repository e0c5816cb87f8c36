"""`pooled_attention` at the sizes of the last block: the class token of some images, the last token of many prompts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F

from skipkernels import functional, reference

from . import Case, with_gradients


def cases(dtype: torch.dtype) -> Iterator[Case]:
    rng = torch.Generator().manual_seed(0)
    for B, N, H, E in ((4, 197, 12, 64), (32, 197, 12, 64), (4, 577, 16, 64), (26, 11, 8, 64), (1380, 11, 8, 64)):
        query = torch.randn(B, H, E, generator=rng).to(dtype).requires_grad_()
        # Keys and values as a tower has them: two views of one projection.
        projection = torch.randn(B, N, 2, H, E, generator=rng).to(dtype)
        key, value = (x.detach().requires_grad_() for x in projection.unbind(2))
        d_out = torch.randn(B, H, E, generator=rng).to(dtype)

        def ours(query=query, key=key, value=value):
            return [functional.pooled_attention(query, key, value)]

        def eager(query=query, key=key, value=value):
            return [
                F.scaled_dot_product_attention(query[:, :, None], key.transpose(1, 2), value.transpose(1, 2))[:, :, 0]
            ]

        def truth(query=query, key=key, value=value, d_out=d_out):
            inputs = [x.detach().double().requires_grad_() for x in (query, key, value)]
            return with_gradients(lambda: [reference.pooled_attention(*inputs)], inputs, [d_out.double()])()

        inputs = [query, key, value]
        yield Case(
            shape=f"B{B}-N{N}-H{H}-E{E}",
            runs={
                name: with_gradients(run, inputs, [d_out]) for name, run in (("skipkernels", ours), ("eager", eager))
            },
            truth=truth,
            # Keys and values are read twice and their gradients written; of query and result there is one row each.
            moved=(6 * B * N + 6 * B) * H * E * dtype.itemsize,
            flops=12 * B * N * H * E,
            target="≥ 1",
        )

"""Calls of the operators that reach every Triton kernel and every entry of its block tables.

`CALLS[name](dtype)` yields arguments for `registration.definitions[name].launch`. The first call of an operator is the
one it is used for; the others reach what the first does not. Tensors are on the meta device: nothing is read or
allocated, so that shapes are those of real jobs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
DTYPES_OF = {"gather_rows": DTYPES | {"int8": torch.int8}}


class Call(NamedTuple):
    shape: str
    """As in the ids of the tests: B4-C1000-D512."""
    arguments: tuple[Any, ...]


def on_meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ids(*shape: int) -> Tensor:
    return on_meta(*shape, dtype=torch.int64)


def class_scores(dtype: torch.dtype) -> Iterator[Call]:
    for B, C, D in ((4, 1000, 512), (4, 21841, 512), (5, 1001, 100)):
        yield Call(f"B{B}-C{C}-D{D}", (on_meta(B, D, dtype=dtype), on_meta(C, D, dtype=dtype), ids(B)))


CALLS: dict[str, Callable[[torch.dtype], Iterator[Call]]] = {
    "class_scores": class_scores,
}

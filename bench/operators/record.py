"""The record of an operator, the last statement of its module: all that the tables of benchmarks and tests need.

From the records come the microbenchmarks (`cases`), the kernels that are compiled ahead of time and counted
(`bench.launches`), the FLOPs of a call (`bench.flops`), and a small call of each public function.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from skipkernels import functional
from skipkernels.ops import OPERATORS

from ..measure import CPU, DTYPES
from . import Case, Random


class Call(NamedTuple):
    """Arguments of an operator for `registration.definitions[name].launch`, on the meta device."""

    shape: str
    """Shape in the form of test ids: B4-C1000-D512."""
    arguments: tuple[Any, ...]


class Record(NamedTuple):
    """Cases, launches, small calls and FLOPs of an operator."""

    cases: Callable[[torch.dtype, torch.device], Iterator[Case]]
    launches: dict[str, Callable[[torch.dtype], Iterator[Call]]]
    """Calls of the registered operators, by name, that reach every Triton kernel. The first call is the typical one.
    Shapes can be those of real jobs."""
    small_calls: dict[str, Callable[[Random], tuple[dict[str, Tensor], dict[str, Any]]]]
    """Differentiable arguments, and the others, of a small call with all tensors, by the name of a public function."""
    widths: dict[str, Callable[[torch.dtype], Iterator[Call]]] = {}
    """Calls of these at other widths of rows or heads, for the other entries of the tables: up to the widest with a
    Triton kernel, where a tile has whole rows."""
    flops: dict[str, Callable[..., int]] = {}
    """FLOPs of matrix products of the registered operators, by name, from the shapes of their arguments."""


@functools.cache
def records() -> dict[str, Record]:
    """The record of each operator in `OPERATORS`."""
    return {name: importlib.import_module(f"{__package__}.{name.rstrip('_')}").RECORD for name in OPERATORS}


def cases_of(op: str, dtype: str, device: torch.device) -> Iterator[Case]:
    """The cases of an operator, by the names of operator and dtype."""
    return records()[op].cases(DTYPES[dtype], device)


def on_meta(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def ids(*shape: int) -> Tensor:
    return on_meta(*shape, dtype=torch.int64)


class SmallCall(NamedTuple):
    """A small call of a function of `functional` with all of its tensors, for properties of all operators."""

    name: str
    inputs: dict[str, Tensor]
    """The differentiable arguments."""
    options: dict[str, Any]

    def on(self, device: torch.device) -> SmallCall:
        """The same call on a device."""
        return SmallCall(*tree_map_only(Tensor, lambda x: x.to(device), tuple(self)))

    def total(self, *inputs: Tensor, module: Any = functional) -> Tensor:
        """Sum of the squared results of the operator, or of its reference, for `inputs` (default: its own)."""
        named = dict(zip(self.inputs, inputs or self.inputs.values(), strict=True))
        out = getattr(module, self.name)(**named, **self.options)
        results = out if isinstance(out, tuple) else (out,)
        return sum((x.square().sum() for x in results if x is not None), start=torch.zeros(()))


def small_call(name: str) -> SmallCall:
    """A small call of a function in `functional.__all__`."""
    make = next(record.small_calls[name] for record in records().values() if name in record.small_calls)
    return SmallCall(name, *make(Random(torch.float32, CPU)))

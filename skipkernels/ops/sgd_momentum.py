"""`sgd_momentum_`: one step of SGD with momentum for a list of tensors, in place.

    g = grad + weight_decay · weight;   buffer ← momentum · buffer + g;   weight ← weight − lr · buffer

With `casts`, copies of the weights in 16 bits are written too; an empty tensor means no copy of this weight.

Learning rate, momentum, weight decay and the seed of stochastic rounding are tensors on the device, so that a captured
graph reads new values at each replay. Each product is rounded as in the reference: all kernels return the same bits.

A list (a model has some 150 parameters, most of them small) is one parallel region on the CPU and one launch on a GPU.
The kernel reads the addresses and sizes of the tensors from tables on the device, which are kept between calls.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from . import registration
from .launching import launch, tl, triton

BLOCK = 2048  # elements per program
LANES, LANES_RANDOM = 8, 4  # elements per group; with stochastic rounding, those that share a hash
NUM_WARPS = 4
COLUMNS = 7  # in the table: addresses of weight, buffer and cast (or 0), elements, offset, first program, vectorised
MAX_TABLES = 512  # kept between calls; 8 bytes per number

_TRITON_DTYPES = {
    getattr(torch, name): getattr(tl, name, None) for name in ("float32", "bfloat16", "float16", "float64")
}


@triton.jit
def _update(
    weight,
    grad,
    momentum_buffer,
    cast,
    numel,
    first,
    block,
    lr,
    seed,
    momentum,
    weight_decay,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENTUM_BUFFER: tl.constexpr,
    CAST: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    VECTORISED: tl.constexpr,
):
    """Update GROUPS groups of LANES elements of one tensor; the first four arguments are addresses."""
    # 1. Elements of the groups
    group = block * GROUPS + tl.arange(0, GROUPS)
    lane = tl.arange(0, LANES)
    offs = group[:, None] * LANES + lane[None, :]  # [GROUPS, LANES]
    weight_ptr = weight.to(tl.pointer_type(WEIGHT))
    grad_ptr = grad.to(tl.pointer_type(GRAD))
    momentum_buffer_ptr = momentum_buffer.to(tl.pointer_type(MOMENTUM_BUFFER))
    # Addresses and numel are multiples of 16, and `first` is one of LANES
    if VECTORISED:
        weight_ptr = tl.multiple_of(weight_ptr, 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        momentum_buffer_ptr = tl.multiple_of(momentum_buffer_ptr, 16)
        mask = offs < numel // 16 * 16  # the product tells the compiler that groups are masked as a whole
    else:
        if STOCHASTIC:
            # Groups are those that share a hash: the first may begin before the tensor
            offs -= first % LANES
        mask = (offs >= 0) & (offs < numel)

    # 2. Momentum and step
    weight = tl.load(weight_ptr + offs, mask=mask).to(tl.float32)  # [GROUPS, LANES]
    grad = tl.load(grad_ptr + offs, mask=mask).to(tl.float32)  # [GROUPS, LANES]
    momentum_buffer = tl.load(momentum_buffer_ptr + offs, mask=mask).to(tl.float32)  # [GROUPS, LANES]

    momentum_buffer = momentum * momentum_buffer + (grad + weight_decay * weight)  # [GROUPS, LANES]
    weight = weight - lr * momentum_buffer
    # [GROUPS, LANES]
    tl.store(momentum_buffer_ptr + offs, momentum_buffer.to(momentum_buffer_ptr.dtype.element_ty), mask=mask)

    # 3. Stochastic rounding: add random bits below the last bit of bf16 and truncate
    if STOCHASTIC:
        # SplitMix64: one hash of 64 bits per group, 16 bits per lane
        x = seed.to(tl.uint64) + ((first // LANES + group).to(tl.uint64) + 1) * 0x9E3779B97F4A7C15  # [GROUPS]
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB
        x = x ^ (x >> 31)
        random = ((x[:, None] >> (16 * lane[None, :]).to(tl.uint64)) & 0xFFFF).to(tl.uint32)  # [GROUPS, LANES]
        bits = weight.to(tl.uint32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        weight = tl.where(finite, (bits + random) & 0xFFFF0000, bits).to(tl.float32, bitcast=True)
    tl.store(weight_ptr + offs, weight.to(weight_ptr.dtype.element_ty), mask=mask)  # [GROUPS, LANES]

    # 4. Copy in 16 bits
    if CAST is not None:
        if cast != 0:
            cast_ptr = cast.to(tl.pointer_type(CAST))
            if VECTORISED:
                cast_ptr = tl.multiple_of(cast_ptr, 16)
            tl.store(cast_ptr + offs, weight.to(CAST), mask=mask)  # [GROUPS, LANES]


@triton.jit
def _sgd_momentum_kernel(
    tensors_ptr,
    grads_ptr,
    programs_ptr,
    lr_ptr,
    momentum_ptr,
    weight_decay_ptr,
    seed_ptr,
    WEIGHT: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENTUM_BUFFER: tl.constexpr,
    CAST: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    GROUPS: tl.constexpr,
    LANES: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """buffer ← momentum · buffer + grad + weight_decay · weight; weight ← weight − lr · buffer.

    One program: GROUPS · LANES elements of one tensor. Tables: int64 [tensors, COLUMNS], addresses of the gradients
    [tensors], and the tensor of each program.
    """
    tensor = tl.load(programs_ptr + tl.program_id(0))
    row_ptr = tensors_ptr + tensor * COLUMNS
    weight = tl.load(row_ptr)
    momentum_buffer = tl.load(row_ptr + 1)
    grad = tl.load(grads_ptr + tensor)
    cast = tl.load(row_ptr + 2)
    numel = tl.load(row_ptr + 3)
    first = tl.load(row_ptr + 4)
    block = tl.program_id(0) - tl.load(row_ptr + 5)
    vectorised = tl.load(row_ptr + 6)
    lr = tl.load(lr_ptr).to(tl.float32)
    momentum = tl.load(momentum_ptr).to(tl.float32)
    weight_decay = tl.load(weight_decay_ptr).to(tl.float32)
    seed = tl.load(seed_ptr) if STOCHASTIC else 0
    # Two calls, since VECTORISED is known to the compiler and the table is not.
    # fmt: off
    if vectorised != 0:
        _update(weight, grad, momentum_buffer, cast, numel, first, block, lr, seed, momentum, weight_decay,
                WEIGHT, GRAD, MOMENTUM_BUFFER, CAST, STOCHASTIC, GROUPS, LANES, VECTORISED=True)
    else:
        _update(weight, grad, momentum_buffer, cast, numel, first, block, lr, seed, momentum, weight_decay,
                WEIGHT, GRAD, MOMENTUM_BUFFER, CAST, STOCHASTIC, GROUPS, LANES, VECTORISED=False)
    # fmt: on


class Call(NamedTuple):
    """Arguments of the operator, in the order of its schema."""

    weights: list[Tensor]
    grads: list[Tensor]
    momentum_buffers: list[Tensor]
    lr: Tensor
    momentum: Tensor
    weight_decay: Tensor
    seed: Tensor | None
    offsets: Sequence[int] | None
    casts: list[Tensor]


class _Tensors(NamedTuple):
    """One tensor of the list, contiguous, with its copy, if any, and the offset of its random bits."""

    weight: Tensor
    grad: Tensor
    momentum_buffer: Tensor
    cast: Tensor | None
    first: int


def _launch(*arguments: Any) -> None:
    call = Call(*arguments)
    alike: dict[tuple[torch.dtype, torch.dtype], list[_Tensors]] = {}
    copies: list[tuple[Tensor, Tensor]] = []

    def contiguous(tensor: Tensor) -> Tensor:
        copy = tensor.contiguous()
        if copy is not tensor:
            copies.append((tensor, copy))
        return copy

    first = 0
    lists = zip(call.weights, call.grads, call.momentum_buffers, strict=True)
    for number, (weight, grad, momentum_buffer) in enumerate(lists):
        first = first if call.offsets is None else call.offsets[number]
        if weight.numel() > 0:
            cast = call.casts[number] if call.casts and call.casts[number].numel() > 0 else None
            tensors = _Tensors(contiguous(weight), grad.contiguous(), contiguous(momentum_buffer), cast, first)
            alike.setdefault((grad.dtype, momentum_buffer.dtype), []).append(tensors)
        first += weight.numel()
    for tensors_alike in alike.values():
        _launch_alike(tensors_alike, call)
    for tensor, copy in copies:
        tensor.copy_(copy)


def _launch_alike(tensors: list[_Tensors], call: Call) -> None:
    """Update tensors of the same dtypes in one launch."""
    weight, grad, momentum_buffer, *_ = tensors[0]
    cast = next((x.cast for x in tensors if x.cast is not None), None)
    device, lanes = weight.device, LANES if call.seed is None else LANES_RANDOM
    rows: list[int] = []
    programs: list[int] = []  # number of programs of each tensor
    begin = 0
    grad_addresses: list[int] = []
    for x in tensors:
        first = 0 if call.seed is None else x.first
        addresses = x.weight.data_ptr(), x.momentum_buffer.data_ptr(), 0 if x.cast is None else x.cast.data_ptr()
        grad_addresses.append(x.grad.data_ptr())
        numel = x.weight.numel()
        vectorised = all(n % 16 == 0 for n in (*addresses, grad_addresses[-1], numel)) and first % lanes == 0
        rows += (*addresses, numel, first, begin, vectorised)
        programs.append(triton.cdiv(first % lanes + numel, BLOCK))
        begin += programs[-1]
    launch(
        _sgd_momentum_kernel,
        (begin,),
        device=device,
        num_warps=NUM_WARPS,
        fp_fusion=False,
        tensors_ptr=_table(rows, device),  # [tensors · COLUMNS]
        grads_ptr=_table(grad_addresses, device),  # [tensors]
        programs_ptr=_table(programs, device, repeat=True),  # [programs]
        lr_ptr=call.lr,
        momentum_ptr=call.momentum,
        weight_decay_ptr=call.weight_decay,
        seed_ptr=call.seed,
        WEIGHT=_TRITON_DTYPES[weight.dtype],
        GRAD=_TRITON_DTYPES[grad.dtype],
        MOMENTUM_BUFFER=_TRITON_DTYPES[momentum_buffer.dtype],
        CAST=None if cast is None else _TRITON_DTYPES[cast.dtype],
        STOCHASTIC=call.seed is not None,
        GROUPS=BLOCK // lanes,
        LANES=lanes,
        COLUMNS=COLUMNS,
    )


_tables: dict[tuple[torch.device, bool, tuple[int, ...]], Tensor] = {}


class GraphTables:
    """Tables that the launches in a captured graph read; they must live as long as the graph.

    Addresses of gradients are known during the capture only. Their tables are allocated then, and written by `upload`
    after it: a copy in the graph would run in each replay.
    """

    def __init__(self) -> None:
        self._held: list[Tensor] = []
        self._missing: list[tuple[Tensor, Tensor]] = []  # table on the device, and its numbers

    def upload(self) -> None:
        """Write the tables that were allocated during the capture, on the current stream."""
        for table, numbers in self._missing:
            _write(table, numbers)
        self._missing.clear()


_of_graph: GraphTables | None = None  # of the graph that is being captured


@contextlib.contextmanager
def tables_of_graph() -> Iterator[GraphTables]:
    """Collect the tables of the launches that are captured in this context, also in threads of autograd."""
    global _of_graph
    _of_graph = GraphTables()
    try:
        yield _of_graph
    finally:
        _of_graph = None


def _table(numbers: Sequence[int], device: torch.device, *, repeat: bool = False) -> Tensor:
    """Return int64 numbers on a device, kept between calls; with `repeat`, index i numbers[i] times. No host sync."""
    key = device, repeat, tuple(numbers)
    table = _tables.get(key)
    if table is None:
        table = torch.tensor(numbers, dtype=torch.int64)
        if repeat:
            table = torch.arange(len(table)).repeat_interleave(table)
        if device.type != "cpu":
            on_host, table = table, torch.empty_like(table, device=device)
            if _of_graph is not None:
                _of_graph._held.append(table)
                _of_graph._missing.append((table, on_host))
                return table
            if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "sgd_momentum_: a captured graph can only read tensors of an earlier call; got new addresses. Make "
                    "the same call before the capture, or capture the training step with skipkernels.graphed."
                )
            _write(table, on_host)
        while len(_tables) >= MAX_TABLES:
            del _tables[next(iter(_tables))]
        _tables[key] = table
    if _of_graph is not None:
        _of_graph._held.append(table)
    return table


def _write(table: Tensor, numbers: Tensor) -> None:
    table.copy_(numbers.pin_memory() if table.is_cuda else numbers, non_blocking=True)


def _fake(weights: list[Tensor], *_: object) -> None:
    pass


sgd_momentum_ = registration.define(
    "sgd_momentum_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor lr, Tensor momentum,"
    " Tensor weight_decay, Tensor? seed, int[]? offsets, Tensor(c!)[] casts) -> ()",
    fallback=reference.sgd_momentum_,
    fake=_fake,
    launch=_launch,
)

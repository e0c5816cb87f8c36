"""`sgd_momentum_`: one step of SGD with momentum for a list of tensors, in place.

    g = grad + weight_decay · weight;   buffer ← momentum · buffer + g;   weight ← weight − lr · buffer

With `casts`, copies of the weights in 16 bits are written too; an empty tensor means no copy of this weight.

Learning rate, momentum, weight decay and the seed of stochastic rounding are tensors on the device, so that a captured
graph reads new values at each replay. Each product is rounded as in the reference: all kernels return the same bits.

A list (a model has some 150 parameters, most of them small) is one parallel region on the CPU and one launch on a GPU.
The kernel reads the addresses and sizes of the tensors from tables on the device, which are kept between calls, those
of the gradients from a table of their own: they are other tensors in each step. A captured graph has its own tables.
"""

from __future__ import annotations

import array
import contextlib
import functools
import threading
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reference
from ..checks import FEATURE_DTYPES, check_device, check_dtype
from . import launching, registration
from .launching import launch, launch_options, tl, triton

LANES, LANES_RANDOM = 8, 4  # elements per group; with stochastic rounding, those that share a hash
COLUMNS = 7  # in the table: addresses of weight, buffer and cast (or 0), elements, offset, first program, vectorised
MAX_TABLES = 512  # kept between calls; 8 bytes per number

_TRITON_DTYPES = {
    getattr(torch, name): getattr(tl, name, None) for name in ("float32", "bfloat16", "float16", "float64")
}


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


class Variant(NamedTuple):
    """Constants of a launch; the types are those of Triton."""

    weight: Any
    grad: Any
    momentum_buffer: Any
    cast: Any  # None: no weight has a copy
    stochastic: bool
    groups: int
    lanes: int


@triton.jit
def _rounded(weight, seed, first, group, lane, LANES: tl.constexpr):
    """Round stochastically to bf16: add random bits below its last bit and truncate. weight: [GROUPS, LANES]."""
    # SplitMix64: one hash of 64 bits per group, 16 bits per lane
    x = seed.to(tl.uint64) + ((first // LANES + group).to(tl.uint64) + 1) * 0x9E3779B97F4A7C15  # [GROUPS]
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = x ^ (x >> 31)
    random = ((x[:, None] >> (16 * lane[None, :]).to(tl.uint64)) & 0xFFFF).to(tl.uint32)  # [GROUPS, LANES]
    bits = weight.to(tl.uint32, bitcast=True)
    finite = (bits & 0x7F800000) != 0x7F800000
    return tl.where(finite, (bits + random) & 0xFFFF0000, bits).to(tl.float32, bitcast=True)


@triton.jit
def _update(row, grad, factors, seed, VARIANT: tl.constexpr, VECTORISED: tl.constexpr):
    """Update the elements of one tensor that a program has. `row` is that of the table, `grad` an address."""
    # 1. Elements of the groups
    weight, momentum_buffer, cast, numel, first, first_program = row
    lr, momentum, weight_decay = factors
    group = (tl.program_id(0) - first_program) * VARIANT.groups + tl.arange(0, VARIANT.groups)
    lane = tl.arange(0, VARIANT.lanes)
    offs = group[:, None] * VARIANT.lanes + lane[None, :]  # [GROUPS, LANES]
    weight_ptr = weight.to(tl.pointer_type(VARIANT.weight))
    grad_ptr = grad.to(tl.pointer_type(VARIANT.grad))
    momentum_buffer_ptr = momentum_buffer.to(tl.pointer_type(VARIANT.momentum_buffer))
    # Addresses and numel are multiples of 16, and `first` is one of LANES
    if VECTORISED:
        weight_ptr = tl.multiple_of(weight_ptr, 16)
        grad_ptr = tl.multiple_of(grad_ptr, 16)
        momentum_buffer_ptr = tl.multiple_of(momentum_buffer_ptr, 16)
        mask = offs < numel // 16 * 16  # the product tells the compiler that groups are masked as a whole
    else:
        if VARIANT.stochastic:
            # Groups are those that share a hash: the first may begin before the tensor
            offs -= first % VARIANT.lanes
        mask = (offs >= 0) & (offs < numel)

    # 2. Momentum and step
    weight = tl.load(weight_ptr + offs, mask=mask).to(tl.float32)  # [GROUPS, LANES]
    grad = tl.load(grad_ptr + offs, mask=mask).to(tl.float32)  # [GROUPS, LANES]
    momentum_buffer = tl.load(momentum_buffer_ptr + offs, mask=mask).to(tl.float32)  # [GROUPS, LANES]

    momentum_buffer = momentum * momentum_buffer + (grad + weight_decay * weight)  # [GROUPS, LANES]
    weight = weight - lr * momentum_buffer
    tl.store(momentum_buffer_ptr + offs, momentum_buffer.to(VARIANT.momentum_buffer), mask=mask)  # [GROUPS, LANES]
    if VARIANT.stochastic:
        weight = _rounded(weight, seed, first, group, lane, VARIANT.lanes)  # [GROUPS, LANES]
    tl.store(weight_ptr + offs, weight.to(VARIANT.weight), mask=mask)  # [GROUPS, LANES]

    # 3. Copy in 16 bits
    if VARIANT.cast is not None:
        if cast != 0:
            cast_ptr = cast.to(tl.pointer_type(VARIANT.cast))
            if VECTORISED:
                cast_ptr = tl.multiple_of(cast_ptr, 16)
            tl.store(cast_ptr + offs, weight.to(VARIANT.cast), mask=mask)  # [GROUPS, LANES]


@triton.jit
def _sgd_momentum_kernel(
    tensors_ptr,
    grads_ptr,
    programs_ptr,
    lr_ptr,
    momentum_ptr,
    weight_decay_ptr,
    seed_ptr,
    COLUMNS: tl.constexpr,
    VARIANT: tl.constexpr,
):
    """buffer ← momentum · buffer + grad + weight_decay · weight; weight ← weight − lr · buffer.

    One program: some elements of one tensor, groups · lanes. Tables: int64 [tensors, COLUMNS], addresses of the
    gradients [tensors], and the tensor of each program.
    """
    tensor = tl.load(programs_ptr + tl.program_id(0))
    row_ptr = tensors_ptr + tensor * COLUMNS
    weight, momentum_buffer = tl.load(row_ptr), tl.load(row_ptr + 1)  # addresses
    grad = tl.load(grads_ptr + tensor)
    cast, numel, first = tl.load(row_ptr + 2), tl.load(row_ptr + 3), tl.load(row_ptr + 4)
    row = weight, momentum_buffer, cast, numel, first, tl.load(row_ptr + 5)
    vectorised = tl.load(row_ptr + 6)
    lr = tl.load(lr_ptr).to(tl.float32)
    momentum = tl.load(momentum_ptr).to(tl.float32)
    weight_decay = tl.load(weight_decay_ptr).to(tl.float32)
    factors = lr, momentum, weight_decay
    seed = tl.load(seed_ptr) if VARIANT.stochastic else 0
    # Two calls, since VECTORISED is known to the compiler and the table is not.
    if vectorised != 0:
        _update(row, grad, factors, seed, VARIANT, VECTORISED=True)
    else:
        _update(row, grad, factors, seed, VARIANT, VECTORISED=False)


# ---- launches of the kernel ------------------------------------------------------------------------------------------


class _Tensors(NamedTuple):
    """One tensor of the list as the kernel reads it: contiguous."""

    weight: Tensor
    grad: Tensor
    momentum_buffer: Tensor
    cast: Tensor | None
    first: int  # offset of its random bits; 0 without a seed

    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """Return the dtypes that may differ between the tensors of a list."""
        return self.grad.dtype, self.momentum_buffer.dtype


def _launch(*arguments: Any) -> None:
    call = Call(*arguments)
    alike: dict[tuple[torch.dtype, torch.dtype], list[_Tensors]] = {}
    updated: list[tuple[Tensor, Tensor]] = []  # tensors of the call, and what the kernel writes
    first = 0
    lists = zip(call.weights, call.grads, call.momentum_buffers, strict=True)
    for number, (weight, grad, momentum_buffer) in enumerate(lists):
        first = first if call.offsets is None else call.offsets[number]
        if weight.numel() > 0:
            cast = call.casts[number] if call.casts and call.casts[number].numel() > 0 else None
            x = _Tensors(
                weight.contiguous(),
                grad.contiguous(),
                momentum_buffer.contiguous(),
                cast,
                first=0 if call.seed is None else first,
            )
            alike.setdefault(x.dtypes(), []).append(x)
            updated += (weight, x.weight), (momentum_buffer, x.momentum_buffer)
        first += weight.numel()
    for tensors in alike.values():
        _launch_alike(tensors, call)
    for tensor, copy in updated:
        if copy is not tensor:
            tensor.copy_(copy)


def _launch_alike(tensors: list[_Tensors], call: Call) -> None:
    """Update tensors of the same dtypes in one launch."""
    weight, grad, momentum_buffer, *_ = tensors[0]
    cast = next((x.cast for x in tensors if x.cast is not None), None)
    device, lanes = weight.device, LANES if call.seed is None else LANES_RANDOM
    options = dict(launch_options("sgd_momentum", weight))
    block = options.pop("BLOCK")  # elements of a program
    # 1. Tables
    rows: list[int] = []  # [tensors, COLUMNS]
    grads = [x.grad.data_ptr() for x in tensors]
    programs = [triton.cdiv(x.first % lanes + x.weight.numel(), block) for x in tensors]  # number of each tensor
    begin = 0
    for x, grad_address, count in zip(tensors, grads, programs, strict=True):
        addresses = x.weight.data_ptr(), x.momentum_buffer.data_ptr(), 0 if x.cast is None else x.cast.data_ptr()
        numel = x.weight.numel()
        vectorised = all(n % 16 == 0 for n in (*addresses, grad_address, numel)) and x.first % lanes == 0
        rows += (*addresses, numel, x.first, begin, vectorised)
        begin += count
    # 2. Launch
    launch(
        _sgd_momentum_kernel,
        (begin,),
        device=device,
        **options,
        fp_fusion=False,
        tensors_ptr=_table(rows, device),  # [tensors · COLUMNS]
        grads_ptr=_table(grads, device),  # [tensors]
        programs_ptr=_table(programs, device, repeat=True),  # [programs]
        lr_ptr=call.lr,
        momentum_ptr=call.momentum,
        weight_decay_ptr=call.weight_decay,
        seed_ptr=call.seed,
        COLUMNS=COLUMNS,
        VARIANT=Variant(
            weight=_TRITON_DTYPES[weight.dtype],
            grad=_TRITON_DTYPES[grad.dtype],
            momentum_buffer=_TRITON_DTYPES[momentum_buffer.dtype],
            cast=None if cast is None else _TRITON_DTYPES[cast.dtype],
            stochastic=call.seed is not None,
            groups=block // lanes,
            lanes=lanes,
        ),
    )


# ---- tables on the device --------------------------------------------------------------------------------------------


def _table(numbers: Sequence[int], device: torch.device, *, repeat: bool = False) -> Tensor:
    """Return int64 numbers on a device; with `repeat`, index i numbers[i] times. No host sync.

    Within `tables_of_graph`, a launch that is captured gets a table that is not written yet.
    """
    captured = _of_graph
    # The stream decides: other threads may launch on streams that are not captured.
    if captured is not None and launching.is_captured(device):
        return captured.allocate(_on_host(numbers, repeat))
    return _kept_table(tuple(numbers), repeat, device, launching.current_stream(device))


# A table is written, read and freed on one stream, so that no stream reads it too early, or while another one writes to
# its memory.
@functools.lru_cache(maxsize=MAX_TABLES)
def _kept_table(numbers: tuple[int, ...], repeat: bool, device: torch.device, stream: int) -> Tensor:
    """Return a table that is kept between calls."""
    on_host = _on_host(numbers, repeat)
    if not launching.runs_beside_host(device):
        return on_host
    if launching.is_captured(device):
        raise RuntimeError(
            "sgd_momentum_: a captured graph can only read tensors of an earlier call; got new addresses. Make "
            "the same call before the capture, or capture the training step with skipkernels.graphed."
        )
    table = torch.empty_like(on_host, device=device)
    _write(table, on_host)
    return table


class GraphTables:
    """Tables that the launches in a captured graph read, for one update of `weights`; must live as long as the graph.

    Addresses of gradients are known during the capture only, and `upload` writes the tables after it: a copy in the
    graph would run in each replay. Their memory is from before the capture: in that of the graph a replay could write
    what was freed before a table was allocated.
    """

    def __init__(self, weights: Sequence[Tensor], device: torch.device):
        # A launch has at least one weight, and three tables, each with up to one number that is not used.
        programs = (-(-(LANES + x.numel()) // launch_options("sgd_momentum", x)["BLOCK"]) for x in weights)
        size = len(weights) * (COLUMNS + 4) + sum(programs)
        self._unused = torch.empty(size, dtype=torch.int64, device=device)
        self._tables: list[tuple[Tensor, Tensor]] = []  # table on the device, and its numbers

    def allocate(self, numbers: Tensor) -> Tensor:
        """Return a table that `upload` will write."""
        table = self._unused[: len(numbers)]
        if len(table) < len(numbers):
            raise RuntimeError(
                "sgd_momentum_: a graph can only update the weights of its optimizer; got others. Let one optimizer "
                "hold them all."
            )
        self._unused = self._unused[-(-len(numbers) // 2) * 2 :]  # 16 bytes, as a kernel is compiled for
        self._tables.append((table, numbers))
        return table

    def upload(self) -> None:
        """Write the tables, on the current stream."""
        for table, numbers in self._tables:
            _write(table, numbers)


_of_graph: GraphTables | None = None  # of the graph that is being captured
_one_graph = threading.Lock()  # at a time, whatever the threads


@contextlib.contextmanager
def tables_of_graph(weights: Sequence[Tensor], device: torch.device) -> Iterator[GraphTables]:
    """Collect the tables of the launches that are captured in this context, also in threads of autograd.

    They update `weights`, on a device. Other threads wait before theirs.
    """
    global _of_graph
    with _one_graph:
        _of_graph = GraphTables(weights, device)
        try:
            yield _of_graph
        finally:
            _of_graph = None


def _on_host(numbers: Sequence[int], repeat: bool) -> Tensor:
    entries = [index for index, times in enumerate(numbers) for _ in range(times)] if repeat else numbers
    return torch.frombuffer(array.array("q", entries), dtype=torch.int64)  # an empty buffer is refused


def _write(table: Tensor, numbers: Tensor) -> None:
    table.copy_(launching.pinned(numbers, table.device), non_blocking=True)


# ---- registration ----------------------------------------------------------------------------------------------------


def _fake(weights: list[Tensor], *_: object) -> None:
    pass


sgd_momentum_ = registration.define(
    "sgd_momentum_(Tensor(a!)[] weights, Tensor[] grads, Tensor(b!)[] momentum_buffers, Tensor lr, Tensor momentum,"
    " Tensor weight_decay, Tensor? seed, int[]? offsets, Tensor(c!)[] casts) -> ()",
    fallback=reference.sgd_momentum_,
    fake=_fake,
    launch=_launch,
)


# ---- checks of the public function -----------------------------------------------------------------------------------


def check_update(
    function: str,
    weights: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    offsets: Sequence[int] | None,
) -> None:
    """Check the lists of weights of one dtype and device, of their gradients and buffers, and of their offsets."""
    counts = len(weights), len(grads), len(momentum_buffers)
    if len(set(counts)) > 1:
        raise ValueError(
            f"{function}: weight, grad and momentum_buffer must be lists of equal length; got {counts[0]}, {counts[1]} "
            f"and {counts[2]}."
        )
    if offsets is not None and not (
        len(offsets) == len(weights)
        and all(0 <= first < 2**63 - x.numel() for first, x in zip(offsets, weights, strict=True))
    ):
        raise ValueError(
            f"{function}: offsets must be an index ≥ 0 for each of {len(weights)} weights, and that of its last "
            f"element an int64; got {offsets}."
        )
    if weights:
        check_dtype(function, "weight", weights[0], FEATURE_DTYPES, "Only floating-point weights can be trained.")
    for weight, grad, momentum_buffer in zip(weights, grads, momentum_buffers, strict=True):
        first = weights[0]
        # Compared before they are checked: a model has hundreds of tensors.
        if weight.dtype != first.dtype or weight.device != first.device or weight.layout != torch.strided:
            check_dtype(function, "weight", weight, [first.dtype], "Use one call per dtype.")
            check_device(function, "weight", weight, ("the first weight", first))
        for argument, x in (("grad", grad), ("momentum_buffer", momentum_buffer)):
            if x.shape != weight.shape:
                shape, got = list(weight.shape), list(x.shape)
                raise ValueError(f"{function}: {argument} must be {shape} to match its weight; got {got}.")
            if x.dtype != weight.dtype or x.device != weight.device or x.layout != torch.strided:
                check_dtype(function, argument, x, FEATURE_DTYPES, f"Use {argument}.float().")
                check_device(function, argument, x, ("weight", weight))
        for argument, x in (("weight", weight), ("momentum_buffer", momentum_buffer)):
            if not x.is_contiguous() and any(
                size > 1 and step == 0 for size, step in zip(x.shape, x.stride(), strict=True)
            ):
                raise ValueError(f"{function}: {argument} must have memory for each element; got an expanded tensor.")


def as_casts(function: str, weights: Sequence[Tensor], casts: Sequence[Tensor | None]) -> list[Tensor]:
    """Check 16-bit copies of weights; return one for each weight, empty where there is none, or no list without any."""
    first = next((x for x in casts if x is not None), None)
    if len(casts) != len(weights):
        raise ValueError(
            f"{function}: casts must have a tensor or None for each of {len(weights)} weights; got {len(casts)}."
        )
    if first is None:
        return []
    check_dtype(function, "weight", weights[0], [torch.float32], "Leave out casts, which are for float32.")
    check_dtype(function, "casts", first, [torch.bfloat16, torch.float16], "A copy has 16 bits.")
    for weight, x in zip(weights, casts, strict=True):
        if x is None:
            continue
        check_dtype(function, "casts", x, [first.dtype], "Use one dtype for all.")
        check_device(function, "casts", x, ("weight", weight))
        if x.shape != weight.shape or not (x.is_contiguous() and weight.is_contiguous()):
            raise ValueError(
                f"{function}: casts must be contiguous copies of contiguous weights; got {list(x.shape)} for a weight "
                f"{list(weight.shape)}."
            )
    return [first.new_empty(0) if x is None else x for x in casts]

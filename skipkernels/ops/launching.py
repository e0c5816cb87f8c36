"""Launches of the Triton kernels of the operators, and the tables of their options.

All kernels are launched by `launch`, on the device of their tensors, which need not be the current device, with every
option that can change a result. Without Triton, the reference implementation is used.

Sizes of blocks, warps and stages are in `tables/`. `defaults.json` has every kernel. Two further files replace kernels:
`hip.json` those that differ on AMD, and one with the name of a device, such as `nvidia-h100-80gb-hbm3.json`, those that
`python -m bench.tune` measured on it.

A kernel has a list of entries. In an entry a single letter is a size of the call, such as C, up to which the entry
holds, and `bytes` is the size of an element; the others are options of the launch. The first entry that holds is taken:
that of the nearest size which is not smaller, so that a tile which fits into the registers there also does here. An
entry without a letter holds for all sizes.

Nothing is measured in a run: a table is read once in a process, and a launch depends on the device and the shape alone.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # not a Linux machine
    triton = types.SimpleNamespace(jit=lambda function=None, **_: function or (lambda f: f))
    tl = None

installed = tl is not None
constexpr = tl.constexpr if installed else int  # a constant of a module that kernels read


class Target(NamedTuple):
    """Target of compilation, ("cuda", 80), ("cuda", 90), ("hip", "gfx942"), …, and the name of a device, if known."""

    backend: str
    arch: int | str
    name: str = ""


def target(device: torch.device) -> Target:
    """Return the target of a device; of an A100 for the CPU, where Triton's interpreter runs, and without a GPU."""
    return Target("cuda", 80) if device.type == "cpu" else _target_of_gpu(device.index)


@functools.lru_cache
def _target_of_gpu(index: int | None) -> Target:
    if not torch.cuda.is_available():  # the meta device
        return Target("cuda", 80)
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip:
        return Target("hip", properties.gcnArchName.partition(":")[0], properties.name)
    return Target("cuda", properties.major * 10 + properties.minor, properties.name)


def launches_on(device: torch.device) -> bool:
    """Return True if operators launch Triton kernels for tensors of a device: CUDA and ROCm, and "meta" as one."""
    return device.type in ("cuda", "meta") and installed


def runs_beside_host(device: torch.device) -> bool:
    """Return True if the kernels of a device run after the call that launches them: not those of a CPU."""
    return device.type != "cpu"


def is_captured(device: torch.device) -> bool:
    """Return True if the next kernel of a device becomes part of a graph instead of running."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def current_stream(device: torch.device) -> int:
    """Return the id of the stream on which a device runs the next kernel; in a hook, that of the gradient."""
    return torch.cuda.current_stream(device).stream_id if device.type == "cuda" else 0


def pinned(x: Tensor, device: torch.device) -> Tensor:
    """Move a CPU tensor to memory from which a copy to a GPU does not wait; for other devices return it as it is."""
    return x.pin_memory() if device.type == "cuda" else x


def with_contiguous_rows(x: Tensor) -> Tensor:
    """Return the matrix, copied if its rows are not contiguous."""
    return x if x.stride(1) == 1 else x.contiguous()


def contiguous_or_none(x: Tensor | None) -> Tensor | None:
    """Return the tensor, copied if it is not contiguous."""
    return None if x is None else x.contiguous()


def dot_precision(dtype: torch.dtype, device: torch.device) -> str:
    """`input_precision` of a `tl.dot` with fp32 accuracy: three products in tf32 on NVIDIA, fp32 on AMD."""
    return "tf32x3" if dtype == torch.float32 and target(device).backend == "cuda" else "ieee"


@functools.cache  # tried once in a process
def products_widen(device_type: str) -> bool:
    """Return True if a device can write a product of 16-bit matrices in fp32; known by trying."""
    one = torch.ones(8, 8, dtype=torch.bfloat16, device=device_type)
    try:
        return torch.mm(one, one, out_dtype=torch.float32).dtype == torch.float32
    except (TypeError, RuntimeError):
        torch.mm(one, one)  # raises an error of the device, such as too little memory
        return False


# ---- options of a launch ---------------------------------------------------------------------------------------------

TABLES = Path(__file__).with_name("tables")


class Entry(NamedTuple):
    """Options of a kernel, and the calls for which they are."""

    sizes: Mapping[str, int]  # largest sizes
    itemsize: int | None  # bytes of an element; None: any
    options: Mapping[str, Any]  # of the launch

    def holds(self, itemsize: int, sizes: Mapping[str, int]) -> bool:
        """Return True for a call with these sizes."""
        return self.itemsize in (None, itemsize) and all(sizes[name] <= most for name, most in self.sizes.items())


def launch_options(kernel: str, x: Tensor, **sizes: int) -> Mapping[str, Any]:
    """Return the options of a launch on the device of x, for elements of its dtype and these sizes."""
    return _choose(kernel, target(x.device), x.element_size(), **sizes).options


@functools.lru_cache(maxsize=1024)
def entry_of(kernel: str, device: Target, itemsize: int, **sizes: int) -> Entry:
    """Return the first entry that holds."""
    return next(entry for entry in table_of(device)[kernel] if entry.holds(itemsize, sizes))


_choose: Callable[..., Entry] = entry_of


@contextlib.contextmanager
def entries_from(choose: Callable[..., Entry]) -> Iterator[None]:
    """Take entries from a function with the arguments of `entry_of`, in all threads: backward runs in another one."""
    global _choose
    before, _choose = _choose, choose
    try:
        yield
    finally:
        _choose = before


@functools.lru_cache
def table_of(device: Target) -> dict[str, list[Entry]]:
    """Return the entries of each kernel: the defaults, or those of the backend or of the device."""
    table = read_table(TABLES / "defaults.json")
    for path in (TABLES / f"{device.backend}.json", table_path(device.name)):
        table |= read_table(path) if path.exists() else {}
    return table


def table_path(name: str) -> Path:
    """Return the file of a device, by its name."""
    return TABLES / f"{re.sub('[^a-z0-9]+', '-', name.lower()).strip('-')}.json"


def read_table(path: Path) -> dict[str, list[Entry]]:
    """Read a file."""
    table = json.loads(path.read_text(encoding="utf-8"))
    return {kernel: list(map(_entry, rows)) for kernel, rows in table.items()}


def _entry(row: dict[str, int]) -> Entry:
    sizes = {name: value for name, value in row.items() if len(name) == 1}
    options = {name: value for name, value in row.items() if name not in sizes and name != "bytes"}
    return Entry(sizes, row.get("bytes"), MappingProxyType(options))


# ---- launch ----------------------------------------------------------------------------------------------------------


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *,
    device: torch.device,
    num_warps: int,
    num_stages: int = 2,
    fp_fusion: bool = True,
    debug: bool = False,
    **arguments: Tensor | int | float | bool | str | tuple[Any, ...] | None,
) -> None:
    """Launch a kernel with arguments by name, on the device of its tensors, unless the grid is empty.

    The largest dimension of the grid comes first: the limit of the others is 65,535. A warp has 32 threads, 64 on
    AMD. fp_fusion allows a · b + c to be rounded once; False gives the bits of PyTorch. debug compiles
    `tl.device_assert`s, which stop the device without a host sync.
    """
    if min(grid) == 0:
        return
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        _run(
            kernel,
            grid,
            dict(
                num_warps=num_warps,
                num_stages=num_stages,
                enable_fp_fusion=fp_fusion,
                debug=debug,
                sanitize_overflow=False,  # debug would check every integer operation for overflow
            ),
            arguments,
        )


def _run(kernel: Any, grid: tuple[int, ...], options: dict[str, Any], arguments: dict[str, Any]) -> None:
    run: Callable[..., Any] = kernel[grid]
    run(**arguments, **options)

"""Launches of Triton kernels, recorded on the meta device as they would be made on a GPU.

CALLS are calls of the operators that reach every kernel, from their records; those of WIDTHS reach the other entries of
the launch tables.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple
from unittest import mock

from skipkernels.ops import launching, registration

from .operators.record import records

CALLS = {name: calls for record in records().values() for name, calls in record.launches.items()}
WIDTHS = {name: calls for record in records().values() for name, calls in record.widths.items()}
PUBLIC_OPERATOR = {name: op for op, record in records().items() for name in record.launches}
"""The public operator that a registered one is a part of: its backward, or a helper in the same file."""

_KIB = 1024


class Architecture(NamedTuple):
    """Target: Triton's backend and name, threads per warp, and the largest shared memory (LDS) of a block in bytes.

    `has_matrix_units` is False where Triton does not use them.
    """

    backend: str
    arch: int | str
    warp_size: int
    block_shared: int
    has_matrix_units: bool = True


# From NVIDIA's CUDA C++ Programming Guide, "Compute Capabilities", and AMD's CDNA3 and CDNA4 ISA guides.
ARCHITECTURES = {
    "sm_75": Architecture("cuda", 75, 32, 64 * _KIB, has_matrix_units=False),
    "sm_80": Architecture("cuda", 80, 32, 163 * _KIB),
    "sm_86": Architecture("cuda", 86, 32, 99 * _KIB),
    "sm_89": Architecture("cuda", 89, 32, 99 * _KIB),
    "sm_90": Architecture("cuda", 90, 32, 227 * _KIB),
    "sm_100": Architecture("cuda", 100, 32, 227 * _KIB),
    "sm_120": Architecture("cuda", 120, 32, 99 * _KIB),
    "gfx942": Architecture("hip", "gfx942", 64, 64 * _KIB),
    "gfx950": Architecture("hip", "gfx950", 64, 160 * _KIB),
}


class TritonLaunch(NamedTuple):
    """The arguments of one call of `launching.launch`."""

    kernel: Any
    grid: tuple[int, ...]
    options: dict[str, Any]
    arguments: dict[str, Any]


@contextlib.contextmanager
def triton_launches(architecture: Architecture) -> Iterator[list[TritonLaunch]]:
    """Record launches on the meta device in a list, as they would be made for this architecture."""
    launches: list[TritonLaunch] = []
    target = launching.Target(architecture.backend, architecture.arch)
    with (
        mock.patch.object(launching, "_run", lambda *launch: launches.append(TritonLaunch(*launch))),
        mock.patch.object(launching, "_target_of_gpu", lambda index: target),
    ):
        yield launches


def launches_of(op: str, arguments: Sequence[Any], architecture: Architecture) -> list[TritonLaunch]:
    """The kernels that one call of an operator with meta tensors launches."""
    with triton_launches(architecture) as launches:
        registration.definitions[op].launch(*arguments)
    return launches

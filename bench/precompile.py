"""Compilation of Triton kernels before they are launched, also for a GPU that is not here.

The launchers run on meta tensors with a recorder in place of the launch, and Triton's binder specialises each launch:
the compiled kernels have the constants, types, divisibility, warps and stages that a launch needs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple, TypeVar

from skipkernels.ops import launching, registration

_KIB = 1024
Result = TypeVar("Result")


class Architecture(NamedTuple):
    """Target: Triton's backend and name, threads per warp, and the largest shared memory (LDS) of a block in bytes."""

    backend: str
    arch: int | str
    warp_size: int
    block_shared: int


# From NVIDIA's CUDA C++ Programming Guide, "Compute Capabilities", and AMD's CDNA3 and CDNA4 ISA guides.
ARCHITECTURES = {
    "sm_80": Architecture("cuda", 80, 32, 163 * _KIB),
    "sm_86": Architecture("cuda", 86, 32, 99 * _KIB),
    "sm_89": Architecture("cuda", 89, 32, 99 * _KIB),
    "sm_90": Architecture("cuda", 90, 32, 227 * _KIB),
    "sm_100": Architecture("cuda", 100, 32, 227 * _KIB),
    "sm_120": Architecture("cuda", 120, 32, 99 * _KIB),
    "gfx942": Architecture("hip", "gfx942", 64, 64 * _KIB),
    "gfx950": Architecture("hip", "gfx950", 64, 160 * _KIB),
}


class Launch(NamedTuple):
    """The arguments of one call of `launching.launch`."""

    kernel: Any
    grid: tuple[int, ...]
    options: dict[str, Any]
    arguments: dict[str, Any]


class Kernel(NamedTuple):
    """The input of Triton's compiler."""

    function: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for kernels that are compiled once."""
        return (self.function.fn.__qualname__, *map(repr, self[1:]))


@contextlib.contextmanager
def recording(architecture: Architecture) -> Iterator[list[Launch]]:
    """Record launches on the meta device in a list, as they would be made for this architecture."""
    launches: list[Launch] = []
    run, target = launching._run, launching._target_of_gpu
    launching._run = lambda *launch: launches.append(Launch(*launch))
    launching._target_of_gpu = lambda index: launching.Target(architecture.backend, architecture.arch)  # type: ignore[assignment]
    try:
        yield launches
    finally:
        launching._run, launching._target_of_gpu = run, target


def launches_of(op: str, arguments: Sequence[Any], architecture: Architecture) -> list[Launch]:
    """The kernels that one call of an operator with meta tensors launches."""
    with recording(architecture) as launches:
        registration.definitions[op].with_triton(*arguments)
    return launches


def gpu_target(architecture: Architecture) -> Any:
    """Triton's description of a target."""
    GPUTarget = importlib.import_module("triton.backends.compiler").GPUTarget
    return GPUTarget(architecture.backend, architecture.arch, architecture.warp_size)


@functools.cache
def _binder(kernel: Any, backend: Any) -> Callable[..., Any]:
    """Triton's function that sorts the arguments of a kernel."""
    create = importlib.import_module("triton.runtime.jit").create_function_from_signature
    return create(kernel.signature, kernel.params, backend)


def specialise(launch: Launch, backend: Any) -> Kernel:
    """The input that `JITFunction.run` would pass to the compiler."""
    kernel = launch.kernel
    given = {**launch.arguments, **launch.options}
    options, signature, constants, attributes = kernel._pack_args(backend, given, *_binder(kernel, backend)(**given))
    return Kernel(kernel, signature, constants, attributes, dict(options.__dict__))


def kernels_of(launches: Iterable[Launch], architecture: Architecture) -> list[Kernel]:
    """The kernels of these launches, each once."""
    backend = importlib.import_module("triton.compiler.compiler").make_backend(gpu_target(architecture))
    return list({kernel.key: kernel for kernel in (specialise(launch, backend) for launch in launches)}.values())


def compile_one(kernel: Kernel, architecture: Architecture) -> Any:
    """Compile a kernel, or load it from Triton's cache."""
    source = launching.triton.compiler.ASTSource(kernel.function, kernel.signature, kernel.constants, kernel.attributes)
    return launching.triton.compile(source, target=gpu_target(architecture), options=kernel.options)


@contextlib.contextmanager
def in_processes(
    function: Callable[[int], Result], count: int, processes: int | None = None
) -> Iterator[Iterator[Result]]:
    """Yield the results of function(0), function(1), …, computed in forked processes (default: one per core).

    They are forked since kernels cannot be pickled. If a compiler aborts, BrokenProcessPool is raised.
    """
    fork = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(processes or os.cpu_count(), fork, _set_function, (function,)) as pool:
        yield pool.map(_call, range(count))


_function: Callable[[int], Any] = len  # type: ignore[assignment]  # the function that a forked process calls


def _set_function(function: Callable[[int], Any]) -> None:
    global _function
    _function = function


def _call(number: int) -> Any:
    return _function(number)

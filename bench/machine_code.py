"""Machine code of Triton kernels for GPUs that need not be here: what it needs of a GPU, and what is wrong with it.

The launchers run on meta tensors with a recorder in place of the launch (`bench.launches`), and Triton's binder gives
the specialisation of each launch. So the compiled kernels are those that a user gets: the same constants, types,
divisibility, warps and stages.
"""

from __future__ import annotations

import functools
import importlib
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import rich.progress

from skipkernels.ops import launching

from .launches import ARCHITECTURES, Architecture, TritonLaunch

LARGEST_GRID = (2**31 - 1, 65535, 65535)
_MATRIX_INSTRUCTIONS = {
    "ptx": re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b[\w.:]*"),
    "amdgcn": re.compile(r"\b(v_mfma)_\w+"),
}


# ---- what is compiled ------------------------------------------------------------------------------------------------


class Kernel(NamedTuple):
    """The input of Triton's compiler."""

    function: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def named_constants(self) -> str:
        """The constants by name, including integer arguments that Triton specialises because they are 1.

        One inside a tuple is named by its place there.
        """
        names = list(self.signature)
        constants = sorted(self.constants.items())
        return " ".join(f"{'.'.join([names[place], *map(str, inner)])}={value}" for (place, *inner), value in constants)


class Label(NamedTuple):
    """Columns that identify a kernel in the table."""

    op: str
    shape: str
    dtype: str
    launch: int
    """Index within the call."""
    kernel: str
    target: str

    def __str__(self) -> str:
        return f"{self.kernel} ({self.op}, {self.shape}, {self.dtype}, {self.target})"


class Job(NamedTuple):
    """A kernel to compile, and its grid."""

    label: Label
    grid: tuple[int, ...]
    kernel: Kernel

    @property
    def key(self) -> tuple[str, ...]:
        """Equal for jobs of which one is enough."""
        label, (function, *inputs) = self.label, self.kernel
        return (label.op, label.dtype, label.target, function.fn.__qualname__, *map(repr, inputs))


def job_of(launch: TritonLaunch, op: str, shape: str, dtype: str, number: int, target: str) -> Job:
    """The job of a launch, with the input that `JITFunction.run` would pass to the compiler."""
    backend = _backend(ARCHITECTURES[target])
    function, given = launch.kernel, {**launch.arguments, **launch.options}
    options, *of_arguments = function._pack_args(backend, given, *_binder(function, backend)(**given))
    kernel = Kernel(function, *of_arguments, dict(options.__dict__))
    return Job(Label(op, shape, dtype, number, function.fn.__name__, target), launch.grid, kernel)


@functools.cache
def _backend(architecture: Architecture) -> Any:
    return importlib.import_module("triton.compiler.compiler").make_backend(_gpu_target(architecture))


def _gpu_target(architecture: Architecture) -> Any:
    """Triton's description of a target."""
    GPUTarget = importlib.import_module("triton.backends.compiler").GPUTarget
    return GPUTarget(architecture.backend, architecture.arch, architecture.warp_size)


@functools.cache
def _binder(function: Any, backend: Any) -> Callable[..., Any]:
    """Triton's function that sorts the arguments of a kernel."""
    create = importlib.import_module("triton.runtime.jit").create_function_from_signature
    return create(function.signature, function.params, backend)


def once(jobs: Iterable[Job]) -> list[Job]:
    """The first job of each key."""
    found: dict[tuple[str, ...], Job] = {}
    for job in jobs:
        found.setdefault(job.key, job)
    return list(found.values())


# ---- what it needs ---------------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """Needs of the machine code of a job: a line of the table."""

    op: str
    shape: str
    dtype: str
    launch: int
    kernel: str
    target: str
    constants: str
    programs: int
    num_warps: int
    num_stages: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    matrix_instruction: str
    triton: str

    @property
    def key(self) -> Label:
        return Label(*self[:6])

    @property
    def name(self) -> str:
        return str(self.key)


class Compiled(NamedTuple):
    """The result of a job: its row, unless it does not compile, and what is wrong with it."""

    row: Row | None
    problems: list[str]


def compile_all(jobs: Sequence[Job]) -> list[Compiled]:
    """The results in the order of the jobs; one process per core."""
    global _jobs
    _jobs = jobs
    _forget_paths()
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        results = pool.map(_compiled, range(len(jobs)))
        return list(rich.progress.track(results, "compiling", len(jobs), transient=True))


_jobs: Sequence[Job] = ()  # of forked processes: kernels cannot be pickled


def _compiled(number: int) -> Compiled:
    job = _jobs[number]
    try:
        row, has_dot = compile_job(job)
    except Exception as error:  # the other kernels are compiled all the same
        reason = str(error).strip().splitlines() or [""]
        return Compiled(None, [f"{job.label} does not compile: {type(error).__name__}: {reason[-1]}"])
    return Compiled(row, list(problems_of(row, job.grid, has_dot)))


def compile_job(job: Job) -> tuple[Row, bool]:
    """Compile a kernel, or load it from Triton's cache, and read its machine code; True if it has a `tl.dot`."""
    function, signature, constants, attributes, options = job.kernel
    source = launching.triton.compiler.ASTSource(function, signature, constants, attributes)
    compiled = launching.triton.compile(source, target=_gpu_target(ARCHITECTURES[job.label.target]), options=options)
    if "cubin" in compiled.asm:
        assembly, (registers, spilled) = "ptx", _resources_of_cubin(compiled.asm["cubin"])
    else:
        assembly, (registers, spilled) = "amdgcn", _resources_of_amdgcn(compiled.asm["amdgcn"])
    instructions = {match[0] for match in _MATRIX_INSTRUCTIONS[assembly].finditer(compiled.asm[assembly])}
    row = Row(
        *job.label,
        constants=job.kernel.named_constants,
        programs=math.prod(job.grid),
        num_warps=compiled.metadata.num_warps,
        num_stages=compiled.metadata.num_stages,
        registers=registers,
        spilled_bytes=spilled,
        shared_bytes=compiled.metadata.shared,
        matrix_instruction=" ".join(sorted(instructions)),
        triton=launching.triton.__version__,
    )
    return row, "tt.dot" in compiled.asm["ttir"]


def _resources_of_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of its stack and local memory, which are 0 without spills."""
    tool = Path(launching.triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text.stdout))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def _resources_of_amdgcn(assembly: str) -> tuple[int, int]:
    """Vector registers per lane, and the larger of scratch memory and spilled vector registers, in bytes.

    Scalar registers are spilled into lanes of a vector register, not to memory.
    """
    usage = {name: int(n) for name, n in re.findall(r"^ +\.(\w+): +(\d+)$", assembly, re.MULTILINE)}
    return usage["vgpr_count"], max(4 * usage["vgpr_spill_count"], usage["private_segment_fixed_size"])


def problems_of(row: Row, grid: tuple[int, ...], has_dot: bool) -> Iterator[str]:
    """Problems of a kernel on any machine with this GPU."""
    limits = ARCHITECTURES[row.target]
    if row.spilled_bytes and limits.has_matrix_units:
        yield f"{row.name} spills {row.spilled_bytes} bytes"
    if row.shared_bytes > limits.block_shared:
        yield f"{row.name} wants {row.shared_bytes} bytes of shared memory; a block may have {limits.block_shared}"
    if any(size > most for size, most in zip(grid, LARGEST_GRID, strict=False)):
        yield f"{row.name} is launched with a grid of {grid}; the largest is {LARGEST_GRID}"
    if has_dot and limits.has_matrix_units and not row.matrix_instruction:
        yield f"{row.name} has a tl.dot but uses no matrix instruction"


# ---- the kernels of the package --------------------------------------------------------------------------------------


def kernel_paths() -> dict[str, str]:
    """Name of each kernel of the package, by its path in each module that defines or imports it."""
    return {
        f"{module.__name__}.{name}": name
        for module in _modules()
        for name, value in vars(module).items()
        if name.endswith("_kernel") and hasattr(value, "fn")
    }


def _modules() -> list[Any]:
    return [module for name, module in sys.modules.items() if name.startswith("skipkernels.ops.")]


def _forget_paths() -> None:
    """Make the compiled kernels independent of the folder of the package.

    An assertion contains the path of its file, and on gfx942 a path of another length took two registers more. The
    cache key does not contain the path, so kernels compiled here use a cache folder of their own.
    """
    for module in _modules():
        for value in vars(module).values():
            if isinstance(value, launching.triton.JITFunction):
                value.file_name = f"{value.module}.py"
    cache = Path(launching.triton.knobs.cache.dir)
    if cache.name != "ahead-of-time":
        os.environ["TRITON_CACHE_DIR"] = str(cache / "ahead-of-time")

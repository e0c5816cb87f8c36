"""Compile every Triton kernel to machine code ahead of time, without a GPU.

    python -m bench.aot                                 compile all and write bench/results/aot.csv
    python -m bench.aot --check                         compile all and compare with the table; write nothing
    python -m bench.aot --op class_scores               compile an operator and replace its rows
    python -m bench.aot --op class_scores --no-save     print only; also --target sm_90 gfx942, --dtype bf16, --quick
    python -m bench.aot --sweep --target sm_90          compile with each integer argument at 1 and beyond 2³¹ only
    python -m bench.aot --widths --target sm_90         compile for every supported width of rows and heads only

The launchers run, forward and backward, on the calls of `bench.launches`, with a recorder in place of the launch and
`launching.target` set to each GPU in turn; Triton's binder gives the specialisation of each launch. So the compiled
kernels are those that a user gets: the same constants, types, divisibility, warps and stages. Read from the machine
code are registers per thread, spilled bytes, bytes of shared memory, and the matrix instruction of a kernel with a
`tl.dot`.

`--check` fails if a kernel does not compile, spills, exceeds the shared memory of a block or the largest grid, has a
`tl.dot` but no matrix instruction, is reached by no call, is missing from the table, is in the table but not compiled,
needs more registers or shared memory than in the table, or uses another matrix instruction. Of these three only the
limits of the GPU count if another version of Triton made the table.

`--quick` takes only the first call of every operator: few entries of the launch tables, no kernels for large sizes.
So do the targets that are not IN_TABLE. Triton has no matrix instructions for sm_75: there kernels only have to compile
and to fit into shared memory.
"""

from __future__ import annotations

import functools
import importlib
import itertools
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
import torch
from rich.console import Console

from skipkernels.ops import OPERATORS, launching, registration

from . import tables
from .launches import ARCHITECTURES, CALLS, FAMILIES, WIDTHS, Architecture, Launch, launches_of
from .measure import DTYPES
from .rows import RESULTS, command

TABLE = RESULTS / "aot.csv"
# Targets of the table, with every call. For the others the first calls are compiled and checked against the limits.
IN_TABLE = ("sm_80", "sm_90", "sm_100", "gfx942")
LARGEST_GRID = (2**31 - 1, 65535, 65535)

_MATRIX_INSTRUCTIONS = {
    "ptx": re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b[\w.:]*"),
    "amdgcn": re.compile(r"\b(v_mfma)_\w+"),
}


# ---- kernels ---------------------------------------------------------------------------------------------------------


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


class Job(NamedTuple):
    """A kernel to compile: the launch that it comes from, and the input of Triton's compiler."""

    op: str
    shape: str
    dtype: str
    number: int
    """Index of the launch within the call."""
    target: str
    grid: tuple[int, ...]
    kernel: Kernel


class Row(NamedTuple):
    """One line of the table."""

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
    def key(self) -> tuple[str, str, str, int, str, str]:
        return self[:6]

    @property
    def name(self) -> str:
        return f"{self.kernel} ({self.op}, {self.shape}, {self.dtype}, {self.target})"


class Result(NamedTuple):
    row: Row
    grid: tuple[int, ...]
    has_dot: bool


def jobs_of(
    ops: Sequence[str], targets: Sequence[str], dtypes: Sequence[str], quick: bool, widths: bool = False
) -> Iterator[Job]:
    """The kernels to compile; a kernel that several calls launch is compiled once for each dtype and target."""
    calls_of = WIDTHS if widths else CALLS
    for target, op in itertools.product(targets, [op for op in ops if op in calls_of]):
        architecture = ARCHITECTURES[target]
        most = 1 if quick or not (widths or target in IN_TABLE) else None
        for dtype, torch_dtype in DTYPES.items():
            seen = set()
            calls = itertools.islice(calls_of[op](torch_dtype), most) if dtype in dtypes else ()
            for call in calls:
                for number, launch in enumerate(launches_of(op, call.arguments, architecture)):
                    (kernel,) = kernels_of([launch], architecture)
                    if kernel.key not in seen:
                        seen.add(kernel.key)
                        yield Job(op, call.shape, dtype, number, target, launch.grid, kernel)


def swept_jobs(ops: Sequence[str], targets: Sequence[str]) -> Iterator[Job]:
    """The kernels of the first call of each operator with each integer argument at 1 and beyond 2³¹, one at a time.

    Triton makes an argument of 1 a constant, and one beyond 2³¹ an int64, which is divisible by 16 or not.
    """
    for target, op in itertools.product(targets, ops):
        architecture, seen = ARCHITECTURES[target], set()
        call = next(CALLS[op](torch.bfloat16))
        for number, launch in enumerate(launches_of(op, call.arguments, architecture)):
            constants = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
            integers = [name for name, x in launch.arguments.items() if type(x) is int and name not in constants]
            for name, value in itertools.product(integers, (1, 2**31, 2**31 + 1)):
                (kernel,) = kernels_of([launch._replace(arguments=launch.arguments | {name: value})], architecture)
                if kernel.key not in seen:
                    seen.add(kernel.key)
                    yield Job(op, f"{call.shape}, {name} = {value}", "bf16", number, target, launch.grid, kernel)


def compile_job(job: Job) -> Result:
    """Compile a kernel, or load it from Triton's cache, and read its machine code."""
    function, signature, constants, attributes, options = job.kernel
    source = launching.triton.compiler.ASTSource(function, signature, constants, attributes)
    compiled = launching.triton.compile(source, target=gpu_target(ARCHITECTURES[job.target]), options=options)
    if "cubin" in compiled.asm:
        assembly, (registers, spilled) = "ptx", resources_of_cubin(compiled.asm["cubin"])
    else:
        assembly, (registers, spilled) = "amdgcn", resources_of_amdgcn(compiled.asm["amdgcn"])
    instructions = {match[0] for match in _MATRIX_INSTRUCTIONS[assembly].finditer(compiled.asm[assembly])}
    matrix, metadata = " ".join(sorted(instructions)), compiled.metadata
    called = job.op, job.shape, job.dtype, job.number, job.kernel.function.fn.__name__, job.target, constants_of(job)
    launched = math.prod(job.grid), metadata.num_warps, metadata.num_stages
    resources = registers, spilled, metadata.shared, matrix, launching.triton.__version__
    return Result(Row(*called, *launched, *resources), job.grid, "tt.dot" in compiled.asm["ttir"])


def constants_of(job: Job) -> str:
    """The constants by name, including integer arguments that Triton specialises because they are 1.

    One inside a tuple is named by its place there.
    """
    names = list(job.kernel.signature)
    constants = sorted(job.kernel.constants.items())
    return " ".join(f"{'.'.join([names[place], *map(str, inner)])}={value}" for (place, *inner), value in constants)


def resources_of_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and bytes of its stack and local memory, which are 0 without spills."""
    tool = Path(launching.triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True)
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text.stdout))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])


def resources_of_amdgcn(assembly: str) -> tuple[int, int]:
    """Vector registers per lane, and the larger of scratch memory and spilled vector registers, in bytes.

    Scalar registers are spilled into lanes of a vector register, not to memory.
    """
    usage = {name: int(n) for name, n in re.findall(r"^ +\.(\w+): +(\d+)$", assembly, re.MULTILINE)}
    return usage["vgpr_count"], max(4 * usage["vgpr_spill_count"], usage["private_segment_fixed_size"])


def forget_paths() -> None:
    """Make the compiled kernels independent of the folder of the package.

    An assertion contains the path of its file, and on gfx942 a path of another length took two registers more. The
    cache key does not contain the path, so kernels compiled here use a cache folder of their own.
    """
    for module in kernel_modules():
        for value in vars(module).values():
            if isinstance(value, launching.triton.JITFunction):
                value.file_name = f"{value.module}.py"
    os.environ["TRITON_CACHE_DIR"] = str(Path(launching.triton.knobs.cache.dir) / "ahead-of-time")


def kernel_modules() -> list[Any]:
    return [module for name, module in sys.modules.items() if name.startswith("skipkernels.ops.")]


def kernels_in(module: Any) -> list[str]:
    """Names of the kernels that a module defines or imports."""
    return [name for name, value in vars(module).items() if name.endswith("_kernel") and hasattr(value, "fn")]


_jobs: Sequence[Job] = ()  # of forked processes: kernels cannot be pickled


def outcomes_of(jobs: Sequence[Job], console: Console) -> list[Result | str]:
    """The results in the order of the jobs, or the reason why one does not compile; one process per core."""
    global _jobs
    _jobs = jobs
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        outcomes = pool.map(outcome_of, range(len(jobs)))
        return list(rich.progress.track(outcomes, "compiling", len(jobs), console=console, transient=True))


def outcome_of(number: int) -> Result | str:
    """The result of a job, or the reason why it does not compile; the other kernels are compiled all the same."""
    job = _jobs[number]
    try:
        return compile_job(job)
    except Exception as error:
        reason = str(error).strip().splitlines() or [""]
        return (
            f"{job.kernel.function.fn.__name__} ({job.op}, {job.shape}, {job.dtype}, {job.target}) does not compile: "
            f"{type(error).__name__}: {reason[-1]}"
        )


def problems_of(result: Result) -> Iterator[str]:
    """Problems of a kernel that do not depend on the table."""
    row, limits = result.row, ARCHITECTURES[result.row.target]
    if row.spilled_bytes and limits.has_matrix_units:
        yield f"{row.name} spills {row.spilled_bytes} bytes"
    if row.shared_bytes > limits.block_shared:
        yield f"{row.name} wants {row.shared_bytes} bytes of shared memory; a block may have {limits.block_shared}"
    if any(size > most for size, most in zip(result.grid, LARGEST_GRID, strict=False)):
        yield f"{row.name} is launched with a grid of {result.grid}; the largest is {LARGEST_GRID}"
    if result.has_dot and limits.has_matrix_units and not row.matrix_instruction:
        yield f"{row.name} has a tl.dot but uses no matrix instruction"


def worse_than(committed: Row, row: Row) -> Iterator[str]:
    """Differences between a kernel and its committed row."""
    if committed.triton != row.triton:  # versions schedule loads and place layouts differently
        return
    for what in ("registers", "shared_bytes"):
        before, now = getattr(committed, what), getattr(row, what)
        if now > before:
            yield f"{row.name}: {what} {before} → {now}"
    if committed.matrix_instruction != row.matrix_instruction:
        yield f"{row.name}: matrix instruction {committed.matrix_instruction} → {row.matrix_instruction}"


def compare(rows: Sequence[Row], table: Sequence[Row]) -> Iterator[str]:
    """Differences between compiled kernels and `table`, the part of the committed table that was selected."""
    return tables.compare(rows, table, TABLE, "compiles", worse_than)


def not_reached(jobs: Sequence[Job]) -> Iterator[str]:
    """Kernels and launchers that no call reaches."""
    for name in registration.definitions:
        if name not in CALLS:
            yield f"{name} has Triton kernels but no calls in a record of bench/operators"
    reached = {job.kernel.function.fn.__name__ for job in jobs}
    kernels = {f"{module.__name__}.{name}": name for module in kernel_modules() for name in kernels_in(module)}
    for path, name in kernels.items():
        if name not in reached:
            yield f"{path} is reached by no call in a record of bench/operators"


def report(console: Console, count: int, problems: Sequence[str]) -> None:
    for problem in problems:
        console.print(problem, style="red", highlight=False)
    console.print(f"{count} kernels, {len(problems)} problems")
    if problems:
        raise SystemExit(1)


def main() -> None:
    parser = command(__doc__)
    parser.add_argument("--op", nargs="+", choices=OPERATORS, default=OPERATORS, help="forward and backward of these")
    parser.add_argument("--target", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--dtype", nargs="+", choices=[*DTYPES], default=[*DTYPES])
    parser.add_argument("--quick", action="store_true", help="the first call of each operator only")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="compare with the table and do not write it")
    instead.add_argument("--sweep", action="store_true", help="integer arguments at 1 and beyond 2³¹; writes nothing")
    instead.add_argument("--widths", action="store_true", help="every supported width; writes nothing")
    args = parser.parse_args()
    console = Console()
    console.width = max(console.width, 220)  # wide enough for every column, also if piped
    if not launching.installed:
        parser.error("Triton is not installed: pip install triton")
    if launching.triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the kernels would be interpreted. Unset it.")

    forget_paths()
    ops = [op for op in CALLS if FAMILIES[op] in args.op]
    swept = swept_jobs(ops, args.target) if args.sweep else None
    jobs = list(swept or jobs_of(ops, args.target, args.dtype, args.quick, args.widths))
    outcomes = outcomes_of(jobs, console)
    rows = [each.row for each in outcomes if isinstance(each, Result)]
    problems = [problem for each in outcomes for problem in ([each] if isinstance(each, str) else problems_of(each))]
    whole = not (args.quick or args.widths or args.sweep) and set(args.dtype) >= set(DTYPES)  # of the chosen operators
    if whole and set(args.op) == set(OPERATORS):
        problems += not_reached(jobs)
    if args.check:
        table = [row for row in tables.read(TABLE, Row) if row.op in ops and row.target in args.target]
        table = [row for row in table if row.dtype in args.dtype]
        if args.quick:
            shapes = {(job.op, job.dtype, job.shape) for job in jobs}
            table = [row for row in table if (row.op, row.dtype, row.shape) in shapes]
        problems += compare([row for row in rows if row.target in IN_TABLE], table)
    else:
        columns = [name for name in Row._fields if name not in ("constants", "triton")]
        tables.show(columns, [[getattr(row, name) for name in columns] for row in rows])
    report(console, len(rows), problems)
    if whole and not (args.check or args.no_save) and set(args.target) == set(ARCHITECTURES):
        others = [row for row in tables.read(TABLE, Row) if row.op not in ops]
        new = [row for row in rows if row.target in IN_TABLE]
        places = {op: place for place, op in enumerate(CALLS)}
        tables.write(TABLE, sorted([*others, *new], key=lambda row: (IN_TABLE.index(row.target), places[row.op])))
        console.print(f"wrote {TABLE}")


if __name__ == "__main__":
    main()

"""Compile every Triton kernel to machine code ahead of time, without a GPU.

    python -m bench.aot                                 compile all and write bench/results/aot.csv
    python -m bench.aot --check                         compile all and compare with the table; write nothing
    python -m bench.aot --op class_scores --no-save     print only; also --target sm_90 gfx942, --dtype bf16, --quick

The launchers run, forward and backward, on the calls of `bench.launches`, with a recorder in place of the launch and
`launching.target` set to each GPU in turn; Triton's binder gives the specialisation of each launch. So the compiled
kernels are those that a user gets: the same constants, types, divisibility, warps and stages. Read from the machine
code are registers per thread, spilled bytes, bytes of shared memory, and the matrix instruction of a kernel with a
`tl.dot`.

`--check` fails if a kernel does not compile, spills, exceeds the shared memory of a block or the largest grid, has a
`tl.dot` but no matrix instruction, is reached by no call, is missing from the table, is in the table but not compiled,
needs more registers or shared memory than in the table, or uses another matrix instruction. If the table was made by
another version of Triton, registers and shared memory may grow by ALLOWANCE.

`--quick` takes only the first call of every operator: all kernels and dtypes, not all entries of the block tables.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import importlib
import itertools
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import rich.progress
from rich.console import Console

from skipkernels.ops import OPERATORS, launching, registration

from . import measure, tables
from .launches import CALLS, DTYPES, DTYPES_OF

for _op in OPERATORS:
    with contextlib.suppress(ModuleNotFoundError):  # not written yet
        importlib.import_module(f"skipkernels.ops.{_op.rstrip('_')}")

TABLE = measure.RESULTS / "aot.csv"
# Registers and shared memory may grow by this much when another version of Triton compiles the same source: versions
# schedule loads and place layouts differently. Spills and the limits of the hardware are never allowed for.
ALLOWANCE = 1.25
LARGEST_GRID = (2**31 - 1, 65535, 65535)

_MATRIX_INSTRUCTIONS = {
    "ptx": re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b[\w.:]*"),
    "amdgcn": re.compile(r"\b(v_mfma)_\w+"),
}


class Architecture(NamedTuple):
    """A target: Triton's backend and name, threads per warp, and the largest shared memory (LDS) of a block in bytes.

    From NVIDIA's CUDA C++ Programming Guide, "Compute Capabilities", and AMD's CDNA3 ISA guide.
    """

    backend: str
    arch: int | str
    warp_size: int
    block_shared: int


ARCHITECTURES = {
    "sm_80": Architecture("cuda", 80, 32, 163 << 10),
    "sm_90": Architecture("cuda", 90, 32, 227 << 10),
    "sm_100": Architecture("cuda", 100, 32, 227 << 10),
    "gfx942": Architecture("hip", "gfx942", 64, 64 << 10),
}


class Launch(NamedTuple):
    """The arguments of one call of `launching.launch`."""

    kernel: Any
    grid: tuple[int, ...]
    options: dict[str, Any]
    arguments: dict[str, Any]


class Job(NamedTuple):
    """A kernel to compile: the launch that it comes from, and the input of Triton's compiler."""

    op: str
    shape: str
    dtype: str
    number: int
    """Index of the launch within the call."""
    target: str
    grid: tuple[int, ...]
    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]


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


@contextlib.contextmanager
def recording(architecture: Architecture) -> Iterator[list[Launch]]:
    """Record launches on the meta device in a list, as they would be made for this architecture."""
    launches: list[Launch] = []
    run, target = launching._run, launching._target_of_gpu
    launching._run = lambda *launch: launches.append(Launch(*launch))
    launching._target_of_gpu = lambda index: launching.Target(architecture.backend, architecture.arch)
    try:
        yield launches
    finally:
        launching._run, launching._target_of_gpu = run, target


def family(op: str) -> str:
    """The operator that a name like class_sampled_ce_backward or gather_rows_out belongs to."""
    return max((name for name in OPERATORS if op.startswith(name)), key=len)


def record(op: str, arguments: Sequence[Any], architecture: Architecture) -> list[Launch]:
    """The kernels that one call of an operator launches."""
    with recording(architecture) as launches:
        registration.definitions[op].launch(*arguments)
    return launches


def jobs_of(ops: Sequence[str], targets: Sequence[str], dtypes: Sequence[str], quick: bool) -> Iterator[Job]:
    """The kernels to compile; a kernel that several calls launch is compiled once for each dtype and target."""
    for target, op in itertools.product(targets, ops):
        backend = importlib.import_module("triton.compiler.compiler").make_backend(gpu_target(target))
        for dtype, torch_dtype in DTYPES_OF.get(op, DTYPES).items():
            seen = set()
            for call in itertools.islice(CALLS[op](torch_dtype), 1 if quick else None) if dtype in dtypes else ():
                for number, launch in enumerate(record(op, call.arguments, ARCHITECTURES[target])):
                    built = specialise(launch, backend)
                    job = Job(op, call.shape, dtype, number, target, launch.grid, launch.kernel, *built)
                    what = (job.kernel.fn.__qualname__, *map(repr, built))
                    if what not in seen:
                        seen.add(what)
                        yield job


def specialise(launch: Launch, backend: Any) -> tuple[dict, dict, dict, dict]:
    """Signature, constants, attributes and options that `JITFunction.run` would pass to the compiler."""
    kernel = launch.kernel
    bind = importlib.import_module("triton.runtime.jit").create_function_from_signature(
        kernel.signature, kernel.params, backend
    )
    given = {**launch.arguments, **launch.options}
    options, signature, constants, attributes = kernel._pack_args(backend, given, *bind(**given))
    return signature, constants, attributes, dict(options.__dict__)


def gpu_target(target: str) -> Any:
    architecture = ARCHITECTURES[target]
    GPUTarget = importlib.import_module("triton.backends.compiler").GPUTarget
    return GPUTarget(architecture.backend, architecture.arch, architecture.warp_size)


def compile_job(job: Job) -> Result:
    """Compile a kernel, or load it from Triton's cache, and read its machine code."""
    triton = launching.triton
    source = triton.compiler.ASTSource(job.kernel, job.signature, job.constants, job.attributes)
    compiled = triton.compile(source, target=gpu_target(job.target), options=job.options)
    if "cubin" in compiled.asm:
        assembly, (registers, spilled) = "ptx", resources_of_cubin(compiled.asm["cubin"])
    else:
        assembly, (registers, spilled) = "amdgcn", resources_of_amdgcn(compiled.asm["amdgcn"])
    instructions = {match[0] for match in _MATRIX_INSTRUCTIONS[assembly].finditer(compiled.asm[assembly])}
    matrix, metadata = " ".join(sorted(instructions)), compiled.metadata
    called = job.op, job.shape, job.dtype, job.number, job.kernel.fn.__name__, job.target, constants_of(job)
    launched = math.prod(job.grid), metadata.num_warps, metadata.num_stages
    row = Row(*called, *launched, registers, spilled, metadata.shared, matrix, triton.__version__)
    return Result(row, job.grid, has_dot="tt.dot" in compiled.asm["ttir"])


def constants_of(job: Job) -> str:
    """The constants by name, including integer arguments that Triton specialises because they are 1."""
    names = list(job.signature)
    return " ".join(f"{names[place]}={value}" for (place,), value in sorted(job.constants.items()))


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
    """Vector registers per lane, and the larger of scratch memory and spilled registers, in bytes."""
    usage = {name: int(n) for name, n in re.findall(r"^ +\.(\w+): +(\d+)$", assembly, re.MULTILINE)}
    spilled = 4 * (usage["vgpr_spill_count"] + usage["sgpr_spill_count"])
    return usage["vgpr_count"], max(spilled, usage["private_segment_fixed_size"])


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


def compile_all(jobs: Sequence[Job], console: Console) -> tuple[list[Result], list[str]]:
    """The results in the order of the jobs, and the jobs that did not compile; one process per core."""
    results, failures = [], []
    # Forked, since kernels cannot be pickled. If a compiler aborts, the pool raises BrokenProcessPool and does not
    # wait.
    fork = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), fork, _start_worker, (jobs,)) as pool:
        outcomes = pool.map(_compile_numbered, range(len(jobs)))
        for outcome in rich.progress.track(outcomes, "compiling", len(jobs), console=console, transient=True):
            (failures if isinstance(outcome, str) else results).append(outcome)
    return results, failures


_jobs: Sequence[Job] = ()


def _start_worker(jobs: Sequence[Job]) -> None:
    global _jobs
    _jobs = jobs


def _compile_numbered(number: int) -> Result | str:
    job = _jobs[number]
    try:
        return compile_job(job)
    except Exception as error:  # reported; the other kernels are compiled
        reason = str(error).strip().splitlines() or [""]
        return (
            f"{job.kernel.fn.__name__} ({job.op}, {job.shape}, {job.dtype}, {job.target}) does not compile: "
            f"{type(error).__name__}: {reason[-1]}"
        )


def problems_of(result: Result) -> Iterator[str]:
    """Problems of a kernel that do not depend on the table."""
    row, limits = result.row, ARCHITECTURES[result.row.target]
    if row.spilled_bytes:
        yield f"{row.name} spills {row.spilled_bytes} bytes"
    if row.shared_bytes > limits.block_shared:
        yield f"{row.name} wants {row.shared_bytes} bytes of shared memory; a block may have {limits.block_shared}"
    if any(size > most for size, most in zip(result.grid, LARGEST_GRID, strict=False)):
        yield f"{row.name} is launched with a grid of {result.grid}; the largest is {LARGEST_GRID}"
    if result.has_dot and not row.matrix_instruction:
        yield f"{row.name} has a tl.dot but uses no matrix instruction"


def worse_than(committed: Row, row: Row) -> Iterator[str]:
    """Differences between a kernel and its committed row."""
    allowance = 1.0 if committed.triton == row.triton else ALLOWANCE
    for what in ("registers", "shared_bytes"):
        before, now = getattr(committed, what), getattr(row, what)
        if now > allowance * before:
            yield f"{row.name}: {what} {before} → {now}"
    if committed.triton == row.triton and committed.matrix_instruction != row.matrix_instruction:
        yield f"{row.name}: matrix instruction {committed.matrix_instruction} → {row.matrix_instruction}"


def compare(rows: Sequence[Row], table: Sequence[Row]) -> Iterator[str]:
    """Differences between compiled kernels and `table`, the part of the committed table that was selected."""
    return tables.compare(rows, table, TABLE, "compiles", worse_than)


def not_reached(jobs: Sequence[Job]) -> Iterator[str]:
    """Kernels and launchers that no call reaches."""
    for name in registration.definitions:
        if name not in CALLS:
            yield f"{name} has Triton kernels but no calls in bench/launches.py"
    reached = {job.kernel.fn.__name__ for job in jobs}
    for module in kernel_modules():
        for name in vars(module):
            if name.endswith("_kernel") and name not in reached:
                yield f"{module.__name__}.{name} is reached by no call in bench/launches.py"


def read_table() -> list[Row]:
    return tables.read(TABLE, Row)


def write_table(rows: Sequence[Row]) -> None:
    tables.write(TABLE, rows)


def print_rows(rows: Sequence[Row]) -> None:
    """Print a line for each kernel and target, with ranges over dtypes and shapes."""
    groups: dict[tuple[str, str, str], list[Row]] = {}
    for row in sorted(rows, key=lambda row: (list(CALLS).index(row.op), row.kernel)):
        groups.setdefault((row.op, row.kernel, row.target), []).append(row)
    ranged, lines = ("num_warps", "registers", "spilled_bytes", "shared_bytes"), []
    for key, group in groups.items():
        values = [[getattr(row, name) for row in group] for name in ranged]
        ranges = ["–".join(map(str, dict.fromkeys((min(each), max(each))))) for each in values]
        used = {name for row in group for name in re.findall(r"\b(?:wg)?mma|tcgen05|v_mfma", row.matrix_instruction)}
        lines.append([*key, len(group), *ranges, " ".join(sorted(used))])
    tables.show(["operator", "kernel", "target", "compiled", *ranged, "matrix instruction"], lines, width=170)


def main() -> None:
    parser = measure.command(__doc__)
    parser.add_argument("--op", nargs="+", choices=OPERATORS, default=OPERATORS, help="forward and backward of these")
    parser.add_argument("--target", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--dtype", nargs="+", choices=[*DTYPES, "int8"], default=[*DTYPES, "int8"])
    parser.add_argument("--quick", action="store_true", help="the first call of each operator only")
    parser.add_argument("--check", action="store_true", help="compare with the table and do not write it")
    args = parser.parse_args()
    console = Console()
    console.width = max(console.width, 170)  # wide enough for every column, also if piped
    if not launching.installed:
        parser.error("Triton is not installed: pip install triton")
    if launching.triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the kernels would be interpreted. Unset it.")

    forget_paths()
    ops = [op for op in CALLS if family(op) in args.op]
    jobs = list(jobs_of(ops, args.target, args.dtype, args.quick))
    results, problems = compile_all(jobs, console)
    rows = [result.row for result in results]
    problems += [problem for result in results for problem in problems_of(result)]
    everything = set(args.op) == set(OPERATORS) and set(args.dtype) >= set(DTYPES)
    if everything:
        problems += not_reached(jobs)
    if args.check:
        table = [row for row in read_table() if row.op in ops and row.target in args.target and row.dtype in args.dtype]
        if args.quick:
            shapes = {(job.op, job.dtype, job.shape) for job in jobs}
            table = [row for row in table if (row.op, row.dtype, row.shape) in shapes]
        problems += compare(rows, table)
    else:
        print_rows(rows)
    for problem in problems:
        console.print(problem, style="red", highlight=False)
    console.print(f"{len(rows)} kernels, {len(problems)} problems")
    if problems:
        raise SystemExit(1)
    if everything and not (args.check or args.no_save or args.quick) and set(args.target) == set(ARCHITECTURES):
        write_table(rows)
        console.print(f"wrote {TABLE}")


if __name__ == "__main__":
    main()

"""Compile every Triton kernel to machine code ahead of time, without a GPU.

    python -m bench.aot                                 compile all and write bench/results/aot.csv
    python -m bench.aot --check                         compile all and compare with the table; write nothing
    python -m bench.aot --op class_scores               compile an operator and print what it needs
    python -m bench.aot --sweep --target sm_90          compile with each integer argument at 1 and beyond 2³¹ only
    python -m bench.aot --widths --target sm_90         compile for every supported width of rows and heads only

The calls are those of the records of `bench.operators`, forward and backward. Read from the machine code
(`bench.machine_code`) are registers per thread, spilled bytes, bytes of shared memory, and the matrix instruction of a
kernel with a `tl.dot`. The command fails if a kernel does not compile, spills, exceeds the shared memory of a block or
the largest grid, has a `tl.dot` but no matrix instruction, or is reached by no call; with `--check` also if it is
missing from the table, is in the table but not compiled, needs more registers or shared memory than in the table, or
uses another matrix instruction. Of these three only the limits of the GPU count if another version of Triton made the
table.

`--op` and `--target` take a part, and `--quick` the first call of every operator in bf16: most kernels, few entries of
the launch tables. Targets that are not IN_TABLE have the first calls alone. Triton has no matrix instructions for
sm_75: there kernels only have to compile and to fit into shared memory.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from skipkernels.ops import OPERATORS, launching, registration

from . import tables
from .launches import ARCHITECTURES, CALLS, PUBLIC_OPERATOR, WIDTHS, launches_of
from .machine_code import Job, Label, Row, compile_all, job_of, kernel_paths, once
from .measure import DTYPES
from .rows import RESULTS, command

TABLE = RESULTS / "aot.csv"
IN_TABLE = ("sm_80", "sm_90", "sm_100", "gfx942")


def main() -> None:
    parser = command(__doc__)
    parser.add_argument("--op", nargs="+", choices=OPERATORS, default=OPERATORS, help="forward and backward of these")
    parser.add_argument("--target", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--quick", action="store_true", help="the first call of each operator in bf16 only")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--check", action="store_true", help="compare with the table and do not write it")
    instead.add_argument("--sweep", action="store_true", help="integer arguments at 1 and beyond 2³¹; writes nothing")
    instead.add_argument("--widths", action="store_true", help="every supported width; writes nothing")
    args = parser.parse_args()
    if not launching.installed:
        parser.error("Triton is not installed: pip install triton")
    if launching.triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the kernels would be interpreted. Unset it.")

    ops = [op for op in CALLS if PUBLIC_OPERATOR[op] in args.op]
    calls_of = WIDTHS if args.widths else CALLS
    jobs = once(swept_jobs(ops, args.target) if args.sweep else jobs_of(ops, args.target, calls_of, args.quick))
    compiled = compile_all(jobs)
    rows = [each.row for each in compiled if each.row is not None]
    problems = [problem for each in compiled for problem in each.problems]
    of_table = [row for row in rows if row.target in IN_TABLE]
    whole = set(args.op) == set(OPERATORS) and not (args.quick or args.widths or args.sweep)
    if whole and not set(IN_TABLE).isdisjoint(args.target):
        problems += not_reached(jobs)
    if args.check:
        problems += compare(of_table, selected(jobs, args.quick))
    else:
        columns = [name for name in Row._fields if name not in ("constants", "triton")]
        tables.show(columns, [[getattr(row, name) for name in columns] for row in rows])
    tables.exit_with(problems, f"{len(rows)} kernels")
    if whole and set(args.target) == set(ARCHITECTURES) and not (args.check or args.no_save):
        tables.write(TABLE, of_table)
        print(f"wrote {TABLE}")


# ---- what is compiled ------------------------------------------------------------------------------------------------


def jobs_of(ops: Sequence[str], targets: Sequence[str], calls_of: Mapping[str, Any], quick: bool) -> Iterator[Job]:
    """The kernels of all calls of the operators, or of the first ones."""
    for target, op in itertools.product(targets, [op for op in ops if op in calls_of]):
        first_only = quick or (calls_of is CALLS and target not in IN_TABLE)
        for dtype in ("bf16",) if quick else DTYPES:
            for call in itertools.islice(calls_of[op](DTYPES[dtype]), 1 if first_only else None):
                for number, launch in enumerate(launches_of(op, call.arguments, ARCHITECTURES[target])):
                    yield job_of(launch, op, call.shape, dtype, number, target)


def swept_jobs(ops: Sequence[str], targets: Sequence[str]) -> Iterator[Job]:
    """The kernels of the first call of each operator with each integer argument at 1 and beyond 2³¹, one at a time.

    Triton makes an argument of 1 a constant, and one beyond 2³¹ an int64, which is divisible by 16 or not.
    """
    for target, op in itertools.product(targets, ops):
        call = next(CALLS[op](DTYPES["bf16"]))
        for number, launch in enumerate(launches_of(op, call.arguments, ARCHITECTURES[target])):
            constants = {parameter.name for parameter in launch.kernel.params if parameter.is_constexpr}
            integers = [name for name, x in launch.arguments.items() if type(x) is int and name not in constants]
            for name, value in itertools.product(integers, (1, 2**31, 2**31 + 1)):
                changed = launch._replace(arguments=launch.arguments | {name: value})
                yield job_of(changed, op, f"{call.shape}, {name} = {value}", "bf16", number, target)


def not_reached(jobs: Sequence[Job]) -> Iterator[str]:
    """Kernels and launchers that no call reaches."""
    for name in registration.definitions:
        if name not in CALLS:
            yield f"{name} has Triton kernels but no calls in a record of bench/operators"
    reached = {job.label.kernel for job in jobs}
    for path, name in kernel_paths().items():
        if name not in reached:
            yield f"{path} is reached by no call in a record of bench/operators"


# ---- the table -------------------------------------------------------------------------------------------------------


def selected(jobs: Sequence[Job], quick: bool) -> list[Row]:
    """Rows of the table of the operators and targets of some jobs; if `quick`, of their calls alone."""

    def part(label: Label) -> tuple[str, ...]:
        return (label.op, label.target, label.shape, label.dtype) if quick else (label.op, label.target)

    parts = {part(job.label) for job in jobs}
    return [row for row in tables.read(TABLE, Row) if part(row.key) in parts]


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


if __name__ == "__main__":
    main()

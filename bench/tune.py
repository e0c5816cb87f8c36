"""Time launch options of the Triton kernels on a GPU, and write the table of this device.

    python -m bench.tune                        write skipkernels/ops/tables/DEVICE.json, which later processes read
    python -m bench.tune --out FOLDER           write FOLDER/DEVICE.json, which nothing reads
    python -m bench.tune --op class_scores --dtype bf16 --seconds 60

The candidates for an entry of the defaults are its neighbours: one block of half or twice the size, other warps, one
stage less or more. Those are left out that do not compile, spill registers or need too much shared memory
(`bench.aot`), or give wrong results. The others are timed as the benchmarks of the operators are: forward and backward,
as CUDA graphs, in turn, on the first case that takes the entry. The fastest replaces the entry if it takes at most MOST
of its time. The table is written after each entry.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from skipkernels.ops import OPERATORS, launching

from . import measure
from .launches import ARCHITECTURES, CALLS, PUBLIC_OPERATOR, launches_of
from .machine_code import Job, compile_all, job_of, once
from .measure import DTYPES, OURS
from .operators import Case, Run
from .operators.gate import Gate
from .operators.record import cases_of
from .operators.replays import time_replays
from .rows import command

MOST = 0.97  # a smaller gain may be noise
MOST_WARPS = 16  # 1,024 threads on AMD
TIMED = ("bf16", "fp32")

Options = Mapping[str, Any]
Place = tuple[Any, ...]
"""Kernel, bytes of an element and sizes of an entry."""


def main(arguments: Sequence[str] | None = None) -> None:
    parser = command(__doc__)
    parser.add_argument("--op", nargs="+", choices=OPERATORS, default=OPERATORS)
    parser.add_argument("--dtype", nargs="+", choices=TIMED, default=TIMED)
    parser.add_argument("--device", type=torch.device, default=measure.default_device(), help="default: a GPU, if any")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="default: the folder of the package")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin no other entry after this time")
    args = parser.parse_args(arguments)
    device = launching.target(args.device)
    if not device.name:
        parser.error("there is no GPU here")
    target = next((name for name, each in ARCHITECTURES.items() if each[:2] == device[:2]), None)
    if target is None:
        parser.error(f"the limits of {device.backend} {device.arch} are not known: add them to bench/launches.py")
    path = launching.table_path(device.name)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
        path = args.out / path.name
    chosen = read_chosen(path)  # also those of an earlier run, perhaps of other operators
    timed = 0
    for op, dtype, case, place, options in entries(args, end=time.monotonic() + args.seconds):
        candidates = sound(op, dtype, target, place, neighbours(options))
        chosen[place], report = fastest(case, dtype, args.device, place, [options, *candidates])
        timed += 1
        print(f"{_text(place)}, {case.shape} {dtype}: {report}", flush=True)
        if not args.no_save:
            path.write_text(json.dumps(table_with(device, chosen), indent=1) + "\n")
    print(f"result: {timed} entries timed; the table is {path}")


def entries(args: argparse.Namespace, end: float) -> Iterator[tuple[str, str, Case, Place, Options]]:
    """Each entry once: operator, dtype and the first case that takes it, place and options; none after `end`."""
    seen: set[Place] = set()
    for op, dtype, case in cases(args.op, args.dtype, args.device):
        if time.monotonic() > end:
            return
        with defaults_but({}) as taken:
            case.runs[OURS]()
        for place, options in taken.items():
            if place not in seen and time.monotonic() <= end:
                seen.add(place)
                yield op, dtype, case, place, options


def read_chosen(path: Path) -> dict[Place, Options]:
    """Options of the entries of a table; none if there is no file."""
    table = launching.read_table(path) if path.exists() else {}
    return {place_of(kernel, entry): entry.options for kernel, entries in table.items() for entry in entries}


def cases(ops: Sequence[str], dtypes: Sequence[str], device: torch.device) -> Iterator[tuple[str, str, Case]]:
    """Operator, dtype and case: the first cases of all operators, then the second ones, and so on."""
    waiting = [(op, dtype, cases_of(op, dtype, device)) for dtype, op in itertools.product(dtypes, ops)]
    while waiting:
        for each in [*waiting]:
            op, dtype, remaining = each
            if case := next(remaining, None):
                yield op, dtype, case
            else:
                waiting.remove(each)


@contextlib.contextmanager
def defaults_but(changed: Mapping[Place, Options]) -> Iterator[dict[Place, Options]]:
    """Take the defaults, but the options of the entries in `changed`; the entries that are taken are returned."""
    taken: dict[Place, Options] = {}

    def entry_of(kernel: str, device: launching.Target, itemsize: int, **sizes: int) -> launching.Entry:
        entry = launching.entry_of(kernel, device._replace(name=""), itemsize, **sizes)
        place = place_of(kernel, entry)
        taken[place] = changed.get(place, entry.options)
        return entry._replace(options=taken[place])

    with launching.entries_from(entry_of):
        yield taken


def place_of(kernel: str, entry: launching.Entry) -> Place:
    return kernel, entry.itemsize, *entry.sizes.items()


def _text(place: Place) -> str:
    kernel, itemsize, *sizes = place
    return " ".join([kernel, *[f"{itemsize} bytes"] * bool(itemsize), *(f"{name} ≤ {most}" for name, most in sizes)])


# ---- candidates ------------------------------------------------------------------------------------------------------


def neighbours(options: Options) -> list[Options]:
    """One block halved, doubled or as it is, with as many warps, half and twice; or one stage less or more."""
    blocks = [name for name in options if name.startswith(("BLOCK", "CHUNK"))]
    scaled = [{}, *({block: factor * options[block]} for block in blocks for factor in (0.5, 2.0))]
    warps = options["num_warps"]
    found: list[Options] = [
        {**options, **block, "num_warps": number} for block in scaled for number in (warps, 0.5 * warps, 2.0 * warps)
    ]
    if "num_stages" in options:
        found += [{**options, "num_stages": options["num_stages"] + more} for more in (-1, 1)]
    whole = [{name: type(options[name])(value) for name, value in each.items()} for each in found if _is_possible(each)]
    return [each for each in whole if each != options]


def _is_possible(options: Options) -> bool:
    sizes = [value for name, value in options.items() if name != "MEASURE"]
    return all(size >= 1 and size == int(size) for size in sizes) and options["num_warps"] <= MOST_WARPS


def sound(op: str, dtype: str, target: str, place: Place, candidates: Sequence[Options]) -> list[Options]:
    """Candidates that compile in all calls of `bench.aot`, without spills and within the limits of the GPU."""
    of_each = (once(jobs_of(op, dtype, target, place, each)) for each in candidates)
    jobs = [(number, job) for number, of in enumerate(of_each) for job in of]
    compiled = compile_all([job for _, job in jobs])
    unsound = {number for (number, _), each in zip(jobs, compiled, strict=True) if each.problems}
    return [each for number, each in enumerate(candidates) if number not in unsound]


def jobs_of(op: str, dtype: str, target: str, place: Place, options: Options) -> Iterator[Job]:
    """The kernels of the calls of an operator that take an entry, with other options."""
    for name in (name for name in CALLS if PUBLIC_OPERATOR[name] == op):
        for call in CALLS[name](DTYPES[dtype]):
            with defaults_but({place: options}) as taken:
                launches = launches_of(name, call.arguments, ARCHITECTURES[target])
            for number, launch in enumerate(launches if place in taken else ()):
                if launch.kernel.fn.__name__ == f"_{place[0]}_kernel":
                    yield job_of(launch, name, call.shape, dtype, number, target)


# ---- times -----------------------------------------------------------------------------------------------------------


def fastest(
    case: Case, dtype: str, device: torch.device, place: Place, candidates: Sequence[Options]
) -> tuple[Options, str]:
    """The fastest of the candidates, of which the first is the default, and a line about it."""
    default, named, copy = _name(candidates[0]), {_name(options): options for options in candidates}, case.copy
    trial = case._replace(
        runs={"eager": case.runs["eager"], **_trials(case.runs[OURS], place, named)},
        copy=None if copy is None else lambda: _trials(copy()[OURS], place, named),
    )
    gate = Gate(trial, DTYPES[dtype], device)
    times = time_replays(trial, [name for name in named if not gate.error_of(name)], device)
    seconds = {name: measure.quantile(found, 0.5) for name, found in times.items() if not isinstance(found, str)}
    if default not in seconds:
        return candidates[0], "the default gives no time"
    best = min(seconds, key=seconds.__getitem__)
    ratio = seconds[best] / seconds[default]
    if ratio > MOST:
        best = default
    return named[best], f"{1000 * seconds[default]:.4f} ms, {ratio:.2f} of it the fastest of {len(seconds)}; {best}"


def _trials(run: Run, place: Place, named: Mapping[str, Options]) -> dict[str, Run]:
    def with_options(options: Options) -> Run:
        def trial() -> list[torch.Tensor]:
            with defaults_but({place: options}):
                return run()

        return trial

    return {name: with_options(options) for name, options in named.items()}


def _name(options: Options) -> str:
    return " ".join(f"{name}={value}" for name, value in options.items())


def table_with(device: launching.Target, chosen: Mapping[Place, Options]) -> dict[str, list[dict[str, Any]]]:
    """The kernels of which an entry is replaced, with all of their entries."""
    table = {}
    for kernel, entries in launching.table_of(device._replace(name="")).items():
        options = [chosen.get(place_of(kernel, entry), entry.options) for entry in entries]
        if options != [entry.options for entry in entries]:
            table[kernel] = [
                {**({"bytes": entry.itemsize} if entry.itemsize else {}), **entry.sizes, **own}
                for entry, own in zip(entries, options, strict=True)
            ]
    return table


if __name__ == "__main__":
    main()

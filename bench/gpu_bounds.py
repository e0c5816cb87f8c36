"""Estimate what changes of a step on a GPU that are not built could save at most. Nothing is measured.

    python -m bench.gpu_bounds       write bench/results/gpu_bounds.csv; about a minute
    python -m bench.gpu_bounds --no-save

The step is that of `bench.gpu_model`, in bf16. A change is estimated as the same step in which the part that it changes
takes no time: an upper bound of its gain. Some changes need products that are ours and not PyTorch's: `break_even` is
the share of the speed of PyTorch's products at which ours would lose what the change saves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from . import gpu_model, measure, tables
from .gpu_model import MODEL, OURS, SKIP_LAYERS, Launch, overlapped, skip_clip, steps_of

TABLE = measure.RESULTS / "gpu_bounds.csv"
PRECISION, CLASSES = "bf16", 1000


class Row(NamedTuple):
    """One line of the table."""

    change: str
    B: int
    C: int
    step_us: int
    gain_us: int
    launches: int  # fewer
    break_even: str
    torch: str

    @property
    def key(self) -> tuple[str, int, int]:
        return self[:3]

    @property
    def name(self) -> str:
        return f"{self.change} (B{self.B}-C{self.C})"


class Change(NamedTuple):
    """A change, the launches of a step if the changed part took no time, and the products that would be ours."""

    name: str
    launches: Sequence[Launch]
    products: Sequence[Launch] = ()


def changes(launches: Sequence[Launch], rows: int, real_rows: int) -> Iterator[Change]:
    """Changes of a step.

    `rows` are those of the texts in a graph, which suffice for any classes, and `real_rows` those of mean classes.
    """

    def without(name: str) -> list[Launch]:
        return [x for x in launches if x.name != name]

    def exact(launch: Launch) -> Launch:
        assert launch.shape is not None
        batch, *sizes = (real_rows if size == rows else size for size in launch.shape)
        share = real_rows / rows
        return launch._replace(
            shape=(batch, *sizes), nbytes=int(share * launch.nbytes), flops=int(share * launch.flops)
        )

    activation = "_mlp_activation_fwd_kernel"
    before = [x for x, after in zip(launches, launches[1:], strict=False) if after.name == activation]
    yield Change("activations in the epilogues of products", without(activation), before)
    of_rows = [x for x in launches if x.shape is not None and rows in x.shape]
    fewer_rows = [exact(x) if x.shape is not None and rows in x.shape else x for x in launches]
    yield Change("products over the text rows that exist", fewer_rows, of_rows)
    yield Change("bias gradients in the epilogues of products", without("_column_sums_kernel"))
    yield Change("gradients of query, key and value written side by side", without("stack"))
    yield Change("our kernels that start before one of ours in front of them ends", list(_started_early(launches)))
    yield Change("all gradients of a side updated by one launch", _together(launches, "_sgd_momentum_kernel"))


def _started_early(launches: Sequence[Launch]) -> Iterator[Launch]:
    """The launches, of which neighbours that are ours are one: without the gap between them, and one ramp."""
    last: Launch | None = None
    for x in launches:
        if last is not None and last.triton and x.triton and last.side == x.side:
            warps = None if last.warps is None or x.warps is None else max(last.warps, x.warps)
            last = x._replace(nbytes=last.nbytes + x.nbytes, flops=last.flops + x.flops, warps=warps)
            continue
        if last is not None:
            yield last
        last = x
    if last is not None:
        yield last


def _together(launches: Sequence[Launch], name: str) -> list[Launch]:
    """The launches, of which those of a name are one for each side."""
    found: dict[str, Launch] = {}
    others = []
    for x in launches:
        if x.name != name:
            others.append(x)
        elif (one := found.get(x.side)) is None:
            found[x.side] = x
        else:
            found[x.side] = one._replace(nbytes=one.nbytes + x.nbytes, warps=(one.warps or 0) + (x.warps or 0))
    return [*others, *found.values()]


def bounds(launches: Sequence[Launch], batch: int, found: Sequence[Change]) -> Iterator[Row]:
    """The rows of a step and its changes."""
    whole = overlapped(launches)
    version = ".".join(torch.__version__.split(".")[:2])
    for name, fewer, products in found:
        gain, taken = whole - overlapped(fewer), sum(x.seconds for x in products)
        even = f"{taken / (taken + gain):.2f}" if products else ""
        micro = (round(1e6 * seconds) for seconds in (whole, gain))
        yield Row(name, batch, CLASSES, *micro, len(launches) - len(fewer), even, version)


def rows_of(batch: int) -> list[Row]:
    """The changes of the step with a batch."""
    launches = steps_of(OURS, batch, CLASSES, PRECISION)
    clip, *_ = skip_clip(MODEL, SKIP_LAYERS, batch, CLASSES)
    prompts, K = clip._text.prompts, clip.sampler.expected_keep(CLASSES, batch)
    prefix = prompts.prefix_length
    real_rows = prefix + round(K * (prompts.row_count - prefix) / CLASSES)
    found = list(changes(launches, prompts.capacity(K), real_rows))
    return list(bounds(launches, batch, found))


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Header and lines, with a column for each batch."""
    lines: defaultdict[str, list[Row]] = defaultdict(list)
    for row in rows:
        lines[row.change].append(row)
    batches = list(dict.fromkeys(row.B for row in rows))
    header = ["", *(f"B = {batch}, µs" for batch in batches), "launches", "breaks even at, for each B"]
    return header, [
        [
            change,
            *(str(row.gain_us) for row in own),
            str(own[0].launches),
            ", ".join(x.break_even for x in own).strip(", "),
        ]
        for change, own in lines.items()
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    args = measure.command(__doc__).parse_args(arguments)
    measure.keep_freed_memory()
    rows = [row for batch in gpu_model.BATCHES for row in rows_of(batch)]
    tables.show(*cells(rows), f"{gpu_model.TITLE}; saved at most of a step with C = {CLASSES:,}")
    if not args.no_save:
        tables.write(TABLE, rows)
        print(f"wrote {TABLE}")


if __name__ == "__main__":
    main()

"""Tables of results that do not depend on the device: docs/when.md, fused-blocks.md, gpu.md."""

from __future__ import annotations

from .. import gpu_model, tables
from ..rows import grouped, latest_rows
from ..when import summary
from .cells import MACHINE_SHOWN, origin, table

PARTS = {"image": "image tower", "pairs": "both towers on pairs"}
FUSED = {"checkpointing": "gradient checkpointing", "compile": "torch.compile"}
FUSED |= {f"fuse-{memory}": f"sk.fuse, {memory}" for memory in ("fast", "balanced", "min")}


def fused() -> str:
    """Saved bytes and time of training a model in fp32, relative to its own blocks; models ran on several CPUs."""
    rows, lines = latest_rows("fuse", precision="fp32"), []
    for (model, batch, part), of in grouped(rows, "model B part").items():
        found = {row["implementation"]: (float(row["saved_mib"]), float(row["p50_ms"])) for row in of}
        saved, step = found["eager"]
        cells = [
            f"{found[name][0] / saved:.2f}, {found[name][1] / step:.2f}" if name in found else "–" for name in FUSED
        ]
        lines.append([f"{model}, batch {batch}, {PARTS[part]}", *cells])
    return table(["bytes, time", *FUSED.values()], lines) + origin("fuse", rows)


def default_cost() -> str:
    """Time and memory of `skipkernels tune`, with and without its comparison."""
    rows = latest_rows("default", **MACHINE_SHOWN)
    lines = [[row["name"], f"{float(row['p50_s']):.0f} s", f"{int(row['peak_mib']):,} MiB"] for row in rows]
    return table(["", "time", "peak memory"], lines) + origin("default", rows)


def when(name: str) -> str:
    """A table of the study of when Skip Tuning wins, which ran on several CPUs."""
    kind, make = summary.TABLES[name]
    rows = latest_rows(kind)
    return table(*make(rows)) + origin(kind, rows)


def estimates() -> str:
    """Estimated steps on a GPU, which depend on no device here."""
    header, lines = gpu_model.cells(tables.read(gpu_model.TABLE, gpu_model.Row))
    return table(header, lines) + f"\n\n<sub>{gpu_model.TITLE}; `python -m bench.gpu_model`</sub>"

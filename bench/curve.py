"""The common part of bench.step and bench.infer: implementations of one computation over the number of classes."""

from __future__ import annotations

import argparse
import gc
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from . import ceilings, measure
from .budget import NO_TIME, CostModel, Probe

Key = tuple[str, str]
"""Implementation and precision."""
OURS, PUBLISHED = "skipkernels", "published"
_ROUNDS = 3  # at least, unless --rounds is less


class Curve:
    """The implementations at one model and batch size: predicted, checked, timed in turn, and appended to a table.

    Attributes:
        columns: Columns of a row, besides those of the machine.
        probes: Small numbers of classes, from which larger ones are predicted.
        compared: Implementations that are compared with the published one.
        unchecked: Note of their rows where the published one does not run.
    """

    columns: Sequence[str] = ()
    probes = 0, 0
    compared: Sequence[str] = ()
    unchecked = ""

    def __init__(self, args: argparse.Namespace, model: str, batch: int):
        self.args, self.model, self.batch = args, model, batch
        self.wanted: list[Key] = [(name, precision) for precision in args.precision for name in args.implementation]
        self.cost_models: dict[Key, CostModel] = {}

    # ---- the computation -----------------------------------------------------------------------------------------

    def build(self, classes: int, keys: Sequence[Key], folder: Path, *, probing: bool = False) -> dict[Key, Any]:
        """The functions to time, checked against another computation of the same result."""
        raise NotImplementedError

    def case(self, classes: int, name: str) -> dict[str, Any]:
        """Columns of a row that is not measured."""
        return {"model": self.model, "B": self.batch, "C": classes}

    def probe(self, key: Key, classes: int, function: Any) -> Probe:
        """Measure a small number of classes."""
        seconds = measure.time_alternately({key: function}, 1, self.args.device)[key][0]
        return Probe(classes, seconds, 0)

    def seconds(self, classes: int, key: Key) -> float:
        """Predicted seconds until the row is complete."""
        raise NotImplementedError

    def reason(self, classes: int, key: Key) -> str:
        """The reason to skip an implementation, or ""."""
        raise NotImplementedError

    def sizes(self, key: Key, function: Any, found: dict[Key, dict[str, Any]]) -> dict[str, Any]:
        """Columns that are measured before timing, among them gflop."""
        raise NotImplementedError

    def moved(self, function: Any) -> int:
        """Least bytes of weights and gradients that one call moves."""
        raise NotImplementedError

    def after(self, key: Key, function: Any) -> dict[str, Any]:
        """Columns that are measured after timing."""
        return {}

    # ---- the measurement -----------------------------------------------------------------------------------------

    def measure(self, table: str) -> None:
        """Measure every number of classes and append the rows."""
        self.predict()
        for classes in self.args.classes:
            started = time.perf_counter()
            rows = self.rows(classes)
            for row in rows:
                print(f"{row['implementation']:24} {row['precision']}  C = {classes:5}  {shown(row)}")
            print(f"  {self.model}, batch {self.batch}, {classes} classes: {time.perf_counter() - started:.0f} s")
            measure.save(self.args, rows, table)

    def predict(self) -> None:
        """Cost models from two small numbers of classes."""
        found: dict[Key, list[Probe]] = {}
        for classes in self.probes:
            for key, function in self.build(classes, self.wanted, Path(), probing=True).items():
                found.setdefault(key, []).append(self.probe(key, classes, function))
        self.cost_models = {key: CostModel.of(*probes) for key, probes in found.items()}

    def rows(self, classes: int) -> list[dict[str, Any]]:
        """A row of each implementation: times and sizes, or the reason why there are none."""
        reasons = {key: self.reason(classes, key) for key in self.wanted}
        keys = self.args.budget.fitting({key: self.seconds(classes, key) for key in self.wanted if not reasons[key]})
        gc.collect()  # models of earlier sizes are in reference cycles
        with tempfile.TemporaryDirectory() as folder:
            found = self.timed(self.build(classes, keys, Path(folder))) if keys else {}
        rows = []
        for key in self.wanted:
            name, precision = key
            note = reasons[key] or ("" if key in keys else NO_TIME)
            if not note and name in self.compared and not any(name == PUBLISHED for name, _ in keys):
                note = self.unchecked.format(self.probes[1])
            row = {"implementation": name, "precision": precision, "note": note} | self.case(classes, name)
            rows.append(dict.fromkeys(self.columns, "") | row | found.get(key, {}))
        return rows

    def timed(self, functions: dict[Key, Callable[[], Any]]) -> dict[Key, dict[str, Any]]:
        """Measure sizes, then times in turn, then what remains."""
        device, found, started = self.args.device, {}, time.perf_counter()
        for key, function in functions.items():
            found[key] = self.sizes(key, function, found)
        once = (time.perf_counter() - started) / 2
        rounds = int(min(self.args.rounds, max(_ROUNDS, self.args.seconds / once)))
        seconds = measure.time_alternately(functions, rounds, device, warm_up=device.type == "cuda")
        for key, row in found.items():
            row |= measure.milliseconds(seconds[key]) | {"rounds": rounds}
            ours = OURS, key[1]
            if ours in seconds and key != ours:
                row["faster"] = round(measure.median_ratio(seconds[key], seconds[ours]), 3)
            if row["gflop"] != "":
                # Blocks that are recomputed to save memory are not part of the floor.
                recomputes = key[0].endswith("memory=min") and ours in found
                flops = 1e9 * found[ours if recomputes else key]["gflop"]
                dtype = torch.bfloat16 if key[1] == "bf16" else torch.float32
                floor = flops / ceilings.matrix_rate(device, dtype)
                floor += self.moved(functions[key]) / ceilings.bandwidth(device)
                row["floor_ms"] = round(1000 * floor, 3)
                row["above_floor"] = round(row["p50_ms"] / row["floor_ms"], 3)
            row |= self.after(key, functions[key])
        return found


def shown(row: dict[str, Any]) -> str:
    """The printed result of a row."""
    if row["p50_ms"] == "":
        return str(row["note"])
    told = {"peak_mib": "{} MiB more at the peak", "saved_mib": "{} saved", "above_floor": "{:.2f} times the floor"}
    told |= {"training_mib": "{} MiB to train", "faster": "skipkernels is {:.2f} times as fast"}
    parts = (form.format(row[column]) for column, form in told.items() if row.get(column, "") != "")
    return ", ".join([measure.shown(row), *parts])

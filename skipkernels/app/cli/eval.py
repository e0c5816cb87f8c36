"""`skipkernels eval`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from skipkernels.app.console import Terminal
from skipkernels.options import Protocol

from .options import Run, Trust, check_run, import_torch


@dataclasses.dataclass(frozen=True)
class EvalCommand:
    """Recompute the accuracy of a run from its checkpoint. Writes no files."""

    run: Run
    """Folder of the run."""
    data: str | None = None
    """Dataset to test on, named as for tune. By default that of the run."""
    root: Path | None = None
    """Folder that contains the datasets of coop:, or the images of csv:. By default that of the run."""
    protocol: Protocol | None = None
    """Protocol, which selects the classes and images to test. By default that of the run."""
    max_classes: int | None = None
    """Largest number of classes. By default all of other data, and for the data of the run as many as in the run."""
    device: str | None = None
    """cpu, cuda, cuda:1, …. By default that of the run."""
    trust: Trust = False

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Evaluate, and print the accuracy. Returns 0."""
        check_run(self.run, "eval", err)
        import_torch(err)
        from skipkernels.app.report.formats import number
        from skipkernels.app.report.table import Row, Table
        from skipkernels.app.train.run_evaluation import REPLACEABLE, evaluate_run

        settings = {name: getattr(self, name) for name in REPLACEABLE}
        accuracies = evaluate_run(self.run, **settings, trust=self.trust, console=err)
        rows = [Row.of(name, number(value, ".2f")) for name, value in accuracies.items()]
        out.print(Table("accuracy, %", ["tuned"], rows).in_terminal(str(self.run)))
        return 0

"""`skipkernels blend`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from skipkernels.app.console import Terminal

from .options import Run, Trust, check_run, import_torch


@dataclasses.dataclass(frozen=True)
class BlendCommand:
    """Blend a tuned model with its zero-shot model (WiSE-FT), and write the result as another run."""

    run: Run
    """Folder of the run."""
    alpha: float | Literal["auto"] = "auto"
    """Weight of the tuned model, from 0 to 1. auto: the best on the validation images; 0.5 without such images."""
    out: Path | None = None
    """Folder of the blended run. By default RUN-blend."""
    overwrite: bool = False
    """Replace an earlier run in the folder."""
    device: str | None = None
    """cpu, cuda, cuda:1, …. By default that of the run."""
    trust: Trust = False

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Blend, and print the accuracy by alpha. Returns 0."""
        check_run(self.run, "blend", err)
        import_torch(err)
        from skipkernels.app.data.files import expanded
        from skipkernels.app.data.tasks import VALIDATION
        from skipkernels.app.report.summary import blend_table
        from skipkernels.app.serve.blending import blend, blended_folder

        options: dict[str, Any] = {"overwrite": self.overwrite, "device": self.device, "trust": self.trust}
        metrics = blend(self.run, self.alpha, out=self.out, **options)
        curve = metrics["blend"]
        out.print(blend_table(metrics).in_terminal("from zero-shot (0) to tuned (1)"))
        why = ""
        if self.alpha == "auto":
            validated = VALIDATION in curve["accuracy"]
            why = ", the best on the validation images" if validated else ", as no validation images can choose it"
        folder = expanded(self.out or blended_folder(self.run))
        out.print(f"{folder}: alpha {curve['chosen']:g}{why}", soft_wrap=True)
        if VALIDATION not in curve["accuracy"]:
            out.print("  not calibrated: no image is held out to fit a temperature", soft_wrap=True)
        return 0

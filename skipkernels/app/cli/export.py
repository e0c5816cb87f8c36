"""`skipkernels export`."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from skipkernels.app.console import Terminal

from .options import Run, Trust, check_run, import_torch


@dataclasses.dataclass(frozen=True)
class ExportCommand:
    """Write a tuned model for open_clip, for Hugging Face's transformers, or as an ONNX file."""

    run: Run
    """Folder of the run."""
    to: Literal["open-clip", "hugging-face", "onnx"]
    """open-clip: a folder for local-dir: and hf-hub:. hugging-face: CLIPModel and CLIPProcessor. onnx: image classifier
    with the embeddings of the classes."""
    out: Path
    """Folder to write; new or empty."""
    overwrite: bool = False
    """Write into a folder with files. An earlier export in it is replaced."""
    trust: Trust = False

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Export, and print the files. Returns 0."""
        check_run(self.run, "export", err)
        import_torch(err)
        from skipkernels.app.serve.exporting import export

        done = export(self.run, self.to, self.out, overwrite=self.overwrite, trust=self.trust)
        for note in done.notes:
            err.print(f"note: {note}", soft_wrap=True)
        out.print(f"{done.folder}: {' '.join(done.files)}", soft_wrap=True)
        return 0

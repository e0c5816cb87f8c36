"""The notebook of examples/ runs from top to bottom in an empty folder, in a process without other imports."""

from __future__ import annotations

import contextlib
import json
import os
import re
from pathlib import Path

import torch

from tests.processes import forkserver

NOTEBOOK = Path(__file__).parents[1] / "examples" / "tune_your_photos.ipynb"


def run_cells(folder: Path) -> None:
    """Run the cells of code, in the folder; what they print is in out.txt."""
    os.chdir(folder)
    torch.set_num_threads(1)
    names = {"__name__": "__main__"}
    with open("out.txt", "w", encoding="utf-8") as out, contextlib.redirect_stdout(out):
        for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code":
                exec(compile("".join(cell["source"]), cell["id"], "exec", dont_inherit=True), names)


def test_notebook_runs(tmp_path):
    process = forkserver().Process(target=run_cells, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    out = (tmp_path / "out.txt").read_text(encoding="utf-8")
    zero_shot, tuned = map(float, re.findall(r"([\d.]+) % (?:zero-shot|tuned)", out))
    assert tuned > zero_shot + 10
    assert out.count("photos/") == 5
    assert (tmp_path / "run" / "report.html").is_file()


def test_notebook_has_no_outputs():
    assert not any(cell.get("outputs") for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"])

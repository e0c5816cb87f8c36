"""The notebook of examples/ runs from top to bottom in an empty folder."""

from __future__ import annotations

import json
from pathlib import Path

NOTEBOOK = Path(__file__).parents[1] / "examples" / "tune_your_photos.ipynb"


def test_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    names: dict = {"__name__": "notebook"}
    for cell in cells:
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "clear the outputs before a commit"
            exec(compile("".join(cell["source"]), cell["id"], "exec", dont_inherit=True), names)
    assert names["metrics"]["tuned"]["all"] > names["metrics"]["zero_shot"]["all"]
    assert capsys.readouterr().out.count("photos/") == 5
    assert Path("run", "report.html").is_file()

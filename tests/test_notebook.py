"""The notebook of examples/ runs from top to bottom in an empty folder, in a process without other imports."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import zipfile
from pathlib import Path

import torch
from PIL import Image

from tests.processes import forkserver

NOTEBOOK = Path(__file__).parents[1] / "examples" / "tune_your_photos.ipynb"


def run_cells(folder: Path, archive: str | None = None) -> None:
    """Run the cells of code in a folder, in fewer epochs; of an archive, those before training. Prints to out.txt."""
    os.chdir(folder)
    torch.set_num_threads(1)
    names = {"__name__": "__main__"}
    with open("out.txt", "w", encoding="utf-8") as out, contextlib.redirect_stdout(out):
        for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]:
            source = "".join(cell["source"]).replace("ZIP = None", f"ZIP = {archive!r}")
            source = source.replace("epochs=8", "epochs=2")
            if archive is not None and "tune(config)" in source:
                break
            if cell["cell_type"] == "code":
                exec(compile(source, cell["id"], "exec", dont_inherit=True), names)


def output(folder: Path, archive: str | None = None) -> str:
    process = forkserver().Process(target=run_cells, args=(folder, archive))
    process.start()
    process.join(300)
    assert process.exitcode == 0
    return (folder / "out.txt").read_text(encoding="utf-8")


def test_notebook_runs(tmp_path):
    out = output(tmp_path)
    zero_shot, tuned = map(float, re.findall(r"([\d.]+) % (?:zero-shot|tuned)", out))
    assert tuned > zero_shot + 10
    assert out.count("photos/") == 5
    assert (tmp_path / "run" / "report.html").is_file()


def test_notebook_runs_on_a_zip_as_people_make_them(tmp_path):
    """A folder around the classes, one in a class, files of macOS at every level, a damaged image, and another file."""
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        for number in range(24):
            place = f"My photos/{('cat', 'sea_lion')[number % 2]}/{'' if number < 16 else '2025/'}"
            data = io.BytesIO()
            Image.new("RGB", (40, 30), (9 * number, 0, 0)).save(data, "png")
            archive.writestr(f"{place}{number}.png", data.getvalue())
            archive.writestr(f"__MACOSX/{place}._{number}.png", b"resource")
        for name in (".DS_Store", "cat/.DS_Store", "cat/2025/.DS_Store", "cat/notes.txt", "cat/IMG_1.HEIC"):
            archive.writestr(f"My photos/{name}", b"damaged")
    out = output(tmp_path, "photos.zip")
    assert "2 classes: cat, sea lion\n" in out and ".txt 1" in out


def test_notebook_has_no_outputs():
    assert not any(cell.get("outputs") for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"])

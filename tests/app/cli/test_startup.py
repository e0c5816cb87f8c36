"""Commands import torch only to compute: not for help, to check images, or to refuse the path of a table."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from PIL import Image

from skipkernels.app.cli.main import COMMANDS

HEAVY = {"torch", "torchvision", "open_clip", "transformers", "timm", "matplotlib"}
# Arguments and exit codes, those with fewer imports first, as one process runs them all.
CASES = {
    **{f"{command} --help": 0 for command in COMMANDS},
    "check imagefolder:photos": 0,
    "check imagefolder:photos --out found.csv": 0,
    "check pictograms:food": 0,
    "check imagefolder:photos --out photos": 2,
    "predict run photos --out photos": 2,
    "compare --out file": 2,
}
PROGRAM = """
import contextlib, io, json, sys
from skipkernels.app.cli.main import main

for case in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(case.split())
        except SystemExit as ended:
            code = ended.code
    print(json.dumps([code, err.getvalue(), list(sys.modules)]))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, tuple[int, str, set[str]]]:
    """Exit code, stderr and imported modules of each case, in a folder of images and the beginning of a run."""
    folder = tmp_path_factory.mktemp("startup")
    for name in ("cat/1.png", "cat/2.png", "dog/1.png", "dog/2.png"):
        path = folder / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path)
    (folder / "file").touch()
    (folder / "run").mkdir()
    settings = "data: pictograms\nprotocol: few-shot\nmethod: skip\nskip_layers: 0.5\nout: run\n"
    (folder / "run" / "config.yaml").write_text(settings)
    (folder / "run" / "metrics.jsonl").touch()
    environment = {name: value for name, value in os.environ.items() if name not in ("WORLD_SIZE", "RANK")}
    options = {"cwd": folder, "env": environment, "capture_output": True, "text": True, "check": True}
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=json.dumps(list(CASES)), **options)
    found = map(json.loads, done.stdout.splitlines())
    return {case: (code, err, set(modules)) for case, (code, err, modules) in zip(CASES, found, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_no_torch(results, case):
    code, err, modules = results[case]
    assert code == CASES[case], err
    assert not HEAVY & modules
    if case.endswith("--help"):
        assert not {"numpy", "PIL", "pydantic"} & modules
    if code:
        assert err.startswith("error ") and "--out" in err

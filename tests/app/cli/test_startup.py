"""Commands import torch only to compute: not for help and version, to check images, or to refuse a path or a name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
from PIL import Image

import skipkernels
from skipkernels import __main__ as entry
from skipkernels.app.cli.main import COMMANDS

HEAVY = {"torch", "torchvision", "open_clip", "transformers", "timm", "matplotlib"}
NO_RUN = "error RUN must be the folder of a run; nope is not a folder."
# Arguments and errors, those with fewer imports first, as one process runs them all.
CASES = {
    "--version": "",
    **{f"{command} --help": "" for command in COMMANDS},
    "check imagefolder:photos": "",
    "check imagefolder:photos --out found.csv": "",
    "check pictograms:food": "",
    "check imagefolder:photos --out photos": "error --out must end in .csv",
    "predict run photos --out photos": "error --out must end in .csv",
    "compare --out file": "error --out: file is a file",
    "tune --method skp": "error --method must be one of auto, skip, ",
    "tune --resume nope": "error --resume must be the folder of a run; nope is not a folder.",
    "export nope --to onnx --out new": NO_RUN,
    "predict nope photos": NO_RUN,
    **{f"{command} nope": NO_RUN for command in ("eval", "blend", "report")},
    "eval ~no-user/run": "error RUN must be the folder of a run; ~no-user/run is not a folder.",
}
PROGRAM = """
import contextlib, io, json, sys
from skipkernels.__main__ import main

for case in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            sys.argv[1:] = case.split()
            code = main()
        except SystemExit as ended:
            code = ended.code
    print(json.dumps([code, out.getvalue(), err.getvalue(), list(sys.modules)]))
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, tuple[int, str, str, set[str]]]:
    """Exit code, stdout, stderr and imported modules of each case, in a folder of images and the beginning of a run."""
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
    options = {"cwd": folder, "capture_output": True, "text": True, "check": True}
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=json.dumps(list(CASES)), **options)
    found = map(json.loads, done.stdout.splitlines())
    return {case: (*texts, set(modules)) for case, (*texts, modules) in zip(CASES, found, strict=True)}


@pytest.mark.parametrize("case", CASES)
def test_no_torch(results, case):
    code, _, err, modules = results[case]
    assert code == (2 if CASES[case] else 0) and err.startswith(CASES[case]), err
    assert not HEAVY & modules


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith(("--help", "--version"))])
def test_no_numpy_for_help_and_version(results, case):
    assert not {"numpy", "PIL", "pydantic"} & results[case][3]


def test_version(results):
    assert results["--version"][1] == f"skipkernels {skipkernels.__version__}\n"


def test_interrupt_during_import_of_numpy_ends_command(tmp_path):
    """The C++ code of torch discards any exception of this import."""
    code = """if True:
        import signal, sys

        class Interrupting:
            def find_spec(self, name, path=None, target=None):
                if name == "numpy.linalg":
                    sys.meta_path.remove(self)
                    signal.raise_signal(signal.SIGINT)

        sys.meta_path.insert(0, Interrupting())
        from skipkernels.__main__ import main

        sys.exit(main())
    """
    command = [sys.executable, "-c", code, "tune", "--method", "zero-shot", "--max-classes", "4", "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 130 and done.stderr.splitlines()[-1] == "interrupted"
    assert not list(tmp_path.iterdir())


def test_interrupt_of_build_has_no_traceback(monkeypatch):
    monkeypatch.setattr(entry.sys, "argv", ["skipkernels", "build"])
    monkeypatch.setattr(entry._build, "main", Mock(side_effect=KeyboardInterrupt))
    assert entry.main() == 130


# ---- threads that wait ---------------------------------------------------------------------------------------------

WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY")


@pytest.mark.parametrize("own", [{}, {"OMP_WAIT_POLICY": "active"}, {"GOMP_SPINCOUNT": "1000"}], ids=str)
def test_passive_wait_before_import_of_torch_keeps_user_settings(monkeypatch, own):
    at_import: dict[str, str] = {}
    monkeypatch.setattr(entry.os, "environ", dict(own))
    monkeypatch.setattr(entry.sys, "argv", ["skipkernels"])
    monkeypatch.setattr("skipkernels.app.cli.main.main", lambda: at_import.update(os.environ) or 0)
    assert entry.main() == 0
    found = {name: at_import[name] for name in WAITING if name in at_import}
    assert found == (own or {"OMP_WAIT_POLICY": "passive", "KMP_BLOCKTIME": "0"})

"""bench/gpu.sh: which stages it runs with which options, and how it reports their ends and results."""

from __future__ import annotations

import os
import re
import subprocess
import tarfile
from pathlib import Path
from unittest.mock import Mock

import pytest

from bench import gpu

SCRIPT = Path(gpu.__file__).with_name("gpu.sh")
SMALL = "--device cpu --model vit-tiny --skip-layers 3 --classes 20 --rounds 1"


def script(folder: Path, *stages: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the script with `echo` in place of Python."""
    environment = os.environ | {"PYTHON": "echo", "OUT": str(folder)} | environment
    return subprocess.run([SCRIPT, *stages], capture_output=True, text=True, env=environment)


def test_script_runs_every_stage(tmp_path, monkeypatch):
    """One that cannot run does not stop the others; bench.gpu knows the options of each."""
    called = {name: Mock() for name in gpu.STAGES}
    monkeypatch.setattr(gpu, "STAGES", called)
    out = tmp_path / "out"
    *stages, archive = script(out, STEP=SMALL).stdout.splitlines()
    statuses = dict(stage.split(": ", 1) for stage in stages)
    assert list(statuses) == "machine tests step step_fp32 full operators profile memcheck racecheck ncu".split()
    for stage in ("machine", "step", "step_fp32", "full", "profile"):
        assert statuses[stage].startswith("done (")
        *_, command = (out / f"{stage}.txt").read_text().splitlines()
        gpu.main(command.removeprefix("-m bench.gpu ").split())
    assert [call.args[0].precision for call in called["step"].call_args_list] == ["bf16", "fp32"]
    others = {"check", "one_step", "smoke"}  # not a stage, and of other programs
    assert {name for name, stage in called.items() if not stage.called} == others
    assert archive == f"all results: {out}.tgz"
    with tarfile.open(f"{out}.tgz") as files:
        assert {"out/summary.txt", *(f"out/{stage}.txt" for stage in statuses)} <= {*files.getnames()}
    assert (out / "summary.txt").read_text().splitlines() == stages


def test_script_runs_the_named_stages_and_scales_their_limits(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "machine.txt").write_text("limits of time: 250 %\ntorch==2.15\n")
    assert re.findall(r"(\w+): done", script(out, "tune", "step").stdout) == ["step", "tune"]
    assert {path.name for path in out.iterdir()} == {"machine.txt", "summary.txt", "step.txt", "tune.txt"}
    step = f"-m bench.gpu step --precision bf16 --all-shapes --seconds {2.5 * 116:.0f} --out {out}\n"
    assert (out / "step.txt").read_text() == step
    assert (out / "tune.txt").read_text() == f"-m bench.tune --seconds {2.5 * 570:.0f} --out {out}\n"


LATER = '[ "$3" = check ] || '  # not in bench.gpu check, by which the script begins
# What Python does, a stage, and what is printed, with {} for the folder
ENDS = {
    "status": (
        f"{LATER}{{ echo result: 2 ms; exit 1; }}",
        "full",
        "exit status 1, see {}/out/full.txt (0 s)\n  result: 2",
    ),
    "limit": (f"{LATER}{{ echo FAILED a; exit 124; }}", "full", "full: cut off at its limit of 45 s (0 s)\n  FAILED a"),
    "program": (f"{LATER}exit 127", "full", "full: {}/python is not installed (0 s)"),
    "stage": ("exit 0", "steps", "no stage steps; expected some of: machine tests step step_fp32 full "),
    "package": ("echo ModuleNotFoundError: x; exit 1", "step", "cannot run the stages: ModuleNotFoundError: x"),
    "its remedy": ("echo ModuleNotFoundError: x; exit 1", "step", "pip list --format=freeze | grep ^torch) -e "),
    "Python": ("exit 127", "step", "PYTHON="),
}


@pytest.mark.parametrize(("python", "stage", "printed"), ENDS.values(), ids=ENDS)
def test_script_says_how_it_ended(tmp_path, python, stage, printed):
    """A stage that fails is one of the results; before the first stage the script ends without a folder of results."""
    out, program = tmp_path / "out", tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{python}\n")
    program.chmod(0o755)
    done = script(out, stage, PYTHON=str(program))
    said = re.sub(r"\(\d+ s\)", "(0 s)", done.stdout + done.stderr)  # a second may end meanwhile
    assert printed.format(tmp_path) in said
    assert out.exists() == (done.returncode == 0)

"""The build of PyTorch that `make` installs."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A Python that writes down what it would run, and fails to reach the index of CPU builds.
PYTHON = """#!/bin/sh
echo "$@" >> log
case "$*" in *https://cpu*) exit 1;; esac
"""


@pytest.mark.skipif(sys.platform != "linux" or shutil.which("make") is None, reason="make on Linux")
@pytest.mark.parametrize(
    ("gpu", "extra", "asked"),
    [("", "", True), ("/dev/nvidiactl", "", False), ("", "https://own", False)],
    ids=["cpu", "gpu", "own-index"],
)
def test_make_asks_for_cpu_torch(tmp_path, gpu, extra, asked):
    """Without a GPU the CPU build is asked for first; without an answer PyPI has the rest."""
    for name in ("Makefile", "pyproject.toml", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / ".venv").mkdir()
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "MAKE"))}
    done = subprocess.run(
        ["make", ".venv/.ready", f"BIN={tmp_path}", f"PYTHON={python}", f"GPU={gpu}", "CPU_INDEX=https://cpu"],
        cwd=tmp_path, env=environment | {"PIP_EXTRA_INDEX_URL": extra}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ("no GPU found: trying the CPU build of PyTorch from https://cpu" in done.stdout) == asked
    *first, last = [line for line in (tmp_path / "log").read_text().splitlines() if "torchvision" in line]
    assert ["--index-url https://cpu" in line for line in first] == [True] * asked
    assert "--index-url" not in last

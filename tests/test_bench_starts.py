"""Every command of bench runs to its end: here at a small size, or in the file of tests that is named."""

from __future__ import annotations

import importlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import bench
from bench import equivalence

SMALL_GPU_MODEL = {"MODEL": "vit-tiny", "SKIP_LAYERS": 3, "BATCHES": (2,), "CLASSES": (20,), "PRECISIONS": ("bf16",)}
# Options, and smaller values of names of the module.
COMMANDS = {
    "cache": ("--model vit-tiny --classes 20 --batch 4 --skip-layers 3", {}),
    "default": ("--rounds 1", {"COMMANDS": {"help": ("--help",)}}),
    "equivalence": ("--steps 1 --precision fp32", {"_CASES": equivalence._CASES[:1]}),
    "fuse": ("--model vit-tiny --batch 2 --rounds 1 --part image --implementations fuse-min", {}),
    "gpu_model": ("", SMALL_GPU_MODEL),
    "models": ("--model ViT-S-32-alt", {}),
    "when.__main__": ("--methods zero-shot --tasks activities --seeds 1 --workers 1", {}),
}
ELSEWHERE = {
    "aot": "test_aot.py",
    "counts": "test_aot.py",
    "gpu": "test_bench_gpu.py",
    "infer": "test_bench_step.py",
    "report": "test_bench_report.py",
    "step": "test_bench_step.py",
    "tune": "ops/test_tune.py",
}


def test_every_command_is_run():
    folder = Path(bench.__file__).parent
    mains = {path for path in folder.rglob("*.py") if "\ndef main(" in path.read_text(encoding="utf-8")}
    names = {".".join(path.relative_to(folder).with_suffix("").parts) for path in mains}
    assert names == {*COMMANDS, *ELSEWHERE}


@pytest.mark.parametrize("name", COMMANDS)
def test_command_runs(name, monkeypatch, tmp_path, capsys):
    options, changes = COMMANDS[name]
    for key, value in changes.items():
        monkeypatch.setattr(f"bench.{name}.{key}", value)
    monkeypatch.setattr("bench.rows.RESULTS", tmp_path)  # no run has rows
    monkeypatch.setattr("bench.when.rows.ProcessPoolExecutor", lambda n, _, *start: ThreadPoolExecutor(n, "", *start))
    monkeypatch.setattr("sys.argv", [name, *options.split(), "--no-save"])
    importlib.import_module(f"bench.{name}").main()
    assert capsys.readouterr().out

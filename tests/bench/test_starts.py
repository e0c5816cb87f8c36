"""Every command of bench, as the pages name it, runs to its end: here at a small size, or in a named file of tests."""

from __future__ import annotations

import importlib
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
    "aot": "test_tables.py",
    "counts": "test_tables.py",
    "gpu": "test_gpu.py",
    "infer": "test_step.py",
    "report": "test_report.py",
    "step": "test_step.py",
    "tune": "../ops/test_tune.py",
}


def test_every_command_is_run():
    folder = Path(bench.__file__).parent
    mains = {path for path in folder.rglob("*.py") if "\ndef main(" in path.read_text(encoding="utf-8")}
    names = {".".join(path.relative_to(folder).with_suffix("").parts) for path in mains}
    assert names == {*COMMANDS, *ELSEWHERE}
    assert all((Path(__file__).parent / file).is_file() for file in ELSEWHERE.values())


@pytest.mark.parametrize("name", COMMANDS)
def test_command_runs(name, results, threads_for_workers, monkeypatch, capsys):
    options, changes = COMMANDS[name]
    for key, value in changes.items():
        monkeypatch.setattr(f"bench.{name}.{key}", value)
    monkeypatch.setattr("sys.argv", [name, *options.split(), "--no-save"])
    importlib.import_module(f"bench.{name}").main()
    assert capsys.readouterr().out

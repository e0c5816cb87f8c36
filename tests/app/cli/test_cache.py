"""`skipkernels cache`."""

from __future__ import annotations

import shutil
import signal
from concurrent.futures import BrokenExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file

from skipkernels.app.cli.main import main
from skipkernels.app.train import setup
from skipkernels.store import MANIFEST, Store

TASK = ["--data", "pictograms:food", "--max-classes", "6", "--shots", "2"]


@pytest.fixture(scope="module")
def _built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "built"
    assert main(["cache", "build", str(folder), *TASK]) == 0
    return folder


@pytest.fixture
def built(_built, tmp_path) -> Path:
    """Copy of a cache of a small task."""
    return Path(shutil.copytree(_built, tmp_path / "cache"))


def said(capsys: pytest.CaptureFixture) -> str:
    """Standard output and standard error as one line."""
    captured = capsys.readouterr()
    return " ".join(f"{captured.out} {captured.err}".split())


def test_cache_build_overwrite_replaces_texts(built, capsys):
    changes = ["--pretrained", "random"]
    before = load_file(built / "texts-base" / "prototypes" / "00000.safetensors")["rows"]
    (built / "texts-base" / "theirs").mkdir()
    assert main(["cache", "build", str(built), *TASK, *changes, "--resume"]) == 2
    assert "texts-base/features: holds a text_cache that differs in" in (refused := said(capsys))
    assert "Give another text_cache (--cache)" in refused and "cache build --overwrite" in refused
    assert main(["cache", "build", str(built), *TASK, *changes, "--overwrite"]) == 0
    after = load_file(built / "texts-base" / "prototypes" / "00000.safetensors")["rows"]
    assert before.shape != after.shape or not before.equal(after)
    assert (built / "texts-base" / "theirs").exists()
    assert all(Store(manifest.parent, verify=True) for manifest in built.rglob(MANIFEST))


def test_cache_skips_other_manifests(built, capsys):
    app = built / "app" / MANIFEST
    app.parent.mkdir()
    app.write_text('{"name": "an app"}')
    for action in ("verify", "info"):
        assert main(["cache", action, str(built)]) == 0
        assert f"skipped {app}: not the manifest of a store" in said(capsys)
    assert main(["cache", "verify", str(app.parent)]) == 2
    (built / "train" / MANIFEST).write_text("damaged")
    assert main(["cache", "verify", str(built)]) == 1
    assert "stores: 7; 1 damaged parts" in said(capsys)


def test_cache_verify_missing_store(built, capsys):
    shutil.rmtree(built / "test-new")
    assert main(["cache", "verify", str(built)]) == 0
    assert "stores: 6; complete and undamaged. Stores that a build has not started are not counted." in said(capsys)


def test_cache_info_folds_long_names(built, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["cache", "info", str(built)]) == 0
    out = capsys.readouterr().out
    assert "…" not in out and "prototypes" in "".join(line[1:].split("│")[0].strip() for line in out.splitlines())


@pytest.mark.parametrize(
    ("how", "code"), [(KeyboardInterrupt, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "terminated"]
)
def test_cache_build_interrupted(tmp_path, monkeypatch, capsys, how, code):
    def interrupted(*arguments, **options):
        if how is KeyboardInterrupt:
            raise how
        signal.raise_signal(how)

    monkeypatch.setattr(setup, "build_run", interrupted)
    assert main(["cache", "build", str(tmp_path)]) == code
    assert "complete shards are kept; resume with cache build --resume" in said(capsys)


def test_cache_prints_folder_names_escaped(built, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    folder = Path(shutil.move(built, built.parent / "[/b]:ok:\x1b[2J"))
    for action in ("info", "verify"):
        assert main(["cache", action, str(folder)]) == 0
    (folder / "train" / MANIFEST).write_text("damaged")
    assert main(["cache", "verify", str(folder)]) == 1
    captured = capsys.readouterr()
    assert captured.out.count(r"/[/b]:ok:\x1b[2J/train") == 2 and "\x1b" not in captured.out + captured.err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (MemoryError(), 2, "error out of memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes\nmore"), 2, "error out of memory (Def"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 1, "failed DataLoader worker (pid 7"),
        (BrokenExecutor("A child process terminated abruptly"), 1, "failed A child process"),
    ],
    ids=["memory", "allocator", "worker", "process"],
)
def test_main_error_is_one_line(tmp_path, monkeypatch, capsys, error, code, line):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(setup, "build_run", fail)
    assert main(["cache", "build", str(tmp_path)]) == code
    assert said(capsys).startswith(line)

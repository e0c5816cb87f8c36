"""`skipkernels cache` from the command line."""

from __future__ import annotations

import shutil
import signal
from concurrent.futures import BrokenExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file

from skipkernels.cli import cache
from skipkernels.cli.main import main
from skipkernels.store import MANIFEST, Store

TASK = ["--data", "glyphs:greek", "--classes", "6", "--shots", "2"]


@pytest.fixture(scope="module")
def _built(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cache") / "built"
    assert main(["cache", "build", str(folder), *TASK]) == 0
    return folder


@pytest.fixture
def built(_built, tmp_path) -> Path:
    """A cache of a small task, to be done with as a test likes."""
    return Path(shutil.copytree(_built, tmp_path / "cache"))


def said(capsys: pytest.CaptureFixture) -> str:
    """On both, as one line."""
    captured = capsys.readouterr()
    return " ".join(f"{captured.out} {captured.err}".split())


@pytest.mark.parametrize("changes", [["--pretrained", "random"], ["--classes", "8"]], ids=["weights", "classes"])
def test_overwrite_replaces_texts_of_another_model_or_task(built, capsys, changes):
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


def test_a_manifest_of_something_else_is_skipped_with_a_line(built, capsys):
    app = built / "app" / MANIFEST
    app.parent.mkdir()
    app.write_text('{"name": "an app"}')
    (built / "train" / ".00000.safetensors.77.partial").write_text("left")
    for action in ("verify", "prune", "info"):
        assert main(["cache", action, str(built)]) == 0
        assert f"skipped {app}: not of a store" in said(capsys)
    assert app.exists() and not list((built / "train").glob("*.partial"))
    assert main(["cache", "verify", str(app.parent)]) == 2
    (built / "train" / MANIFEST).write_text("damaged")
    assert main(["cache", "verify", str(built)]) == 1
    assert "7 stores, 1 damages" in said(capsys)


def test_verify_says_what_it_cannot_see(built, capsys):
    shutil.rmtree(built / "test-new")
    assert main(["cache", "verify", str(built)]) == 0
    assert "6 stores, all complete and sound; one that a build has not begun is not seen" in said(capsys)


def test_names_are_folded_and_not_cut(built, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    assert main(["cache", "info", str(built)]) == 0
    out = capsys.readouterr().out
    assert "…" not in out and "prototypes" in "".join(line[1:].split("│")[0].strip() for line in out.splitlines())


@pytest.mark.parametrize(
    ("how", "code"), [(KeyboardInterrupt, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "terminated"]
)
def test_a_build_that_is_interrupted_says_how_it_goes_on(tmp_path, monkeypatch, capsys, how, code):
    def interrupted(*arguments):
        if how is KeyboardInterrupt:
            raise how
        signal.raise_signal(how)

    monkeypatch.setattr(cache, "_build", interrupted)
    assert main(["cache", "build", str(tmp_path)]) == code
    assert "what is complete is in the folder; cache build goes on from there with --resume" in said(capsys)


def test_names_of_folders_are_shown_as_they_are(built, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    folder = Path(shutil.move(built, built.parent / "[/b]:ok:\x1b[2J"))
    (folder / "train" / ".00000.safetensors.77.partial").write_text("left")
    for action in (["info"], ["prune", "--dry-run"], ["verify"]):
        assert main(["cache", *action, str(folder)]) == 0
    (folder / "train" / MANIFEST).write_text("damaged")
    assert main(["cache", "verify", str(folder)]) == 1
    captured = capsys.readouterr()
    assert captured.out.count(r"/[/b]:ok:\x1b[2J/train") == 3 and "\x1b" not in captured.out + captured.err


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (MemoryError(), 2, "error memory is used up"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 9 bytes\nmore"), 2, "error memory is used up (Def"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), 1, "failed DataLoader worker (pid 7"),
        (BrokenExecutor("A child process terminated abruptly"), 1, "failed A child process"),
    ],
    ids=["memory", "allocator", "worker", "process"],
)
def test_what_ends_any_command_is_one_line(tmp_path, monkeypatch, capsys, error, code, line):
    def fail(*arguments):
        raise error

    monkeypatch.setattr(cache, "_build", fail)
    assert main(["cache", "build", str(tmp_path)]) == code
    assert said(capsys).startswith(line)


@pytest.mark.parametrize("action", ["info", "verify"])
def test_a_look_that_is_interrupted_promises_nothing(built, monkeypatch, capsys, action):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(cache, f"_{action}", interrupt)
    assert main(["cache", action, str(built)]) == 130
    assert said(capsys) == "interrupted"

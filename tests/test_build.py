"""C++ kernels: prebuilt, built on first use, refused, or impossible."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import skipkernels
from skipkernels import _build
from skipkernels.folders import locked
from skipkernels.ops import registration
from tests.processes import forkserver

# In a process that has not loaded the kernels, and has no prebuilt library: it looks for one in an empty folder.
WITHOUT_PREBUILT = """
import pathlib, sys, torch, skipkernels as sk
from skipkernels import _build
sources = _build.source_dir()
_build.source_dir = lambda: sources
_build._PACKAGE = pathlib.Path(sys.argv[1])
"""
USE = """
image = torch.eye(3).requires_grad_()
loss = sk.functional.class_sampled_ce(image, torch.eye(3), torch.arange(3), 2.0)
loss.backward()
print(f"{loss:.6f} {image.grad.norm():.6f} {sk.backends()['class_sampled_ce']['cpu'].kernel}")
"""
LOSS = "0.239545"  # log(e² + 2) − 2


class Started(NamedTuple):
    """A process that has imported the package, and the files of its output and its errors."""

    process: Any
    out: Path
    err: Path


def execute(code: str, empty: str, out: Path, err: Path, environment: dict[str, str]) -> None:
    os.environ |= environment
    sys.argv = ["-c", empty]
    for number, path in enumerate((out, err), 1):
        os.dup2(os.open(path, os.O_CREAT | os.O_WRONLY), number)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)
    exec(code, {})
    sys.stdout.flush()


def start(code: str, tmp_path: Path, name: str = "first", **environment: str) -> Started:
    empty, out, err = tmp_path / "empty", tmp_path / f"{name}.out", tmp_path / f"{name}.err"
    empty.mkdir(exist_ok=True)
    environment = {"XDG_CACHE_HOME": str(tmp_path / "cache"), **environment}
    process = forkserver().Process(target=execute, args=(code, str(empty), out, err, environment))
    process.start()
    return Started(process, out, err)


def finish(started: Started) -> tuple[str, str]:
    started.process.join(300)
    err = started.err.read_text()
    assert started.process.exitcode == 0, err
    return started.out.read_text().strip(), err


# A compiler that copies the library of this process, so that a build is cheap; `make setup` compiles.
COPIES = """#!/bin/sh
for argument; do
  if test "$last" = -o; then case "$argument" in *.so) cp "{library}" "$argument";; *) : > "$argument";; esac; fi
  last=$argument
done
echo 1
"""


@pytest.fixture
def copies(tmp_path) -> dict[str, str]:
    library = _build.load().path
    assert library is not None
    compiler = tmp_path / "compiler"
    compiler.write_text(COPIES.format(library=library))
    compiler.chmod(0o755)
    return {"CXX": str(compiler)}


def test_built_once_by_two_processes_at_once_after_a_kill_of_a_build(tmp_path, copies):
    waiting = tmp_path / "waiting"
    compiler = Path(copies["CXX"])
    text = compiler.read_text()
    compiler.write_text(
        text.replace("for argument", f'case "$*" in *-shared*) touch {waiting}; sleep 60;; esac\nfor argument', 1)
    )
    killed = start(WITHOUT_PREBUILT + USE, tmp_path, **copies)
    while not waiting.exists():
        assert killed.process.is_alive(), killed.err.read_text()
        time.sleep(0.05)
    killed.process.kill()
    killed.process.join()
    (folder,) = (tmp_path / "cache").glob("skipkernels/*")
    assert list(folder.glob(".partial-*")) and not list(folder.glob("*.so"))
    compiler.write_text(text)
    both = [finish(process) for process in [start(WITHOUT_PREBUILT + USE, tmp_path, n, **copies) for n in "ab"]]
    silent, building = sorted(err for _, err in both)
    assert silent == "" and building.count("skipkernels: building the C++ kernels, once") == 1
    for out, _ in both:
        assert out.split()[0] == LOSS and out.split()[-1] == "C++"
    (library,) = folder.glob("*.so")
    assert set(folder.iterdir()) <= {library, folder / ".lock"}


def wait_for_library(folder: Path) -> None:
    for _ in range(2400):  # another process imports torch first
        if list(folder.glob("*.so")):
            return
        time.sleep(0.05)
    raise AssertionError(f"no library was made: {[each.name for each in folder.iterdir()]}")


def test_built_in_the_background_for_the_next_start(tmp_path, copies):
    options = copies | {"SKIPKERNELS_CPP": ""}
    out, err = finish(start(WITHOUT_PREBUILT + USE + USE, tmp_path, **options))
    lines = out.splitlines()
    assert lines[0] == lines[1] and lines[0].split()[0] == LOSS and lines[0].split()[-1] == "reference"
    assert err.count("\n") == 1 and "this run uses PyTorch, the next one the kernels" in err
    (folder,) = (tmp_path / "cache").glob("skipkernels/*")
    wait_for_library(folder)
    out, err = finish(start(WITHOUT_PREBUILT + USE, tmp_path, "second", **options))
    assert out.split()[0] == LOSS and out.split()[-1] == "C++" and err == ""


# A compiler that makes files with nothing but its arguments in them, so that a build is cheap.
PRETENDED = """#!/bin/sh
for argument; do test "$last" = -o && echo "$@" > "$argument"; last=$argument; done
echo 1
"""


@pytest.fixture
def pretended(tmp_path, monkeypatch) -> Path:
    compiler = tmp_path / "a compiler"
    compiler.write_text(PRETENDED)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", shlex.quote(str(compiler)))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXXFLAGS", raising=False)
    return compiler


@pytest.mark.parametrize("changed", [False, True], ids=["same_sources", "changed_sources"])
def test_prebuilt_library_of_other_sources_is_not_loaded(pretended, monkeypatch, tmp_path, changed):
    """Case: an editable checkout with changes in csrc/ since; its operators may have other arguments."""
    package, loaded = tmp_path / "package", []
    shutil.copytree(_build.source_dir(), package / "csrc")
    monkeypatch.setattr(_build, "_PACKAGE", package)
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.setenv("SKIPKERNELS_CPP", "wait")
    (package / "_C.abi3.so").touch()  # as libraries were named before
    prebuilt = package / f"_C_{_build.sources_digest()}.abi3.so"
    prebuilt.touch()
    if changed:
        with (package / "csrc" / "simd.h").open("a") as file:
            file.write("// changed\n")
    path = _build.load.__wrapped__().path
    assert loaded == [path] and (path == prebuilt) == (not changed)
    assert not changed or path.is_relative_to(tmp_path / "cache")


def test_compiler_with_arguments_and_further_flags(pretended, monkeypatch):
    plain = _build.build()
    monkeypatch.setenv("CXX", f"{shlex.quote(str(pretended))} --first 'of two'")
    monkeypatch.setenv("CXXFLAGS", "-g -O1")
    library = _build.build()
    assert library.parent != plain.parent
    words = library.read_text()
    assert words.startswith("--first of two ") and words.index("-O3") < words.index("-O1")


def warning(monkeypatch) -> str:
    """The only warning of a process without C++ kernels, which loads no library."""
    monkeypatch.setenv("SKIPKERNELS_CPP", "build")
    with pytest.warns(RuntimeWarning, match="no C\\+\\+ kernels") as caught:
        assert _build.load.__wrapped__().path is None
    (only,) = caught
    return str(only.message)


def give_away(path: Path, monkeypatch) -> None:
    """Let another user own it."""
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)


@pytest.mark.parametrize(
    ("which", "change"),
    [
        ("library", "all write"),
        ("library", "of another"),
        ("folder", "all write"),
        ("folder", "group writes"),
        ("parent", "of another"),
    ],
)
def test_path_that_another_user_may_write_is_refused(pretended, monkeypatch, tmp_path, which, change):
    """They could put a library of their own into it, or another folder in its place."""
    library = _build.build()
    path = {"library": library, "folder": library.parent, "parent": tmp_path / "cache"}[which]
    if change == "of another":
        give_away(path, monkeypatch)
    else:
        os.chown(path, -1, 12345) if os.geteuid() == 0 else None
        path.chmod(0o777 if change == "all write" else 0o775)
    if change == "group writes" and path.stat().st_gid == path.stat().st_uid:
        pytest.skip("no other group")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail(f"{path} was loaded"))
    # Without root everything is of another user, and the folder is named first.
    named = path if change != "of another" or os.geteuid() == 0 else tmp_path
    assert re.search(rf"{named}.* is not safe: .*Let XDG_CACHE_HOME name", warning(monkeypatch))


def test_truncated_library_is_built_again(pretended):
    """Loading it would end the process by SIGBUS."""
    library = _build.build()
    whole = library.read_bytes()
    library.write_bytes(whole[:-1])
    again = _build.build()
    assert again.read_bytes() == whole and list(library.parent.glob("*.so")) == [again]


def test_folder_in_a_sticky_one_is_used(pretended, tmp_path):
    """Others can write to such a folder, as to /tmp, but not rename files that are not theirs."""
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache").chmod(0o1777)
    library = _build.build()
    assert [stat.S_IMODE(path.stat().st_mode) for path in (library, library.parent)] == [0o700, 0o700]


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("CXX", r"no C\+\+ compiler found \(CXX=/no/such/compiler\)"),
        ("CXXFLAGS", r"CXX or CXXFLAGS cannot be split into words \(No closing quotation\)"),
        ("ninja", r"ninja is not installed \(pip install ninja\)"),
        ("cache", "Not a directory|File exists"),
        ("error", r"(?s)failed with exit code 1:.*FAILED: .*\.o.*broken header"),
        ("no library", "Could not load this library|invalid ELF header"),
    ],
)
def test_failed_build_is_one_warning(pretended, monkeypatch, tmp_path, case, reason):
    if case == "error":
        pretended.write_text('#!/bin/sh\ncase "$*" in *--version) ;; *) echo broken header; exit 1;; esac')
    elif case == "ninja":
        monkeypatch.setitem(sys.modules, "ninja", None)
    elif case == "cache":
        (tmp_path / "cache").write_text("a file")
    elif case in ("CXX", "CXXFLAGS"):
        monkeypatch.setenv(case, {"CXX": "/no/such/compiler", "CXXFLAGS": '"-g'}[case])
    assert re.search(reason, warning(monkeypatch))
    assert case == "no library" or not list(tmp_path.rglob("*.so"))


def test_background_build_that_fails_is_not_repeated(pretended, monkeypatch, capfd):
    text = pretended.read_text()
    pretended.write_text('#!/bin/sh\ncase "$*" in *--version) echo 1;; *) echo broken header; exit 1;; esac')
    start_process = subprocess.Popen

    def in_this_process(command: Any, **options: Any) -> Any:  # another one imports torch for seconds
        if _build._DETACHED not in command:
            return start_process(command, **options)
        with contextlib.redirect_stderr(io.TextIOWrapper(options["stderr"], write_through=True)):
            _build.build_detached()

    monkeypatch.setattr(subprocess, "Popen", in_this_process)
    monkeypatch.setattr(os, "nice", lambda increment: None)
    assert _build._find_or_start() is None
    folder = _build._target()[1]
    assert "broken header" in (folder / "failed.log").read_text()
    with monkeypatch.context() as patch:
        patch.setattr(_build, "_check_ninja", lambda: pytest.fail("a build was started"))
        with pytest.raises(_build.BuildError, match=rf"as {folder}/failed.log says; SKIPKERNELS_CPP=wait repeats it"):
            _build._find_or_start()
    pretended.write_text(text)
    assert _build.build().exists() and not (folder / "failed.log").exists()


def test_background_build_that_was_killed_is_repeated(pretended, monkeypatch, capfd):
    """But not while another process builds."""
    folder, started = _build._target()[1], []
    (folder / "build.log").write_text("of a process that was killed")
    monkeypatch.setattr(_build, "_key", lambda compiler: folder.name)  # it starts a process
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **options: started.append(options))
    with locked(folder):
        assert _build._find_or_start() is None and not started
    assert _build._find_or_start() is None and len(started) == 1 and started[0]["start_new_session"]
    assert capfd.readouterr().err.count("in the background") == 2


def test_setup_without_kernels_is_a_pure_wheel(tmp_path):
    setup = Path(skipkernels.__file__).parents[1] / "setup.py"
    if not setup.is_file():
        pytest.skip("not a checkout")
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho broken header; exit 1\n")
    compiler.chmod(0o755)
    command = ["egg_info", "-e", tmp_path, "build", "-b", tmp_path / "build", "bdist_wheel", "-d", tmp_path]
    result = subprocess.run(
        [sys.executable, setup.name, *command, "-b", tmp_path / "bdist"],
        cwd=setup.parent,
        env={**os.environ, "CXX": str(compiler)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "broken header" in result.stderr
    assert "they will be built on first use" in result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"skipkernels-{skipkernels.__version__}-py3-none-any.whl"
    names = {Path(name).name for name in zipfile.ZipFile(wheel).namelist()}
    assert {"functional.py", *(path.name for path in _build.source_dir().iterdir())} <= names
    assert not [name for name in names if name.endswith(".so")]


def test_turned_off(tmp_path):
    """The reference raises the same errors; the tests with `reference` among the backends check its results."""
    code = """
from tests import test_functional
for name in ("class_sampled_ce", "class_scores"):
    for bad in test_functional.BAD[name]:
        test_functional.test_refuses(name, *bad)
"""
    out, err = finish(start(WITHOUT_PREBUILT + USE + code, tmp_path, SKIPKERNELS_CPP="0"))
    assert out.split()[0] == LOSS and out.split()[-1] == "reference"
    assert err == ""
    assert not (tmp_path / "cache").exists()


def test_links_to_stable_symbols_only():
    """One binary for every torch from 2.10: nothing of at:: or c10::, only the C functions of the stable ABI."""
    path = _build.load().path
    if path is None or shutil.which("nm") is None:
        pytest.skip("no library, or no nm")
    symbols = subprocess.run(["nm", "-D", "--undefined-only", path], check=True, capture_output=True, text=True).stdout
    names = [line.split()[-1].partition("@") for line in symbols.splitlines()]
    # PyPI's libtorch_cpu.so exports some of the C++ library's functions, which then have no version here.
    known = ("aoti_torch_", "torch_", "_ITM", "__gmon", "_ZNSt", "_ZNKSt", "_ZSt")
    torchs = [name for name, at, _ in names if not at and not name.startswith(known)]
    assert torchs == ["__cxa_finalize"] or torchs == []
    assert not [name for name, _, _ in names if "c10" in name or "2at" in name or name.startswith("Py")]


def test_backends_tell_the_truth():
    table = skipkernels.backends()
    loaded = _build.load().path is not None
    for name, devices in table.items():
        cpp = registration.has_cpp(name)
        assert devices["cpu"].kernel == ("C++" if cpp else "reference")
        assert bool(devices["cpu"].reason) != cpp
        assert devices["cuda"].kernel == "Triton"
        assert bool(devices["cuda"].reason) != torch.cuda.is_available()
        assert devices["cuda"].fallback_cases.startswith("fp64") and not devices["cpu"].fallback_cases
        assert callable(getattr(skipkernels.reference, name))
    assert (table["class_sampled_ce"]["cpu"].kernel == "C++") == loaded

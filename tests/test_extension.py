"""C++ kernels: prebuilt, built on first use, refused, or impossible."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import skipkernels
from skipkernels import _extension
from skipkernels.ops import registration

# A process that has no prebuilt library: it looks for one in an empty folder.
WITHOUT_PREBUILT = """
import pathlib, sys, torch, skipkernels as sk
from skipkernels import _extension
sources = _extension.source_dir()
_extension.source_dir = lambda: sources
_extension._PACKAGE = pathlib.Path(sys.argv[1])
"""
USE = """
image = torch.eye(3).requires_grad_()
loss = sk.functional.class_sampled_ce(image, torch.eye(3), torch.arange(3), 2.0)
loss.backward()
print(f"{loss:.6f} {image.grad.norm():.6f} {sk.backends()['class_sampled_ce']['cpu'].kernel}")
"""
LOSS = "0.239545"  # log(e² + 2) − 2


def start(code: str, tmp_path: Path, **environment: str) -> subprocess.Popen:
    empty = tmp_path / "empty"
    empty.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(empty)],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen) -> tuple[str, str]:
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out.strip(), err


# A compiler that copies the library of this process, so that a build is cheap; `make setup` compiles.
COPIES = """#!/bin/sh
for argument; do
  if test "$last" = -o; then case "$argument" in *.so) cp "{library}" "$argument";; *) : > "$argument";; esac; fi
  last=$argument
done
echo 1
"""


def test_built_once_on_first_use_by_two_processes_at_once(tmp_path):
    library = _extension.load().path
    assert library is not None
    compiler = tmp_path / "compiler"
    compiler.write_text(COPIES.format(library=library))
    compiler.chmod(0o755)
    copies = {"CXX": str(compiler)}
    both = [finish(process) for process in [start(WITHOUT_PREBUILT + USE, tmp_path, **copies) for _ in "ab"]]
    silent, building = sorted(err for _, err in both)
    assert silent == "" and building.count("skipkernels: building the C++ kernels, once") == 1
    for out, _ in both:
        assert out.split()[0] == LOSS and out.split()[-1] == "C++"
    (built,) = (tmp_path / "cache" / "skipkernels").glob("*/*.so")
    assert {path.name for path in built.parent.iterdir()} == {built.name, "lock"}


# A compiler that makes files with nothing but its arguments in them, so that a build is cheap.
PRETENDED = """#!/bin/sh
for argument; do test "$last" = -o && echo "$@" > "$argument"; last=$argument; done
echo "${VERSION:-1}"
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
    shutil.copytree(_extension.source_dir(), package / "csrc")
    monkeypatch.setattr(_extension, "_PACKAGE", package)
    monkeypatch.setattr(torch.ops, "load_library", loaded.append)
    monkeypatch.delenv("SKIPKERNELS_CPP", raising=False)
    (package / "_C.abi3.so").touch()  # as libraries were named before
    prebuilt = package / f"_C_{_extension.sources_digest()}.abi3.so"
    prebuilt.touch()
    if changed:
        with (package / "csrc" / _extension.HEADERS[0]).open("a") as file:
            file.write("// changed\n")
    path = _extension._find_or_build().path
    assert loaded == [path] and (path == prebuilt) == (not changed)
    assert not changed or path.is_relative_to(tmp_path / "cache")


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty"])
def test_damaged_library_is_built_again(pretended, capfd, damage):
    """Loading it would end the process with a bus error or worse."""
    library = _extension.build()
    whole = library.read_bytes()
    bad = {"truncated": whole[:-1], "flipped": b"?" + whole[1:], "empty": b""}[damage]
    library.write_bytes(bad)
    again = _extension.build()
    assert len(list(library.parent.glob("*.so"))) == 1
    assert again.read_bytes() != bad and again == _extension.build()
    assert capfd.readouterr().err.count("building the C++ kernels") == 2


def test_library_is_on_the_disk_before_it_has_its_name(pretended, monkeypatch):
    """Else a crash of the machine may leave the name and not what is in it."""
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("fsync"), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b)))
    _extension.build()
    assert events == ["fsync", "replace"]


def test_another_version_of_the_compiler_builds_again(pretended, monkeypatch):
    first = _extension.build()
    monkeypatch.setenv("VERSION", "2")
    second = _extension.build()
    assert first.parent != second.parent and first.exists()


def test_compiler_with_arguments_and_further_flags(pretended, monkeypatch):
    plain = _extension.build()
    monkeypatch.setenv("CXX", f"{shlex.quote(str(pretended))} --first 'of two'")
    monkeypatch.setenv("CXXFLAGS", "-g -O1")
    library = _extension.build()
    assert library.parent != plain.parent
    words = library.read_text()
    assert words.startswith("--first of two ") and words.index("-O3") < words.index("-O1")


@pytest.fixture
def umask_0():
    before = os.umask(0)
    yield
    os.umask(before)


def test_built_files_are_writable_by_the_user_only(pretended, umask_0):
    library = _extension.build()
    lock = library.parent / "lock"
    modes = [stat.S_IMODE(p.stat().st_mode) for p in (library.parent.parent, library.parent, library, lock)]
    assert modes == [0o700, 0o700, 0o644, 0o600]


def give_away(path: Path, monkeypatch) -> None:
    """Let another user own it."""
    if os.geteuid() == 0:
        os.chown(path, 12345, 12345, follow_symlinks=False)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)


@pytest.mark.parametrize(
    "planted", ["folder of another", "folder all write", "library of another", "library all write"]
)
def test_library_that_another_user_may_write_is_not_loaded(pretended, monkeypatch, planted):
    library = _extension.build()
    path = library.parent if planted.startswith("folder") else library
    if planted.endswith("another"):
        give_away(path, monkeypatch)
    else:
        path.chmod(0o777)
    with pytest.raises(
        _extension.BuildError, match=rf"{path.name} is not loaded: another user \(uid \d+\) owns it or may"
    ):
        _extension.build()


def only_warning(monkeypatch, match: str) -> None:
    """Load the kernels, which must be absent for one reason."""
    monkeypatch.setenv("SKIPKERNELS_CPP", "build")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: pytest.fail(f"{path} was loaded"))
    with pytest.warns(RuntimeWarning, match=match) as caught:
        assert _extension._find_or_build().path is None
    assert len(caught) == 1


@pytest.mark.parametrize("parent", ["all write", "group writes", "of another"])
def test_folder_in_one_that_another_user_may_write_is_refused(pretended, monkeypatch, tmp_path, parent):
    """They could put another folder in its place."""
    shared = tmp_path / "shared"
    shared.mkdir()
    monkeypatch.setenv("XDG_CACHE_HOME", str(shared / "mine" / "cache"))
    (shared / "mine").mkdir(mode=0o700)
    if parent == "of another":
        give_away(shared, monkeypatch)
    else:
        os.chown(shared, -1, 12345) if os.geteuid() == 0 else None
        shared.chmod(0o777 if parent == "all write" else 0o775)
    if parent == "group writes" and shared.stat().st_gid == shared.stat().st_uid:
        pytest.skip("no other group")
    only_warning(monkeypatch, f"{shared}.* is not safe: .*Let XDG_CACHE_HOME name")
    assert not list(tmp_path.rglob("*.so"))


def test_folder_in_a_sticky_one_is_used(pretended, monkeypatch, tmp_path):
    """Others can write to such a folder, as to /tmp, but not rename files that are not theirs."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o1777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "shared" / "cache"))
    assert _extension.build().is_file()


def test_library_replaced_after_the_build_is_not_loaded(pretended, monkeypatch):
    build = _extension.build

    def replaced() -> Path:
        library = build()
        library.write_bytes(b"other code")
        return library

    monkeypatch.setattr(_extension, "build", replaced)
    only_warning(monkeypatch, "was changed after it was built")


def test_link_of_another_user_is_not_followed(pretended, monkeypatch):
    library = _extension.build()
    target = library.rename(library.parent / "elsewhere")
    library.symlink_to(target)
    assert _extension.build() == library
    give_away(library, monkeypatch)
    with pytest.raises(_extension.BuildError, match="is not loaded"):
        _extension.build()


def no_home() -> Path:
    raise RuntimeError("Could not determine home directory.")


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("CXX", r"CXX=g\+\+ 'x cannot be split into words \(No closing quotation\)"),
        ("CXXFLAGS", r"CXXFLAGS=\"-g cannot be split into words"),
        ("home", "no home folder, and no XDG_CACHE_HOME"),
        ("cache", "Not a directory|File exists"),
        ("format", "Exec format error"),
        ("killed", r"failed with exit code -9"),
        ("words", "failed with exit code 1:\n.?no"),
        ("nothing", "No such file or directory"),
        ("no library", "Could not load this library|invalid ELF header"),
    ],
)
def test_failed_build_is_one_warning(pretended, monkeypatch, tmp_path, case, reason):
    monkeypatch.setenv("SKIPKERNELS_CPP", "build")
    scripts = {"format": "\x7f", "killed": "kill -9 $$", "words": "printf '\\377no' >&2; exit 1", "nothing": "exit 0"}
    if case in scripts:
        pretended.write_text(("" if case == "format" else "#!/bin/sh\n") + scripts[case])
    elif case == "home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(Path, "home", no_home)
    elif case == "cache":
        (tmp_path / "cache").write_text("a file")
    elif case in ("CXX", "CXXFLAGS"):
        monkeypatch.setenv(case, {"CXX": "g++ 'x", "CXXFLAGS": '"-g'}[case])
    with pytest.warns(RuntimeWarning, match="no C\\+\\+ kernels") as caught:
        extension = _extension._find_or_build()
    assert len(caught) == 1 and extension.path is None
    assert re.search(reason, extension.reason), extension.reason
    assert case == "no library" or not list(tmp_path.rglob("*.so"))


def test_setup_without_a_compiler_is_a_pure_package(tmp_path):
    setup = Path(skipkernels.__file__).parents[1] / "setup.py"
    if not setup.is_file():
        pytest.skip("not a checkout")
    result = subprocess.run(
        [sys.executable, setup.name, "egg_info", "-e", tmp_path, "build", "-b", tmp_path / "build"],
        cwd=setup.parent,
        env={**os.environ, "CXX": "/no/such/compiler"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "no C++ compiler found (CXX=/no/such/compiler)" in result.stdout
    built = {path.name for path in (tmp_path / "build").rglob("*")}
    assert {"functional.py", *_extension.SOURCES} <= built and not [name for name in built if name.endswith(".so")]


def test_setup_with_a_compiler_that_fails_is_a_pure_wheel(tmp_path):
    setup = Path(skipkernels.__file__).parents[1] / "setup.py"
    if not setup.is_file():
        pytest.skip("not a checkout")
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\nfor last; do :; done\ntest $last = --version || { echo broken header; exit 1; }\n")
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
    assert "broken header" in result.stderr and "they will be built on first use" in result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"skipkernels-{skipkernels.__version__}-py3-none-any.whl"
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith(".so")]


def test_compiler_without_these_target_clones_builds_one_version(pretended):
    with pretended.open("r+") as file:
        rest = file.read().removeprefix("#!/bin/sh\n")
        file.seek(0)
        file.write('#!/bin/sh\ncase "$*" in *multiversion.cpp*) exit 1;; esac\n' + rest)
    assert "-DSKIPKERNELS_NO_MULTIVERSION" in _extension.build().read_text()


def test_only_names_that_the_oldest_torch_has():
    """torch 2.10 has the macro with the shorter name, and later ones have both."""
    for path in _extension.source_dir().iterdir():
        assert "STABLE_TORCH_ERROR_CODE_CHECK" not in path.read_text()


def test_turned_off(tmp_path):
    """The reference raises the same errors; the tests with `reference` among the backends check its results."""
    code = """
from tests import test_functional
for bad in test_functional.CROSS_ENTROPY:
    test_functional.test_class_sampled_ce_refuses(*bad)
for bad in test_functional.SCORES:
    test_functional.test_class_scores_refuses(*bad)
"""
    out, err = finish(start(WITHOUT_PREBUILT + USE + code, tmp_path, SKIPKERNELS_CPP="0"))
    assert out.split()[0] == LOSS and out.split()[-1] == "reference"
    assert err == ""
    assert not (tmp_path / "cache").exists()


def test_no_compiler_is_one_warning(tmp_path):
    out, err = finish(start(WITHOUT_PREBUILT + USE + USE, tmp_path, CXX="/no/such/compiler"))
    assert out.splitlines()[0].split()[0] == LOSS and out.split()[-1] == "reference"
    assert err.count("RuntimeWarning: skipkernels: no C++ kernels: no C++ compiler found (CXX=/no/such/compiler)") == 1
    assert "Install a C++17 compiler" in err


def test_links_to_stable_symbols_only():
    """One binary for every torch from 2.10: nothing of at:: or c10::, only the C functions of the stable ABI."""
    path = _extension.load().path
    if path is None or shutil.which("nm") is None:
        pytest.skip("no library, or no nm")
    symbols = subprocess.run(["nm", "-D", "--undefined-only", path], check=True, capture_output=True, text=True).stdout
    names = [line.split()[-1].partition("@") for line in symbols.splitlines()]
    # PyPI's libtorch_cpu.so exports some of the C++ library's functions, which then have no version here.
    known = ("aoti_torch_", "torch_", "_ITM", "__gmon", "_ZNSt", "_ZNKSt", "_ZSt")
    torchs = [name for name, at, _ in names if not at and not name.startswith(known)]
    assert torchs == ["__cxa_finalize"] or torchs == []
    assert not [name for name, _, _ in names if "c10" in name or "2at" in name or name.startswith("Py")]


def test_every_source_is_listed():
    folder = Path(skipkernels.__file__).parents[1] / "csrc"
    if not folder.is_dir():
        pytest.skip("not a checkout")
    assert {p.name for p in folder.iterdir()} == {*_extension.SOURCES, *_extension.HEADERS}


def test_backends_tell_the_truth():
    table = skipkernels.backends()
    loaded = _extension.load().path is not None
    for name, devices in table.items():
        cpp = registration.has_cpp(name)
        assert devices["cpu"].kernel == ("C++" if cpp else "reference")
        assert bool(devices["cpu"].reason) != cpp
        assert devices["cuda"].kernel == "Triton"
        assert bool(devices["cuda"].reason) != torch.cuda.is_available()
        assert devices["cuda"].fallback_cases.startswith("fp64") and not devices["cpu"].fallback_cases
        assert callable(getattr(skipkernels.reference, name))
    assert (table["class_sampled_ce"]["cpu"].kernel == "C++") == loaded

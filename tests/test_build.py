"""C++ kernels: built, loaded, or absent."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import pytest
import torch

import skipkernels
from skipkernels import _build
from skipkernels.ops import registration
from tests.processes import run_in_processes


def loss_without_prebuilt(rank: int, package: Path, library: str | None) -> tuple[float, str, list[str]]:
    """Loss of an operator in a process with no library in the package, its kernel, and the warnings of two calls."""
    os.environ.pop("SKIPKERNELS_CPP", None)
    os.environ |= {} if library is None else {"SKIPKERNELS_CPP": library}
    sources = _build.source_dir()
    _build.source_dir, _build._PACKAGE = lambda: sources, package
    with warnings.catch_warnings(record=True) as caught:
        for _ in range(2):
            image = torch.eye(3).requires_grad_()
            loss = skipkernels.functional.class_sampled_ce(image, torch.eye(3), torch.arange(3), 2.0)
            loss.backward()
        kernel = skipkernels.backends()["class_sampled_ce"]["cpu"].kernel
    return loss.item(), kernel, [str(each.message) for each in caught]


@pytest.mark.parametrize(
    ("library", "kernel", "warning"),
    [
        (None, "reference", r"no C\+\+ kernels \(not built\)"),
        (__file__, "reference", r"no C\+\+ kernels \(.*test_build\.py: invalid"),
        ("0", "reference", None),
        ("built", "C++", None),
    ],
    ids=["missing", "no library", "0", "named"],
)
def test_library_of_a_process(tmp_path, library, kernel, warning):
    """Without one PyTorch computes the same, and one warning says how to build it."""
    if library == "built":
        library = str(_build.load().path or pytest.skip("no library"))
    ((loss, used, warned),) = run_in_processes(1, tmp_path, loss_without_prebuilt, tmp_path, library)
    assert loss == pytest.approx(0.239545, abs=1e-6)  # log(e² + 2) − 2
    assert used == kernel and len(warned) == (warning is not None)
    for message in warned:
        assert re.search(f"{warning}.*Build them once with `skipkernels build`", message)


def test_a_missing_library_is_named(monkeypatch):
    """To build that of the package would not help."""
    monkeypatch.setenv("SKIPKERNELS_CPP", "no/such.so")
    with pytest.warns(RuntimeWarning, match=r"\(SKIPKERNELS_CPP names no file: /.*no/such\.so\)"):
        assert _build.load.__wrapped__().path is None


# A compiler that makes files with nothing but its arguments in them, so that a build is cheap.
PRETENDED = """#!/bin/sh
for argument; do test "$last" = -o && echo "$@" > "$argument"; last=$argument; done
echo 1
"""


@pytest.fixture
def pretended(tmp_path, monkeypatch) -> Path:
    """The compiler; the package is in a folder of the test."""
    compiler = tmp_path / "a compiler"
    compiler.write_text(PRETENDED)
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", shlex.quote(str(compiler)))
    monkeypatch.delenv("CXXFLAGS", raising=False)
    shutil.copytree(_build.source_dir(), tmp_path / "package" / "csrc")
    monkeypatch.setattr(_build, "_PACKAGE", tmp_path / "package")
    return compiler


def test_build_into_the_package_once(pretended, capsys):
    assert _build.main() == 0
    said = capsys.readouterr()
    library = Path(said.out.strip())
    assert library == _build.library_path() and "building the C++ kernels" in said.err
    assert {path.name for path in library.parent.iterdir()} == {"csrc", library.name}
    assert _build.main() == 0 and "building" in capsys.readouterr().err, "this one does not load, and is built again"
    shutil.copyfile(_build.load().path or pytest.skip("no library"), library)
    pretended.unlink()
    assert _build.main() == 0 and capsys.readouterr() == (f"{library}\n", ""), "nothing is compiled again"
    with (library.parent / "csrc" / "simd.h").open("a") as file:
        file.write("// changed\n")
    assert not _build.library_path().exists(), "the library of other sources is not used"


def test_compiler_with_arguments_and_further_flags(pretended, monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", f"{shlex.quote(str(pretended))} --first 'of two'")
    monkeypatch.setenv("CXXFLAGS", "-g -O1")
    for _ in range(2):  # a named one is always built
        assert _build.main(tmp_path / "new" / "kernels.so") == 0
    words = (tmp_path / "new" / "kernels.so").read_text()
    assert words.startswith("--first of two ") and words.index("-O3") < words.index("-O1")


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("CXX", r"no C\+\+ compiler found \(CXX=/no/such/compiler\)"),
        ("CXXFLAGS", r"CXX or CXXFLAGS cannot be split into words \(No closing quotation\)"),
        ("torch", "import of torch halted"),
        ("ninja", r"ninja is not installed \(pip install ninja\)"),
        ("folder", "Not a directory|File exists"),
        ("sources", "No such file or directory: .*csrc"),
        ("error", r"failed with exit code 1$"),
    ],
)
def test_failed_build_is_printed(pretended, monkeypatch, tmp_path, capfd, case, reason):
    out = None
    if case == "error":
        pretended.write_text("#!/bin/sh\necho broken header; exit 1")
    elif case in ("torch", "ninja"):
        monkeypatch.setitem(sys.modules, case, None)
    elif case == "folder":
        out = tmp_path / "a compiler" / "kernels.so"
    elif case == "sources":
        shutil.rmtree(tmp_path / "package" / "csrc")
    else:
        monkeypatch.setenv(case, {"CXX": "/no/such/compiler", "CXXFLAGS": '"-g'}[case])
    assert _build.main(out) == 1
    said = capfd.readouterr()
    assert said.out == "" and re.search(f"^skipkernels build: .*{reason}", said.err, re.MULTILINE)
    assert ("broken header" in said.err) == (case == "error")
    assert not list(tmp_path.rglob("*.so*"))


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
    assert "`skipkernels build` builds them later" in result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"skipkernels-{skipkernels.__version__}-py3-none-any.whl"
    names = {Path(name).name for name in zipfile.ZipFile(wheel).namelist()}
    sources = (path.name for path in _build.source_dir().iterdir())
    assert {"functional.py", "LICENSE", "LICENSES-pictograms", *sources} <= names
    assert not [name for name in names if name.endswith(".so")]


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

"""Build the C++ kernels with ninja, and load them.

`setup.py` builds them into the package if torch and a compiler are there; `skipkernels build` does so later. Without
them PyTorch runs the operators. Imports only the standard library at its head, for `setup.py`.

`torch.utils.cpp_extension.load` is not used: after a kill its lock file stays, and the next build waits forever. It
also links libraries that one binary for every torch since 2.10 must not need.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path
from typing import NamedTuple

# The oldest torch with the stable ABI of the binary: 2.10, as 0xMMmm and twelve zeros.
DEFINES = ("-DTORCH_TARGET_VERSION=0x020a000000000000",)
COMPILE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    # Vector loops from `#pragma omp simd` (no OpenMP run-time: threads are PyTorch's).
    "-fopenmp-simd",
    # Comparisons and square roots in a loop keep it from becoming a vector loop if they must set errno or trap.
    "-fno-math-errno",
    "-fno-trapping-math",
    # Vectors wider than the base instruction set pass between inlined functions only.
    "-Wno-psabi",
)
_PACKAGE = Path(__file__).parent
_WINDOWS = "the C++ kernels have not been compiled on Windows"


class Extension(NamedTuple):
    """Path of the loaded library, or the reason for its absence."""

    path: Path | None
    reason: str = ""


class BuildError(RuntimeError):
    """The library cannot be built."""


@functools.cache
def load() -> Extension:
    """Load the C++ kernels; the first call decides for the whole process.

    SKIPKERNELS_CPP=0 turns them off; another value is the path of the library. By default it is in the package.
    """
    asked = os.environ.get("SKIPKERNELS_CPP", "")
    if asked == "0":
        return Extension(None, "SKIPKERNELS_CPP=0 turns them off")
    if sys.platform == "win32":
        return Extension(None, _WINDOWS)
    import torch

    try:
        library = Path(asked).absolute() if asked else library_path()
        if not library.is_file():
            raise FileNotFoundError(f"SKIPKERNELS_CPP names no file: {library}" if asked else "not built")
        torch.ops.load_library(library)
        return Extension(library)
    except OSError as error:
        reason = str(error.__cause__ or error).splitlines()[0]  # the cause says what does not fit, such as the libc
        warnings.warn(
            f"skipkernels: no C++ kernels ({reason}), so PyTorch runs the operators: the same numbers, slower. Build "
            "them once with `skipkernels build`; SKIPKERNELS_CPP=0 silences this.",
            RuntimeWarning,
            stacklevel=2,
        )
        return Extension(None, reason)


def library_path() -> Path:
    """Path of the library in the package; its name has the digest of `csrc/`."""
    return _PACKAGE / f"_C_{sources_digest()}.abi3.so"


def main(out: Path | None = None) -> int:
    """Build the library, by default that of the package unless it loads, and print its path, or why it failed."""
    try:
        library = library_path() if out is None else out.absolute()
        if out is not None or not _loads(library):
            sys.stderr.write("building the C++ kernels, one to three minutes\n")
            build(library)
    except (ImportError, OSError, BuildError) as error:  # ImportError: of torch
        sys.stderr.write(f"skipkernels build: {error}\n")
        return 1
    sys.stdout.write(f"{library}\n")
    return 0


def _loads(library: Path) -> bool:
    """Return True if the library is there and loads, in a process that a damaged one may crash."""
    load = [sys.executable, "-c", "import sys, torch; torch.ops.load_library(sys.argv[1])", str(library)]
    return library.is_file() and subprocess.run(load, capture_output=True).returncode == 0


def build(library: Path) -> None:
    """Build the library.

    The compiler is that of the environment variable CXX, its further flags are those of CXXFLAGS.

    Raises:
        BuildError: If there is no compiler, or it fails.
        OSError: If the folder can't be written.
    """
    compiler = _compiler()
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".build-", dir=library.parent) as folder:  # can it be written?
        built = Path(folder, "_C.so")
        _run_ninja(compiler, built)
        os.replace(built, library)  # never a part of a library, also if two processes build it


def source_dir() -> Path:
    """Path of `csrc/`: inside the package when installed, beside it in a checkout."""
    return next((d for d in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc") if d.is_dir()), _PACKAGE / "csrc")


def sources_digest() -> str:
    """Digest of `csrc/`, part of the name of the library, so that one from other sources is not loaded."""
    digest = hashlib.sha256()
    for path in sorted(path for path in source_dir().iterdir() if path.suffix in (".cpp", ".h")):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _compiler() -> list[str]:
    """Compiler command with flags; CXX may have arguments, as in `ccache g++`."""
    if sys.platform == "win32":
        raise BuildError(_WINDOWS)
    try:
        asked, further = (shlex.split(os.environ.get(name, "")) for name in ("CXX", "CXXFLAGS"))
    except ValueError as error:
        raise BuildError(f"CXX or CXXFLAGS cannot be split into words ({error})") from error
    for program, *arguments in [asked] if asked else [["c++"], ["g++"], ["clang++"]]:
        found = shutil.which(program)
        if found is not None:
            return [found, *arguments, *COMPILE_FLAGS, *DEFINES, *further]
    raise BuildError(f"no C++ compiler found ({f'CXX={shlex.join(asked)}' if asked else 'tried c++, g++, clang++'})")


def _run_ninja(compiler: list[str], library: Path) -> None:
    """Compile csrc/, all files in parallel, and link the library. The objects are put beside it."""
    import torch

    if importlib.util.find_spec("ninja") is None:
        raise BuildError("ninja is not installed (pip install ninja)")
    command = shlex.join(compiler).replace("$", "$$")
    torch_dir = shlex.quote(str(Path(torch.__file__).parent)).replace("$", "$$")
    sources = sorted(source_dir().glob("*.cpp"), key=lambda path: -path.stat().st_size)  # the slowest first
    objects = [f"{source.stem}.o" for source in sources]
    paths = [re.sub(r"[$ :]", r"$\g<0>", str(source)) for source in sources]
    lines = [
        "rule compile",
        f"  command = {command} -fPIC -isystem {torch_dir}/include -c $in -o $out",
        "  description = compile $in",
        "rule link",
        f"  command = {command} -shared $in -o $out -L{torch_dir}/lib -ltorch_cpu",
        "  description = link",
        *(f"build {name}: compile {path}" for name, path in zip(objects, paths, strict=True)),
        f"build {library.name}: link {' '.join(objects)}",
    ]
    library.with_name("build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
    # ninja shows its progress and the errors of the compiler on stderr.
    code = subprocess.run([sys.executable, "-m", "ninja", library.name], cwd=library.parent, stdout=2).returncode
    if code != 0:
        raise BuildError(f"ninja, of which the output is above, failed with exit code {code}")

"""Build the C++ kernels with ninja, and load them.

`setup.py` builds them into the package if torch is there at build time. Where they are missing, the first use of an
operator starts a process that builds them once, into the user's cache, also after the end of this process, which uses
the PyTorch reference. Imports only the standard library at its head, for `setup.py`.

`torch.utils.cpp_extension.load` is not used: after a kill its lock file stays, and the next build waits forever. It
also links libraries that one binary for every torch since 2.10 must not need.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
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
_LOG, _FAILED = "build.log", "failed.log"  # of a build in the background, and of one that failed
_WINDOWS = "the C++ kernels have not been compiled on Windows"
_LIBRARIES, _PARTIAL = "_C_*.so", ".partial-"  # in the cache: libraries, and folders of unfinished builds
_DETACHED = "from skipkernels import _build; _build.build_detached()"


class Extension(NamedTuple):
    """Path of the loaded library, or the reason for its absence."""

    path: Path | None
    reason: str = ""


class BuildError(RuntimeError):
    """The library cannot be built."""


@functools.cache
def load() -> Extension:
    """Load the C++ kernels; the first call decides for the whole process.

    If they are not built, a process in the background builds them; with SKIPKERNELS_CPP=wait or build this one does.
    """
    asked = os.environ.get("SKIPKERNELS_CPP", "")
    if asked == "0":
        return Extension(None, "SKIPKERNELS_CPP=0 turns them off")
    if sys.platform == "win32":
        return Extension(None, _WINDOWS)
    import torch

    for path in () if asked == "build" else _PACKAGE.glob(f"_C_{sources_digest()}.*"):
        with contextlib.suppress(OSError):  # built for another system
            torch.ops.load_library(path)
            return Extension(path)
    try:
        built = build() if asked in ("build", "wait") else _find_or_start()
        if built is None:
            return Extension(None, "being compiled in the background, for the next start")
        torch.ops.load_library(built)
        return Extension(built)
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"skipkernels: no C++ kernels: {error}. The PyTorch reference is used instead: the same numbers, slower. "
            "Install a C++17 compiler (g++ or clang++, or name one in CXX) and start again; SKIPKERNELS_CPP=0 asks for "
            "the reference and silences this.",
            RuntimeWarning,
            stacklevel=2,
        )
        return Extension(None, str(error))


def build(*, wait: bool = True) -> Path:
    """Return the path of the library in the user's cache; build it if it is absent or damaged.

    The compiler is that of the environment variable CXX, its further flags are those of CXXFLAGS. Raises an OSError if
    another process builds it and `wait` is False.
    """
    from ._progress import progress
    from .folders import locked

    compiler, folder = _target()
    if (library := _built(folder)) is not None:
        return library
    with locked(folder, wait=wait):
        if (library := _built(folder)) is not None:  # another process built it meanwhile
            return library
        for left in folder.glob(f"{_PARTIAL}*"):  # of a build that was killed
            shutil.rmtree(left, ignore_errors=True)
        for damaged in folder.glob(_LIBRARIES):
            damaged.unlink()
        sys.stderr.write(f"skipkernels: building the C++ kernels, once (one to three minutes), in {folder}\n")
        steps = len(list(source_dir().glob("*.cpp"))) + 1
        with (
            tempfile.TemporaryDirectory(prefix=_PARTIAL, dir=folder, ignore_cleanup_errors=True) as temporary,
            progress("building", steps) as advance,
        ):
            new = Path(temporary, "_C.so")
            _run_ninja(compiler, new, lambda: advance(1))
            new.chmod(0o700)  # whatever the umask
            library = new.replace(folder / _name_of(new))
        (folder / _FAILED).unlink(missing_ok=True)
    return library


def build_detached() -> None:
    """Build the library as the process in the background: at low priority, unless another process builds it."""
    if hasattr(os, "nice"):
        os.nice(10)
    _, folder = _target()
    try:
        build(wait=False)
    except (OSError, RuntimeError) as error:
        if getattr(error, "errno", None) != errno.EBUSY:
            sys.stderr.write(f"{error}\n")
            sys.stderr.flush()
            os.replace(folder / _LOG, folder / _FAILED)


def _find_or_start() -> Path | None:
    """Return the path of the library in the user's cache; if absent, start a process that builds it."""
    from .folders import is_locked

    _, folder = _target()
    if (library := _built(folder)) is not None:
        return library
    if (folder / _FAILED).exists():
        raise BuildError(f"a build failed, as {folder / _FAILED} says; SKIPKERNELS_CPP=wait repeats it")
    _check_ninja()
    if not is_locked(folder):
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        with (folder / _LOG).open("wb") as log:
            subprocess.Popen(
                [sys.executable, "-c", _DETACHED],
                env=os.environ | {"PYTHONPATH": paths},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,  # Ctrl-C in the terminal does not reach it
            )
    sys.stderr.write(
        "skipkernels: compiling the C++ kernels in the background (one to three minutes); this run uses PyTorch, "
        "the next one the kernels\n"
    )
    return None


def _target() -> tuple[list[str], Path]:
    """Return the compiler command, and the folder of the library in the user's cache, which is made."""
    compiler = _compiler()
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = cache / "skipkernels" / _key(compiler)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return compiler, _private(folder)


def _built(folder: Path) -> Path | None:
    """Return the path of the library in a folder if it is there and whole: a truncated one would raise SIGBUS."""
    for library in map(_private, folder.glob(_LIBRARIES)):
        if library.name == _name_of(library):
            return library
    return None


def _name_of(library: Path) -> str:
    """Name of a library in the cache, which has a digest of its bytes."""
    return f"_C_{hashlib.sha256(library.read_bytes()).hexdigest()[:16]}.so"


def build_into(library: Path) -> None:
    """Build the library for a package, as `setup.py` does. Raises a BuildError if that is impossible."""
    library.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        built = Path(temporary, "_C.so")
        _run_ninja(_compiler(), built)
        shutil.copyfile(built, library)


def source_dir() -> Path:
    """Path of `csrc/`: inside the package when installed, beside it in a checkout."""
    return next((d for d in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc") if d.is_dir()), _PACKAGE / "csrc")


def sources_digest() -> str:
    """Digest of `csrc/`, part of the name of a prebuilt library, so that one from other sources is not loaded."""
    digest = hashlib.sha256()
    for path in sorted(source_dir().iterdir()):
        digest.update(f"{path.name}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _key(compiler: list[str]) -> str:
    """Digest of everything that the binary depends on."""
    import torch

    version = _run([*compiler, "--version"])
    parts = (torch.__version__, platform.machine(), version, *compiler, sources_digest())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


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


def _check_ninja() -> None:
    if importlib.util.find_spec("ninja") is None:
        raise BuildError("ninja is not installed (pip install ninja)")


def _private(target: Path) -> Path:
    """Return the path of a folder or file; raise if another user may write to it or replace it, with code of theirs."""
    target = target.resolve()  # without links, so that its parents are those that are checked
    for path in (target, *target.parents) if os.name == "posix" else ():
        status = path.stat()
        others = 0o002 if status.st_gid == status.st_uid else 0o022  # with umask 002 a user's own group may write
        sticky = path != target and status.st_mode & stat.S_ISVTX  # as /tmp, where others rename only their own files
        if status.st_uid not in (0, os.geteuid()) or (status.st_mode & others and not sticky):
            raise BuildError(
                f"{path} is not safe: another user (uid {status.st_uid}) owns it or may write to it (mode "
                f"{stat.S_IMODE(status.st_mode):04o}). Let XDG_CACHE_HOME name a folder of your own"
            )
    return target


def _run_ninja(compiler: list[str], library: Path, after_step: Callable[[], None] = lambda: None) -> None:
    """Compile csrc/, all files in parallel, and link the library. The objects are put beside it."""
    import torch

    _check_ninja()
    command = shlex.join(compiler).replace("$", "$$")
    torch_dir = shlex.quote(str(Path(torch.__file__).parent)).replace("$", "$$")
    sources = sorted(source_dir().glob("*.cpp"), key=lambda path: -path.stat().st_size)  # the slowest first
    objects = [f"{source.stem}.o" for source in sources]
    paths = [re.sub(r"[$ :]", r"$\g<0>", str(source)) for source in sources]
    lines = [
        "rule compile",
        f"  command = {command} -fPIC -isystem {torch_dir}/include -c $in -o $out",
        "rule link",
        f"  command = {command} -shared $in -o $out -L{torch_dir}/lib -ltorch_cpu",
        *(f"build {name}: compile {path}" for name, path in zip(objects, paths, strict=True)),
        f"build {library.name}: link {' '.join(objects)}",
    ]
    library.with_name("build.ninja").write_text("\n".join(lines) + "\n", encoding="utf-8")
    _run([sys.executable, "-m", "ninja", "-C", str(library.parent), library.name], after_step)


def _run(command: list[str], after_step: Callable[[], None] = lambda: None) -> str:
    """Run a command and return its output; call `after_step` after each line of ninja about a step that has ended."""
    output: list[str] = []
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
    with subprocess.Popen(command, **options) as process:  # type: ignore[call-overload]
        for line in process.stdout:
            output.append(line)
            if line.startswith("["):  # [3/12] …
                after_step()
    if process.returncode != 0:
        last_lines = "".join(output[-20:]).strip()
        raise BuildError(f"`{shlex.join(command)}` failed with exit code {process.returncode}:\n{last_lines}\n")
    return "".join(output)

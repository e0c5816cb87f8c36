"""Build and load the C++ kernels.

`setup.py` builds them into the package when torch is there at build time. Where they are missing they are built when an
operator is first used, once, into the user's cache. Both ways use the lists below. This file imports nothing but the
standard library at its head, so that `setup.py` can read it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

SOURCES = (
    "add_layer_norm.cpp",
    "class_sampled_ce.cpp",
    "class_sampled_logits.cpp",
    "class_sampled_lse.cpp",
    "class_scores.cpp",
    "gather_rows.cpp",
    "mlp_activation.cpp",
    "pooled_attention.cpp",
    "sgd_momentum.cpp",
    "shared_prefix_attention.cpp",
    "vector.cpp",
)
HEADERS = ("attention.h", "class_sampled.h", "rows.h", "simd.h", "tensor.h", "unit_rows.h", "vector.h")

# The oldest torch with the stable ABI of the binary: 2.10, as 0xMMmm and twelve zeros.
DEFINES = ("-DTORCH_TARGET_VERSION=0x020a000000000000",)
COMPILE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-g0",
    "-fvisibility=hidden",
    # Vector loops from `#pragma omp simd` (no OpenMP run-time: threads are PyTorch's), with fused multiply-adds.
    "-fopenmp-simd",
    "-ffp-contract=fast",
    # Comparisons and square roots in a loop keep it from becoming a vector loop if they must set errno or trap.
    "-fno-math-errno",
    "-fno-trapping-math",
    # Vectors wider than the base instruction set pass between inlined functions only.
    "-Wno-psabi",
)

_PACKAGE = Path(__file__).parent


class Extension(NamedTuple):
    """Path of the loaded library, or the reason for its absence."""

    path: Path | None
    reason: str = ""


def source_dir() -> Path:
    """Path of `csrc/`: inside the package when installed, beside it in a checkout."""
    return next((d for d in (_PACKAGE / "csrc", _PACKAGE.parent / "csrc") if d.is_dir()), _PACKAGE / "csrc")


def sources_digest() -> str:
    """Digest of `csrc/`, part of the name of a prebuilt library, so that one from other sources is not loaded."""
    digest = hashlib.sha256()
    for name in (*SOURCES, *HEADERS):
        digest.update((source_dir() / name).read_bytes() + b"\0")
    return digest.hexdigest()[:16]


_lock = threading.Lock()
_extension: Extension | None = None


def load() -> Extension:
    """Load the C++ kernels, built first if necessary; the first call decides for the whole process."""
    global _extension
    if _extension is None:
        with _lock:
            if _extension is None:
                _extension = _find_or_build()
    return _extension


def _find_or_build() -> Extension:
    if os.environ.get("SKIPKERNELS_CPP") == "0":
        return Extension(None, "SKIPKERNELS_CPP=0 turns them off")
    import torch

    reason = ""
    try:
        asked = os.environ.get("SKIPKERNELS_CPP") == "build"
        for path in [] if asked else sorted(_PACKAGE.glob(f"_C_{sources_digest()}.*")):
            try:
                torch.ops.load_library(path)
                return Extension(path)
            except OSError as error:
                reason = f"{path.name} does not load ({error}); "
        path = build()
        if not _is_whole(path):
            raise BuildError(f"{path} is not loaded: it was changed after it was built. Remove it")
        torch.ops.load_library(path)
        return Extension(path)
    except (OSError, BuildError) as error:
        reason += str(error)
    warnings.warn(
        f"skipkernels: no C++ kernels: {reason}. The PyTorch reference is used instead: the same numbers, slower. "
        "Install a C++17 compiler (g++ or clang++, or name one in CXX) and start again; SKIPKERNELS_CPP=0 asks for "
        "the reference and silences this.",
        RuntimeWarning,
        stacklevel=2,
    )
    return Extension(None, reason)


class BuildError(Exception):
    """The library cannot be built."""


def build() -> Path:
    """Return the path of the library in the user's cache; build it if absent.

    The compiler is that of the environment variable CXX, its further flags are those of CXXFLAGS.
    """
    compiler = _compiler()
    folder = _cache_dir().resolve() / _key(compiler)  # without links, so that its parents are those that are checked
    for own in (*reversed(folder.parents), folder):
        own.mkdir(mode=0o700, exist_ok=True)
    _check_parents(folder)
    _check_own(folder)
    library = _whole_library(folder)
    if library is not None:
        return library
    with _only_process(folder / "lock"):
        library = _whole_library(folder)
        if library is not None:  # built by another process meanwhile
            return library
        for damaged in folder.glob("_C.*.so"):
            damaged.unlink()
        sys.stderr.write(f"skipkernels: building the C++ kernels, once (one to three minutes), in {folder}\n")
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            return _keep(_compile(compiler, Path(scratch)), folder)


def _whole_library(folder: Path) -> Path | None:
    """Return the library in a folder if its digest matches: a truncated one would crash the process that loads it."""
    for path in folder.glob("_C.*.so"):
        _check_own(path)
        if _is_whole(path):
            return path
    return None


def _is_whole(path: Path) -> bool:
    return path.name == f"_C.{_digest(path)}.so"


def _check_parents(folder: Path) -> None:
    """Raise if another user may rename a parent of a folder, and so put another in its place."""
    for parent in folder.parents if os.name == "posix" else ():
        status = parent.stat()
        group = 0 if status.st_gid == status.st_uid else 0o020  # with umask 002 a user's own group may write
        others_write = status.st_mode & (0o002 | group) and not status.st_mode & stat.S_ISVTX
        if others_write or status.st_uid not in (0, os.geteuid()):
            raise BuildError(
                f"{parent} is not safe: another user (uid {status.st_uid}) owns it or may write to it (mode "
                f"{stat.S_IMODE(status.st_mode):04o}), and so replace {folder}. Let XDG_CACHE_HOME name a folder of "
                "your own, such as one in your home"
            )


def _check_own(path: Path) -> None:
    """Raise for a file or folder that another user owns or may write to, and so could plant code in."""
    for status in (path.lstat(), path.stat()):  # a link, and what it points to
        others_write = status.st_mode & 0o022 and not stat.S_ISLNK(status.st_mode)
        if os.name == "posix" and (others_write or status.st_uid not in (0, os.geteuid())):
            raise BuildError(
                f"{path} is not loaded: another user (uid {status.st_uid}) owns it or may write to it "
                f"(mode {stat.S_IMODE(status.st_mode):04o}). Remove it, or let XDG_CACHE_HOME name a folder of your own"
            )


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _keep(built: Path, folder: Path) -> Path:
    """Move a library into a folder atomically: synced to disk first, then renamed."""
    with built.open("rb+") as file:
        os.fsync(file.fileno())
    built.chmod(stat.S_IMODE(built.stat().st_mode) & 0o644)
    library = folder / f"_C.{_digest(built)}.so"
    os.replace(built, library)
    return library


def _compiler() -> list[str]:
    """Compiler command with flags; CXX may have arguments, as in `ccache g++`."""
    asked = os.environ.get("CXX", "").strip()
    further = _words("CXXFLAGS")
    for program, *arguments in [_words("CXX")] if asked else [["c++"], ["g++"], ["clang++"]]:
        found = shutil.which(program)
        if found is not None:
            return [found, *arguments, *COMPILE_FLAGS, *DEFINES, *further]
    raise BuildError(f"no C++ compiler found ({f'CXX={asked}' if asked else 'tried c++, g++, clang++'})")


def _words(variable: str) -> list[str]:
    """Words of an environment variable, as a shell splits them."""
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise BuildError(f"{variable}={os.environ[variable]} cannot be split into words ({error})") from error


def check_compiler() -> None:
    """Raise a BuildError if no C++ compiler runs."""
    try:
        _run([*_compiler(), "--version"])
    except OSError as error:
        raise BuildError(str(error)) from error


def _cache_dir() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "skipkernels"
    except RuntimeError as error:  # no HOME, and no entry in the list of users
        raise BuildError("no home folder, and no XDG_CACHE_HOME, to keep them in") from error


def _key(compiler: list[str]) -> str:
    """Digest of everything that the binary depends on."""
    import torch

    digest = hashlib.sha256()
    version = _run([*compiler, "--version"])
    for part in (torch.__version__, platform.machine(), version, *compiler, sources_digest()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:16]


@contextlib.contextmanager
def _only_process(path: Path) -> Iterator[None]:
    """Hold the lock in `path`. The system lets go of it if the process dies.

    Without locks (Windows, some network disks) two processes may both build: slower, and as right, since the library
    is renamed into place whole.
    """
    with open(path, "w", opener=lambda name, flags: os.open(name, flags, mode=0o600)) as file:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# As simd.h uses it. GCC before 12 has target_clones and not these levels.
_MULTIVERSION_TEST = """
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__has_attribute)
#if __has_attribute(target_clones)
__attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#endif
#endif
int f(int x) { return x + 1; }
"""


def _multiversion_flags(compiler: list[str], scratch: Path) -> list[str]:
    """Flags that turn function multiversioning off if the compiler fails on it."""
    source = scratch / "multiversion.cpp"
    source.write_text("#include <cstdint>\n" + _MULTIVERSION_TEST)  # a header defines __GLIBC__
    try:
        _run([*compiler, "-fPIC", "-c", str(source), "-o", str(scratch / "multiversion.o")])
    except BuildError:
        return ["-DSKIPKERNELS_NO_MULTIVERSION"]
    return []


def build_into(library: Path) -> None:
    """Build the library for a package, as `setup.py` does. Raises a BuildError if that is impossible."""
    try:
        with tempfile.TemporaryDirectory() as scratch:
            library.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(_compile(_compiler(), Path(scratch)), library)
    except OSError as error:
        raise BuildError(str(error)) from error


def _compile(compiler: list[str], scratch: Path) -> Path:
    import torch

    torch_dir = Path(torch.__file__).parent
    sources = [source_dir() / name for name in SOURCES]
    objects = [scratch / f"{source.stem}.o" for source in sources]
    compiler = [*compiler, *_multiversion_flags(compiler, scratch)]
    compile_one = [*compiler, "-fPIC", "-isystem", str(torch_dir / "include"), "-c"]
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(
            pool.map(
                lambda pair: _run([*compile_one, str(pair[0]), "-o", str(pair[1])]), zip(sources, objects, strict=True)
            )
        )
    built = scratch / "_C.so"
    _run([*compiler, "-shared", *map(str, objects), "-o", str(built), f"-L{torch_dir / 'lib'}", "-ltorch_cpu"])
    return built


def _run(command: list[str]) -> str:
    result = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if result.returncode != 0:
        last_lines = "\n".join((result.stdout + result.stderr).strip().splitlines()[-20:])
        raise BuildError(f"`{' '.join(command)}` failed with exit code {result.returncode}:\n{last_lines}\n")
    return result.stdout

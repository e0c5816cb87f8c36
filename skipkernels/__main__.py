"""`skipkernels` and `python -m skipkernels`: the entry point of the command line, which imports no torch."""

from __future__ import annotations

import importlib.util
import io
import os
import sys

import skipkernels
from skipkernels import _CLI_PACKAGES, _build


def main() -> int:
    """Run the command line."""
    if sys.argv[1:] == ["--version"]:
        sys.stdout.write(f"skipkernels {skipkernels.__version__}\n")
        return 0
    for descriptor in range(3):  # a file of the run must not get the descriptor of a closed stream
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr has: escape what the encoding lacks
    _set_passive_wait()
    try:
        if sys.argv[1:] == ["build"]:  # also without the extra `cli`
            return _build.main()
        for package in _CLI_PACKAGES:
            if importlib.util.find_spec(package) is None:
                sys.stderr.write(f"skipkernels: the command line needs {package}: pip install 'skipkernels[cli]'\n")
                return 1
        from skipkernels.app.cli import main as cli  # here, so that Ctrl-C may interrupt its imports

        return cli.main()
    except KeyboardInterrupt:
        return 130
    finally:
        for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed when Python started
            try:
                stream.flush()
            except OSError:  # Python would try again at exit, and print an error
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _set_passive_wait() -> None:
    """Let waiting OpenMP threads sleep, unless the user has set how they wait. Call before torch loads OpenMP.

    By default they spin: two runs on the same cores took several times as long as one after the other.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY"}:
        os.environ["OMP_WAIT_POLICY"] = "passive"  # GNU's and LLVM's
        os.environ["KMP_BLOCKTIME"] = "0"  # Intel's, in milliseconds


if __name__ == "__main__":
    sys.exit(main())

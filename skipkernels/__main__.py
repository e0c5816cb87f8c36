"""`skipkernels` and `python -m skipkernels`: the command line, whose imports Ctrl-C may already interrupt."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Run the command line."""
    _open_closed_streams()
    _wait_passively()
    try:
        from skipkernels.cli import main as cli

        return cli.main()
    except KeyboardInterrupt:
        return 130


def _open_closed_streams() -> None:
    """Open the null device for standard streams that are closed: else a file of the run would get their descriptor."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # the lowest descriptor that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, open(descriptor, "w" if descriptor else "r", closefd=False))


def _wait_passively() -> None:
    """Let OpenMP's threads sleep while they wait; to be called before torch loads OpenMP. What the user set holds.

    By default they spin: two runs at once on the same cores took several times as long as one after the other.
    """
    if not os.environ.keys() & {"OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME", "KMP_LIBRARY"}:
        os.environ["OMP_WAIT_POLICY"] = "passive"  # GNU's and LLVM's
        os.environ["KMP_BLOCKTIME"] = "0"  # Intel's, in milliseconds


if __name__ == "__main__":
    sys.exit(main())

"""`skipkernels` and `python -m skipkernels`: the command line, whose imports Ctrl-C may already interrupt."""

from __future__ import annotations

import os
import sys


def main() -> int:
    """Run the command line."""
    _open_closed_streams()
    try:
        from skipkernels import cli

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


if __name__ == "__main__":
    sys.exit(main())

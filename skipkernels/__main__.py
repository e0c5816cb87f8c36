"""`skipkernels` and `python -m skipkernels`: the command line, whose imports Ctrl-C may already interrupt."""

from __future__ import annotations

import sys


def main() -> int:
    """Run the command line."""
    try:
        from skipkernels import cli

        return cli.main()
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())

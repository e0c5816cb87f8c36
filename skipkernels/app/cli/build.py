"""`skipkernels build`."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from skipkernels.app.console import Terminal


@dataclasses.dataclass(frozen=True)
class BuildCommand:
    """Build the C++ kernels, if the package was installed without them. CXX and CXXFLAGS choose compiler and flags."""

    out: Path | None = None
    """Path of the library, which SKIPKERNELS_CPP names later. By default it is in the package, and built once."""

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Build, and print the path of the library. Returns 0, or 1 if the build failed."""
        from skipkernels import _build

        return _build.main(self.out)

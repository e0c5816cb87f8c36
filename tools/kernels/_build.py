"""C++ kernels beside this file, if the build has them."""

from pathlib import Path
from typing import NamedTuple

import torch


class Extension(NamedTuple):
    """Path of the loaded library, or the reason for its absence."""

    path: Path | None
    reason: str = ""


_loaded: Extension | None = None


def load() -> Extension:
    """Load the library, once."""
    global _loaded
    if _loaded is None:
        path = Path(__file__).with_name("_C.so")
        if path.exists():
            torch.ops.load_library(path)
            _loaded = Extension(path)
        else:
            _loaded = Extension(None, "this build has no C++ kernels")
    return _loaded

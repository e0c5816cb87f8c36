"""Versions and machine of a run, for metrics.json and classifier.json."""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import os
import platform
from typing import Any

import skipkernels

_PACKAGES = ("torch", "open_clip_torch", "torchvision", "triton", "numpy")


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that compute, by name."""
    found = {"skipkernels": skipkernels.__version__, "python": platform.python_version()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def environment(device: str) -> dict[str, Any]:
    """Return the date and time (UTC) as "finished", "versions", and the "machine"."""
    import torch

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor()
    parts = [name or platform.machine(), f"{os.cpu_count()} CPU cores", f"{torch.get_num_threads()} threads"]
    return {
        "finished": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "machine": ", ".join([*parts, f"{platform.system()} {platform.release()}"]),
    }

"""`torch.ops.skipkernels`, registering the operators at its first use.

Imported by the package if torch is already imported.
"""

from __future__ import annotations

import importlib
import types
from typing import Any

import torch


class _Unregistered(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if vars(torch.ops).get(self.__name__) is self:
            delattr(torch.ops, self.__name__)  # torch creates its own namespace
        importlib.import_module("skipkernels.ops")
        return getattr(getattr(torch.ops, self.__name__), name)


if "skipkernels" not in vars(torch.ops):
    vars(torch.ops)["skipkernels"] = _Unregistered("skipkernels")

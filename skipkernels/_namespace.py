"""`torch.ops.skipkernels`, which registers the operators when one of them is first asked for.

Imported with the package where torch was imported before it.
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
            delattr(torch.ops, self.__name__)  # torch makes its own
        importlib.import_module("skipkernels.ops")
        return getattr(getattr(torch.ops, self.__name__), name)


if "skipkernels" not in vars(torch.ops):
    vars(torch.ops)["skipkernels"] = _Unregistered("skipkernels")

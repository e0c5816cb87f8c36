"""Implementations of the operators, with which the same tests run: the values of the fixture `backend`."""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import pytest
import torch

from skipkernels import _build
from skipkernels.ops import launching


class Backend(NamedTuple):
    """An implementation of the operators.

    `cpp`, `reference`, `interpreter` (Triton kernels and launchers on the CPU, without a GPU), `gpu` (the same on a
    device), or `simulator` (the same on the CPU with every memory access checked, see `make race`). `replacement` is
    the field of an operator's definition that replaces its CPU implementation.
    """

    name: str
    device: torch.device
    dtypes: tuple[torch.dtype, ...]
    replacement: str | None = None

    @property
    def unavailable(self) -> str | None:
        """The reason why it cannot run here; None if it can."""
        if self.name == "interpreter" and torch.cuda.is_available():
            return "Triton launches on the GPU, where it is available"
        if self.name == "interpreter" and not launching.installed:
            return "Triton is not installed"
        if self.name == "cpp" and _build.load().path is None:
            return f"no C++ kernels: {_build.load().reason}"
        return None

    def skip_unless_supported(self, dtype: torch.dtype) -> None:
        if dtype not in self.dtypes:
            pytest.skip(f"{self.name} does not support {dtype}")

    def opcheck(self, operator: Any, arguments: tuple[Any, ...], compiled: bool = True) -> None:
        """`torch.library.opcheck`; autograd and compilation, which see only the registration, with C++ alone."""
        names = ("test_schema", "test_faketensor", "test_autograd_registration", "test_aot_dispatch_dynamic")
        torch.library.opcheck(operator, arguments, test_utils=names if compiled and self.name == "cpp" else names[:2])


CPU = torch.device("cpu")
ALL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = {
    "cpp": Backend("cpp", CPU, ALL),
    "reference": Backend("reference", CPU, ALL, "fallback"),
    # Without bf16, to which the interpreter does not round, and fp64, for which launchers call the fallback.
    "interpreter": Backend("interpreter", CPU, (torch.float32, torch.float16), "launch"),
    "gpu": Backend("gpu", torch.device("cuda", 0), (torch.float32, torch.bfloat16, torch.float16)),
}
if "ttsem" in sys.modules:  # the simulator runs the tests; its tensors are CPU tensors
    BACKENDS = {"simulator": Backend("simulator", CPU, (torch.float32, torch.bfloat16, torch.float16), "launch")}

GPU = pytest.param("gpu", marks=pytest.mark.gpu)
INTERPRETED = "simulator" if "simulator" in BACKENDS else "interpreter"


def on_gpu(*shape: int) -> Any:
    """A shape for a GPU alone: on a CPU it takes long, and smaller ones run the same code."""
    return pytest.param(shape, marks=pytest.mark.gpu)

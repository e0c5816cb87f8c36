"""The implementations of the operators; the same tests run on each."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import sys
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from skipkernels import _extension
from skipkernels.ops import registration


class Backend(NamedTuple):
    """`cpp`, `reference`, `interpreter` (Triton's kernels and launchers on the CPU) or `gpu` (the same on a device); or
    `simulator` (the same on the CPU, where each access to memory is checked: see `make race`)."""

    name: str
    device: torch.device
    dtypes: tuple[torch.dtype, ...]

    def skip_unless_supported(self, dtype: torch.dtype) -> None:
        if dtype not in self.dtypes:
            pytest.skip(f"{dtype} is not for {self.name}")


CPU = torch.device("cpu")
ALL = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
BACKENDS = {
    "cpp": Backend("cpp", CPU, ALL),
    "reference": Backend("reference", CPU, ALL),
    # Its bf16 arithmetic is not that of bf16, and fp64 is the reference's.
    "interpreter": Backend("interpreter", CPU, (torch.float32, torch.float16)),
    "gpu": Backend("gpu", torch.device("cuda", 0), (torch.float32, torch.bfloat16, torch.float16)),
}


if "ttsem" in sys.modules:  # it runs the tests, and every launch goes to it; the tensors are on the CPU and deny it
    BACKENDS = {"simulator": Backend("simulator", CPU, (torch.float32, torch.bfloat16, torch.float16))}


@pytest.fixture(params=[pytest.param(name, marks=[pytest.mark.gpu] * (name == "gpu")) for name in BACKENDS])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Each of them in turn; the operators of the test are served by it."""
    chosen = BACKENDS[request.param]
    if chosen.name == "cpp" and _extension.load().path is None:
        pytest.skip(f"no C++ kernels: {_extension.load().reason}")
    if chosen.name in ("cpp", "gpu"):
        yield chosen
        return
    _extension.load()  # later it would put the C++ kernels first again
    library = torch.library.Library(registration.NAMESPACE, "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for name, definition in registration.definitions.items():
            function = definition.fallback if chosen.name == "reference" else definition.launch
            library.impl(name, function, "CPU", allow_override=True)
    with _device_assertions() if chosen.name == "interpreter" else contextlib.nullcontext():
        yield chosen
    library._destroy()


@contextlib.contextmanager
def _device_assertions() -> Iterator[None]:
    """Let `tl.device_assert` fail in Triton's interpreter, which does not look at the option of a launch."""
    builder = importlib.import_module("triton.runtime.interpreter").interpreter_builder
    before = builder.options
    builder.options = dataclasses.replace(before, debug=True, sanitize_overflow=False)
    yield
    builder.options = before

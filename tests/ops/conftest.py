"""Implementations of the operators: the same tests run with each."""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch

from skipkernels import _build
from skipkernels.ops import launching, registration
from tests.ops.interpreter import interpreter

pytest.register_assert_rewrite("tests.ops.harness")


class Backend(NamedTuple):
    """An implementation of the operators.

    `cpp`, `reference`, `interpreter` (Triton kernels and launchers on the CPU, without a GPU), `gpu` (the same on a
    device), or `simulator` (the same on the CPU with every memory access checked, see `make race`).
    """

    name: str
    device: torch.device
    dtypes: tuple[torch.dtype, ...]

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
    "reference": Backend("reference", CPU, ALL),
    # The interpreter does not round to bf16; fp64 uses the fallback.
    "interpreter": Backend("interpreter", CPU, (torch.float32, torch.float16)),
    "gpu": Backend("gpu", torch.device("cuda", 0), (torch.float32, torch.bfloat16, torch.float16)),
}


if "ttsem" in sys.modules:  # the simulator runs the tests; its tensors are CPU tensors
    BACKENDS = {"simulator": Backend("simulator", CPU, (torch.float32, torch.bfloat16, torch.float16))}


GPU = pytest.param("gpu", marks=pytest.mark.gpu)
INTERPRETED = "simulator" if "simulator" in BACKENDS else "interpreter"


def on_gpu(*shape: int) -> Any:
    """A shape that takes too long, and finds nothing more, without a GPU."""
    return pytest.param(shape, marks=pytest.mark.gpu)


@pytest.fixture(params=[GPU if name == "gpu" else name for name in BACKENDS])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Run the test with each implementation."""
    chosen = BACKENDS[request.param]
    if chosen.name == "interpreter" and torch.cuda.is_available():
        pytest.skip("Triton launches on the GPU, where it is available")
    if chosen.name == "interpreter" and not launching.installed:
        pytest.skip("Triton is not installed")
    if chosen.name == "cpp" and _build.load().path is None:
        pytest.skip(f"no C++ kernels: {_build.load().reason}")
    if chosen.name in ("cpp", "gpu"):
        yield chosen
        return
    _build.load()  # loading it later would override the implementation
    library = torch.library.Library(registration.NAMESPACE, "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for name, definition in registration.definitions.items():
            function = definition.fallback if chosen.name == "reference" else definition.launch
            library.impl(name, function, "CPU", allow_override=True)
    with interpreter() if chosen.name == "interpreter" else contextlib.nullcontext():
        yield chosen
    library._destroy()


@pytest.fixture
def products_depend_on_threads() -> Iterator[None]:
    """Imitate a CPU with AMX: PyTorch's product depends on the number of threads, inside a parallel region too."""

    def product(a: torch.Tensor, b: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        return out.copy_(torch.mm(a, b) * torch.get_num_threads())

    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        library.impl("mm.out", product, "CPU", allow_override=True)
    yield
    library._destroy()

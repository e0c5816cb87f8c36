"""Fixtures of the operators' tests, which run with each implementation."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import pytest
import torch

from skipkernels import _build
from skipkernels.ops import registration
from tests.ops.backends import BACKENDS, GPU, Backend
from tests.ops.interpreter import interpreter

pytest.register_assert_rewrite("tests.ops.harness")


@pytest.fixture(params=[GPU if name == "gpu" else name for name in BACKENDS])
def backend(request: pytest.FixtureRequest) -> Iterator[Backend]:
    """Run the test with each implementation."""
    chosen = BACKENDS[request.param]
    if chosen.unavailable:
        pytest.skip(chosen.unavailable)
    if chosen.replacement is None:
        yield chosen
        return
    _build.load()  # loading it later would override the implementation
    library = torch.library.Library(registration.NAMESPACE, "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for name, definition in registration.definitions.items():
            library.impl(name, getattr(definition, chosen.replacement), "CPU", allow_override=True)
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

"""Shared by all tests: settings before the first import, the order of the tests, and fixtures."""

from __future__ import annotations

import functools
import gc
import os
import sys

import torch

# Before the first use of cuBLAS, which needs it under torch.use_deterministic_algorithms.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the import of Triton: its kernels then run on the CPU

from collections.abc import Generator, Iterator

import hypothesis
import pytest

from skipkernels import _build

# ---- settings --------------------------------------------------------------------------------------------------------

# No deadline: cores may be busy. Derandomised: a failure is the same on every machine.
# On a GPU an example may compile kernels, a second each, where sizes have another divisibility.
_EXAMPLES = 8 if torch.cuda.is_available() else 40
hypothesis.settings.register_profile("skipkernels", deadline=None, derandomize=True, max_examples=_EXAMPLES)
hypothesis.settings.load_profile("skipkernels")

# Flushes matter only when the power fails, and take most of the time of tests of stores.
os.fsync = lambda descriptor: None

# A seed for devices that are not there is queued, with the formatted stack of the call: three milliseconds each.
for devices in (torch.cuda, torch.xpu, torch.mtia):
    if not devices.is_available():
        devices.manual_seed_all = lambda seed: None

gc.disable()  # until the tests are collected, which makes objects that stay


# ---- hooks of pytest, in the order of their calls --------------------------------------------------------------------


def pytest_configure(config: pytest.Config) -> None:
    """Build the C++ kernels if `csrc/` has changed since the last build."""
    needed = "SKIPKERNELS_CPP" not in os.environ and sys.platform != "win32" and not hasattr(config, "workerinput")
    if needed and not _build.library_path().is_file() and _build.main() != 0:
        pytest.exit("no C++ kernels; SKIPKERNELS_CPP=0 runs the tests without them", 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests; without a GPU, skip those marked `gpu`."""
    on_gpu = torch.cuda.is_available()
    items.sort(key=_place_on_gpu if on_gpu else _place_on_cpu)
    for item in items:
        if not on_gpu and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA or ROCm device"))


def _place_on_gpu(item: pytest.Item) -> int:
    """First shapes of a real step, graphs, then operators at other shapes: a run on a GPU may have little time."""
    first = (
        "test_step_shapes.py",
        "test_step_gradients.py",
        "test_replays_on_a_gpu.py",
        "::test_no_worse_than_eager",
        "::test_graph_replays",
    )
    return next((place for place, part in enumerate(first) if part in item.nodeid), len(first))


def _place_on_cpu(item: pytest.Item) -> int:
    """First slow tests, so that no process of pytest ends with one alone.

    Then those of modules with a fork server, which so starts in one process of pytest only.
    """
    forks = not {"forkserver", "run_in_processes"}.isdisjoint(vars(item.getparent(pytest.Module).obj))
    return 0 if item.get_closest_marker("slow") else 1 if forks else 2


def pytest_collection_finish() -> None:
    """Make slow work of imported modules cheaper: full garbage collections, of 0.4 seconds, and tokenizers, of 0.1."""
    gc.collect()
    gc.freeze()
    gc.enable()
    if open_clip := sys.modules.get("open_clip"):
        open_clip.get_tokenizer = functools.cache(open_clip.get_tokenizer)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """End a worker after a test that met an error of the GPU such as an illegal access: all later ones would fail.

    pytest-xdist names the test, and starts another worker.
    """
    report = yield
    if report.failed and "PYTEST_XDIST_WORKER" in os.environ and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            os.write(2, report.longreprtext.encode())
            os._exit(1)
    return report


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else nanobind reports leaks at the end of the process


# ---- fixtures --------------------------------------------------------------------------------------------------------

THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _same_threads() -> Iterator[None]:
    """Reset the number of threads, on which the last digits of a run depend, also before fixtures of modules."""
    yield
    torch.set_num_threads(THREADS)


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Fill uninitialised memory with NaN."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before

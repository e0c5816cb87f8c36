"""Compile the Triton kernels of bench/gpu.sh into Triton's cache, without the GPU that will run them.

    python -m bench.prepare --target sm_90

Compiled are the kernels of the steps of bench/gpu.py and of the cases of bench/operators, not those of the tests.

The steps run on the meta device, where the code takes the paths of a GPU, with a recorder in place of the launches. The
cache (TRITON_CACHE_DIR) is of use with the same versions of Triton and Python. Up to Triton 3.6 each signature of a
kernel has a launcher in C, which is compiled, too; it needs a C compiler and no driver.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import os
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

import skipkernels as sk
from skipkernels import casts
from skipkernels.casts import Casts
from skipkernels.ops import OPERATORS, launching, registration
from tests.ops.small_calls import small_call

from .gpu import graphed_step_of
from .inputs import PRECISIONS, positive, random_inputs
from .measure import CPU, OURS
from .meta_device import meta_as_gpu
from .operators import cases_of
from .precompile import ARCHITECTURES, Kernel, compile_one, in_processes, kernels_of, launches_of
from .stand_in import WithoutProducts, move_to_meta
from .training import step_of, with_update

Call = tuple[str, tuple[Any, ...]]


class Calls(TorchDispatchMode):
    """Record the calls of our operators; tensors among the arguments are on the meta device, with their strides."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Call] = []

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operator.namespace == registration.NAMESPACE:
            self.found.append((operator._opname, tree_map_only(Tensor, _on_meta, tuple(args))))
        return operator(*args, **kwargs or {})


def _on_meta(x: Tensor) -> Tensor:
    return x if x.is_meta else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")


def calls_of_steps(model: str, batch: int, classes: int, skip_layers: int, precision: str) -> list[Call]:
    """The calls of our operators in the construction of SkipCLIP and in the steps that `bench.gpu.step` measures."""
    inputs = random_inputs(model, batch, classes, CPU)
    with WithoutProducts(), Calls() as calls:  # on the CPU, since the construction compares results with the model's
        clip = sk.SkipCLIP(inputs.model, inputs.tokens, skip_layers=skip_layers, memory="fast")
        features = clip.encode_lower(inputs.images)
        clip(features, inputs.labels)  # caches the text features at the cut
    move_to_meta(clip)
    features, labels = features.to("meta"), inputs.labels.to("meta")
    keep, tail = clip.sampler.plan(classes, batch)
    whole = keep + int(tail.sum())
    with meta_as_gpu(), calls:
        for K in (whole, whole + 1):  # a step draws one of the two
            ranks = torch.arange(K, device="meta")
            with mock.patch.object(clip.sampler, "draw", lambda *_, ranks=ranks: ranks):
                for make in measured_steps(clip, features, labels, skip_layers, precision):
                    run = make()
                    for _ in range(2):  # the first creates the state of the optimizer
                        run()
                    del run  # and the hooks of its optimizer
    return calls.found


def measured_steps(
    clip: sk.SkipCLIP, features: Tensor, labels: Tensor, skip_layers: int, precision: str
) -> list[Callable[[], Callable[[], Any]]]:
    """Functions that make what `bench.gpu.step` runs: the comparison, an eager step, and one that can be captured."""
    step = step_of(clip, features, labels, skip_layers, precision)

    def compare() -> None:
        with torch.no_grad():
            clip(features, labels)
        step()

    def graphed() -> Callable[[], None]:
        run, kept = graphed_step_of(clip, features, labels, precision)[0], Casts(clip.trainable_parameters())

        def with_casts() -> None:
            with casts.used(kept):
                run()

        return with_casts

    return [lambda: compare, lambda: with_update(step), graphed]


def calls_of_operators(precision: str) -> list[Call]:
    """The calls of the cases of bench/operators, and in fp32 those of `bench.gpu.smoke`."""
    meta = torch.device("meta")
    with Calls() as calls:
        for op in OPERATORS:
            for case in cases_of(op, precision, meta):
                case.runs[OURS]()
            if precision == "fp32":
                small = small_call(op).on(meta)
                total = small.total(*(x.requires_grad_() for x in small.inputs))
                if small.inputs:
                    total.backward()
    return calls.found


def kernels_of_calls(calls: Iterable[Call], target: str) -> list[Kernel]:
    """The kernels that these calls launch, each once."""
    architecture = ARCHITECTURES[target]
    launches = itertools.chain.from_iterable(launches_of(op, arguments, architecture) for op, arguments in calls)
    return kernels_of(launches, architecture)


# ---- launchers -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def launchers() -> Iterator[Callable[[Any], Any] | None]:
    """Yield a function that compiles the C launcher of a compiled kernel, or None if Triton has none to compile.

    A launcher is linked with the library of the driver, for which an empty one of that name is used here, so a launcher
    is not loaded: the functions of the driver are missing.
    """
    build, driver = (importlib.import_module(f"triton.{name}") for name in ("runtime.build", "backends.nvidia.driver"))
    if not hasattr(driver, "make_launcher"):  # later versions of Triton have one launcher for all kernels
        yield None
        return
    with tempfile.TemporaryDirectory() as folder:
        library = str(Path(folder, "libcuda.so.1"))
        link = [os.environ.get("CC", "cc"), "-shared", "-Wl,-soname,libcuda.so.1", "-o", library, "-x", "c", os.devnull]
        subprocess.run(link, check=True)
        flags = ["-Wl,--no-as-needed", "-l:libcuda.so.1"]  # else the linker drops a library without functions
        link_all = build._build
        with (
            mock.patch.object(build, "_build", lambda *of: link_all(*of[:-1], [*of[-1], *flags])),
            mock.patch.object(driver, "library_dirs", lambda: [driver.libdevice_dir, folder]),
            mock.patch.object(build, "_load_module_from_path", mock.MagicMock()),
        ):
            driver.CudaUtils()  # a module in C that every process needs
            yield lambda compiled: driver.CudaLauncher(compiled.src, compiled.metadata)


# ---- command ---------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=ARCHITECTURES, default="sm_90")
    parser.add_argument("--model", default="ViT-B-16")
    parser.add_argument("--batch", type=positive, default=4)
    parser.add_argument("--classes", type=positive, default=1000)
    parser.add_argument("--skip-layers", type=positive, default=6)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--steps-only", action="store_true", help="without the cases of bench/operators")
    args = parser.parse_args(arguments)
    if not launching.installed:
        parser.error("Triton is not installed: pip install triton")
    if launching.triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: the kernels would be interpreted. Unset it.")
    start = time.monotonic()
    architecture = ARCHITECTURES[args.target]
    calls: list[Call] = []
    for precision in args.precision:
        calls += calls_of_steps(args.model, args.batch, args.classes, args.skip_layers, precision)
        calls += () if args.steps_only else calls_of_operators(precision)
    kernels = kernels_of_calls(calls, args.target)
    with launchers() if architecture.backend == "cuda" else contextlib.nullcontext() as compile_launcher:

        def prepare(number: int) -> None:
            compiled = compile_one(kernels[number], architecture)
            if compile_launcher is not None:
                compile_launcher(compiled)

        with in_processes(prepare, len(kernels)) as done:
            list(done)
    folder = Path(launching.triton.knobs.cache.dir)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    what = "kernels" if compile_launcher is None else "kernels and their launchers"
    print(
        f"{len(kernels)} {what} for {args.target} in {time.monotonic() - start:.0f} s; "
        f"{folder} has {size / 2**20:.0f} MiB"
    )


if __name__ == "__main__":
    main()

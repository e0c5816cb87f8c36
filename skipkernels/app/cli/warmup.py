"""`skipkernels warmup`."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from typing import TYPE_CHECKING, Literal

from skipkernels.app.console import Terminal
from skipkernels.options import Precision

if TYPE_CHECKING:
    import torch

    from skipkernels.ops.precompile import Architecture, Launch

Target = Literal["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950"]


@dataclasses.dataclass(frozen=True)
class WarmupCommand:
    """Compile the Triton kernels of a training step in parallel processes, into Triton's cache.

    A run compiles each kernel when it first needs it, one after the other. Later runs read the cache
    (TRITON_CACHE_DIR).
    """

    model: str = "ViT-B-16"
    """Name of an open_clip model. Its weights are not needed."""
    classes: int = 1000
    """Classes that take part in training."""
    batch_size: int = 4
    """Images per step."""
    precision: Precision = "auto"
    """fp32, bf16, bf16-sr or fp16, as for tune. auto: bf16."""
    skip_layers: int | float = 0.5
    """Blocks that each tower skips: a number, or a fraction of its blocks."""
    target: Target | None = None
    """GPU to compile for. By default the one of this machine; with a target none is needed."""
    processes: int | None = None
    """Number of processes. By default one per core."""

    def execute(self, out: Terminal, err: Terminal) -> int:
        """Compile, and print the number of kernels. Returns 0, or 1 if a kernel does not compile."""
        import torch

        from skipkernels.app.data import InputError
        from skipkernels.ops import launching

        for name in ("classes", "batch_size", "processes"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"warmup: {name} must be at least 1; got {value}.", name)
        if not launching.installed:
            raise InputError("warmup: Triton is not installed. Run: pip install triton")
        if launching.triton.knobs.runtime.interpret:
            raise InputError("warmup: TRITON_INTERPRET is set, so that kernels are interpreted. Unset it.")
        if self.target is None and not torch.cuda.is_available():
            raise InputError("warmup: there is no CUDA or ROCm device here. Choose a GPU with --target, such as sm_90.")

        from skipkernels.ops import precompile

        device = torch.device("cpu" if self.target else "cuda")
        architecture = precompile.ARCHITECTURES[self.target] if self.target else precompile.architecture_of(device)
        started = time.monotonic()
        kernels = precompile.kernels_of(self.launches(architecture, device), architecture)
        compiled, problems = 0, []
        for result in precompile.compile_all(kernels, architecture, self.processes, "warmup"):
            compiled += result == ""
            if result not in ("", precompile.CACHED):
                problems.append(result)
        for problem in problems:
            err.print(problem, soft_wrap=True)
        folder = launching.triton.knobs.cache.dir
        out.print(
            f"{len(kernels)} kernels for {self.target or architecture.arch}: {compiled} compiled in "
            f"{time.monotonic() - started:.0f} s, {len(kernels) - compiled - len(problems)} were in {folder}",
            soft_wrap=True,
        )
        return 1 if problems else 0

    def launches(self, architecture: Architecture, device: torch.device) -> list[Launch]:
        """The launches of a step and a prediction, in fp32 as at construction and in the precision of a run."""
        import torch

        import skipkernels as sk
        from skipkernels.app.train.model import RANDOM, load_model
        from skipkernels.app.train.precision import MixedPrecision
        from skipkernels.ops.precompile import Recorder

        model, _, tokenizer = load_model(self.model, RANDOM, torch.device("cpu"))
        mixed = MixedPrecision("bf16" if self.precision == "auto" else self.precision, device)
        mixed.prepare(model)
        tokens = tokenizer([f"a photo of a class {'x' * (n % 7)}." for n in range(self.classes)])
        # On the CPU, since construction compares results with the model's, and a recorder computes none.
        clip = sk.SkipCLIP(model, tokens, skip_layers=self.skip_layers).to(device)
        images = torch.zeros(self.batch_size, 3, *clip.image_size, device=device)
        labels = torch.zeros(self.batch_size, dtype=torch.int64, device=device)
        groups = mixed.parameter_groups(clip.parameter_groups(text_lr=0.0, image_lr=0.0))
        optimizer = sk.FusedSGD(groups, momentum=0.9, weight_decay=5e-4)
        # Backward in this thread: the recorder sees the operators of one thread.
        with torch.autograd.set_multithreading_enabled(False), Recorder(architecture) as recorder:
            for context in (contextlib.nullcontext, mixed.autocast):
                with context():
                    features = clip.encode_lower(images)
                    loss = clip(features, labels).loss
                loss.backward()
                optimizer.step()
                with context():
                    clip.predict(features)
        return recorder.launches

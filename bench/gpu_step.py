"""The training steps of bench/gpu.sh: SkipCLIP and the published step, forward to update."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import open_clip
import torch
from torch import Tensor

import skipkernels as sk
from skipkernels import testing
from skipkernels.clip import graphed
from tests import naive

from . import cuda, measure
from .inputs import Inputs, autocast, random_inputs
from .operators import OURS
from .training import SLACK, Published, Step

if TYPE_CHECKING:
    from .gpu_stages import Run

_SHOWN = 40  # kernels in slowest.csv
_UPDATE = {"momentum": 0.9, "weight_decay": 5e-4}


def measure_steps(run: Run) -> None:
    """Check our step and time it and the published one at all sizes, profile one, and time the compiled ones."""
    sizes = [*itertools.product(run.sizes.precisions, run.sizes.classes)]
    for precision, classes in sizes:
        if run.budget.allows(5):
            Measured(run, classes, precision).all_but_compiled()
    slowest(run)
    for precision, classes in sizes:  # last, since they take longest
        if run.budget.allows(20):
            Measured(run, classes, precision).compiled()


class Measured:
    """The steps at one number of classes and precision; a row for each check and time, or the error."""

    def __init__(self, run: Run, classes: int, precision: str):
        self.run, self.case = run, {"C": classes, "precision": precision}
        self.inputs = inputs_of(run, classes)
        self.published = Published(self.inputs, run.sizes.skip_layers)
        self.precision = precision

    def all_but_compiled(self) -> None:
        self.row("gradients", self.gradients)
        self.row("host syncs", self.syncs)
        self.row("replay = eager", self.replay)
        self.row("published", lambda: self.time(with_update(self.published.step(self.precision))))
        self.row(OURS, lambda: self.time(self.training()))
        self.row(f"{OURS}, graphed", lambda: self.time(self.training().graphed()))

    def compiled(self) -> None:
        self.row("published, compiled", lambda: self.time(with_update(self.published.compiled(self.precision))))

    def row(self, what: str, find: Callable[[], dict[str, Any]]) -> None:
        columns = dict.fromkeys(("p20_ms", "p50_ms", "p80_ms", "peak_mib", "launches", "note"), "")
        try:
            found = find()
        except torch.AcceleratorError:  # the device is lost
            raise
        except (Exception, SystemExit) as error:
            traceback.print_exception(error)
            lines = str(error).strip().splitlines() or [""]
            found = {"note": f"failed: {type(error).__name__}: {lines[0]}"}
        self.run.write("step", {"what": what, **self.case, **columns, **found})

    def training(self) -> Training:
        return Training(self.run, self.inputs, self.precision)

    def time(self, function: Callable[[], Any]) -> dict[str, Any]:
        """Time, peak of memory above what is kept between steps, and launches from the host."""
        device = self.run.device
        for _ in range(graphed.WARMUP + 1):  # the last captures a graph
            function()
        found = measure.milliseconds([measure.seconds_of(function, device) for _ in range(self.run.sizes.rounds)], 3)
        found["peak_mib"] = round(testing.peak_bytes(function, device, warm_up=False) / 2**20)
        return found | ({"launches": cuda.launches(function)} if self.run.on_gpu else {})

    def gradients(self) -> dict[str, str]:
        """Gradients of ours and of the published step against those of the naive step in fp64, on the same classes."""
        training, skip = self.training(), self.run.sizes.skip_layers
        del training.optimizer  # and its hooks, which would update in backward
        gc.collect()
        out = training.forward()
        out.loss.backward()
        ours = {name: p.grad for name, p in training.model.named_parameters() if p.grad is not None}
        theirs = self.published.gradients(self.precision, out.class_ids)
        model, tokens = (
            copy.deepcopy(self.inputs.model).double().requires_grad_(True),
            self.inputs.tokens[out.class_ids],
        )
        quick = bool(open_clip.get_model_config(self.run.sizes.model).get("quick_gelu"))
        with torch.device(self.run.device):
            loss = naive.step_loss(model, self.inputs.images.double(), tokens, out.targets, (skip, skip), quick)
        loss.backward()
        truth = {name: model.get_parameter(name).grad for name in ours}
        error = testing.relative_error
        worse = {name: error(ours[name], x) - error(theirs[name], x) for name, x in truth.items() if x is not None}
        name = max(worse, key=worse.__getitem__)
        verdict = "ok" if worse[name] <= SLACK[self.precision] else "WRONG"
        note = f"{verdict}: {len(worse)} gradients, at most {worse[name]:.1e} worse than published ({name})"
        return {"note": f"{note}; loss {out.loss:.6f}, in fp64 {loss:.6f}"}

    def syncs(self) -> dict[str, str]:
        """A step under sync debugging, which raises at a host sync."""
        training = self.training()
        training()
        with cuda.sync_is_an_error() if self.run.on_gpu else contextlib.nullcontext():
            training()
        return {"note": "none"}

    def replay(self) -> dict[str, str]:
        """Losses and weights of ten steps by replay and of ten eager ones with the same draws."""
        captured, eager = self.training(), self.training()
        replay, step = captured.graphed(), eager.graphed(len(eager.labels) + 1)  # which never captures this size
        pairs = [(replay().clone(), step()) for _ in range(10)]
        pairs += zip(captured.model.parameters(), eager.model.parameters(), strict=True)
        if all(torch.equal(a, b) for a, b in pairs):
            return {"note": "ok: equal bits"}
        return {"note": f"differs by {max(testing.relative_error(a, b) for a, b in pairs):.1e}"}


class Training:
    """Our step, on its own copy of the model."""

    def __init__(self, run: Run, inputs: Inputs, precision: str):
        self.model, self.labels = copy.deepcopy(inputs.model), inputs.labels.contiguous()
        self.clip = sk.SkipCLIP(self.model, inputs.tokens, skip_layers=run.sizes.skip_layers, memory="fast")
        self.features = self.clip.encode_lower(inputs.images)
        self.optimizer = sk.FusedSGD(self.clip.parameter_groups(text_lr=1e-5, image_lr=1e-5), **_UPDATE)
        self.autocast = functools.partial(autocast, run.device, precision)

    def forward(self) -> sk.SkipOutput:
        with self.autocast():
            return self.clip(self.features, self.labels)

    def __call__(self) -> Tensor:
        loss = self.forward().loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def graphed(self, batch_size: int | None = None) -> Callable[[], Tensor]:
        """The same step as one replay, if the batch has `batch_size` images, by default those of the inputs."""
        with self.autocast():
            step = self.clip.graphed(self.optimizer, batch_size=batch_size or len(self.labels))

        def replay() -> Tensor:
            with self.autocast():
                out = step(self.features, self.labels)
            return getattr(out, "loss", out).detach()

        return replay


def inputs_of(run: Run, classes: int) -> Inputs:
    return random_inputs(run.sizes.model, run.sizes.batch, classes, run.device)


def with_update(step: Step) -> Callable[[], None]:
    """Add the update to a published step."""
    optimizer = torch.optim.SGD([p for p in step.model.parameters() if p.requires_grad], lr=1e-5, **_UPDATE)

    def run() -> None:
        step()
        optimizer.step()

    return run


def one_step(run: Run) -> Training:
    """Run a step at the first size."""
    training = Training(run, inputs_of(run, run.sizes.classes[0]), run.sizes.precisions[0])
    training()
    measure.synchronize(run.device)
    return training


def slowest(run: Run) -> None:
    """The kernels of a step by their time; those of Triton, ours, are marked."""
    training, activity = one_step(run), torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CUDA if run.on_gpu else activity.CPU]) as profiler:
        training()
        measure.synchronize(run.device)
    column = "self_device_time_total" if run.on_gpu else "self_cpu_time_total"
    events = sorted(profiler.key_averages(), key=lambda event: -getattr(event, column))
    for event in events[:_SHOWN]:
        ours, milliseconds = event.key.startswith(("_", "skipkernels")), round(getattr(event, column) / 1000, 4)
        run.write("slowest", {"kernel": event.key[:80], "ours": int(ours), "calls": event.count, "ms": milliseconds})

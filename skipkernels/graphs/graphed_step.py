"""A whole training step as one CUDA graph: forward, backward, update and zero_grad by one launch of the host."""

from __future__ import annotations

import contextlib
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..casts import Casts, used
from ..clip import SkipCLIP, SkipOutput, check_clip
from ..clip.checks import check_labels, described
from ..clip.step import LossOptions, step
from ..formatting import first_line
from ..ops.sgd_momentum import GraphTables, tables_of_graph
from ..optimizer import DeviceNumbers, FusedSGD
from ..reference import autocast_dtype
from .capturable import CapturedState, why_not_capturable
from .capture import record, renew_accumulators
from .parts import ReservedRanks, TextsOnStream

WARMUP = 3  # steps before a capture, which compile kernels and create the state of the optimizer


class _Key(NamedTuple):
    """Batches that one graph serves."""

    shape: torch.Size
    dtype: torch.dtype
    autocast: torch.dtype | None


class _Graph(NamedTuple):
    """A captured step: its graph, the tables and ranks that it reads, and the result that it writes."""

    graph: Any
    tables: GraphTables
    ranks: Tensor
    out: SkipOutput
    constants: CapturedState


@dataclass
class _Steps:
    """Steps on batches of one key: the warm-up, then a graph."""

    key: _Key
    eager: int = 0  # number so far
    # Images and labels of the eager steps, the capture and the replays: of one address and one layout, whatever the
    # caller passes. A kernel is compiled for its strides and alignments, and a capture cannot load another one.
    batch: tuple[Tensor, Tensor] | None = None
    # Each eager step makes casts of the weights anew, which also compiles the update that writes them. With those of
    # the last one the graph is captured: from then on it multiplies by their addresses, and its update writes them. A
    # replay first casts weights again that changed since the last one. They live as long as the graph.
    casts: Casts = field(default_factory=Casts)
    graph: _Graph | None = None

    def copied(self, pixel_values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Copy a batch to `batch`."""
        if self.batch is None:
            self.batch = torch.empty_like(pixel_values), torch.empty_like(labels)
        self.batch[0].copy_(pixel_values, non_blocking=True)
        self.batch[1].copy_(labels, non_blocking=True)
        return self.batch


class _Streams(NamedTuple):
    """Streams of one GPU.

    The allocator gives freed memory to the stream that allocated it, without regard to others that use it. Here each
    stream waits for these others before it allocates, so `record_stream` is not needed.
    """

    device: torch.device
    step: Any
    texts: Any


def graphed(clip: SkipCLIP, optimizer: torch.optim.Optimizer, batch_size: int) -> GraphedStep:
    """Return a function that runs a whole training step: on a GPU, a replay of a CUDA graph. See `GraphedStep`."""
    check_clip("graphed", clip)
    if type(clip) is not SkipCLIP:
        raise RuntimeError(f"graphed: clip must be a SkipCLIP of one process; got {type(clip).__name__}.")
    return GraphedStep(clip, optimizer, batch_size)


class GraphedStep:
    """A training step: forward, backward, `optimizer.step()` and `optimizer.zero_grad()`.

    On a GPU the first three calls run eagerly on a side stream; the fourth captures a CUDA graph, and from then on a
    call is one replay. Batches of another size than `batch_size` run eagerly, with the K classes of a graph. On other
    devices every call runs the loop

        out = clip(pixel_values, labels); out.loss.backward(); optimizer.step(); optimizer.zero_grad()

    A graph runs the text side on a stream of its own, so that its backward, and with `FusedSGD` its update, run beside
    those of the image side. The update of `FusedSGD` also writes the 16-bit copies of weights that fused blocks use
    under autocast.

    A replay has the random numbers (except those of dropout) and learning rates of this loop, with `FusedSGD` also its
    momentum and weight decay, but one K for all steps, m + round(Σq); see `RankSampler.draw` and
    docs/cuda-graphs.md. Its result is detached, in buffers that the next call overwrites. Schedulers, evaluation,
    checkpoints and `load_state_dict` are possible between calls: each call compares the model, the optimizer and
    autocast with those captured, on the host. After a change that a graph would not follow (`requires_grad`, a moved
    tensor, an option of another optimizer, images of another size) the step is captured again. If a capture fails, or
    would not run hooks that were added later, a warning gives the reason, and steps run eagerly until `reset`.

    Args:
        clip: SkipCLIP in training mode.
        optimizer: Optimizer of its parameters: `FusedSGD`, `torch.optim.SGD(fused=True)`, or one that is constructed
            with `capturable=True`, such as `torch.optim.AdamW`.
        batch_size: Number of images of the batches to capture.

    Raises:
        ValueError: If the optimizer has no parameter of SkipCLIP that trains, or the step cannot be captured.

    Example:
        >>> import skipkernels
        >>> from skipkernels.app.demo import pictogram_tiny
        >>> model, _, tokenizer = pictogram_tiny.load()
        >>> clip = skipkernels.SkipCLIP(model, tokenizer([f"the digit {n}." for n in range(10)]), skip_layers=0.5)
        >>> optimizer = skipkernels.FusedSGD(clip.parameter_groups(text_lr=2e-5, image_lr=5e-6), momentum=0.9)
        >>> step = skipkernels.graphed(clip, optimizer, batch_size=4)
        >>> step(torch.rand(4, 3, 32, 32), torch.tensor([3, 3, 3, 3])).loss.shape
        torch.Size([])
    """

    def __init__(self, clip: SkipCLIP, optimizer: torch.optim.Optimizer, batch_size: int):
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"graphed: batch_size must be at least 1, a whole number; got {batch_size!r}.")
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(
                f"graphed: optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}. Create one from "
                "clip.parameter_groups(…)."
            )
        self._clip, self._optimizer, self._batch_size = clip, optimizer, batch_size
        self._check_optimizer()
        self._ranks = ReservedRanks(clip)
        self._numbers = DeviceNumbers()  # rates of PyTorch's optimizers, and the gradient of the loss
        self._streams: _Streams | None = None  # of the last call
        self._steps: _Steps | None = None  # of the last batch of `batch_size`
        self._why_eager: str | None = None  # why no step is captured until `reset`
        if self._on_gpu():
            reason = why_not_capturable(clip, optimizer)
            if reason is not None:
                raise ValueError(f"graphed: this step cannot be captured: {reason} Or run the steps without graphed.")
        optimizer.register_load_state_dict_post_hook(partial(_reset, weakref.ref(self)))

    def __repr__(self) -> str:
        eager = self._why_eager if self._on_gpu() else "no CUDA device"
        state = f"eager: {eager}" if eager else f"captured: {self.is_captured}"
        return f"GraphedStep(batch_size={self._batch_size}, {state})"

    @property
    def is_captured(self) -> bool:
        """True if there is a graph."""
        return self._steps is not None and self._steps.graph is not None

    def reset(self) -> None:
        """Drop the captured graph: the next calls run eagerly, then a step is captured again."""
        self._why_eager = self._steps = None

    def __call__(self, pixel_values: Tensor, labels: Tensor) -> SkipOutput:
        """Run one step on images [B, 3, height, width], or features at the cut [B, N, W], with labels int64 [B]."""
        clip, device = self._clip, self._clip.prototypes.device
        self._check_call(labels)
        if not self._on_gpu():
            self._check_optimizer()
            return self._backward_and_update(clip(pixel_values, labels))
        pixel_values, labels = (
            x.to(device, non_blocking=True) if isinstance(x, Tensor) else x  # for the error of `_check_batch`
            for x in (pixel_values, labels)
        )
        autocast = autocast_dtype(device)
        self._check_batch(pixel_values, labels, autocast)
        with torch.cuda.device(device):
            if self._streams is None or self._streams.device != device:
                self._streams = _Streams(device, torch.cuda.Stream(device), torch.cuda.Stream(device))
                self._steps = None
            steps = self._begin(_Key(pixel_values.shape, pixel_values.dtype, autocast))
            if steps is None:
                return self._run_eagerly(pixel_values, labels, Casts())
            pixel_values, labels = steps.copied(pixel_values, labels)
            if steps.graph is None and steps.eager == WARMUP:
                steps.graph = self._captured(steps)
            if steps.graph is not None:
                return self._replay(steps.graph, steps.casts)
            steps.eager += 1
            steps.casts = Casts(self._held_weights() if isinstance(self._optimizer, FusedSGD) else ())
            return self._run_eagerly(pixel_values, labels, steps.casts)

    def _begin(self, key: _Key) -> _Steps | None:
        """Draw the ranks of a step, and return the steps of its key; None if no graph serves it."""
        served = key.shape[0] == self._batch_size and self._why_eager is None
        steps = self._steps if served and self._steps is not None and self._steps.key == key else None
        graph = None if steps is None else steps.graph
        if graph is not None and not graph.constants.is_unchanged():
            steps = graph = None
        if graph is None:
            self._check_optimizer()
        # After the checks: a step that is refused leaves the generator as it was.
        prototypes = self._clip.prototypes
        self._ranks.draw(prototypes.device, len(prototypes), key.shape[0])
        if graph is not None and graph.ranks is not self._ranks.ranks:  # K has changed
            steps = None
        if served:
            self._steps = steps = steps or _Steps(key)
        return steps

    # ---- checks ------------------------------------------------------------------------------------------------------

    def _on_gpu(self) -> bool:
        return self._clip.prototypes.device.type == "cuda"

    def _check_call(self, labels: Any) -> None:
        if not self._clip.training:
            raise RuntimeError("graphed: a step needs clip.train(); SkipCLIP is in evaluation mode.")
        if isinstance(labels, Tensor) and labels.is_floating_point():
            raise ValueError(
                f"graphed: labels must be class ids, int64 [B]; got {described(labels)}. The classes of soft labels "
                "are counted on the host: run without graphed."
            )

    def _check_batch(self, pixel_values: Tensor, labels: Tensor, autocast: torch.dtype | None) -> None:
        """Raise unless a batch on a GPU can be captured."""
        clip = self._clip
        clip.check_inputs(pixel_values)
        check_labels(labels, pixel_values, clip.num_classes)
        if pixel_values.requires_grad:
            raise ValueError(
                "graphed: pixel_values must not require grad, which a replay would not compute. Run without graphed."
            )
        if clip.images.tower.cut.lower_device is not None and not clip.images.are_features(pixel_values):
            raise RuntimeError(
                "graphed: images cannot be captured with lower_device, which copies each batch to another device. Pass "
                "features at the cut, or leave lower_device out."
            )
        if autocast == torch.float16:
            raise RuntimeError(
                "graphed: fp16 autocast needs a GradScaler, which has a host sync in each step. Use bfloat16."
            )

    def _check_optimizer(self) -> None:
        """Raise a ValueError if the optimizer would train nothing, such as one from before `add_lora`."""
        held = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        if not any(p.requires_grad and id(p) in held for p in self._clip.model.parameters()):
            raise ValueError(
                "graphed: optimizer must hold parameters of this SkipCLIP that train; got none. Create it with "
                "clip.parameter_groups(text_lr=…, image_lr=…), after add_lora or merge_lora, and pass it to graphed."
            )

    # ---- eager steps -------------------------------------------------------------------------------------------------

    def _run_eagerly(self, pixel_values: Tensor, labels: Tensor, casts: Casts) -> SkipOutput:
        """Run a step with the ranks drawn for it, on the stream of the capture."""
        assert self._streams is not None
        device, stream, _ = self._streams
        current = torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream), self._options_on_device(), used(casts):
            out = self._backward_and_update(self._forward(pixel_values, labels))
        current.wait_stream(stream)
        return out

    def _forward(self, pixel_values: Tensor, labels: Tensor) -> SkipOutput:
        assert self._streams is not None
        clip = self._clip
        options = LossOptions(clip.label_smoothing, clip.class_weight)
        texts = TextsOnStream(clip.texts, self._streams.texts)
        return step(clip.images.encode(pixel_values), labels, texts, self._ranks, clip.scale, options)

    def _backward_and_update(self, out: SkipOutput) -> SkipOutput:
        device, dtype = out.loss.device, out.loss.dtype
        enabled = device.type != "meta" and torch.is_autocast_enabled(device.type)
        with torch.autocast(device.type, enabled=False) if enabled else contextlib.nullcontext():
            out.loss.backward(self._numbers.on(device, ("gradient of the loss", dtype), 1.0, dtype))  # one launch less
            self._optimizer.step()
        self._optimizer.zero_grad()
        if enabled:  # within the caller's autocast; casts of the weights before the update would be used again
            torch.clear_autocast_cache()
        return out._replace(loss=out.loss.detach())

    # ---- capture and replay ------------------------------------------------------------------------------------------

    def _captured(self, steps: _Steps) -> _Graph | None:
        """Capture a step, or warn of the reason against it and forget what a failed capture left on the host.

        A capture launches nothing, so weights, ranks and the state of the optimizer are those before it.
        """
        reason = why_not_capturable(self._clip, self._optimizer)
        if reason is None:
            try:
                return self._capture(steps)
            except Exception as error:
                # The end of a capture raises an error of its own after one within it.
                reason = f"the capture failed: {first_line(error.__context__ or error).rstrip('.')}."
        # Behind the handler: its traceback holds tensors of the capture.
        self._why_eager, self._steps = reason, None
        torch.clear_autocast_cache()
        self._optimizer.zero_grad()
        warnings.warn(f"graphed: steps run one by one until reset(): {reason}", stacklevel=3)
        return None

    def _capture(self, steps: _Steps) -> _Graph:
        """Capture the step with the tensors and casts of the eager steps."""
        assert steps.batch is not None and self._streams is not None
        batch = steps.batch
        renew_accumulators(self._clip.trainable_parameters())

        def run() -> SkipOutput:
            torch.clear_autocast_cache()  # casts of the warm-up would be constants of the graph
            return self._backward_and_update(self._forward(*batch))

        with used(steps.casts), self._options_on_device(), tables_of_graph() as tables:
            graph, out = record(run, self._streams.step)
        tables.upload()
        assert self._ranks.ranks is not None
        return _Graph(graph, tables, self._ranks.ranks, out, CapturedState(self._clip, self._optimizer))

    def _replay(self, captured: _Graph, casts: Casts) -> SkipOutput:
        self._copy_options()
        with casts.renewed():
            captured.graph.replay()
            # A replay changes no versions, by which autograd, and the casts of other graphs, detect the update.
            torch.autograd.graph.increment_version(self._held_weights())
        return captured.out

    def _held_weights(self) -> list[Tensor]:
        """Weights that train and that the optimizer holds."""
        return [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]

    def _copy_options(self) -> dict[int, Tensor]:
        """Copy options that a scheduler has changed to the device; return the rates by group, not of FusedSGD."""
        if isinstance(self._optimizer, FusedSGD):
            self._optimizer.copy_options()
            return {}
        device, groups = self._clip.prototypes.device, self._optimizer.param_groups
        return {
            index: self._numbers.on(device, index, group["lr"], torch.float32)  # the dtype that SGD(fused=True) reads
            for index, group in enumerate(groups)
            if not isinstance(group["lr"], Tensor)
        }

    @contextlib.contextmanager
    def _options_on_device(self) -> Iterator[None]:
        """Set learning rates that are numbers to tensors for one step; a captured number would be a constant."""
        rates, groups = self._copy_options(), self._optimizer.param_groups
        numbers = {index: groups[index]["lr"] for index in rates}
        for index, rate in rates.items():
            groups[index]["lr"] = rate
        try:
            yield
        finally:
            for index, lr in numbers.items():
                groups[index]["lr"] = lr


def _reset(reference: weakref.ref[GraphedStep], _: torch.optim.Optimizer) -> None:
    """Drop the graphs of a step, which the optimizer must not keep alive: loaded state is in other tensors."""
    graphed_step = reference()
    if graphed_step is not None:
        graphed_step.reset()

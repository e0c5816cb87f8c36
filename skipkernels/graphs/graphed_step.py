"""A whole training step as one CUDA graph: forward, backward, update and zero_grad by one launch of the host.

A graph reads and writes fixed addresses, so what differs from step to step is copied to static tensors before it:

    ranks of the kept classes   by `ReservedRanks.draw`, which holds them
    images and labels           by `GraphedStep`, to its `_StaticStep`
    options of the optimizer    by `FusedSGD.copy_options`, which holds them

The first calls run eagerly on these tensors, then a step is captured, and from then on each call is a replay, before
which `GraphConstants` compares what the graph takes as constant.
"""

from __future__ import annotations

import warnings
import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..casts import Casts
from ..clip import SkipCLIP, SkipOutput, check_clip
from ..clip.step import LossOptions, step
from ..dtypes import autocast_dtype, without_autocast
from ..formatting import first_line
from ..ops.sgd_momentum import GraphTables, tables_of_graph
from ..optimizer import DeviceNumbers, FusedSGD
from .capture import GraphConstants, capture_graph, renew_accumulators
from .checks import check_batch, check_mode, check_optimizer, refuse_soft_labels, why_not_capturable
from .parts import ReservedRanks, TextsOnStream

WARMUP = 3  # steps before a capture, which compile kernels and create the state of the optimizer


def graphed(clip: SkipCLIP, optimizer: torch.optim.Optimizer, batch_size: int) -> GraphedStep:
    """Return a function that runs a whole training step: on a GPU, a replay of a CUDA graph. See `GraphedStep`.

    Args:
        clip: SkipCLIP in training mode.
        optimizer: Optimizer of its parameters: `FusedSGD`; or `torch.optim.SGD(fused=True)`, or one that is constructed
            with `capturable=True`, such as `torch.optim.AdamW`, with learning rates that are tensors on the GPU.
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
    check_clip("graphed", clip)
    if type(clip) is not SkipCLIP:
        raise RuntimeError(f"graphed: clip must be a SkipCLIP of one process; got {type(clip).__name__}.")
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"graphed: batch_size must be at least 1, a whole number; got {batch_size!r}.")
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"graphed: optimizer must be a torch.optim.Optimizer; got {type(optimizer).__name__}. Create one from "
            "clip.parameter_groups(…)."
        )
    return GraphedStep(clip, optimizer, batch_size)


class GraphedStep:
    """A training step: forward, backward, `optimizer.step()` and `optimizer.zero_grad()`. Created by `graphed`.

    On a GPU the first three calls run eagerly on a side stream; the fourth captures a CUDA graph, and from then on a
    call is one replay. Batches of another size than `batch_size`, and on other devices every call, run the loop

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
    would not run hooks that were added later, a warning gives the reason, and each call runs the loop until `reset`.
    """

    def __init__(self, clip: SkipCLIP, optimizer: torch.optim.Optimizer, batch_size: int):
        self._clip, self._optimizer, self._batch_size = clip, optimizer, batch_size
        self._ranks = ReservedRanks(clip)
        self._numbers = DeviceNumbers()  # the gradient of the loss
        self._streams: _Streams | None = None  # of the last device
        self._static: _StaticStep | None = None
        self._why_eager: str | None = None  # why no step is captured until `reset`
        check_optimizer(clip, optimizer)
        if self._on_gpu() and (reason := why_not_capturable(clip, optimizer)) is not None:
            raise ValueError(f"graphed: this step cannot be captured: {reason} Or run the steps without graphed.")
        optimizer.register_load_state_dict_post_hook(partial(_reset, weakref.ref(self)))

    def __repr__(self) -> str:
        eager = self._why_eager if self._on_gpu() else "no CUDA device"
        state = f"eager: {eager}" if eager else f"captured: {self.is_captured}"
        return f"GraphedStep(batch_size={self._batch_size}, {state})"

    @property
    def is_captured(self) -> bool:
        """True if there is a graph."""
        return self._static is not None and self._static.graph is not None

    def reset(self) -> None:
        """Drop the captured graph: the next calls run eagerly, then a step is captured again."""
        self._why_eager = self._static = None

    def _on_gpu(self) -> bool:
        return self._clip.prototypes.device.type == "cuda"

    def __call__(self, pixel_values: Tensor, labels: Tensor) -> SkipOutput:
        """Run one step on images [B, 3, height, width], or features at the cut [B, N, W], with labels int64 [B]."""
        clip, device = self._clip, self._clip.prototypes.device
        check_mode(clip)
        refuse_soft_labels(labels)
        check_optimizer(clip, self._optimizer)
        pixel_values, labels = (
            x.to(device, non_blocking=True) if isinstance(x, Tensor) else x  # for the error of a check
            for x in (pixel_values, labels)
        )
        if self._on_gpu():
            check_batch(clip, pixel_values, labels)
        if not self._on_gpu() or len(pixel_values) != self._batch_size or self._why_eager is not None:
            return self._backward_and_update(clip(pixel_values, labels))
        with torch.cuda.device(device):
            # 1. Copy the ranks, the batch and the options. A graph of other batches, or of another step, is dropped.
            ranks = self._ranks.draw(self._batch_size)
            static = self._static_step(pixel_values, labels, ranks)
            static.pixel_values.copy_(pixel_values, non_blocking=True)
            static.labels.copy_(labels, non_blocking=True)
            if isinstance(self._optimizer, FusedSGD):
                self._optimizer.copy_options()
            # 2. Replay; before that warm up, and capture once.
            with static.casts.active():
                if static.graph is None and static.warm_up_steps == WARMUP:
                    static.graph = self._try_to_capture(static)
                return self._warm_up(static) if static.graph is None else self._replay(static.graph)

    def _static_step(self, pixel_values: Tensor, labels: Tensor, ranks: Tensor) -> _StaticStep:
        """Return the static step of the last call, or a new one for other batches or if the step has changed."""
        device = pixel_values.device
        kind = pixel_values.shape, pixel_values.dtype, device, autocast_dtype(device)
        if self._static is None or not self._static.serves(kind, ranks):
            if self._streams is None or self._streams.device != device:
                self._streams = _Streams(device, torch.cuda.Stream(device), torch.cuda.Stream(device))
            self._static = _StaticStep(
                kind,
                ranks,
                self._streams,
                torch.empty_like(pixel_values),
                torch.empty_like(labels),
                Casts(self._fused_weights()),
            )
        return self._static

    def _held_weights(self) -> list[Tensor]:
        """Weights that train and that the optimizer holds."""
        return [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]

    def _fused_weights(self) -> list[Tensor]:
        """Those of FusedSGD, of which its update also writes the casts; none of another optimizer."""
        return self._held_weights() if isinstance(self._optimizer, FusedSGD) else []

    # ---- one step ----------------------------------------------------------------------------------------------------

    def _step(self, static: _StaticStep) -> SkipOutput:
        """Run a step on static tensors, with the ranks that were drawn for it."""
        clip = self._clip
        texts = TextsOnStream(clip.texts, static.streams.texts)
        image = clip.images.encode(static.pixel_values)  # [B, D]
        options = LossOptions(clip.label_smoothing, clip.class_weight)
        out = step(image, static.labels, texts, self._ranks, clip.scale, options)
        return self._backward_and_update(out)

    def _backward_and_update(self, out: SkipOutput) -> SkipOutput:
        device, dtype = out.loss.device, out.loss.dtype
        with without_autocast(device):
            out.loss.backward(self._numbers.on(device, dtype, 1.0, dtype))  # one launch less
            self._optimizer.step()
        self._optimizer.zero_grad()
        torch.clear_autocast_cache()  # in the autocast of the caller: its casts are of the weights before the update
        return out._replace(loss=out.loss.detach())

    # ---- warm-up, capture and replay ---------------------------------------------------------------------------------

    def _warm_up(self, static: _StaticStep) -> SkipOutput:
        """Run a step eagerly, on the streams of the capture."""
        stream, current = static.streams.step, torch.cuda.current_stream()
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            out = self._step(static)
        current.wait_stream(stream)
        static.warm_up_steps += 1
        return out

    def _try_to_capture(self, static: _StaticStep) -> _Graph | None:
        """Capture a step, or warn of the reason against it and forget what a failed capture left on the host.

        A capture launches nothing, so weights, ranks and the state of the optimizer are those before it.
        """
        reason = why_not_capturable(self._clip, self._optimizer)
        if reason is None:
            try:
                return self._capture(static)
            except Exception as error:
                # The end of a capture raises an error of its own after one within it.
                reason = f"the capture failed: {first_line(error.__context__ or error).rstrip('.')}."
        # Behind the handler: its traceback holds tensors of the capture.
        self._why_eager, self._static = reason, None
        torch.clear_autocast_cache()
        self._optimizer.zero_grad()
        warnings.warn(f"graphed: steps run one by one until reset(): {reason}", stacklevel=3)
        return None

    def _capture(self, static: _StaticStep) -> _Graph:
        renew_accumulators(self._clip.trainable_parameters())
        torch.clear_autocast_cache()  # casts of the caller would be constants of the graph
        with tables_of_graph(self._fused_weights(), static.pixel_values.device) as tables:
            graph, out = capture_graph(lambda: self._step(static), static.streams.step)
        tables.upload()
        return _Graph(graph, out, tables, GraphConstants(self._clip, self._optimizer))

    def _replay(self, captured: _Graph) -> SkipOutput:
        captured.graph.replay()
        # A replay changes no versions, by which autograd, and the casts of other graphs, detect the update.
        torch.autograd.graph.increment_version(self._held_weights())
        return captured.out


# ---- what is captured ------------------------------------------------------------------------------------------------


class _Streams(NamedTuple):
    """Streams of one GPU.

    The allocator gives freed memory to the stream that allocated it, without regard to others that use it. Here each
    stream waits for these others before it allocates, so `record_stream` is not needed.
    """

    device: torch.device
    step: Any
    texts: Any


class _Graph(NamedTuple):
    """A captured step."""

    graph: Any
    out: SkipOutput  # which a replay writes
    tables: GraphTables  # which it reads
    constants: GraphConstants


@dataclass(eq=False)
class _StaticStep:
    """Steps on batches of one kind, the warm-up and then a graph, which read the same tensors.

    A kernel is compiled for the strides and alignments of its tensors, and a capture cannot load another one.
    """

    kind: tuple[Any, ...]  # shape and dtype of the images, device and autocast
    ranks: Tensor  # [K]
    streams: _Streams
    pixel_values: Tensor
    labels: Tensor
    casts: Casts
    warm_up_steps: int = 0  # so far
    graph: _Graph | None = None

    def serves(self, kind: tuple[Any, ...], ranks: Tensor) -> bool:
        """Return True for a batch of this kind and these ranks, unless the step has changed since the capture."""
        same_tensors = self.kind == kind and self.ranks is ranks
        return same_tensors and (self.graph is None or self.graph.constants.is_unchanged())


def _reset(reference: weakref.ref[GraphedStep], _: torch.optim.Optimizer) -> None:
    """Drop the graphs of a step, which the optimizer must not keep alive: loaded state is in other tensors."""
    graphed_step = reference()
    if graphed_step is not None:
        graphed_step.reset()

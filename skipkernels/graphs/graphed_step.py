"""A whole training step as one CUDA graph: forward, backward, update and zero_grad by one launch of the host."""

from __future__ import annotations

import contextlib
import math
import warnings
import weakref
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
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
from ..optimizer import FusedSGD
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
    """A captured step: its graph, the tables that it reads, and the result that it writes."""

    graph: Any
    tables: GraphTables
    out: SkipOutput
    constants: CapturedState


@dataclass
class _BatchState:
    """Steps so far on batches of one key."""

    eager_steps: int = 0
    # Images and labels of the eager steps, the capture and the replays: of one address and one layout, whatever the
    # caller passes. A kernel is compiled for its strides and alignments, and a capture cannot load another one.
    batch: tuple[Tensor, Tensor] | None = None
    # Each eager step makes casts of the weights anew, which also compiles the update that writes them. Those of the
    # last one are completed at the capture: from then on the graph multiplies by their addresses, and its update
    # writes them. A replay first casts weights again that changed since the last one. They live as long as the graph.
    casts: Casts | None = None
    graph: _Graph | None = None

    def copied(self, pixel_values: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Copy a batch to `batch`."""
        if self.batch is None:
            self.batch = torch.empty_like(pixel_values), torch.empty_like(labels)
        self.batch[0].copy_(pixel_values, non_blocking=True)
        self.batch[1].copy_(labels, non_blocking=True)
        return self.batch


@dataclass
class _Gpu:
    """Streams and memory of the steps on a GPU.

    The allocator gives freed memory to the stream that allocated it, without regard to others that use it. Here each
    stream waits for these others before it allocates, so `record_stream` is not needed.
    """

    stream: Any  # of a step
    text_stream: Any  # of its text side
    pool: Any = None  # of all graphs, from the first capture on


class _Rate(NamedTuple):
    """Learning rate of a group: the tensor that a graph reads, and the number in it."""

    on_device: Tensor
    number: float


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
    tensor, an option of another optimizer) the step is captured again; with a later hook, steps run eagerly. So do all
    later steps if a capture fails, after a warning with the reason.

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
        self._states: defaultdict[_Key, _BatchState] = defaultdict(_BatchState)
        self._ranks = ReservedRanks()
        self._rates: dict[int, _Rate] = {}  # by the index of a group of PyTorch's optimizers
        self._one: Tensor | None = None  # gradient of the loss
        self._gpu: _Gpu | None = None  # before the first call on a GPU
        self._failed = False  # a capture raised an error
        if self._on_gpu():
            reason = why_not_capturable(clip, optimizer)
            if reason is not None:
                raise ValueError(f"graphed: this step cannot be captured: {reason} Or run the steps without graphed.")
        optimizer.register_load_state_dict_post_hook(partial(_reset, weakref.ref(self)))

    def __repr__(self) -> str:
        eager = "no CUDA device" if not self._on_gpu() else "the capture failed" if self._failed else None
        state = f"eager: {eager}" if eager else f"captured: {self.is_captured}"
        return f"GraphedStep(batch_size={self._batch_size}, {state})"

    @property
    def is_captured(self) -> bool:
        """True if there is a graph."""
        return any(state.graph is not None for state in self._states.values())

    def reset(self) -> None:
        """Drop the captured graphs: the next calls run eagerly, then a step is captured again."""
        self._states.clear()
        if self._gpu is not None:
            self._gpu.pool = None  # the allocator refuses to use the pool of graphs that are all destroyed

    def __call__(self, pixel_values: Tensor, labels: Tensor) -> SkipOutput:
        """Run one step on images [B, 3, height, width], or features at the cut [B, N, W], with labels int64 [B]."""
        clip = self._clip
        self._check_call(labels)
        if not self._on_gpu():
            self._check_optimizer()
            return self._backward_and_update(clip(pixel_values, labels))
        device = clip.prototypes.device
        pixel_values, labels = (
            x.to(device, non_blocking=True) if isinstance(x, Tensor) else x  # for the error of `_check_batch`
            for x in (pixel_values, labels)
        )
        autocast = autocast_dtype(device)
        self._check_batch(pixel_values, labels, autocast)
        self._ranks.draw(clip.sampler, device, len(clip.prototypes), len(pixel_values))
        key = _Key(pixel_values.shape, pixel_values.dtype, autocast)
        with torch.cuda.device(device):
            if self._gpu is None:
                self._gpu = _Gpu(torch.cuda.Stream(device), torch.cuda.Stream(device))
            self._reset_if_changed(key)
            if self._is_for_graph(labels):
                pixel_values, labels = self._states[key].copied(pixel_values, labels)
                self._capture_in_time(self._gpu, self._states[key])
            state = self._states[key]  # a new one after a failed capture
            if state.graph is None:
                return self._run_eagerly(self._gpu, state, pixel_values, labels)
            return self._replay(state.graph, state.casts)

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
        if self._clip.sampler.shared is not None:
            raise RuntimeError("graphed: a step selects its own classes. Leave same_classes(), or run without graphed.")

    def _check_batch(self, pixel_values: Tensor, labels: Tensor, autocast: torch.dtype | None) -> None:
        """Raise unless a batch on a GPU can be captured."""
        clip = self._clip
        clip.check_and_follow(pixel_values)
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

    def _run_eagerly(self, gpu: _Gpu, state: _BatchState, pixel_values: Tensor, labels: Tensor) -> SkipOutput:
        """Run a step with the ranks drawn for it, on the stream of the capture, with the casts of the capture."""
        state.eager_steps += 1
        if isinstance(self._optimizer, FusedSGD) and self._is_for_graph(labels):
            state.casts = Casts(self._held_weights())
        current = torch.cuda.current_stream(pixel_values.device)
        gpu.stream.wait_stream(current)
        with torch.cuda.stream(gpu.stream), self._options_on_device(), used(state.casts):
            out = self._backward_and_update(self._forward(gpu.text_stream, pixel_values, labels))
        current.wait_stream(gpu.stream)
        return out

    def _forward(self, text_stream: Any, pixel_values: Tensor, labels: Tensor) -> SkipOutput:
        clip = self._clip
        options = LossOptions(clip.label_smoothing, clip.class_weight)
        texts = TextsOnStream(clip.texts, text_stream)
        return step(clip.images.encode(pixel_values), labels, texts, self._ranks, clip.scale, options)

    def _backward_and_update(self, out: SkipOutput) -> SkipOutput:
        device_type = out.loss.device.type
        enabled = device_type != "meta" and torch.is_autocast_enabled(device_type)
        with torch.autocast(device_type, enabled=False) if enabled else contextlib.nullcontext():
            if self._one is None or self._one.device != out.loss.device or self._one.dtype != out.loss.dtype:
                self._one = torch.ones_like(out.loss)
            out.loss.backward(self._one)
            self._optimizer.step()
        self._optimizer.zero_grad()
        if enabled:  # within the caller's autocast; casts of the weights before the update would be used again
            torch.clear_autocast_cache()
        return out._replace(loss=out.loss.detach())

    # ---- capture and replay ------------------------------------------------------------------------------------------

    def _is_for_graph(self, labels: Tensor) -> bool:
        """Return True for batches of the size that graphs serve, unless a capture failed."""
        return len(labels) == self._batch_size and not self._failed

    def _reset_if_changed(self, key: _Key) -> None:
        """Check the optimizer before an eager step or a capture; drop all graphs if that of a key is out of date."""
        graph = self._states[key].graph
        if graph is not None and graph.constants.is_unchanged(self._ranks.ranks):
            return
        if graph is not None:
            self.reset()  # the warm-up begins again
        self._check_optimizer()

    def _capture_in_time(self, gpu: _Gpu, state: _BatchState) -> None:
        """Capture the step after the eager steps; after an error warn, and forget what it left on the host.

        A capture launches nothing, so weights, ranks and the state of the optimizer are those before it.
        """
        if state.graph is not None or state.eager_steps < WARMUP:
            return
        if why_not_capturable(self._clip, self._optimizer) is not None:
            return
        try:
            state.graph = self._capture(gpu, state)
            return
        except RuntimeError as error:
            # The end of a capture raises an error of its own after one within it.
            reason = first_line(error.__context__ or error).rstrip(".")
            warnings.warn(f"graphed: the capture failed, so steps run one by one from here: {reason}.", stacklevel=3)
        self._failed = True  # behind the handler: its traceback holds tensors of the capture
        self.reset()
        torch.clear_autocast_cache()
        if isinstance(self._optimizer, FusedSGD):
            self._optimizer.discard_step()
        else:
            self._optimizer.zero_grad()

    def _replay(self, captured: _Graph, casts: Casts | None) -> SkipOutput:
        # 1. Copy changed options to the addresses that the graph reads, and cast changed weights
        self._copy_options()
        if casts is not None:
            casts.renew()
        # 2. Replay. It changes no versions, by which autograd, and the casts of other graphs, detect the update.
        captured.graph.replay()
        torch.autograd.graph.increment_version(self._held_weights())
        if casts is not None:
            casts.mark()
        return captured.out

    def _capture(self, gpu: _Gpu, state: _BatchState) -> _Graph:
        """Capture the step with the tensors and casts of the eager steps."""
        assert state.batch is not None
        (pixel_values, labels), casts = state.batch, state.casts
        if gpu.pool is None:
            gpu.pool = torch.cuda.graph_pool_handle()
        renew_accumulators(self._clip.trainable_parameters())
        if casts is not None:
            casts.complete = True

        def run() -> SkipOutput:
            torch.clear_autocast_cache()  # casts of the warm-up would be constants of the graph
            with used(casts):
                return self._backward_and_update(self._forward(gpu.text_stream, pixel_values, labels))

        with self._options_on_device(), tables_of_graph() as tables:
            graph, out = record(run, gpu.stream, gpu.pool)
        tables.upload()
        return _Graph(graph, tables, out, CapturedState(self._clip, self._optimizer, self._ranks.ranks))

    def _held_weights(self) -> list[Tensor]:
        """Weights that train and that the optimizer holds."""
        return [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]

    def _copy_options(self) -> None:
        """Copy options that a scheduler has changed to the device: learning rates, and others of FusedSGD."""
        if isinstance(self._optimizer, FusedSGD):
            self._optimizer.copy_options()
            return
        for index, group in enumerate(self._optimizer.param_groups):
            lr = group["lr"]
            if isinstance(lr, Tensor):
                continue
            if index not in self._rates:
                self._rates[index] = _Rate(_rate_on(self._clip.prototypes.device), math.nan)
            on_device, number = self._rates[index]
            if number != lr:
                on_device.fill_(lr)
                self._rates[index] = _Rate(on_device, lr)

    @contextlib.contextmanager
    def _options_on_device(self) -> Iterator[None]:
        """Set learning rates that are numbers to tensors for one step; a captured number would be a constant."""
        self._copy_options()
        numbers = [(group, group["lr"]) for group in self._optimizer.param_groups]
        for index, rate in self._rates.items():
            self._optimizer.param_groups[index]["lr"] = rate.on_device
        try:
            yield
        finally:
            for group, lr in numbers:
                group["lr"] = lr


def _rate_on(device: torch.device) -> Tensor:
    return torch.empty((), dtype=torch.float32, device=device)  # the dtype that SGD(fused=True) reads


def _reset(reference: weakref.ref[GraphedStep], _: torch.optim.Optimizer) -> None:
    """Drop the graphs of a step, which the optimizer must not keep alive: loaded state is in other tensors."""
    graphed_step = reference()
    if graphed_step is not None:
        graphed_step.reset()

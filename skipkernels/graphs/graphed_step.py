"""A whole training step as one CUDA graph: forward, backward, update and zero_grad by one launch of the host."""

from __future__ import annotations

import contextlib
import gc
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import casts
from ..casts import Casts
from ..clip import SkipCLIP, SkipOutput, check_clip
from ..clip.checks import check_labels
from ..clip.step import LossOptions, step
from ..clip.texts import ClassTexts
from ..formatting import first_line
from ..ops.class_scores import classes_at_ranks
from ..ops.sgd_momentum import GraphTables, tables_of_graph
from ..optimizer import FusedSGD, world_size
from ..selection import ClassSelection, RankSampler
from ..towers.attention import SDPA
from ..towers.block import HOOKS, global_hooks

WARMUP = 3  # steps before a capture, which compile kernels and create the state of the optimizer


class _Captured(NamedTuple):
    """A captured step: its graph, and the tensors that it reads and writes."""

    graph: Any
    tables: GraphTables
    casts: Casts | None
    x: Tensor
    labels: Tensor
    out: SkipOutput
    frozen: _Frozen


def graphed(clip: SkipCLIP, optimizer: torch.optim.Optimizer, batch_size: int) -> GraphedStep:
    """Return a function that runs a whole training step: on a GPU, a replay of a CUDA graph. See `GraphedStep`."""
    check_clip("graphed", clip)
    if type(clip) is not SkipCLIP:
        raise RuntimeError(f"graphed: clip must be a SkipCLIP of one process; got {type(clip).__name__}.")
    return GraphedStep(clip, optimizer, batch_size)


class GraphedStep:
    """A training step: forward, backward, `optimizer.step()` and `optimizer.zero_grad()`.

    On a GPU the first three calls run eagerly on a side stream; the fourth captures a CUDA graph, and from then on a
    call is one replay. On other devices, and for batches of another size than `batch_size`, every call runs the loop

        out = clip(x, labels); out.loss.backward(); optimizer.step(); optimizer.zero_grad()

    A graph runs the text side on a stream of its own, so that its backward, and with `FusedSGD` its update, run beside
    those of the image side. The update of `FusedSGD` also writes the 16-bit copies of weights that fused blocks use
    under autocast. Neither has run on a device yet.

    A replay has the random numbers (except those of dropout) and learning rates of this loop, with `FusedSGD` also its
    momentum and weight decay, but one K for all steps, m + round(Σq); see `RankSampler.reserve` and
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
        self._captured: dict[Any, _Captured] = {}
        self._warm: dict[Any, int] = {}
        self._casts: dict[Any, Casts] = {}  # made by the last eager step
        self._rates: dict[int, tuple[Tensor, float]] = {}  # by group of PyTorch's optimizers: tensor, number in it
        self._one: Tensor | None = None  # gradient of the loss
        # Streams of a step and of its text side, on a GPU
        self._stream, self._text_stream = self._streams()
        self._pool: Any = None
        self._failed = False  # a capture raised an error
        if self._captures():
            reason = why_not_capturable(clip, optimizer)
            if reason is not None:
                raise ValueError(f"graphed: this step cannot be captured: {reason} Or run the steps without graphed.")
        optimizer.register_load_state_dict_post_hook(partial(_reset, weakref.ref(self)))

    def _check_optimizer(self) -> None:
        """Raise a ValueError if the optimizer would train nothing, such as one from before `add_lora`."""
        held = {id(p) for group in self._optimizer.param_groups for p in group["params"]}
        if not any(p.requires_grad and id(p) in held for p in self._clip.model.parameters()):
            raise ValueError(
                "graphed: optimizer must hold parameters of this SkipCLIP that train; got none. Create it with "
                "clip.parameter_groups(text_lr=…, image_lr=…), after add_lora or merge_lora, and pass it to graphed."
            )

    def _captures(self) -> bool:
        return self._clip.prototypes.device.type == "cuda"

    def _streams(self) -> tuple[Any, Any]:
        device = self._clip.prototypes.device
        return (torch.cuda.Stream(device), torch.cuda.Stream(device)) if self._captures() else (None, None)

    def reset(self) -> None:
        """Drop the captured graphs: the next calls run eagerly, then a step is captured again."""
        self._captured.clear()
        self._warm.clear()
        self._casts.clear()
        self._pool = None  # the allocator refuses to use the pool of graphs that are all destroyed

    def __call__(self, x: Tensor, labels: Tensor) -> SkipOutput:
        """Run one step on images [B, 3, height, width], or features at the cut [B, N, W], with labels int64 [B]."""
        clip = self._clip
        if not clip.training:
            raise RuntimeError("graphed: a step needs clip.train(); SkipCLIP is in evaluation mode.")
        if isinstance(labels, Tensor) and labels.is_floating_point():
            raise ValueError(
                f"graphed: labels must be class ids, int64 [B]; got {labels.dtype} {list(labels.shape)}. The classes "
                "of soft labels are counted on the host: run without graphed."
            )
        if clip.sampler.shared is not None:
            raise RuntimeError("graphed: a step selects its own classes. Leave same_classes(), or run without graphed.")
        if not self._captures():
            self._check_optimizer()
            return self._update(clip(x, labels))
        device = clip.prototypes.device
        x, labels = x.to(device, non_blocking=True), labels.to(device, non_blocking=True)
        clip.prepare(x)
        check_labels(labels, x, clip.num_classes)
        if x.requires_grad:
            raise ValueError("graphed: x must not require grad, which a replay would not compute. Run without graphed.")
        if clip.images.tower.lower_device is not None and not clip.images.are_features(x):
            raise RuntimeError(
                "graphed: images cannot be captured with lower_device, which copies each batch to another device. Pass "
                "features at the cut, or leave lower_device out."
            )
        autocast = _autocast(device)
        if autocast == torch.float16:
            raise RuntimeError(
                "graphed: fp16 autocast needs a GradScaler, which has a host sync in each step. Use bfloat16."
            )
        clip.sampler.reserve(device, len(clip.prototypes), len(x))
        with torch.cuda.device(device):
            return self._run(x, labels, (x.shape, x.dtype, autocast))

    def _run(self, x: Tensor, labels: Tensor, key: Any) -> SkipOutput:
        """Run a step with reserved ranks: by a replay of the graph of `key`, if there is one or it is time for one."""
        # 1. Drop the graphs after a change that they would not follow.
        captured = self._captured.get(key)
        if captured is not None and not captured.frozen.is_unchanged():
            self.reset()
            captured = None
        # 2. Without a graph, run eagerly; after WARMUP such steps of `batch_size` images, capture one.
        if captured is None:
            self._check_optimizer()
            ready = len(x) == self._batch_size and self._warm.get(key, 0) >= WARMUP and not self._failed
            if ready and why_not_capturable(self._clip, self._optimizer) is None:
                captured = self._try_capture(x, labels, self._casts.get(key))
            if captured is None:
                self._warm[key] = self._warm.get(key, 0) + 1
                if isinstance(self._optimizer, FusedSGD) and len(x) == self._batch_size and not self._failed:
                    self._casts[key] = Casts(self._held_weights())  # also compiles the update that writes them
                return self._on_stream(x, labels, self._casts.get(key))
            self._captured[key] = captured
        # 3. Copy the batch and changed options to the addresses that the graph reads, and replay it.
        captured.x.copy_(x, non_blocking=True)
        captured.labels.copy_(labels, non_blocking=True)
        self._copy_options()
        if captured.casts is not None:
            captured.casts.renew()
        captured.graph.replay()
        # A replay changes no versions, by which autograd, and the casts of other graphs, detect the update.
        torch.autograd.graph.increment_version(self._held_weights())
        if captured.casts is not None:
            captured.casts.mark()
        return captured.out

    # ---- eager steps -------------------------------------------------------------------------------------------

    def _forward(self, x: Tensor, labels: Tensor) -> SkipOutput:
        clip = self._clip
        options = LossOptions(clip.label_smoothing, clip.class_weight)
        texts, ranks = _TextsOnStream(clip.texts, self._text_stream), _ReservedRanks(clip.sampler)
        return step(clip.images.encode(x), labels, texts, ranks, clip.scale, options)

    def _update(self, out: SkipOutput) -> SkipOutput:
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

    def _on_stream(self, x: Tensor, labels: Tensor, kept: Casts | None) -> SkipOutput:
        """Run the step eagerly on the stream of the capture, with its casts; its ranks are reserved."""
        current = torch.cuda.current_stream(x.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), self._options_on_device(), casts.used(kept):
            out = self._update(self._forward(x, labels))
        current.wait_stream(self._stream)
        # Otherwise the allocator could reuse the memory of the result while the caller's stream reads it.
        for tensor in out:
            if tensor is not None:  # logits
                tensor.record_stream(current)
        return out

    # ---- capture -----------------------------------------------------------------------------------------------

    def _try_capture(self, x: Tensor, labels: Tensor, kept: Casts | None) -> _Captured | None:
        """Capture the step, with its casts; after an error warn, forget what it left on the host, and return None.

        A capture launches nothing, so weights, ranks and the state of the optimizer are those before it.
        """
        try:
            return self._capture(x, labels, kept)
        except RuntimeError as error:
            reason = first_line(error).rstrip(".")
            warnings.warn(f"graphed: the capture failed, so steps run one by one from here: {reason}.", stacklevel=4)
        self._failed = True
        self.reset()
        torch.clear_autocast_cache()
        if isinstance(self._optimizer, FusedSGD):
            self._optimizer.discard_step()
        else:
            self._optimizer.zero_grad()
        return None

    def _capture(self, x: Tensor, labels: Tensor, kept: Casts | None) -> _Captured:
        static_x, static_labels = x.clone(), labels.clone()
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        _renew_accumulators(self._clip.trainable_parameters())
        if kept is not None:
            kept.complete = True

        def step() -> SkipOutput:
            torch.clear_autocast_cache()  # casts of the warm-up would be constants of the graph
            with casts.used(kept):
                return self._update(self._forward(static_x, static_labels))

        with self._options_on_device(), tables_of_graph() as tables:
            graph, out = record(step, self._stream, self._pool)
        tables.upload()
        return _Captured(graph, tables, kept, static_x, static_labels, out, _Frozen(self._clip, self._optimizer))

    def _held_weights(self) -> list[Tensor]:
        """Weights that train and that the optimizer holds."""
        return [p for group in self._optimizer.param_groups for p in group["params"] if p.requires_grad]

    def _copy_options(self) -> None:
        """Copy options that a scheduler has changed to the device: learning rates, and others of FusedSGD."""
        if isinstance(self._optimizer, FusedSGD):
            self._optimizer.copy_options()
            return
        for number, group in enumerate(self._optimizer.param_groups):
            lr = group["lr"]
            if isinstance(lr, Tensor):
                continue
            rate, copied = self._rates.get(number) or (_rate_on(self._clip.prototypes.device), None)
            if copied != lr:
                rate.fill_(lr)
                self._rates[number] = rate, lr

    @contextlib.contextmanager
    def _options_on_device(self) -> Iterator[None]:
        """Set learning rates that are numbers to tensors for one step; a captured number would be a constant."""
        self._copy_options()
        numbers = [(group, group["lr"]) for group in self._optimizer.param_groups]
        for index, (rate, _) in self._rates.items():
            self._optimizer.param_groups[index]["lr"] = rate
        try:
            yield
        finally:
            for group, lr in numbers:
                group["lr"] = lr


class _ReservedRanks:
    """Sampler of a step with reserved ranks, at the address that a graph reads."""

    def __init__(self, sampler: RankSampler):
        self._sampler = sampler

    def select(self, scores: Tensor, labels: Tensor) -> ClassSelection:
        """Select the classes [K] at the reserved ranks."""
        return ClassSelection(*classes_at_ranks(scores, self._sampler.reserved, labels))


class _TextsOnStream:
    """Texts that are encoded on a stream of their own.

    Autograd runs each node of backward on the stream of its forward, and lets streams wait for each other's gradients.
    """

    def __init__(self, texts: ClassTexts, stream: Any):
        self._texts, self._stream, self.prototypes = texts, stream, texts.prototypes

    def encode(self, class_ids: Tensor) -> Tensor:
        """Class ids [K] to text embeddings [K, D]."""
        current = torch.cuda.current_stream(class_ids.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            text = self._texts.encode(class_ids)
        current.wait_stream(self._stream)
        # The allocator knows the stream on which memory was allocated, and not the other one that uses it.
        class_ids.record_stream(self._stream)
        text.record_stream(current)
        return text


def _rate_on(device: torch.device) -> Tensor:
    return torch.empty((), dtype=torch.float32, device=device)  # the dtype that SGD(fused=True) reads


def _reset(step: weakref.ref[GraphedStep], _: torch.optim.Optimizer) -> None:
    """Drop the graphs of a step, which the optimizer must not keep alive: loaded state is in other tensors."""
    graphed = step()
    if graphed is not None:
        graphed.reset()


def _renew_accumulators(parameters: Iterable[Tensor]) -> None:
    """Let autograd create new nodes for the gradients of parameters; their hooks stay.

    A node accumulates on the stream on which it was created. The graph of a loss that is still held keeps its
    nodes alive, so backward would accumulate on the stream of that step, which breaks a capture on another one. A
    parameter has a new node after its data had another dtype.
    """
    for parameter in parameters:
        data = parameter.data
        parameter.data = data.new_empty(0, dtype=torch.float32 if data.dtype == torch.float64 else torch.float64)
        parameter.data = data


def record(step: Callable[[], SkipOutput], stream: Any, pool: Any) -> tuple[Any, SkipOutput]:
    """Capture a function on a stream; return the graph and the static results.

    Without garbage collection: a collected tensor of another graph would be freed during the capture.
    """
    graph = torch.cuda.CUDAGraph()
    collects = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            out = step()
    finally:
        if collects:
            gc.enable()
    return graph, out


def why_not_capturable(clip: SkipCLIP, optimizer: torch.optim.Optimizer) -> str | None:
    """Return why the step of a SkipCLIP and an optimizer cannot be captured in a CUDA graph, or None."""
    hooked = next((name for name, x in clip.model.named_modules() if any(getattr(x, hook) for hook in HOOKS)), None)
    generator = clip.sampler.generator
    for applies, reason in (
        (clip.images.tower.attention_backend is not SDPA, 'attention="xformers" has a host sync. Use "sdpa".'),
        (clip.texts.reads_folder(), "text_cache, as large as here, is read on the host. Leave it out."),
        (hooked is not None, f"{hooked or 'the model'} has hooks, which would run at the capture only. Remove them."),
        (bool(global_hooks()), "global module hooks would run at the capture only. Remove them."),
        (generator is not None and generator.device.type != "cpu", "the generator must be on the CPU."),
        (world_size() > 1, "gradients of several processes are averaged by hooks."),
    ):
        if applies:
            return reason
    return _why_optimizer_is_not_capturable(optimizer)


def _why_optimizer_is_not_capturable(optimizer: torch.optim.Optimizer) -> str | None:
    name = type(optimizer).__name__
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return f"{name} has step hooks, which would run at the capture only. Remove them."
    if isinstance(optimizer, FusedSGD):
        return None
    if isinstance(optimizer, torch.optim.SGD):
        fused = all(group["fused"] for group in optimizer.param_groups)
        return None if fused else "SGD reads its learning rate on the host. Use FusedSGD, or SGD with fused=True."
    if all(group.get("capturable") for group in optimizer.param_groups):
        return None
    return f"{name} is not capturable. Construct it with capturable=True if it has that option, or use FusedSGD."


def _autocast(device: torch.device) -> torch.dtype | None:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


class _Frozen:
    """All that a graph takes as constant: modules, modes, hooks, tensors and their addresses, options."""

    def __init__(self, clip: SkipCLIP, optimizer: torch.optim.Optimizer):
        self._clip, self._optimizer = clip, optimizer
        self._modules = list(clip.model.modules())
        self._seen = self._state()
        self._held = list(self._tensors()), clip.texts  # so that addresses are not used again

    def is_unchanged(self) -> bool:
        """Return True if a replay is the step that would run now."""
        return self._state() == self._seen

    def _tensors(self) -> Iterator[Tensor | None]:
        """Yield the tensors that a step reads and that exist between steps."""
        clip = self._clip
        for module in self._modules:
            yield from module._parameters.values()
            yield from module._buffers.values()
        for state in self._optimizer.state.values():
            yield from (x for x in state.values() if isinstance(x, Tensor))
        yield from (*clip.texts.step_tensors(), clip.class_weight, clip.sampler.reserved)

    def _state(self) -> list[Any]:
        clip = self._clip
        return [
            [None if x is None else (id(x), x.data_ptr(), x.requires_grad) for x in self._tensors()],
            [(id(m), m.training, *map(id, m._modules.values())) for m in self._modules],
            [hooks for m in self._modules for name in HOOKS if (hooks := getattr(m, name))],
            global_hooks(),
            [id(clip.texts), clip.images.tower.memory, clip.texts.tower.memory, clip.label_smoothing],
            [_constants(self._optimizer, group) for group in self._optimizer.param_groups],
        ]


def _constants(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> list[Any]:
    """Options of a group that a graph takes as constants: numbers that it does not read on the device; ids of tensors.

    Without momentum FusedSGD has no buffers.
    """
    not_constant = {"params", "lr", "initial_lr"}
    if isinstance(optimizer, FusedSGD):
        not_constant |= {"momentum", "weight_decay"}
    options: list[Any] = [list(map(id, group["params"])), group.get("momentum") == 0]
    for name, value in group.items():
        if isinstance(value, Tensor):
            options.append((name, id(value)))
        elif name not in not_constant:
            options.append((name, value))
    return options

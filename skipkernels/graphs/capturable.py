"""A step before its capture in a CUDA graph: why it cannot be captured, and what the graph takes as constant."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..clip import SkipCLIP
from ..optimizer import FusedSGD, world_size
from ..towers.alterations import HOOKS, global_hooks
from ..towers.rows import SDPA


def why_not_capturable(clip: SkipCLIP, optimizer: torch.optim.Optimizer) -> str | None:
    """Return why the step of a SkipCLIP and an optimizer cannot be captured in a CUDA graph, or None."""
    if (hooked := _first_hooked(clip.model)) is not None:
        return f"{hooked} has hooks, which would run at the capture only. Remove them."
    if global_hooks():
        return "global module hooks would run at the capture only. Remove them."
    if clip.images.tower.cut.backend != SDPA:  # a copy is another object
        return 'attention="xformers" has a host sync. Use "sdpa".'
    if any(x is None for x in clip.texts.step_tensors()):
        return "text_cache, as large as here, is read on the host. Leave it out."
    if clip.sampler.generator.device.type != "cpu":
        return "the generator must be on the CPU."
    if torch.cuda.get_allocator_backend() != "native":  # it waits for no stream that `record_stream` does not name
        return "the allocator cudaMallocAsync gives memory from stream to stream. Unset it in PYTORCH_ALLOC_CONF."
    if world_size() > 1:
        return "gradients of several processes are averaged by hooks."
    return _why_optimizer_is_not_capturable(optimizer)


def _first_hooked(model: nn.Module) -> str | None:
    """Name of the first module that has hooks, "the model" for the model itself; None without hooks."""
    return next((name or "the model" for name, module in model.named_modules() if _has_hooks(module)), None)


def _has_hooks(module: nn.Module) -> bool:
    return any(getattr(module, x) for x in HOOKS)


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


class _Constants(NamedTuple):
    """Values that a graph takes as constant."""

    tensors: list[tuple[int, int, bool] | None]  # identity, address and requires_grad
    modules: list[tuple[int, ...]]  # identity, mode, hooks (none at a capture, see `why_not_capturable`) and children
    options: list[Any]
    groups: list[list[Any]]  # options of the optimizer


class CapturedState:
    """Comparison of what a graph takes as constant: modules, modes, hooks, tensors and their addresses, options."""

    def __init__(self, clip: SkipCLIP, optimizer: torch.optim.Optimizer):
        self._clip, self._optimizer = clip, optimizer
        self._modules = list(clip.model.modules())
        self._captured = self._read()
        self._held = list(self._tensors()), clip.texts  # so that addresses are not used again

    def is_unchanged(self) -> bool:
        """Return True if a replay is the step that would run now."""
        return self._read() == self._captured

    def _tensors(self) -> Iterator[Tensor | None]:
        """Yield the tensors of clip and optimizer that a step reads and that exist between steps."""
        clip = self._clip
        for module in self._modules:
            yield from module._parameters.values()
            yield from module._buffers.values()
        for state in self._optimizer.state.values():
            yield from (x for x in state.values() if isinstance(x, Tensor))
        yield from (*clip.texts.step_tensors(), clip.class_weight)

    def _read(self) -> _Constants:
        clip = self._clip
        return _Constants(
            [None if x is None else (id(x), x.data_ptr(), x.requires_grad) for x in self._tensors()],
            [(id(m), m.training, _has_hooks(m), *map(id, m._modules.values())) for m in self._modules],
            [id(clip.texts), clip.images.tower.cut, clip.texts.tower.cut, clip.label_smoothing, global_hooks()],
            [_constant_options(self._optimizer, group) for group in self._optimizer.param_groups],
        )


def _constant_options(optimizer: torch.optim.Optimizer, group: dict[str, Any]) -> list[Any]:
    """Options of a group that a graph takes as constant: numbers not read on the device, and ids of tensors."""
    not_constant = {"params", "lr", "initial_lr"}
    if isinstance(optimizer, FusedSGD):
        not_constant |= {"momentum", "weight_decay"}
    # FusedSGD reads its momentum on the device, but without momentum it has no buffers: another graph.
    options: list[Any] = [list(map(id, group["params"])), group.get("momentum") == 0]
    for name, value in group.items():
        if isinstance(value, Tensor):
            options.append((name, id(value)))
        elif name not in not_constant:
            options.append((name, value))
    return options

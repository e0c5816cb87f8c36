"""Checks of a step in a CUDA graph: of the arguments of each call, and whether it can be captured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..clip import SkipCLIP
from ..clip.checks import check_labels, described
from ..dtypes import autocast_dtype
from ..optimizer import FusedSGD, world_size
from ..selection import RankSampler
from ..towers.alterations import HOOKS, global_hooks
from ..towers.rows import SDPA

# ---- checks of each call ---------------------------------------------------------------------------------------------


def check_mode(clip: SkipCLIP) -> None:
    """Raise a RuntimeError in evaluation mode."""
    if not clip.training:
        raise RuntimeError("graphed: a step needs clip.train(); SkipCLIP is in evaluation mode.")


def refuse_soft_labels(labels: Any) -> None:
    """Raise a ValueError for probabilities of the classes."""
    if isinstance(labels, Tensor) and labels.is_floating_point():
        raise ValueError(
            f"graphed: labels must be class ids, int64 [B]; got {described(labels)}. The classes of soft labels "
            "are counted on the host: run without graphed."
        )


def check_optimizer(clip: SkipCLIP, optimizer: torch.optim.Optimizer) -> None:
    """Raise a ValueError if the optimizer would train nothing, such as one from before `add_lora`."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if not any(p.requires_grad and id(p) in held for p in clip.model.parameters()):
        raise ValueError(
            "graphed: optimizer must hold parameters of this SkipCLIP that train; got none. Create it with "
            "clip.parameter_groups(text_lr=…, image_lr=…), after add_lora or merge_lora, and pass it to graphed."
        )


def check_batch(clip: SkipCLIP, pixel_values: Any, labels: Any) -> None:
    """Raise an error unless a step on a batch can be captured."""
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
    if autocast_dtype(pixel_values.device) == torch.float16:
        raise RuntimeError(
            "graphed: fp16 autocast needs a GradScaler, which has a host sync in each step. Use bfloat16."
        )


# ---- conditions of a capture -----------------------------------------------------------------------------------------


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
    if getattr(clip.sampler.select, "__func__", None) is not RankSampler.select:
        return "a graph takes the ranks that RankSampler.draw returns, and does not call select() of another sampler."
    if clip.sampler.generator.device.type != "cpu":
        return "the generator must be on the CPU."
    if torch.cuda.get_allocator_backend() != "native":  # it waits for no stream that `record_stream` does not name
        return "the allocator cudaMallocAsync gives memory from stream to stream. Unset it in PYTORCH_ALLOC_CONF."
    if world_size() > 1:
        return "gradients of several processes are averaged by hooks."
    return _why_optimizer_is_not_capturable(optimizer, clip.prototypes.device)


def _first_hooked(model: nn.Module) -> str | None:
    """Name of the first module that has hooks, "the model" for the model itself; None without hooks."""
    return next((name or "the model" for name, module in model.named_modules() if has_any_hooks(module)), None)


def has_any_hooks(module: nn.Module) -> bool:
    """Return True if a module has hooks of any kind."""
    return any(getattr(module, x) for x in HOOKS)


def _why_optimizer_is_not_capturable(optimizer: torch.optim.Optimizer, device: torch.device) -> str | None:
    name = type(optimizer).__name__
    if optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks:
        return f"{name} has step hooks, which would run at the capture only. Remove them."
    if isinstance(optimizer, FusedSGD):
        return None
    option = "fused" if isinstance(optimizer, torch.optim.SGD) else "capturable"
    if not all(group.get(option) for group in optimizer.param_groups):
        return f"{name} is not capturable. Construct it with {option}=True if it has that option, or use FusedSGD."
    rates = [group["lr"] for group in optimizer.param_groups]
    if not all(isinstance(lr, Tensor) and lr.device == device for lr in rates):
        return (
            f"{name} has learning rates that a graph would take as constant. Give each group a tensor, lr=torch.tensor("
            f'…, device="{device.type}"), which schedulers fill, or use FusedSGD.'
        )
    return None

"""FusedSGD: SGD that updates weights inside backward, so that only a few gradients are in memory at a time."""

from __future__ import annotations

import itertools
import math
import weakref
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.utils.hooks import RemovableHandle

from . import functional
from .checks import FEATURE_DTYPES, check_dtype

# Options that torch.optim.SGD reads from its groups, so that it loads a state dict of FusedSGD.
_TORCH_OPTIONS = {
    "dampening": 0,
    "nesterov": False,
    "maximize": False,
    "foreach": None,
    "differentiable": False,
    "fused": None,
}


class FusedSGD(torch.optim.Optimizer):
    """SGD with momentum that updates each weight inside backward, as soon as its gradient is complete.

        g = grad + weight_decay · weight;   buffer ← momentum · buffer + g;   weight ← weight − lr · buffer

    The update and the defaults are those of `torch.optim.SGD`, in one pass over memory (`functional.sgd_momentum_`).
    Memory holds the gradients of about one block, not of the model. The training loop is unchanged: `step()` after each
    backward updates the weights that still have a gradient (a weight frozen at construction, a gradient set by hand)
    and begins the next step. Options of a group are read at each update, so learning-rate schedulers work. State dicts
    are interchangeable with those of `torch.optim.SGD`. Keep a reference to the optimizer: its hooks are removed with
    it.

    Each backward is an update. Use `in_backward=False` for everything that needs or changes all gradients of a step
    before the update: several backward passes per step, `GradScaler`, `clip_grad_norm_` (after backward it finds no
    gradient and clips nothing, without an error), `DistributedDataParallel` (updates in backward raise an error in a
    process group of several ranks), a weight shared by checkpoints with `use_reentrant=True`. A second gradient of a
    weight before `step()` is an error, as is a second backward through a graph that needs the old value of a weight. If
    backward raises an error, some weights are updated and others are not.

    Args:
        params: Parameters, or groups of them with their own options, as for `torch.optim`; any shape, fp32, bf16, fp16
            or fp64. Momentum buffers have the shape and dtype of their weights.
        lr: Learning rate ≥ 0, 1e-3 by default: a number, or a tensor of one element on the device of the weights. The
            kernel reads the tensor, so a captured CUDA graph uses its value at each replay.
        momentum: Factor of the buffer, ≥ 0; 0 (default) keeps no buffer.
        weight_decay: L2 penalty ≥ 0, 0 by default.
        in_backward: True (default) updates weights in backward. False updates all in `step()`, with one call per group,
            dtype and device.
        stochastic_rounding: True rounds bf16 weights up with the probability of the discarded part, so that updates
            below half a unit in the last place survive on average. Only for groups of bf16 weights. The random bits
            differ for each weight and step, and continue with the state dict; a captured graph repeats its bits.
        seed: Seed of stochastic rounding, ≥ 0.

    Raises:
        TypeError: If the dtype of a weight is not supported; in backward, if a gradient is sparse.
        ValueError: If an option is out of range, or one of `torch.optim.SGD` that is not supported.
        RuntimeError: In backward, for a second gradient before `step()` or a gradient that another optimizer has
            consumed; in backward and at construction, for updates in backward in a process group of several ranks.

    Source: Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources" (LOMO), ACL 2024,
    arXiv 2306.09782, for updates inside backward.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = FusedSGD([weight], lr=0.25, momentum=0.9)
        >>> weight.square().sum().backward()
        >>> weight.tolist(), weight.grad
        ([0.5, 1.0], None)
        >>> optimizer.step()  # nothing is left to update here
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        *,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        in_backward: bool = True,
        stochastic_rounding: bool = False,
        seed: int = 0,
    ):
        self._in_backward = False  # until all groups are checked
        self._updated: set[int] = set()  # indices of the weights updated in backward since step()
        self._hooks: list[RemovableHandle] = []
        self._remove_hooks = weakref.finalize(self, _remove, self._hooks)
        self._remove_hooks.atexit = False
        if in_backward:
            _refuse_several_processes()
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, **_TORCH_OPTIONS}
        super().__init__(params, options | {"stochastic_rounding": stochastic_rounding, "seed": seed, "steps": 0})
        if in_backward:
            self._in_backward = True
            for group in range(len(self.param_groups)):
                self._hook(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with its options."""
        super().add_param_group(param_group)
        _check(self.param_groups[-1])
        if self._in_backward:
            self._hook(len(self.param_groups) - 1)

    def _hook(self, group: int) -> None:
        first = sum(len(other["params"]) for other in self.param_groups[:group])
        for number, weight in enumerate(self.param_groups[group]["params"], first):
            if weight.requires_grad:
                # A proxy, since a parameter must not keep the optimizer alive, and the index of the group, since
                # load_state_dict replaces the group.
                update = partial(FusedSGD._update_in_backward, weakref.proxy(self), group, number)
                self._hooks.append(weight.register_post_accumulate_grad_hook(update))

    def _update_in_backward(self, group: int, number: int, weight: Tensor) -> None:
        if not self._updated:  # once per step: a process group may be created after the optimizer
            _refuse_several_processes()
        if weight.grad is None:
            raise RuntimeError(
                "FusedSGD: the gradient of a weight was consumed before this optimizer could use it: another one "
                "updates it in backward too. Call close() on that one."
            )
        if number in self._updated:
            raise RuntimeError(
                "FusedSGD: a weight must get one gradient per step; got a second one since step(), after the first was "
                "consumed. Call step() after each backward, or use in_backward=False."
            )
        self._update(self.param_groups[group], number, [weight])
        self._updated.add(number)
        weight.grad = None

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """End a step: update every weight that still has a gradient.

        Args:
            closure: Function that computes the loss and its gradients, unless backward has already run.

        Returns:
            The result of the closure.
        """
        loss = None if closure is None else closure()
        numbers = itertools.count()
        for group in self.param_groups:
            alike: defaultdict[tuple[torch.dtype, torch.device], list[tuple[int, Tensor]]] = defaultdict(list)
            for weight, number in zip(group["params"], numbers, strict=False):
                if weight.grad is not None:
                    alike[weight.dtype, weight.device].append((number, weight))
            for numbered in alike.values():
                self._update(group, numbered[0][0], [weight for _, weight in numbered])
            group["steps"] += 1
        self._updated.clear()
        return loss

    def _update(self, group: dict[str, Any], number: int, weights: list[Any]) -> None:
        """Update weights of a group by one call; `number` is the index of the first one in the optimizer."""
        functional.sgd_momentum_(
            weights,
            [weight.grad for weight in weights],
            [self._momentum_buffer(weight, group["momentum"]) for weight in weights],
            group["lr"],
            momentum=group["momentum"],
            weight_decay=group["weight_decay"],
            seed=_random_bits(group["seed"], group["steps"], number) if group["stochastic_rounding"] else None,
        )

    def _momentum_buffer(self, weight: Tensor, momentum: float) -> Tensor:
        if momentum == 0:  # never read
            return torch.zeros_like(weight)
        state = self.state[weight]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(weight)
        return state["momentum_buffer"]

    def close(self) -> None:
        """Remove the hooks: later gradients remain for `step()` or another optimizer."""
        self._in_backward = False
        self._remove_hooks()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called by load_state_dict with the groups of a checkpoint; those of torch.optim.SGD lack some options.
        super().__setstate__(state)
        for group in self.param_groups:
            for option, default in self.defaults.items():
                group.setdefault(option, default)
            _check(group)

    def __getstate__(self) -> NoReturn:
        raise TypeError("FusedSGD: cannot be copied or pickled: its hooks are on its parameters. Use state_dict().")


def _refuse_several_processes() -> None:
    """Refuse a process group of several ranks: weights would be updated before gradients are averaged."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            "FusedSGD: in_backward must be False in a process group of several ranks; got True in one of "
            f"{distributed.get_world_size()}. Backward consumes gradients before they are averaged: the weights of the "
            "ranks would diverge. Use in_backward=False."
        )


def _check(group: dict[str, Any]) -> None:
    for weight in group["params"]:
        if group["stochastic_rounding"]:
            remedy = "Set stochastic_rounding to False, or put other weights into another group."
            check_dtype("FusedSGD", "params", weight, [torch.bfloat16], remedy)
        check_dtype("FusedSGD", "params", weight, FEATURE_DTYPES, "Only floating-point weights can be trained.")
    if len(set(group["params"])) < len(group["params"]):
        raise ValueError("FusedSGD: params must be different weights; got one twice in a group. Remove the duplicate.")
    for option in ("lr", "momentum", "weight_decay", "seed"):
        value = group[option]
        on_device = option == "lr" and isinstance(value, Tensor)  # its value would be a host sync
        if not (on_device or 0 <= value < math.inf):
            raise ValueError(f"FusedSGD: {option} must be at least 0; got {value}.")
    for option in ("dampening", "nesterov", "maximize", "differentiable"):
        if group.get(option):
            raise ValueError(f"FusedSGD: {option} is not supported; got {group[option]}. Use torch.optim.SGD.")


def _remove(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


def _random_bits(*numbers: int) -> int:
    """Return 64 random bits, determined by the numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])

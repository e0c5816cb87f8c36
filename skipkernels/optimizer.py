"""FusedSGD: weights are updated inside backward, so that gradients never add up to a copy of the model."""

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

__all__ = ["FusedSGD"]

# What torch.optim.SGD reads of its groups, so that it takes a state dict of ours.
_TORCHS = {
    "dampening": 0,
    "nesterov": False,
    "maximize": False,
    "foreach": None,
    "differentiable": False,
    "fused": None,
}


class FusedSGD(torch.optim.Optimizer):
    """SGD with momentum that updates each weight inside backward, as soon as its gradient is complete, and frees that.

        g = grad + weight_decay · weight;   buffer ← momentum · buffer + g;   weight ← weight − lr · buffer

    It is `torch.optim.SGD`'s update, with its defaults, in one pass over memory (`functional.sgd_momentum_`). Gradients
    are alive between the node of backward that computes them and the end of their update: those of a block, not those
    of the model. A loop stays as it is, with `step()` after each backward: it updates what still has a gradient (a
    weight that was frozen when it was given, a gradient set by hand), and the next step begins. The options of a group
    are read at each update, so learning-rate schedulers work. State dicts load into `torch.optim.SGD` and from it. Keep
    the optimizer: its hooks go with it.

    Each backward is an update. What needs all gradients of a step, or changes them before it, wants
    `in_backward=False`: several backward passes a step, `GradScaler`, `clip_grad_norm_` (after backward there is no
    gradient left for it: it clips nothing, and cannot say so), `DistributedDataParallel` (which averages gradients that
    were used up: in a process group of several members, updates in backward are refused), a weight shared by
    checkpoints with `use_reentrant=True`. A second gradient of a weight before `step()` is an error, and so,
    autograd's own, is a second backward through a graph that needs a weight as it was. A backward that ends in an error
    leaves some weights updated and others not.

    Args:
        params: parameters, or groups of them with options of their own, as for `torch.optim`; of any shape, in fp32,
            bf16, fp16 or fp64. Momentum buffers have the shape and dtype of their weights.
        lr: learning rate, at least 0: a number, or a tensor of one element on the device of the weights, which is read
            there: a captured CUDA graph takes what it holds at each replay.
        momentum: share of the buffer that stays, at least 0. At 0 there is no buffer.
        weight_decay: L2 penalty, at least 0.
        in_backward: whether weights are updated in backward; otherwise `step()` updates all, with one call for those of
            a group that have one dtype and device.
        stochastic_rounding: whether bf16 weights are rounded up with the probability of the part that is lost, so that
            updates smaller than half a step survive on average. For groups of nothing but bf16. The random bits are
            other ones for each weight in each step, and continue with the state dict; a captured graph repeats its own.
        seed: of stochastic rounding, at least 0.

    Raises:
        TypeError: for a weight of a dtype that does not fit; in backward, for a gradient that is sparse.
        ValueError: for an option out of its range, or one of `torch.optim.SGD` that is not here.
        RuntimeError: in backward, for a second gradient before `step()`, or one that another optimizer took; there and
            at construction, for updates in backward in a process group of several members.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = FusedSGD([weight], lr=0.25, momentum=0.9)
        >>> weight.square().sum().backward()
        >>> weight.tolist(), weight.grad
        ([0.5, 1.0], None)
        >>> optimizer.step()  # as in any loop; here it has nothing left to do
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
        self._in_backward = False  # until all groups have been found right
        self._updated: set[int] = set()  # numbers of the weights that backward has updated since step()
        self._hooks: list[RemovableHandle] = []
        self._remove_hooks = weakref.finalize(self, _remove, self._hooks)
        self._remove_hooks.atexit = False
        if in_backward:
            _refuse_several_processes()
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, **_TORCHS}
        super().__init__(params, options | {"stochastic_rounding": stochastic_rounding, "seed": seed, "steps": 0})
        if in_backward:
            self._in_backward = True
            for group in range(len(self.param_groups)):
                self._hook(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Train further parameters, with options of their own where the group has them."""
        super().add_param_group(param_group)
        _check(self.param_groups[-1])
        if self._in_backward:
            self._hook(len(self.param_groups) - 1)

    def _hook(self, group: int) -> None:
        first = sum(len(other["params"]) for other in self.param_groups[:group])
        for number, weight in enumerate(self.param_groups[group]["params"], first):
            if weight.requires_grad:
                # A proxy: a parameter must not keep alive the optimizer that keeps its buffer. The group's number: the
                # group itself is another one after load_state_dict.
                update = partial(FusedSGD._update_in_backward, weakref.proxy(self), group, number)
                self._hooks.append(weight.register_post_accumulate_grad_hook(update))

    def _update_in_backward(self, group: int, number: int, weight: Tensor) -> None:
        if not self._updated:  # the first of a step: the process group may have come later
            _refuse_several_processes()
        if weight.grad is None:
            raise RuntimeError(
                "FusedSGD: the gradient of a weight was taken before this optimizer could use it: another one updates "
                "it in backward too. Call close() on that one."
            )
        if number in self._updated:
            raise RuntimeError(
                "FusedSGD: a weight must get one gradient a step; got a second one since step(), when the first was "
                "used up. Call step() after each backward, or make the optimizer with in_backward=False."
            )
        self._update(self.param_groups[group], number, [weight])
        self._updated.add(number)
        weight.grad = None

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """End a step: update every weight that has a gradient, which no longer has one if backward updated it.

        Args:
            closure: computes the loss and its gradients, if that is not done already.

        Returns:
            What the closure returns.
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
        """One call for some weights of a group, of which the first has this number among those of the optimizer."""
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
        if momentum == 0:  # nothing of it is read
            return torch.zeros_like(weight)
        state = self.state[weight]
        if state.get("momentum_buffer") is None:
            state["momentum_buffer"] = torch.zeros_like(weight)
        return state["momentum_buffer"]

    def close(self) -> None:
        """Leave backward: from now on gradients stay, for `step()` or for another optimizer."""
        self._in_backward = False
        self._remove_hooks()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # load_state_dict comes by here, with the groups of a checkpoint: torch.optim.SGD's lack some options.
        super().__setstate__(state)
        for group in self.param_groups:
            for option, default in self.defaults.items():
                group.setdefault(option, default)
            _check(group)

    def __getstate__(self) -> NoReturn:
        raise TypeError("FusedSGD: it can't be copied or pickled: its hooks are on its parameters. Use state_dict().")


def _refuse_several_processes() -> None:
    """A gradient that is used up in backward is no longer there to be averaged: the weights of the ranks would part."""
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        raise RuntimeError(
            "FusedSGD: in_backward must be False in a process group of several members; got True in one of "
            f"{distributed.get_world_size()}. Backward uses gradients up before they are averaged: the weights of the "
            "ranks would part. Use in_backward=False."
        )


def _check(group: dict[str, Any]) -> None:
    for weight in group["params"]:
        if group["stochastic_rounding"]:
            remedy = "Leave out stochastic_rounding, or give other weights a group without it."
            check_dtype("FusedSGD", "params", weight, [torch.bfloat16], remedy)
        check_dtype("FusedSGD", "params", weight, FEATURE_DTYPES, "Only floating-point weights can be trained.")
    if len(set(group["params"])) < len(group["params"]):
        raise ValueError("FusedSGD: params must be different weights; got one twice in a group. Leave it out once.")
    for option in ("lr", "momentum", "weight_decay", "seed"):
        value = group[option]
        on_device = option == "lr" and isinstance(value, Tensor)  # to look at it would wait for the device
        if not (on_device or 0 <= value < math.inf):
            raise ValueError(f"FusedSGD: {option} must be at least 0; got {value}.")
    for option in ("dampening", "nesterov", "maximize", "differentiable"):
        if group.get(option):
            raise ValueError(f"FusedSGD: there is no {option}; got {group[option]}. Use torch.optim.SGD.")


def _remove(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


def _random_bits(*numbers: int) -> int:
    """64 bits that are others for other numbers, and the same everywhere."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])

"""FusedSGD: SGD that updates weights inside backward, so that only a few gradients are in memory at a time."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Hashable
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT
from torch.utils.hooks import RemovableHandle

from . import casts, functional
from .checks import FEATURE_DTYPES, check_dtype
from .dtypes import accumulation_dtype
from .ops import launching
from .reference import signed64

# Options that torch.optim.SGD reads from its groups, so that it loads a state dict of FusedSGD.
_TORCH_OPTIONS = {
    "dampening": 0,
    "nesterov": False,
    "maximize": False,
    "foreach": None,
    "differentiable": False,
    "fused": None,
}
_GATHERED_BYTES = 32 << 20  # gradients gathered in backward for one launch; a block of ViT-B has 28 MB in fp32
# Added to the seed of a group at each step. Odd, so that seeds repeat only after 2⁶⁴ steps. Not the constant by which
# the operator multiplies positions (SplitMix64): each step would use the random bits of the one before, shifted.
_SEED_STRIDE = signed64(0xD1B54A32D192ED03)


class FusedSGD(torch.optim.Optimizer):
    """SGD with momentum that updates weights inside backward, as soon as their gradients are complete.

        g = grad + weight_decay · weight;   buffer ← momentum · buffer + g;   weight ← weight − lr · buffer

    The update, the defaults and the state dicts are those of `torch.optim.SGD`, in one pass over memory
    (`functional.sgd_momentum_`). Memory holds the gradients of about one block, not of the model: on the CPU each
    weight is updated immediately, on a GPU gradients are gathered up to 32 MiB for one launch.

    The training loop is unchanged: `step()` after each backward updates the weights that still have a gradient (of a
    weight that was frozen at construction, or set by hand) and ends the step. Options of a group are read at each
    update, so learning-rate schedulers work. Keep a reference to the optimizer: its hooks are removed with it.

    Each backward is an update. Use `in_backward=False` for everything that needs or changes all gradients of a step
    before the update: several backward passes per step, `GradScaler`, `clip_grad_norm_`, `DistributedDataParallel`, a
    weight used in several activation checkpoints with `use_reentrant=True`. They are errors, but some are detected only
    after a backward has updated the weights: load these again.

    Args:
        params: Parameters, or groups of them with their own options, as for `torch.optim`; any shape, fp32, bf16, fp16
            or fp64. Momentum buffers have the shape of their weights.
        lr: Learning rate ≥ 0, 1e-3 by default: a number, or a tensor of one element on the device of the weights. The
            kernel reads the tensor, so a captured CUDA graph uses its value at each replay; see `copy_options`.
        momentum: Factor of the buffer, ≥ 0; 0 (default) keeps no buffer.
        weight_decay: L2 penalty ≥ 0, 0 by default.
        in_backward: True (default) updates weights in backward. False updates all in `step()`.
        stochastic_rounding: True rounds bf16 weights up with the probability of the discarded part, so that updates
            below half a unit in the last place survive on average. Only for groups of bf16 weights. The random bits
            differ for each weight, step and replay of a captured graph, and continue with the state dict.
        seed: Seed of stochastic rounding, ≥ 0.

    Source: Lv et al., "Full Parameter Fine-tuning for Large Language Models with Limited Resources" (LOMO), ACL 2024,
    arXiv 2306.09782, for updates inside backward.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
        >>> optimizer = FusedSGD([weight], lr=0.25, momentum=0.9)
        >>> weight.square().sum().backward()
        >>> weight.tolist()
        [0.5, 1.0]
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
        self._in_backward = False  # add_param_group adds no hooks until all groups are checked
        self._places: dict[Tensor, _Place] = {}
        self._updated: set[Tensor] = set()  # weights that backward has updated since step()
        self._waiting: dict[int, list[Tensor]] = {}  # weights of gathered gradients, by the stream that computed these
        self._numbers = DeviceNumbers()  # options, by group and name
        self._hooks: list[RemovableHandle] = []
        self._remove_hooks = weakref.finalize(self, _remove_all, self._hooks)
        self._remove_hooks.atexit = False
        if in_backward:
            _refuse_several_processes()
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, **_TORCH_OPTIONS}
        options |= {"stochastic_rounding": stochastic_rounding, "seed": seed, "step_seed": None}
        super().__init__(params, options)
        if in_backward:
            self._in_backward = True
            for group in self.param_groups:
                self._add_hooks(group)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with its options."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            _check_group(group)
        except BaseException:
            self.param_groups.pop()
            raise
        if self._in_backward:
            self._add_hooks(group)

    def _add_hooks(self, group: dict[str, Any]) -> None:
        # A proxy, since a parameter must not keep the optimizer alive.
        update = partial(FusedSGD._update_in_backward, weakref.proxy(self))
        self._hooks += [p.register_post_accumulate_grad_hook(update) for p in group["params"] if p.requires_grad]

    # ---- in backward -------------------------------------------------------------------------------------------------

    def _update_in_backward(self, weight: Tensor) -> None:
        """Update a weight, at once or with others; hook after its gradient."""
        if not self._updated:  # once per step: a process group may be created after the optimizer, or weights moved
            _refuse_several_processes()
            self._places = self._read_places()
        if weight not in self._places:  # taken out of its group
            return
        if _is_consumed(weight):
            _refuse_second_optimizer()
        if weight in self._updated:
            _refuse_use("a second backward")
        self._updated.add(weight)
        if launching.runs_beside_host(weight.device):  # a launch takes longer than most updates
            self._gather(weight)
        else:
            self._consume([weight])

    def _gather(self, weight: Tensor) -> None:
        """Let a weight wait for others of its stream, and update these if their gradients are large enough."""
        if not self._waiting:
            # At the end of backward, when the stream of its caller has waited for all others
            torch.autograd.Variable._execution_engine.queue_callback(self._flush_all)
        stream = launching.current_stream(weight.device)
        waiting = self._waiting.setdefault(stream, [])
        waiting.append(weight)
        if sum(x.nbytes for x in waiting) >= _GATHERED_BYTES:
            self._flush(stream)

    def _flush_all(self) -> None:
        """Update all weights that wait, at the end of backward, on the stream of its caller."""
        for stream in list(self._waiting):
            self._flush(stream)

    def _flush(self, stream: int) -> None:
        """Update the weights that wait for the gradients of a stream."""
        waiting = self._waiting.pop(stream)
        if any(map(_is_consumed, waiting)):
            _refuse_second_optimizer()
        self._consume(waiting)

    def _consume(self, weights: list[Tensor]) -> None:
        """Update weights in backward, and replace their gradients by placeholders."""
        self._update(weights)
        for weight in weights:
            assert weight.grad is not None
            weight.grad = _ConsumedGradient(weight.grad)

    def _discard_backward(self) -> None:
        """Remove what backward left: placeholders, and weights that wait because it raised an error."""
        self._waiting = {}
        for group in self.param_groups:
            for weight in group["params"]:
                if isinstance(weight.grad, _ConsumedGradient):
                    weight.grad = None

    # ---- at the end of a step ----------------------------------------------------------------------------------------

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of all weights, and forget a step that did not end, as after an error in backward."""
        self._discard_backward()
        self._updated.clear()
        super().zero_grad(set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """End a step: update every weight that still has a gradient; return the result of `closure`, if given."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        self._discard_backward()
        self._places = self._read_places()
        self._update([p for p in self._places if p.grad is not None])
        for group in self.param_groups:
            if isinstance(group["step_seed"], Tensor):
                group["step_seed"].add_(_SEED_STRIDE)
        self._updated.clear()
        self._places = {}  # a weight that is replaced can be freed
        return loss

    # ---- the update --------------------------------------------------------------------------------------------------

    def _update(self, weights: list[Tensor]) -> None:
        """Update weights by one call for each group, dtype and device."""
        alike: defaultdict[tuple[int, torch.dtype, torch.device], list[Tensor]] = defaultdict(list)
        for weight in weights:
            alike[self._places[weight].group_index, weight.dtype, weight.device].append(weight)
        for (group_index, _, device), of_group in alike.items():
            group = self.param_groups[group_index]
            # Without momentum the buffer is scratch memory: that of one weight at a time, not of the whole model.
            for part in [of_group] if group["momentum"] else [[weight] for weight in of_group]:
                functional.sgd_momentum_(
                    part,
                    [weight.grad for weight in part],  # type: ignore[misc]
                    [self._momentum_buffer(weight, group) for weight in part],
                    self._option(group_index, "lr", device),
                    momentum=self._option(group_index, "momentum", device),
                    weight_decay=self._option(group_index, "weight_decay", device),
                    seed=_step_seed(group, device),
                    offsets=[self._places[weight].offset for weight in part],
                    casts=casts.active_casts(part),
                )

    def _read_places(self) -> dict[Tensor, _Place]:
        places, offset = {}, 0
        for group_index, group in enumerate(self.param_groups):
            for weight in group["params"]:
                places[weight] = _Place(group_index, offset)
                offset += -(-weight.numel() // 4) * 4  # a multiple of 4: four elements share a hash
        return places

    def copy_options(self) -> None:
        """Copy changed learning rates, momenta and weight decays to the device, before a step on several streams.

        The streams then find these tensors, and the seed, written before the step: no other order would be certain.
        """
        for group_index, group in enumerate(self.param_groups):
            for device in {weight.device for weight in group["params"]}:
                for name in ("lr", "momentum", "weight_decay"):
                    self._option(group_index, name, device)
                _step_seed(group, device)

    def _option(self, group_index: int, name: str, device: torch.device) -> Tensor | float:
        """Option of a group: on a GPU a tensor at a fixed address, which captured graphs read at each replay."""
        option = self.param_groups[group_index][name]
        if isinstance(option, Tensor) or not launching.runs_beside_host(device):
            return option
        return self._numbers.on(device, (group_index, name), option, accumulation_dtype(device))

    def _momentum_buffer(self, weight: Tensor, group: dict[str, Any]) -> Tensor:
        if group["momentum"] == 0:
            return torch.zeros_like(weight)
        state = self.state[weight]
        buffer: Tensor | None = state.get("momentum_buffer")
        if buffer is None:
            state["momentum_buffer"] = buffer = torch.zeros_like(weight)
        return buffer

    # ---- state -------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Return the state, see `torch.optim.Optimizer.state_dict`; with stochastic rounding, a host sync."""
        state = super().state_dict()
        for group in state["param_groups"]:
            if isinstance(group["step_seed"], Tensor):
                group["step_seed"] = group["step_seed"].item()
        return state

    def close(self) -> None:
        """Remove the hooks: later gradients remain for `step()` or another optimizer."""
        self._in_backward = False
        self._discard_backward()
        self._remove_hooks()

    def __setstate__(self, state: dict[str, Any]) -> None:
        # Called by load_state_dict with the groups of a checkpoint; those of torch.optim.SGD lack some options.
        for group in state["param_groups"]:
            for option, default in self.defaults.items():
                group.setdefault(option, default)
            _check_group(group)
        super().__setstate__(state)

    def __getstate__(self) -> NoReturn:
        raise TypeError("FusedSGD: cannot be copied or pickled: its hooks are on its parameters. Use state_dict().")


def _remove_all(hooks: list[RemovableHandle]) -> None:
    for hook in hooks:
        hook.remove()


class _Place(NamedTuple):
    """Place of a weight in an optimizer."""

    group_index: int  # in `param_groups`: load_state_dict replaces the groups
    offset: int  # first of its elements among those of all weights


# ---- gradients that backward has consumed ----------------------------------------------------------------------------


class _ConsumedGradient(torch.Tensor):
    """Placeholder in `.grad` from an update in backward to `step()`, without memory; an operation on it is an error.

    With None instead, `clip_grad_norm_` would skip the weight: return 0 and clip nothing.
    """

    @staticmethod
    def __new__(cls, gradient: Tensor) -> _ConsumedGradient:
        return torch.Tensor._make_wrapper_subclass(cls, gradient.shape, dtype=gradient.dtype, device=gradient.device)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> NoReturn:  # type: ignore[override]
        _refuse_use(str(func))


def _is_consumed(weight: Tensor) -> bool:
    return weight.grad is None or isinstance(weight.grad, _ConsumedGradient)


def _refuse_second_optimizer() -> NoReturn:
    raise RuntimeError(
        "FusedSGD: the gradient of a weight was consumed before this optimizer could use it: another one updates it in "
        "backward too. Call close() on that one."
    )


def _refuse_use(use: str) -> NoReturn:
    raise RuntimeError(
        f"FusedSGD: {use} needs gradients that updates in backward have consumed. GradScaler, clip_grad_norm_ and "
        "several backward passes before step() need all gradients of a step. Use in_backward=False."
    )


# ---- numbers that kernels read ---------------------------------------------------------------------------------------


class DeviceNumbers:
    """Numbers on devices, each at a fixed address that captured graphs read, written when the number changes."""

    def __init__(self) -> None:
        self._copies: dict[tuple[torch.device, Hashable], tuple[Tensor, float]] = {}

    def on(self, device: torch.device, name: Hashable, number: float, dtype: torch.dtype) -> Tensor:
        """Return the tensor [] of a name, with this number."""
        copy, value = self._copies.get((device, name)) or (torch.empty((), dtype=dtype, device=device), None)
        if value != number:
            copy.fill_(number)
            self._copies[device, name] = copy, number
        return copy


def _step_seed(group: dict[str, Any], device: torch.device) -> Tensor | None:
    """Return the seed of the step, an int64 tensor [] on a device; None without stochastic rounding."""
    if not group["stochastic_rounding"]:
        return None
    seed = group["step_seed"]  # a number if it is from a state dict
    if seed is None:
        seed = signed64(int(np.random.SeedSequence(group["seed"]).generate_state(1, np.uint64)[0]))
    if not isinstance(seed, Tensor):
        seed = torch.full((), seed, dtype=torch.int64, device=device)
    group["step_seed"] = seed.to(device)  # the weights may have been moved
    return group["step_seed"]


# ---- checks ----------------------------------------------------------------------------------------------------------


def world_size() -> int:
    """Return the number of ranks of the default process group, 1 without one."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _refuse_several_processes() -> None:
    if (ranks := world_size()) > 1:
        raise RuntimeError(
            "FusedSGD: in_backward must be False in a process group of several ranks; got True in one of "
            f"{ranks}. Backward consumes gradients before they are averaged: the weights of the "
            "ranks would diverge. Use in_backward=False."
        )


def _check_group(group: dict[str, Any]) -> None:
    """Raise for weights or options of a group that cannot be trained with."""
    dtypes, remedy = list(FEATURE_DTYPES), "Only floating-point weights can be trained."
    if group["stochastic_rounding"]:
        dtypes, remedy = [torch.bfloat16], "Set stochastic_rounding to False, or put other weights into another group."
    for weight in group["params"]:
        check_dtype("FusedSGD", "params", weight, dtypes, remedy)
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

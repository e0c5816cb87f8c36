"""In which numbers a run computes, and in which it keeps its weights."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

Precision = Literal["auto", "fp32", "bf16", "bf16-sr", "fp16"]

_COMPUTED_IN = {"bf16": torch.bfloat16, "bf16-sr": torch.bfloat16, "fp16": torch.float16}
_KEPT = ("logit_scale", "logit_bias")  # in fp32: bf16 rounds a temperature of 100 to 98.9
# What to do where numbers are not finite any more.
REMEDY = (
    "Lower --text-lr and --image-lr, or use --precision fp32. The checkpoint of the last good epoch, if any, is kept."
)
# PyTorch's 65,536 times CLIP's temperature of 100 overflows: the first steps of a run would be left out until it has
# been halved often enough, on glyph-tiny down to 8,192.
_FIRST_SCALE = 2.0**10


class Arithmetic:
    """What a precision does to a model, to the steps, and to the updates.

    | precision | computes in | weights | update |
    |---|---|---|---|
    | fp32 | fp32 | fp32 | |
    | bf16 | bf16, by autocast | fp32 | |
    | bf16-sr | bf16 | bf16 | rounded at random, up with the probability of the part that is lost (`FusedSGD`) |
    | fp16 | fp16, by autocast | fp32 | left out where a scaled gradient is not finite; the scale follows |

    With fp16 each update waits for the device, which knows whether it may be made; in the others nothing waits.

    Args:
        precision: One of the four; not auto, which a run resolves.
        device: Where the run computes.

    Attributes:
        scaler: Of the loss, for fp16.

    Example:
        >>> arithmetic = Arithmetic("bf16", torch.device("cpu"))
        >>> with arithmetic.autocast():
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.bfloat16
    """

    def __init__(self, precision: Precision, device: torch.device):
        self._precision, self._device = precision, device
        fp16 = precision == "fp16"
        self.scaler = torch.amp.GradScaler(device.type, init_scale=_FIRST_SCALE) if fp16 else None

    def autocast(self) -> torch.autocast:
        """For the forward of a step, and for evaluation."""
        dtype = _COMPUTED_IN.get(self._precision)
        return torch.autocast(self._device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def prepare(self, model: nn.Module) -> None:
        """Give a model that was just loaded the weights that a run keeps."""
        if self._precision != "bf16-sr":
            return
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            if tensor.is_floating_point() and name.rpartition(".")[2] not in _KEPT:
                tensor.data = tensor.data.to(torch.bfloat16)

    def groups(self, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Parameter groups as the optimizer takes them: bf16 weights are marked to be rounded at random.

        A group that has weights in other types too, such as prompts that train, is divided.
        """
        if self._precision != "bf16-sr":
            return list(groups)
        divided = []
        for group in groups:
            for half in (True, False):
                some = [p for p in group["params"] if (p.dtype == torch.bfloat16) == half]
                if some:
                    divided.append(group | {"params": some, "stochastic_rounding": half})
        return divided

    def backward(self, loss: Tensor) -> None:
        """Compute gradients."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def update(self, optimizer: torch.optim.Optimizer, clip_grad_norm: float | None) -> None:
        """Clip the gradients if asked for, and update the weights."""
        if clip_grad_norm is not None:
            if self.scaler is not None:
                self.scaler.unscale_(optimizer)
            weights = [weight for group in optimizer.param_groups for weight in group["params"]]
            torch.nn.utils.clip_grad_norm_(weights, clip_grad_norm)
        if self.scaler is None:
            optimizer.step()
        else:
            self.scaler.step(optimizer)
            self.scaler.update()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        if self.scaler is not None:
            self.scaler.load_state_dict(state)

"""Mixed precision: dtypes of computation and of weights, and loss scaling."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from ...options import Precision

_AUTOCAST = {"bf16": torch.bfloat16, "bf16-sr": torch.bfloat16, "fp16": torch.float16}
_FP32 = ("logit_scale", "logit_bias")  # bf16 rounds a logit scale of 100 to 98.9
REMEDY = (
    "Lower `text_lr` and `image_lr`, or use `precision=fp32`. The checkpoint of the last good epoch, if any, is kept."
)
# PyTorch's default of 65,536 times CLIP's logit scale of 100 overflows: the first steps would be skipped until it has
# been halved enough, to 8,192 on pictogram-tiny.
_INITIAL_SCALE = 2.0**10


def in_bf16(name: str, weight: Tensor) -> Tensor:
    """Return a weight in the dtype that it has in a run in bf16-sr."""
    keeps_dtype = not weight.is_floating_point() or name.rpartition(".")[2] in _FP32
    return weight if keeps_dtype else weight.to(torch.bfloat16)


class MixedPrecision:
    """Precision of the weights, the forward and the updates of a run.

    | precision | computes in | weights | update |
    |---|---|---|---|
    | fp32 | fp32 | fp32 | |
    | bf16 | bf16, by autocast | fp32 | |
    | bf16-sr | bf16 | bf16 | stochastic rounding (`FusedSGD`) |
    | fp16 | fp16, by autocast | fp32 | skipped if a scaled gradient is not finite; the scale adapts |

    In fp16 each update has a host sync, to find out if it is skipped; the other precisions have none.

    Attributes:
        scaler: Scaler of the loss; None except for fp16.

    Example:
        >>> precision = MixedPrecision("bf16", torch.device("cpu"))
        >>> with precision.autocast():
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.bfloat16
    """

    def __init__(self, precision: Precision, device: torch.device):
        self._precision, self._device = precision, device
        fp16 = precision == "fp16"
        self.scaler = torch.amp.GradScaler(device.type, init_scale=_INITIAL_SCALE) if fp16 else None

    def autocast(self) -> torch.autocast:
        """Return the autocast context of a forward."""
        dtype = _AUTOCAST.get(self._precision)
        return torch.autocast(self._device.type, dtype or torch.bfloat16, enabled=dtype is not None)

    def prepare(self, model: nn.Module) -> None:
        """Cast the weights of a model to their dtype in the run."""
        if self._precision != "bf16-sr":
            return
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            tensor.data = in_bf16(name, tensor.data)

    def parameter_groups(self, groups: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return optimizer groups with stochastic rounding for bf16 weights; groups of mixed dtypes are split."""
        if self._precision != "bf16-sr":
            return list(groups)
        split = []
        for group in groups:
            for bf16 in (True, False):
                params = [p for p in group["params"] if (p.dtype == torch.bfloat16) == bf16]
                if params:
                    split.append(group | {"params": params, "stochastic_rounding": bf16})
        return split

    def backward(self, loss: Tensor) -> None:
        """Compute gradients, of the scaled loss in fp16."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def update(self, optimizer: torch.optim.Optimizer, clip_grad_norm: float | None) -> None:
        """Clip the gradients, if `clip_grad_norm` is given, and update the weights."""
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
        """Return the state of the scaler."""
        return {} if self.scaler is None else self.scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of the scaler."""
        if self.scaler is not None:
            self.scaler.load_state_dict(state)

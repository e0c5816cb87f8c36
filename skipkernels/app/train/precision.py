"""Mixed precision: the dtype of computation, and loss scaling."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...options import Precision

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
REMEDY = (
    "Lower `text_lr` and `image_lr`, or use `precision=fp32`. The checkpoint of the last good epoch, if any, is kept."
)
# PyTorch's default of 65,536 times CLIP's logit scale of 100 overflows: the first steps would be skipped until it has
# been halved enough, to 8,192 on pictogram-tiny.
_INITIAL_SCALE = 2.0**10


class MixedPrecision:
    """Precision of the forward of a run; weights are fp32. bf16 and fp16 are computed by autocast.

    In fp16 an update is skipped if a scaled gradient is not finite, and the scale adapts. Each update then has a host
    sync; the other precisions have none.

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

    def backward(self, loss: Tensor) -> None:
        """Compute gradients, of the scaled loss in fp16."""
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()

    def update(self, optimizer: torch.optim.Optimizer) -> None:
        """Update the weights."""
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

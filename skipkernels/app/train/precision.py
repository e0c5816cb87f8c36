"""Mixed precision: autocast of the forward, and scaling of the loss in fp16. Weights are fp32."""

from __future__ import annotations

import torch

from ...options import Precision

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REMEDY = (
    "Lower `text_lr` and `image_lr`, or use `precision=fp32`. The checkpoint of the last good epoch, if any, is kept."
)
# PyTorch's default of 65,536 times CLIP's logit scale of 100 overflows: the first steps would be skipped until it has
# been halved enough, to 8,192 on pictogram-tiny. Other models may need less.
_INITIAL_SCALE = 2.0**10


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return the autocast context of a forward in a precision other than "auto".

    Example:
        >>> with autocast("bf16", torch.device("cpu")):
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.bfloat16
    """
    return torch.autocast(device.type, _DTYPES[precision], enabled=precision != "fp32")


def grad_scaler(precision: Precision, device: torch.device) -> torch.amp.GradScaler:
    """Return the scaler of a loss, which does nothing except in fp16.

    In fp16 an update is skipped if a scaled gradient is not finite, and the scale adapts. Each update then has a host
    sync; the other precisions have none.
    """
    return torch.amp.GradScaler(device.type, init_scale=_INITIAL_SCALE, enabled=precision == "fp16")

"""Mixed precision: autocast of the forward. Weights are fp32."""

from __future__ import annotations

import torch

from ...options import Precision

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
REMEDY = (
    "Lower `text_lr` and `image_lr`, or use `precision=fp32`. The checkpoint of the last good epoch, if any, is kept."
)


def autocast(precision: Precision, device: torch.device) -> torch.autocast:
    """Return the autocast context of a forward in a precision other than "auto".

    Example:
        >>> with autocast("bf16", torch.device("cpu")):
        ...     (torch.ones(1, 1) @ torch.ones(1, 1)).dtype
        torch.bfloat16
    """
    return torch.autocast(device.type, _DTYPES[precision], enabled=precision != "fp32")

"""Default values of studies. Imports nothing heavy: the command line's help shows them."""

from __future__ import annotations

from typing import Literal

SHOTS = (1, 2, 4, 8, 16)  # training images per class in the few-shot protocol, as in CoOp

Ablated = Literal["skip_layers", "keep_ratio", "decay"]

VALUES: dict[Ablated, tuple[int | float, ...]] = {
    "skip_layers": (0, 0.25, 0.5, 0.75, 1.0),
    "keep_ratio": (0.05, 0.1, 0.25, 0.5, 1.0),
    "decay": (0.05, 0.1, 0.3, 0.6, 1.0),
}

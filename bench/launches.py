"""Calls of the operators that reach every Triton kernel and every entry of its block tables, from their records."""

from __future__ import annotations

import torch

from .operators.record import records

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
CALLS = {name: calls for record in records().values() for name, calls in record.launches.items()}
WIDTHS = {name: calls for record in records().values() for name, calls in record.widths.items()}
FAMILIES = {name: op for op, record in records().items() for name in record.launches}
"""The public operator that a registered one is a part of: its backward, or a helper in the same file."""

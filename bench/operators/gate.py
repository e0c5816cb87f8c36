"""Checks results: an error against the reference in fp64 may exceed eager's by the slack of the tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from skipkernels.formatting import first_line
from skipkernels.testing import SLACK, relative_error

from .. import measure
from . import Case

MOST_ERROR = 0.25  # of eager; its error is the bound for the others; in bf16 it is up to 0.06


class Gate:
    """The reference results of a case, and the bounds that eager's errors set."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device):
        self.case, self.dtype, self.device = case, dtype, device
        case.prepare()
        self.truth = case.truth()
        self.bounds = [0.0] * len(self.truth)
        if not isinstance(results := self._results("eager"), str):
            errors = [_error(value, truth) for value, truth in zip(results, self.truth, strict=True)]
            self.bounds = [error if error <= MOST_ERROR else 0.0 for error in errors]

    def error_of(self, name: str) -> str:
        """The reason why results are wrong or missing, or ""."""
        results = self._results(name)
        if isinstance(results, str):
            return results
        for number, (value, truth, bound) in enumerate(zip(results, self.truth, self.bounds, strict=True)):
            if not value.is_floating_point():
                continue
            # A bf16 implementation may return an fp32 loss. Ten times the slack: this catches wrong results; the tests
            # are exact.
            slack = 10 * max(SLACK[value.dtype], SLACK[self.dtype])
            if not _error(value, truth) <= bound + slack:
                return f"wrong: result {number} is off by {_error(value, truth):.1e}, eager by {bound:.1e}"
        return ""

    def _results(self, name: str) -> list[Tensor] | str:
        self.case.prepare()
        try:
            results = self.case.runs[name]()
            measure.synchronize(self.device)
        except torch.AcceleratorError:  # the device is lost: later results would be meaningless
            raise
        except Exception as error:
            return f"failed: {type(error).__name__}: {first_line(error)}"
        return results


def _error(value: Tensor, truth: Tensor) -> float:
    """The error measure of the tests; infinite if shapes or finite positions differ."""
    if value.shape != truth.shape or not torch.equal(value.isfinite(), truth.isfinite()):
        return math.inf
    return relative_error(value, truth)

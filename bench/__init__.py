"""Benchmarks: each checks its result against a baseline first, then times both in one run."""

import warnings

warnings.filterwarnings("error", r"skipkernels: no C\+\+ kernels")  # the reference is not what a benchmark measures

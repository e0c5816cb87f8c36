"""Benchmarks: each checks its result against a baseline first, then times both in one run."""

import os

os.environ.setdefault("SKIPKERNELS_CPP", "wait")  # not the reference while the C++ kernels are compiled

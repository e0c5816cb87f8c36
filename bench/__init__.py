"""Benchmarks: each checks its result against a baseline first, then times both in one run.

steps               step, infer, fuse; inputs, published and training have what they time
operators           operators/ and peers
without a GPU       counts, aot and gpu_model, by flops, launches, machine_code, recording and meta_device
on a GPU            gpu.sh, by gpu and gpu_step; tune
results             equivalence, models (by small_models), cache, when/
rows and pages      measure times, rows and tables store, report and pages/ show
"""

import warnings

warnings.filterwarnings("error", r"skipkernels: no C\+\+ kernels")  # the reference is not what a benchmark measures

#!/usr/bin/env bash
# Check and time everything on a GPU in at most nine minutes; see bench/gpu.py. Results: $OUT (default: gpu-results).
#
#   bench/gpu.sh --prepare [TARGET]    without a GPU, with the Python and Triton of the machine that has one: put into
#                                      .gpu the packages that it may lack and the compiled kernels of TARGET (sm_90)
#   bench/gpu.sh [--dry-run] [--only STAGE …]
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD:$PWD/.gpu/packages${PYTHONPATH:+:$PYTHONPATH}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/.gpu/triton}
export CUBLAS_WORKSPACE_CONFIG=:4096:8       # deterministic products
export SKIPKERNELS_CPP=${SKIPKERNELS_CPP:-0} # no time to compile what runs on a CPU
if [ "${1:-}" = --prepare ]; then
  packages=(open_clip_torch ftfy wcwidth tyro docstring_parser typeguard)
  "$python" -m pip install --quiet --no-deps --upgrade --target .gpu/packages "${packages[@]}"
  exec "$python" -m bench.gpu_stages prepare "${2:-sm_90}" 0
fi
exec timeout --kill-after=5 540 "$python" -m bench.gpu "$@"

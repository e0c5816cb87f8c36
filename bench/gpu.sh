#!/usr/bin/env bash
# Check and time everything on a GPU, unattended, in at most nine minutes. Each stage has a time limit and its output in
# $OUT/STAGE.txt (default: gpu-results); a stage that fails or is cut off does not stop the others.
#
#   bench/gpu.sh                       all stages
#   bench/gpu.sh step ncu              some stages
#   bench/gpu.sh --prepare [TARGET]    without a GPU, with the Python and Triton of the machine that has one: put into
#                                      .gpu the packages that it may lack and the kernels of a step for TARGET (sm_90)
#
#   machine     versions and devices
#   tests       pytest -m gpu, in parallel: operators against fp64, no host sync, replays equal eager steps
#   step        a step of ViT-B/16: gradients against the published step; time, also as a CUDA graph
#   operators   every operator as CUDA graphs, against eager, peers and torch.compile; operators.json
#   profile     the kernels of a step that take longest
#   memcheck, racecheck    compute-sanitizer on a small call of every operator
#   ncu         Nsight Compute on the Triton kernels of a step
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${OUT:-gpu-results}
export PYTHONPATH=$PWD:$PWD/.gpu/packages${PYTHONPATH:+:$PYTHONPATH}
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/.gpu/triton}
export SKIPKERNELS_CPP=${SKIPKERNELS_CPP:-0} # no time to compile what runs on a CPU

if [ "${1:-}" = --prepare ]; then
  "$python" -m pip install --quiet --no-deps --upgrade --target .gpu/packages \
    open_clip_torch ftfy wcwidth tyro docstring_parser typeguard pytest_benchmark py-cpuinfo
  for precision in bf16 fp32; do
    "$python" -m skipkernels warmup --target "${2:-sm_90}" --precision "$precision" || exit
  done
  exit
fi

chosen=${*:-machine tests step operators profile memcheck racecheck ncu}
mkdir -p "$out"
stage() { # NAME SECONDS COMMAND …
  [[ " $chosen " == *" $1 "* ]] || return 0
  timeout --signal=INT --kill-after=5 "$2" "${@:3}" >"$out/$1.txt" 2>&1
  echo "$1: exit status $?, $SECONDS s since the start" | tee -a "$out/log.txt"
}

stage machine 10 sh -c "nvidia-smi; $python -m pip list"
stage tests 150 "$python" -m pytest -q -m gpu -n 8 -p no:cacheprovider --continue-on-collection-errors \
  --ignore tests/integrations tests
stage step 60 "$python" -m bench.gpu step
stage operators 150 "$python" -m pytest bench/operators -q -p no:cacheprovider --device=cuda --minutes=2 \
  --benchmark-json="$out/operators.json"
stage profile 30 "$python" -m bench.gpu profile_step
# The sanitizer sees allocations only if PyTorch does not keep freed memory.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
stage memcheck 45 compute-sanitizer --tool memcheck "$python" -m bench.gpu smoke
stage racecheck 45 compute-sanitizer --tool racecheck "$python" -m bench.gpu smoke
unset PYTORCH_NO_CUDA_MEMORY_CACHING
stage ncu 40 ncu --clock-control none --kernel-name 'regex:^_.*_kernel$' --launch-count 40 "$python" -m bench.gpu one_step

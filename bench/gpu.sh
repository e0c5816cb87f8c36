#!/usr/bin/env bash
# Check and time everything on a GPU, unattended, in at most ten minutes. Each stage has a time limit and its output in
# $OUT/STAGE.txt (default: gpu-results); a stage that fails or is cut off does not stop the others. docs/gpu.md says more.
#
#   bench/gpu.sh                       all stages
#   bench/gpu.sh step ncu              some stages
#
# STEP has options of the step, such as STEP="--model ViT-L-14 --classes 100". PYTHON is the Python to run.
#
#   machine     versions, devices, and which peers can run
#   tests       pytest -m gpu, in parallel: operators against fp64, no host sync, replays equal eager steps
#   step, step_fp32        a step of ViT-B/16: gradients against the published step; launches; time, also as a CUDA graph
#   operators   every operator as CUDA graphs, against eager, peers and torch.compile; operators.json
#   profile     the kernels of a step that take longest
#   memcheck, racecheck    compute-sanitizer on a small call of every operator
#   ncu         Nsight Compute on the Triton kernels of a step
#   summary     ten lines with the goals beside the results
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${OUT:-gpu-results} STEP=${STEP:-}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export SKIPKERNELS_CPP=${SKIPKERNELS_CPP:-0} # no time to compile what runs on a CPU

processes=$(($(nproc) < 8 ? $(nproc) : 8))
chosen=${*:-machine tests step step_fp32 operators profile memcheck racecheck ncu summary}
mkdir -p "$out"
[ $# -gt 0 ] || rm -f "$out/facts.json" "$out/operators.json" # of an earlier run
stage() { # NAME SECONDS COMMAND …
  [[ " $chosen " == *" $1 "* ]] || return 0
  timeout --signal=INT --kill-after=5 "$2" "${@:3}" >"$out/$1.txt" 2>&1
  echo "$1: exit status $?, $SECONDS s since the start" | tee -a "$out/log.txt"
}

# From a cold disk the first import of torch takes most of a minute. A first run also compiles the kernels.
stage machine 60 sh -c "nvidia-smi; $python -m bench.gpu machine --out '$out'"
stage tests 120 "$python" -m pytest -v -m gpu -n "$processes" --maxschedchunk 1 -p no:cacheprovider \
  --continue-on-collection-errors $(grep -rlE 'mark\.gpu|: Backend' tests --include='test_*.py') # others import more
stage step 120 "$python" -m bench.gpu step $STEP --out "$out"
stage step_fp32 60 "$python" -m bench.gpu step $STEP --precision fp32 --out "$out"
stage operators 130 "$python" -m pytest bench/operators -q -p no:cacheprovider --device=cuda --minutes=1.7 \
  --benchmark-json="$out/operators.json"
stage profile 20 "$python" -m bench.gpu profile_step $STEP
# The sanitizer sees allocations only if PyTorch does not keep freed memory.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
stage memcheck 25 compute-sanitizer --tool memcheck "$python" -m bench.gpu smoke
stage racecheck 25 compute-sanitizer --tool racecheck "$python" -m bench.gpu smoke
unset PYTORCH_NO_CUDA_MEMORY_CACHING
stage ncu 40 ncu --profile-from-start off --clock-control none --kernel-name 'regex:^_.*_kernel$' --launch-count 60 \
  "$python" -m bench.gpu one_step $STEP
[[ " $chosen " == *" summary "* ]] && "$python" -m bench.summary "$out" | tee "$out/summary.txt"

#!/usr/bin/env bash
# Check and time everything on a GPU, unattended: in at most ten minutes on an H100, on a slower machine in up to forty.
#
#   bench/gpu.sh                       all stages but tune
#   bench/gpu.sh step ncu              some stages
#
# When a stage ends, how it ended and its results are printed, also into $OUT/summary.txt; its whole output is in
# $OUT/STAGE.txt (default of OUT: gpu-results) as it comes. One that fails, or is cut off at its limit of time, does not
# stop the others. At the end all files are in $OUT.tgz. docs/gpu.md says what to install, the goals, and where to send it.
#
#   machine     versions, devices, which peers can run, and by how much the limits of the other stages are scaled
#   tests       pytest -m gpu, in parallel: operators against fp64, no host sync, replays equal eager steps
#   step, step_fp32        steps of ViT-B/16: gradients against the published step; launches; bits; time, also as a CUDA
#               graph, and in bf16 of the published step by torch.compile
#   full        training of a whole CLIP: its own blocks, also compiled, and sk.fuse
#   operators   every operator as CUDA graphs, against eager, peers and torch.compile
#   tune        launch options of the Triton kernels, in ten minutes more: writes the table of this device into $OUT
#   profile     the kernels of a step that take longest
#   memcheck, racecheck    compute-sanitizer on a small call of every operator
#   ncu         Nsight Compute on the Triton kernels of a step
#
# PYTHON is the Python to run, by default python3. STEP has options of the steps in place of --all-shapes, such as
# STEP="--model ViT-L-14 --classes 100". With --device cpu all stages but tune, ncu and the sanitizers run without a GPU,
# with a small model in minutes: STEP="--device cpu --model vit-tiny --skip-layers 3 --classes 20 --rounds 1".
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} out=${OUT:-gpu-results} STEP=${STEP:-}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
export SKIPKERNELS_CPP=${SKIPKERNELS_CPP:-0} # no time to compile what runs on a CPU

stages="machine tests step step_fp32 full operators tune profile memcheck racecheck ncu"
chosen=${*:-${stages/ tune/}}
for name in $chosen; do
  [[ " $stages " == *" $name "* ]] || { echo "bench/gpu.sh: no stage $name; expected some of: $stages" >&2; exit 2; }
done
if ! output=$("$python" -m bench.gpu check --device cuda $STEP 2>&1); then
  reason=$(grep -m 1 -E '^[^ ]*rror: ' <<<"$output" || tail -n 1 <<<"$output")
  cat >&2 <<END
bench/gpu.sh: $python cannot run the stages: $reason
  a package is absent: $python -m pip install -c <($python -m pip list --format=freeze | grep ^torch) -e ".[cli,test]"
  a PyTorch without CUDA on a machine with a GPU: install torch and torchvision for its CUDA, see pytorch.org
  another Python: PYTHON=.venv/bin/python bench/gpu.sh
  without a GPU: STEP="--device cpu --model vit-tiny --skip-layers 3 --classes 20 --rounds 1" bench/gpu.sh
END
  exit 2
fi
mkdir -p "$out"

# Lines of an output that are results: ours; gradients, failures and counts of pytest; counts of compute-sanitizer.
results='^result: |^worst gradient|: no timing$|(^|\] )(FAILED|ERROR) |[0-9]+ (passed|failed|error|skipped)|SUMMARY: '
scaled() { # SECONDS
  local percent
  percent=$(sed -n 's/^limits of time: \([0-9]*\) %$/\1/p' "$out/machine.txt" 2>/dev/null)
  echo $(($1 * ${percent:-100} / 100))
}
stage() { # NAME SECONDS COMMAND …
  [[ " $chosen " == *" $1 "* ]] || return 0
  local limit status begin=$SECONDS
  limit=$(scaled "$2")
  { timeout --signal=INT --kill-after=5 "$limit" "${@:3}" >"$out/$1.txt" 2>&1; } 2>/dev/null # "Killed", of the shell
  status=$?
  case $status in
    0) status=done ;;
    124 | 137) status="cut off at its limit of $limit s" ;;
    127) status="$3 is not installed" ;;
    *) status="exit status $status, see $out/$1.txt" ;;
  esac
  echo "$1: $status ($((SECONDS - begin)) s)"
  grep -E "$results" "$out/$1.txt" | head -n 80 | sed 's/^/  /'
}

run() {
  # From a cold disk the first import of torch takes most of a minute. A first run also compiles the kernels.
  stage machine 90 sh -c "nvidia-smi; $python -m bench.gpu machine"
  stage tests 100 "$python" -m pytest -v -m gpu -n $(($(nproc) < 8 ? $(nproc) : 8)) --maxschedchunk 1 \
    -p no:cacheprovider --continue-on-collection-errors \
    $(grep -rlE 'mark\.gpu|: Backend' tests --include='test_*.py') # others import more
  stage step 150 "$python" -m bench.gpu step --precision bf16 ${STEP:---all-shapes} --seconds "$(scaled 116)" --out "$out"
  stage step_fp32 35 "$python" -m bench.gpu step --precision fp32 $STEP --out "$out"
  stage full 45 "$python" -m bench.gpu full --batch 32 --rounds 10 $STEP --out "$out"
  stage operators 75 "$python" -m pytest bench/operators -q -p no:cacheprovider --minutes="$(scaled 10)e-1" --save "$out"
  stage tune 600 "$python" -m bench.tune --seconds "$(scaled 570)" --out "$out"
  stage profile 20 "$python" -m bench.gpu profile_step $STEP
  # The sanitizer sees allocations only if PyTorch does not keep freed memory.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  stage memcheck 25 compute-sanitizer --tool memcheck "$python" -m bench.gpu smoke
  stage racecheck 25 compute-sanitizer --tool racecheck "$python" -m bench.gpu smoke
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
  stage ncu 35 ncu --profile-from-start off --clock-control none --kernel-name 'regex:^_.*_kernel$' --launch-count 60 \
    "$python" -m bench.gpu one_step $STEP
}
run | tee "$out/summary.txt"
tar -czf "$out.tgz" -C "$(dirname "$out")" "$(basename "$out")" && echo "all results: $out.tgz"

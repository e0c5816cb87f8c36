#!/usr/bin/env bash
# Build the C++ kernels for arm64 and run the operators' tests on them under emulation. Needs root on an x86-64 Debian 13.
#
#   tools/arm64.sh CACHE                               pytest tests/ops, those of the C++ kernels at small shapes
#   tools/arm64.sh CACHE pytest tests/ops -k gather    or other arguments of the emulated Python's -m
#
# CACHE keeps the emulated system, 1.5 GB. The first call installs the cross compiler and the emulator; it downloads and
# compiles for about eight minutes. A start of Python with torch takes a minute.
set -euo pipefail
cd "$(dirname "$0")/.."
cache=$(realpath -m "${1:?usage: tools/arm64.sh CACHE [ARGUMENTS of python -m]}")
shift
mkdir -p "$cache"/{debs,root,site,objects}

if ! { command -v qemu-aarch64-static && command -v aarch64-linux-gnu-g++; } > /dev/null; then
  dpkg --add-architecture arm64
  apt-get update -qq
  apt-get install -y -qq qemu-user-static g++-aarch64-linux-gnu
fi

if [ ! -e "$cache/root/lib" ]; then # Python of Debian 13 with its libraries
  packages="libbz2-1.0 libc6 libexpat1 libffi8 libgcc-s1 libgomp1 liblzma5 libncursesw6 libpython3.13 libpython3.13-minimal
    libpython3.13-stdlib libreadline8t64 libsqlite3-0 libssl3t64 libstdc++6 libtinfo6 libuuid1 libzstd1 python3.13
    python3.13-minimal zlib1g"
  (cd "$cache/debs" && apt-get download -qq $(printf '%s:arm64 ' $packages))
  for deb in "$cache"/debs/*.deb; do dpkg -x "$deb" "$cache/root"; done
  ln -sfn usr/lib "$cache/root/lib"
fi

if [ ! -e "$cache/site/.ready" ]; then # 2.10: the oldest torch that is supported, and the last without CUDA libraries
  python3 -m pip install -q --no-deps --target "$cache/site" --only-binary=:all: --python-version 313 \
    --platform={manylinux_2_28,manylinux_2_27,manylinux_2_17,manylinux2014}_aarch64 \
    torch==2.10.0 torchvision==0.25.0 attrs filelock fsspec hypothesis iniconfig jinja2 markupsafe mpmath networkx numpy \
    packaging pillow pluggy pygments pytest pyyaml safetensors setuptools sortedcontainers sympy timm typing_extensions \
    xxhash
  touch "$cache/site/.ready"
fi

build() { python3 -c "from skipkernels import _build; print($1)"; }
library=$cache/package/skipkernels/_C_$(build '_build.sources_digest()').abi3.so
kept=$cache/objects/$(basename "$library")
if [ ! -e "$kept" ]; then
  flags="$(build '*_build.COMPILE_FLAGS, *_build.DEFINES') -fPIC -isystem $cache/site/torch/include"
  rm -f "$cache"/objects/*.o
  printf '%s\n' csrc/*.cpp | xargs -P "$(nproc)" -I{} sh -c \
    "aarch64-linux-gnu-g++ $flags -c {} -o $cache/objects/\$(basename {} .cpp).o"
  aarch64-linux-gnu-g++ -shared "$cache"/objects/*.o -o "$kept" -L"$cache/site/torch/lib" -ltorch_cpu
fi

rm -rf "$cache/package" # a copy, since the checkout has the library of this machine
mkdir "$cache/package"
cp -r bench csrc pyproject.toml skipkernels tests "$cache/package"
rm -f "$cache"/package/skipkernels/_C_*
cp "$kept" "$library"
cd "$cache/package"
# Left out: the large shapes of a step, errors of a limit of memory, which the emulator ignores, and options of Triton.
[ $# -gt 0 ] || set -- pytest tests/ops -v --ignore=tests/ops/test_step_shapes.py --ignore=tests/ops/test_allocation.py \
  --ignore=tests/ops/test_launch_options.py --ignore=tests/ops/test_tune.py \
  -o addopts= -p no:cacheprovider -k "not (reference or interpreter or gpu or compile)"
exec qemu-aarch64-static -L "$cache/root" -E PYTHONPATH="$PWD:$cache/site" -E OMP_NUM_THREADS=1 \
  "$cache/root/usr/bin/python3.13" -m "$@"

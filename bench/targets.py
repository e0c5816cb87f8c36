"""Target GPUs: limits of their architectures, and published bandwidths and rates."""

from __future__ import annotations

from typing import NamedTuple


class Architecture(NamedTuple):
    """Limits of one multiprocessor (SM; compute unit on AMD), from the vendors' programming guides."""

    backend: str
    arch: int | str
    warp_size: int
    block_shared: int
    """Largest shared memory (LDS) of a block, in bytes."""
    shared: int
    """Shared memory, in bytes."""
    reserved_shared: int
    """Shared memory reserved by the system for each block, in bytes."""
    registers: int
    """32-bit registers of a multiprocessor."""
    thread_registers: int
    """Most registers per thread."""
    register_unit: int
    """Allocation granularity of registers per warp."""
    warps: int
    blocks: int


KIB = 1024
# NVIDIA: CUDA C++ Programming Guide, "Compute Capabilities". AMD: CDNA3 ISA guide: four SIMDs, each with 512 vector
# registers (with the accumulation registers) for every one of 64 lanes and at most 8 waves.
ARCHITECTURES = {
    "sm_80": Architecture("cuda", 80, 32, 163 * KIB, 164 * KIB, KIB, 65536, 255, 256, 64, 32),
    "sm_90": Architecture("cuda", 90, 32, 227 * KIB, 228 * KIB, KIB, 65536, 255, 256, 64, 32),
    "sm_100": Architecture("cuda", 100, 32, 227 * KIB, 228 * KIB, KIB, 65536, 255, 256, 64, 32),
    "gfx942": Architecture("hip", "gfx942", 64, 64 * KIB, 64 * KIB, 0, 131072, 512, 512, 32, 32),
}


class Gpu(NamedTuple):
    """Published specifications, without sparsity."""

    architecture: str
    multiprocessors: int
    bandwidth: float
    """Memory bandwidth, bytes/s."""
    half: float
    """Rate of the matrix units in fp16 or bf16 with fp32 accumulation, FLOP/s."""
    tf32: float


# NVIDIA's data sheets: A100 80 GB SXM; H100 SXM; H200 SXM; HGX B200, per GPU. Where a sheet gives rates "with
# sparsity" only, half of the rate.
GPUS = {
    "A100": Gpu("sm_80", 108, 2.039e12, 312e12, 156e12),
    "H100": Gpu("sm_90", 132, 3.35e12, 989.4e12, 494.7e12),
    "H200": Gpu("sm_90", 132, 4.8e12, 989.4e12, 494.7e12),
    "B200": Gpu("sm_100", 148, 7.7e12, 2250e12, 1100e12),
}

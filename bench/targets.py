"""The GPUs that kernels are made for: limits of their architectures, and what the vendors say of their speed."""

from __future__ import annotations

from typing import NamedTuple


class Architecture(NamedTuple):
    """Limits of one multiprocessor (SM; compute unit on AMD), from the vendors' programming guides."""

    backend: str
    arch: int | str
    warp_size: int
    block_shared: int
    """Bytes of shared memory (LDS) that one block may have."""
    shared: int
    """Bytes of shared memory."""
    reserved_shared: int
    """Bytes of it that the system takes for every block."""
    registers: int
    """32-bit registers of all threads."""
    thread_registers: int
    """Registers that one thread may have."""
    register_unit: int
    """Registers come to a warp in multiples of this, counted over all its threads."""
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

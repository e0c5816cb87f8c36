"""The operators of skipkernels as a kernel of Hugging Face's `kernels`."""

from . import functional, layers, reference

__all__ = ["functional", "layers", "reference"]

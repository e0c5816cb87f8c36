"""Weights file of a run: a whole model, or the state of a method."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ...folders import replace_tensors
from ...formatting import first_line
from ..data import InputError
from ..methods import Method

# Contents of a weights file: a whole model that open_clip can load, or the state of a method, for use with the
# pretrained model.
MODEL, METHOD = "model", "method"


def contents(method: Method, model: nn.Module) -> str:
    """Return MODEL if the state of a method is a whole model, else METHOD."""
    return MODEL if method.state_dict().keys() == model.state_dict().keys() else METHOD


def save_weights(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write tensors to a file."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        shared = any(tensor.data_ptr() == other.data_ptr() for other in stored.values())  # safetensors refuses it
        stored[name] = tensor.detach().clone() if shared else tensor.detach().contiguous()
    replace_tensors(path, stored)


def load_into(method: Method, path: Path) -> None:
    """Load a weights file into a method."""
    try:
        method.load_state_dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError, LookupError) as error:
        raise InputError(f"{path}: not usable as weights of this model: {first_line(error)}") from error

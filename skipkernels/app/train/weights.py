"""Weights file of a run: a whole model, the state of a method, or the weights that changed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ...digests import digest_json, digest_tensors
from ...folders import replace_tensors
from ...formatting import first_line
from ..data import InputError
from ..methods import Method
from ..untrusted import parse_object
from .precision import in_bf16

# Contents of a weights file, named in its metadata: a whole model that open_clip can load; the state of a method, for
# use with the pretrained model; or the part of either that tuning changed.
MODEL, METHOD, CHANGES = "model", "method", "changes"
_KEY = "skipkernels"  # the only metadata key: safetensors writes several in random order


class WeightsFile:
    """Contents of the weights file of a method; made before training.

    With `delta` only the weights that changed are saved, found by digests without a copy.
    """

    def __init__(self, method: Method, model: nn.Module, *, delta: bool):
        self._method = method
        self._first = _digests(method.state_dict()) if delta else None
        whole = method.state_dict().keys() == model.state_dict().keys()
        self.holds = CHANGES if delta else MODEL if whole else METHOD

    def save(self, path: Path) -> None:
        """Write the weights to a new file."""
        tensors = dict(self._method.state_dict())
        if self._first is None:
            save_weights(path, tensors, holds=self.holds)
            return
        now = _digests(tensors)
        kept = {name: tensors[name] for name in tensors if now[name] != self._first[name]}
        save_weights(path, kept, holds=self.holds, of=digest_json(self._first))

    def load(self, path: Path) -> None:
        """Load a weights file into the method."""
        found = read_metadata(path)
        try:
            weights = load_file(path)
            if found.get("holds") == CHANGES:
                first = self._method.state_dict()
                if found.get("of") != digest_json(self._first or _digests(first)):
                    # A run in bf16-sr has bf16 weights; the model may have them in fp32 here.
                    first = {name: in_bf16(name, weight) for name, weight in first.items()}
                    if found.get("of") != digest_json(_digests(first)):
                        raise InputError(
                            f"{path}: contains changes to other pretrained weights; give the same `pretrained`."
                        )
                weights = {**first, **weights}
            self._method.load_state_dict(weights)
        except (SafetensorError, OSError, RuntimeError, LookupError) as error:
            raise _unusable(path, error) from error


def save_weights(path: Path, tensors: Mapping[str, Tensor], **metadata: str) -> None:
    """Write tensors to a file, with metadata for `read_metadata`."""
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        shared = any(tensor.data_ptr() == other.data_ptr() for other in stored.values())  # safetensors refuses it
        stored[name] = tensor.detach().clone() if shared else tensor.detach().contiguous()
    replace_tensors(path, stored, {_KEY: json.dumps(metadata, sort_keys=True)})


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a weights file; empty for a file that no run wrote."""
    try:
        with safe_open(path, "pt") as file:
            values = parse_object((file.metadata() or {}).get(_KEY, "{}"))
        if not all(isinstance(value, str) for value in values.values()):
            raise ValueError("its metadata must be strings by name")
        return values
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise _unusable(path, error) from error


def has_bf16(path: Path) -> bool:
    """Return True if a weights file has a bf16 tensor, as those of runs in bf16-sr."""
    try:
        with safe_open(path, "pt") as file:
            return any(file.get_slice(name).get_dtype() == "BF16" for name in file.keys())
    except (SafetensorError, OSError) as error:
        raise _unusable(path, error) from error


def _digests(weights: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: digest_tensors([(name, tensor)]) for name, tensor in weights.items()}


def _unusable(path: Path, error: BaseException) -> InputError:
    return InputError(f"{path}: not usable as weights of this model: {first_line(error)}")

"""Weights file of a run: a whole model, the state of a method, or the weights that changed."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ...digests import digest_json, digest_tensors
from ..data import InputError
from ..methods import Method
from ..untrusted import parse_object
from .precision import in_bf16

# Contents of a weights file, named in its metadata: a whole model that open_clip can load; the state of a method, for
# use with the pretrained model; or the part of either that tuning changed.
MODEL, METHOD, CHANGES = "model", "method", "changes"
_KEY = "skipkernels"  # the only metadata key: safetensors writes several in random order


class WeightsFile:
    """Contents of the weights file of a method.

    Args:
        method: Method, before training.
        model: CLIP of the method.
        delta: Save only changed weights, found by digests without a copy.
        reloaded: Let `load` work after training too: then a delta has all trained weights, also unchanged ones.
    """

    def __init__(self, method: Method, model: nn.Module, *, delta: bool, reloaded: bool = False):
        self._method = method
        self._first = WeightDigests(method.state_dict()) if delta else None
        self._trained = _trained_names(method) if delta and reloaded else set()
        self._whole = method.state_dict().keys() == model.state_dict().keys()

    @property
    def holds(self) -> str:
        """Kind of the contents: MODEL, METHOD or CHANGES."""
        return CHANGES if self._first is not None else MODEL if self._whole else METHOD

    def contents(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Return the tensors by name, and the metadata of the file."""
        weights = dict(self._method.state_dict())
        if self._first is None:
            return weights, metadata(holds=self.holds)
        kept = {name: weights[name] for name in weights if name in self._trained}
        return kept | self._first.changed(weights), metadata(holds=self.holds, of=self._first.digest())

    def load(self, path: Path) -> None:
        """Load a weights file into the method.

        Raises:
            InputError: If it is damaged, or of another model, method or pretrained weights.
        """
        found = read_metadata(path)
        try:
            weights = load_file(path)
            if found.get("holds") == CHANGES:
                first = self._method.state_dict()
                if found.get("of") != (self._first or WeightDigests(first)).digest():
                    # A run in bf16-sr has bf16 weights; the model may have them in fp32 here.
                    first = {name: in_bf16(name, weight) for name, weight in first.items()}
                    if found.get("of") != WeightDigests(first).digest():
                        raise InputError(
                            f"{path}: contains changes to other pretrained weights; give the same `pretrained`."
                        )
                weights = {**first, **weights}
            self._method.load_state_dict(weights)
        except (SafetensorError, OSError, RuntimeError, LookupError) as error:
            raise _unusable(path, error) from error


def _trained_names(method: Method) -> set[str]:
    """Names of the trained weights in the state of a method."""
    trained = {w.data_ptr() for group in method.parameter_groups(text_lr=0.0, image_lr=0.0) for w in group["params"]}
    return {name for name, weight in method.state_dict().items() if weight.data_ptr() in trained}


class WeightDigests:
    """Digests of weights before training, to find those that changed.

    Example:
        >>> import torch
        >>> digests = WeightDigests({"a": torch.ones(1), "b": torch.ones(1)})
        >>> digests.changed({"a": torch.ones(1), "b": torch.zeros(1)})
        {'b': tensor([0.])}
    """

    def __init__(self, weights: Mapping[str, Tensor]):
        self._by_name = {name: digest_tensors([(name, tensor)]) for name, tensor in weights.items()}

    def digest(self) -> str:
        """Return the digest of all weights together."""
        return digest_json(self._by_name)

    def changed(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the weights with a different digest."""
        digests = self._by_name
        return {name: tensor for name, tensor in weights.items() if digests[name] != digest_tensors([(name, tensor)])}


def metadata(**values: str) -> dict[str, str]:
    """Return metadata of a weights file, which `read_metadata` converts back to `values`."""
    return {_KEY: json.dumps(values, sort_keys=True)}


def read_metadata(path: Path) -> dict[str, str]:
    """Read the metadata of a weights file; empty for a file that no run wrote.

    Raises:
        InputError: If it can't be read.
    """
    try:
        with safe_open(path, "pt") as file:
            values = parse_object((file.metadata() or {}).get(_KEY, "{}"))
        if not all(isinstance(value, str) for value in values.values()):
            raise ValueError("its metadata must be strings by name")
        return values
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise _unusable(path, error) from error


def has_bf16(path: Path) -> bool:
    """Return True if a weights file has a bf16 tensor, as those of runs in bf16-sr.

    Raises:
        InputError: If it can't be read.
    """
    try:
        with safe_open(path, "pt") as file:
            return any(file.get_slice(name).get_dtype() == "BF16" for name in file.keys())
    except (SafetensorError, OSError) as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: BaseException) -> InputError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = textwrap.shorten(" ".join(lines[:2]), 250, placeholder=" ….")
    return InputError(f"{path}: not usable as weights of this model: {reason}")

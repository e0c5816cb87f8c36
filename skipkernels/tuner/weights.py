"""What of a method goes into the file of its weights, and back."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from ..data import InputError
from ..store import digest_json, digest_tensors, parse_object
from .methods import Method

# What the header of the file says that it holds: a whole model, as open_clip loads it; what a method keeps besides the
# model's first weights; or of either only what tuning changed.
MODEL, METHOD, CHANGES = "model", "method", "changes"
_NOTES = "skipkernels"  # the one key of a header's metadata: of several, safetensors writes the order at random


class Weights:
    """The weights of a run as its checkpoints have them.

    Args:
        method: Before tuning.
        model: Its CLIP.
        delta: Keep only what changes. What that is is found by digests, without a copy.
    """

    def __init__(self, method: Method, model: nn.Module, *, delta: bool):
        self._method = method
        self._first = Digests(method.state_dict()) if delta else None
        self._whole = method.state_dict().keys() == model.state_dict().keys()

    def to_save(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors by name, and what the header of the file says."""
        weights = dict(self._method.state_dict())
        if self._first is None:
            return weights, notes(holds=MODEL if self._whole else METHOD)
        return self._first.changed(weights), notes(holds=CHANGES, of=self._first.all())

    def load(self, path: Path) -> None:
        """Take what such a file holds.

        Raises:
            InputError: If it is damaged, or of another model or method, or of other first weights.
        """
        holds = header(path)
        try:
            weights = load_file(path)
            if holds.get("holds") == CHANGES:
                first = self._method.state_dict()
                if holds.get("of") != Digests(first).all():
                    raise InputError(
                        f"{path}: it has the changes of other first weights than those of --pretrained; give the same."
                    )
                weights = {**first, **weights}
            self._method.load_state_dict(weights)
        except (SafetensorError, OSError, RuntimeError, LookupError) as error:
            raise _unusable(path, error) from error


class Digests:
    """Of weights before tuning, by which those that changed are found.

    Example:
        >>> import torch
        >>> digests = Digests({"a": torch.ones(1), "b": torch.ones(1)})
        >>> digests.changed({"a": torch.ones(1), "b": torch.zeros(1)})
        {'b': tensor([0.])}
    """

    def __init__(self, weights: Mapping[str, Tensor]):
        self._of = {name: digest_tensors([(name, tensor)]) for name, tensor in weights.items()}

    def all(self) -> str:
        """Of all of them together."""
        return digest_json(self._of)

    def changed(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Those that are others now."""
        return {name: tensor for name, tensor in weights.items() if self._of[name] != digest_tensors([(name, tensor)])}


def notes(**says: str) -> dict[str, str]:
    """Metadata of a file of weights, as `header` reads them."""
    return {_NOTES: json.dumps(says, sort_keys=True)}


def header(path: Path) -> dict[str, str]:
    """What the header of a file of weights says; nothing in a file that is not a run's.

    Raises:
        InputError: If it can't be read.
    """
    try:
        with safe_open(path, "pt") as file:
            says = parse_object((file.metadata() or {}).get(_NOTES, "{}"))
        if not all(isinstance(value, str) for value in says.values()):
            raise ValueError("its notes must be texts by name")
        return says
    except (SafetensorError, OSError, ValueError, TypeError) as error:
        raise _unusable(path, error) from error


def _unusable(path: Path, error: BaseException) -> InputError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    reason = textwrap.shorten(" ".join(lines[:2]), 250, placeholder=" ….")
    return InputError(f"{path}: not usable as weights of this model: {reason}")

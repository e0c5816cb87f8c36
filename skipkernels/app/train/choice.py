"""The choice of a run between candidates, candidates.json."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...formatting import first_line
from ..data import InputError
from ..results.files import CANDIDATES
from ..untrusted import read_object, validated


@dataclass(frozen=True)
class Choice:
    """The chosen candidate, and how it came about: the contents of candidates.json."""

    asked: dict[str, Any]  # `TuneConfig.identity` of the configuration that asked for a choice
    settings: dict[str, Any]  # fields of the configuration, which replace those
    because: str
    candidates: list[dict[str, Any]] = field(default_factory=list)  # for metrics.json; none if no image was held out
    calibration: dict[str, Any] = field(default_factory=dict)  # fields of a `Description`
    validation: dict[str, Any] | None = None  # for metrics.json
    by_class: list[dict[str, Any]] = field(default_factory=list)  # on the held-out images: zero-shot, chosen
    seconds: float = 0.0  # of all trials

    @classmethod
    def read(cls, folder: Path) -> Choice | None:
        """Read the choice of a run folder; None if it has none."""
        path = folder / CANDIDATES
        if not path.is_file():
            return None
        try:
            return validated(cls, read_object(path))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: damaged ({first_line(error)}). Tune again with `overwrite=True`.") from error

    def to_json(self) -> str:
        """Contents of the file."""
        return json.dumps(asdict(self), indent=2) + "\n"

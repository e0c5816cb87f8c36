"""Description and settings of a run for its export: each text that may be a path is left out or replaced."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import open_clip

from ..config import TuneConfig
from ..data.registry import IN_PYTHON, KINDS
from ..methods import METHODS
from ..train.description import Description
from ..train.model import RANDOM
from .loading import TunedRun


def public_description(run: TunedRun, weights: str) -> Description:
    """Return the description of an exported model, of which `weights` is the name of the weights file."""
    described = run.described
    tuned = METHODS[described.method].trains_model
    tags = (RANDOM, *open_clip.list_pretrained_tags_by_model(described.model))
    return replace(
        described,
        model=public_name(described.model),
        method=described.method if tuned else "zero-shot",
        settings=described.settings if tuned else {},
        data=public_name(described.data),
        pretrained=described.pretrained if described.pretrained in (None, *tags) else "file",
        weights=weights,
        whole_model=True,
    )


def public_config(config: TuneConfig, described: Description) -> TuneConfig:
    """Return the settings of a run with the names of its `public_description`."""
    names: dict[str, Any] = {name: getattr(described, name) for name in ("model", "pretrained", "data")}
    if described.data != config.data:  # the path is not shared, and a command needs one
        names["data"] += ":PATH"
    return replace(config, **names, root=None, cache=None, out=None, dataset_identity=None)


def public_name(name: str) -> str:
    """Return the name of a model or a dataset; of own files, only the kind.

    >>> public_name("imagefolder:/home/me/photos"), public_name("hf-hub:org/name")
    ('imagefolder', 'hf-hub:org/name')
    """
    kind, _, rest = name.partition(":")
    if kind in ("hf", "hf-hub"):
        public = re.fullmatch(r"[\w.-]+(/[\w.-]+)?(\?.*)?", rest) and not Path(rest).exists()
    else:
        public = not re.search(r"[/\\]", rest) and (kind == IN_PYTHON or (kind in KINDS and not KINDS[kind].own))
    return name if public or not rest else kind

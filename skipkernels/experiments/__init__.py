"""Experiments of the paper: glyphs, baselines, studies and sensitivity analysis.

Importing this package registers the dataset glyphs, the baselines and the model glyph-tiny, but does not import their
modules.
"""

from __future__ import annotations

from typing import Any

from ..data.registry import register_source
from ..tuner.registry import METHODS, MODELS


def _open_glyphs(name: str, root: Any, templates: Any, download: bool) -> Any:
    from .glyphs import open_glyphs

    return open_glyphs(name, templates)


register_source(
    "glyphs",
    _open_glyphs,
    usage="glyphs, glyphs:BLOCK such as glyphs:greek",
    about="Characters of Unicode in the fonts of matplotlib, with nothing to download.",
    example="--data glyphs:greek",
)
for _name, _baseline in {
    "full": "full:Full",
    "linear-probe": "linear_probe:LinearProbe",
    "coop": "coop:CoOp",
    "clip-adapter": "clip_adapter:CLIPAdapter",
    "lora": "lora:LoRA",
}.items():
    METHODS.register(_name, f"{__name__}.baselines.{_baseline}")
MODELS.register("glyph-tiny", f"{__name__}.glyph_tiny:PACKAGED")

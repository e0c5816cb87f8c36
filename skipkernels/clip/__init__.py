"""SkipCLIP: Skip Tuning of a CLIP that is already loaded.

A training step, `clip(images, labels)`, in the order of its calls:

    SkipCLIP.forward              skip_clip.py
        ImageEncoder.encode       images.py                    images [B, 3, height, width] → [B, D]
            ImageTower.lower      towers/image.py, base.py     below the cut: in chunks, without gradient
            ImageTower.upper      towers/image.py, base.py     above the cut
        step                      step.py
            ClassTexts.scores     texts.py                     → [C]
            RankSampler.select    selection/sampler.py         → ids [K] of the kept classes
            PromptEncoder.encode  texts.py                     ids [K] → [K, D]
                TextFeatures.rows text_features.py             below the cut: computed once, for all classes
                TextTower.upper   towers/text.py, base.py      above the cut
            cross_entropy         step.py                      → loss []

Above the cut both towers call their blocks with rows of packed tokens, in `Tower._run_upper_rows`. A block is a
`FusedBlock` (`towers/block.py`): it calls `fused_block`, an autograd node (`towers/fused/node.py`) around the forward
and backward in `towers/fused/stages.py`.
"""

from typing import Any

from .checks import blocks_to_skip, described
from .skip_clip import SkipCLIP
from .step import SkipOutput

__all__ = [
    "SkipCLIP",
    "SkipOutput",
    "blocks_to_skip",
    "check_clip",
]


def check_clip(function: str, clip: Any) -> None:
    """Raise a TypeError unless clip is a SkipCLIP."""
    if not isinstance(clip, SkipCLIP):
        raise TypeError(
            f"{function}: clip must be a SkipCLIP; got {described(clip)}. Wrap the model: "
            "SkipCLIP(model, tokens, skip_layers=…)."
        )

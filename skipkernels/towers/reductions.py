"""Exact reductions of time and memory of a tower by name, and why one is not applied; docs/method.md lists them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from .base import Tower
from .block import why_takes_no_rows
from .image import ImageTower
from .prompts import Prompts
from .text import TextTower


class Reduction(NamedTuple):
    """State of one exact reduction."""

    enabled: bool
    reason: str  # Reason why it is not applied; "" if it is


def reductions_of(image: ImageTower, text: TextTower, templates: Iterable[Prompts]) -> dict[str, Reduction]:
    """Return the reductions of both towers, as they are now; one is off if it is for the prompts of any template."""
    no_image_rows, no_text_rows = (tower.why_no_rows(tower.upper_blocks) for tower in (image, text))
    not_cropped = next(filter(None, (prompts.why_not_cropped for prompts in templates)), None)
    not_shared = next(filter(None, (prompts.why_not_shared for prompts in templates)), None)
    reasons = {
        "image.fused_block": _why_not_all_fused(image),
        "image.pooled_last_block": image.why_not_pooled() or no_image_rows,
        "image.no_input_gradient": _why_input_gradient(image),
        "text.fused_block": _why_not_all_fused(text),
        "text.text_crop": not_cropped,
        "text.shared_prefix": not_shared or no_text_rows,
        "text.pooled_last_block": no_text_rows,
        "text.no_input_gradient": _why_input_gradient(text),
        "text.features_kept": _why_input_gradient(text),
    }
    for name, tower in (("image", image), ("text", text)):
        if not tower.upper_blocks:
            reasons[f"{name}.pooled_last_block"] = "every block is skipped: the last runs once, for every token"
    return {name: Reduction(reason is None, reason or "") for name, reason in reasons.items()}


def _why_input_gradient(tower: Tower) -> str | None:
    return None if tower.skip else "nothing is skipped (skip_layers=0), so the embedding trains"


def _why_not_all_fused(tower: Tower) -> str | None:
    """Return why not all blocks take rows, or None; a reason of some blocks is given with their indices."""
    reasons = [tower.why_never_rows() or why_takes_no_rows(block) for block in tower.blocks]
    found = []
    for reason in dict.fromkeys(filter(None, reasons)):
        indices = [str(index) for index, other in enumerate(reasons) if other == reason]
        some = f"{len(indices)} of {len(reasons)} blocks ({', '.join(indices)}): "
        found.append(reason if len(indices) == len(reasons) else some + reason)
    return "; ".join(found) or None

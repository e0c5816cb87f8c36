"""Detection of a model that was altered after SkipCLIP was made."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from ..towers import ImageTower, TextTower, build_towers
from ..towers.structure import Structure, containers, fused_modules, refuse_overrides


class Snapshot:
    """Snapshot of the modules that SkipCLIP reads but does not call: containers and fused blocks."""

    def __init__(self, model: nn.Module, image: ImageTower, text: TextTower):
        around = containers(model, (image, text))
        upper = fused_modules(image, range(image.skip, len(image.blocks)))
        every_text = fused_modules(text, range(len(text.blocks)))
        self._step = Structure([*around, *upper, *every_text])
        self._lower_image = Structure(fused_modules(image, range(image.skip)))

    def is_unchanged(self, *, lower_image: bool) -> bool:
        """Return True if nothing has changed; `lower_image` includes the image blocks below the cut."""
        parts = (self._step, self._lower_image)[: 1 + lower_image]
        if all(part.is_unchanged() for part in parts):
            return True
        if any(part.replaced_method() for part in parts):
            raise RuntimeError(
                "SkipCLIP: a class of the model's modules was altered after SkipCLIP was made: its forward() was "
                "replaced, and SkipCLIP does not call it. Undo that, or call clip.refresh() to compare with the model "
                "again."
            )
        return False


def refuse_alterations(model: nn.Module, tokens: Tensor, image: ImageTower, texts: Sequence[TextTower]) -> None:
    """Raise a RuntimeError if towers read from the model now would differ from these."""
    try:
        refuse_overrides(model, containers(model, (image, texts[0])))
        fresh_image, fresh = build_towers(model, tokens.long())
    except ValueError as error:
        raise RuntimeError(f"SkipCLIP: the model was altered after SkipCLIP was made. {error}") from error
    for name, old, new in (
        ("image", image, fresh_image),
        *(("text", *pair) for pair in zip(texts, fresh, strict=True)),
    ):
        was, now = old.summary(), new.summary()
        for part in was:
            if was[part] != now[part]:
                values = now[part] if isinstance(now[part], list) else []
                reason = next((f" ({value})" for value in values if isinstance(value, str)), "")
                nan = next((n for n, x in model.named_buffers() if x.is_floating_point() and x.isnan().any()), None)
                if nan is not None:
                    reason = f" (buffer {nan} has NaN, to which averages turn −inf: average with use_buffers=False)"
                raise RuntimeError(
                    f"SkipCLIP: the {name} tower was altered after SkipCLIP was made: {part} changed{reason}. Undo "
                    "that, or call clip.refresh() to read the model again, and create the optimizer again if "
                    "parameters were replaced."
                )

"""Both encoders of a CLIP, and what they share. The cut of their towers is in cut_towers.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..options import Memory, Trainable
from ..towers.base import Reduction
from ..towers.block import fuse_blocks
from ..towers.text import TextTower
from ..towers.watch import Watched
from .checks import check_vocabulary
from .cut_towers import TowerOptions, cut_towers, restored_after_error
from .images import ImageEncoder
from .texts import ClassTexts, FixedTexts
from .trainable import check_trained, set_trainable


class Encoders:
    """Both encoders of a model, which the constructor compares with the model itself.

    Args:
        model: A CLIP. Its blocks are fused in place.
        tokens: [C, L] or [C, T, L], as kept by SkipCLIP.
        options: Number of blocks below the cut, and others of the towers.
        text_cache: Folder of the text features, or None.
        lower_device: Device of the modules below the cut, or None for that of the model.
    """

    images: ImageEncoder
    texts: ClassTexts

    def __init__(
        self,
        model: Any,
        tokens: Tensor,
        options: TowerOptions,
        *,
        text_cache: str | Path | None = None,
        lower_device: torch.device | str | None = None,
    ):
        self.model, self.tokens, self.options = model, tokens, options
        self._usual_memory: Memory = "auto" if options.memory == "min" else options.memory
        self._folder = None if text_cache is None else Path(text_cache).absolute()  # of the working directory of now
        self._lower_device = None if lower_device is None else torch.device(lower_device)
        # `trainable` and the names of what trained before `add_lora`, which sets it
        self.before_adapters: tuple[Trainable, set[str]] | None = None
        with restored_after_error(model):
            self._build()
        # The text features of all classes are computed by now, so the lower text tower can move to another device.
        self._move_lower()

    def refresh(self) -> None:
        """Read the model again; prototypes stay."""
        for encoder in (self.images, self.texts):
            encoder.tower.move_lower(self._device)  # the model itself, with which its encoders are compared, runs there
        self._build(self.texts.prototypes)
        self._move_lower()

    def _build(self, prototypes: Tensor | None = None) -> None:
        """Read the model, and compare it with its encoders; prototypes are computed unless given."""
        from ..towers.registry import build_towers  # these are needed at a construction only
        from .containers import Containers
        from .verify import verify

        image, text = build_towers(self.model)
        # 1. Fuse the blocks, cut the towers, and freeze what is below the cut
        self._containers = Containers(self.model, image, text)
        self._containers.refuse_overrides()
        cut_towers(image, text, self.options)
        set_trainable(self.model, image, text, self.options)
        with torch.autocast(self._device.type, enabled=False):
            # 2. Text features at the cut, and prototypes: embeddings of all classes before tuning
            self.images, self.texts = ImageEncoder(image), self._texts_of(text, self.tokens)
            if prototypes is None:
                self.texts.compute_prototypes()
            else:
                self.texts.prototypes = prototypes
            # 3. Comparison with the model itself
            verify(self.model, self.images, self.texts, self.tokens)

    def set_tokens(self, tokens: Tensor) -> None:
        """Replace the classes; their prototypes are computed with the current weights."""
        if self._folder is not None:
            raise RuntimeError(
                "SkipCLIP: set_classes cannot replace the classes of a text_cache. Create SkipCLIP again with another "
                "text_cache."
            )
        from .verify import verify

        tower = self.texts.tower
        texts = self._texts_of(tower, tokens)
        with torch.autocast(self._device.type, enabled=False):
            texts.compute_prototypes()
            cuts = self.images.tower.cut, tower.cut
            if all(cut.lower_device is None for cut in cuts):  # else the model itself cannot run: it is on two devices
                verify(self.model, self.images, texts, tokens)
        self.tokens, self.texts = tokens, texts
        self._move_lower()

    def _texts_of(self, tower: TextTower, tokens: Tensor) -> ClassTexts:
        check_vocabulary("SkipCLIP", "tokens", tokens, tower.vocabulary)
        kind = ClassTexts if self.options.train_text else FixedTexts
        return kind(tower, tokens.to(self._device, torch.int64), self._folder)

    @property
    def _device(self) -> torch.device:
        """Device above the cut."""
        device: torch.device = self.model.logit_scale.device
        return device

    def check_model(self) -> None:
        """Compare the model with what was read, and fuse blocks that replaced others; see `SkipCLIP.check_model`."""
        self._containers.check_unchanged()
        fuse_blocks([*self.images.tower.blocks, *self.texts.tower.blocks])
        self.images.check_contents()
        self.texts.check_contents()
        check_trained(self.images.tower, self.texts.tower, self.options)

    @property
    def reductions(self) -> dict[str, Reduction]:
        """Exact reductions of both towers by name, as they are now."""
        image, text = self.images.tower, self.texts.tower
        of_templates = [text.reductions(prompts) for prompts in self.texts.templates]
        # The state for the first template for which a reduction is disabled, or else for the first of all
        of_texts = {
            name: next((each[name] for each in of_templates if not each[name].enabled), reduction)
            for name, reduction in of_templates[0].items()
        }
        states: dict[str, Reduction] = {}
        for prefix, tower, found in (("image", image, image.reductions), ("text", text, of_texts)):
            states |= {f"{prefix}.{name}": reduction for name, reduction in found.items()}
            if tower.skip == len(tower.blocks):
                reason = "every block is skipped: the last runs once, for every token"
                states[f"{prefix}.pooled_last_block"] = Reduction(False, reason)
            no_cut = None if tower.skip else "nothing is skipped (skip_layers=0), so the embedding trains"
            states[f"{prefix}.no_input_gradient"] = Reduction.unless(no_cut)
        states["text.features_kept"] = states["text.no_input_gradient"]
        return states

    # ---- parameters --------------------------------------------------------------------------------------------------

    def trained(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the parameters of the text side and of the image side that train."""
        check_trained(self.images.tower, self.texts.tower, self.options)
        text = list(self.texts.tower.upper_parameters()) if self.options.train_text else []
        image = list(self.images.tower.upper_parameters())
        if self.options.trainable == "as_is":
            text, image = ([p for p in side if p.requires_grad] for side in (text, image))
        return [*text, *([self.model.logit_scale] if self.model.logit_scale.requires_grad else [])], image

    # ---- memory and devices ------------------------------------------------------------------------------------------

    def save_memory(self, enable: bool) -> None:
        """Save only the inputs of the blocks above the cut; else what `memory` was, or "auto" if that was "min"."""
        self.options = replace(self.options, memory="min" if enable else self._usual_memory)
        for tower in (self.images.tower, self.texts.tower):
            tower.cut = replace(tower.cut, memory=self.options.memory)

    def _move_lower(self) -> None:
        """Move the modules below the cut to their device, and count the templates. Constant texts go to the CPU."""
        text_device = self._lower_device
        if not self.options.train_text:
            self.texts.drop()
            text_device = None if self._device.type == "cpu" else torch.device("cpu")
        for tower, device in ((self.images.tower, self._lower_device), (self.texts.tower, text_device)):
            tower.cut = replace(tower.cut, lower_device=device)
            tower.move_lower()
        self.texts.tower.cut = replace(self.texts.tower.cut, runs=len(self.texts.templates))

    @contextmanager
    def converted(self, fn: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Follow a conversion or move of every module by `fn`, which the caller does within this context."""
        encoders = self.images, self.texts
        valid = [encoder for encoder in encoders if encoder.watched is not None and not encoder.is_stale()]
        yield
        for encoder in encoders:
            encoder.tower.move_lower()
        self.texts.convert(fn)
        for encoder in valid:  # its features stay valid; the converted weights have other digests
            encoder.watched = Watched(encoder.tower.lower_parts)

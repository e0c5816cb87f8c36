"""Encoding of classes to text embeddings. Features at the cut and embeddings are cached until weights change."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from ..towers import TextTower, evaluating
from ..towers.changes import Frozen
from .prompt_features import PromptFeatures, unit_norm

_ROWS_ON_GPU = 256 << 20  # bytes of a folder that a GPU holds, so that no step waits: about 40,000 classes of ViT-B


class TextEncoder:
    """Text tower of SkipCLIP, one for each template: a class has the mean embedding of its unit-norm prompts."""

    def __init__(self, towers: Sequence[TextTower], chunk: int):
        self.chunk = chunk
        self.templates = [PromptFeatures(tower, chunk) for tower in towers]
        # Embeddings of all classes, the autocast dtype and classes, and the modules and weights that computed them
        self._embeddings: tuple[Tensor, Any, Frozen] | None = None
        self.weights = Frozen(tuple)  # Modules and weights below the cut that computed the cached features

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_embeddings": None}  # not shared with other processes or copies

    @property
    def towers(self) -> list[TextTower]:
        """The tower of each template; they differ in their prompts only."""
        return [template.tower for template in self.templates]

    @property
    def tower(self) -> TextTower:
        """The tower of the first template."""
        return self.templates[0].tower

    @property
    def lower_device(self) -> torch.device | None:
        """Device of the modules below the cut, if it differs from the device above the cut."""
        return self.templates[0].lower_device

    @lower_device.setter
    def lower_device(self, device: torch.device | None) -> None:
        for template in self.templates:
            template.lower_device = device

    # ---- encoding ----------------------------------------------------------------------------------------------

    def encode(self, class_ids: Tensor, *, exact: bool = False) -> Tensor:
        """Class ids [K] to text embeddings [K, D], not normalised. With `exact` see `PackedPrompts.select`."""
        with parametrize.cached():  # low-rank updates once, not for each template
            embeddings = [encode(class_ids, exact) for encode in self.encoders()]
        if len(embeddings) == 1:
            return embeddings[0]
        return torch.stack([unit_norm(x) for x in embeddings]).mean(0).to(embeddings[0].dtype)

    def encoders(self, *, cached: bool = True) -> list[Callable[..., Tensor]]:
        """Return for each template a function from class ids [K] to embeddings [K, D]."""
        if not cached or self.tower.skip == 0:
            return [template.encode_uncached for template in self.templates]
        self._compute_features()
        return [template.encode for template in self.templates]

    def encode_tokens(self, tokens: Tensor) -> Tensor:
        """Encode prompts [B, L] that need not be classes, cropped to the longest; on a GPU with host syncs."""
        device = self.tower.tokens.device
        prompts = PromptFeatures(self.tower.with_prompts(tokens.to(device, torch.int64)), self.chunk)
        prompts.lower_device = self.lower_device
        return prompts.encode_uncached(torch.arange(len(tokens), device=device), exact=True)

    def _compute_features(self) -> None:
        """Compute the cached features, or read them from their folder, unless they are up to date."""
        changed = self.weights.changed()
        if self._has_stores():
            if changed:
                if self.weights.settings_changed():
                    raise RuntimeError(
                        "SkipCLIP: a module below the cut of the text tower has other hooks or settings than when the "
                        "features of text_cache were computed. Undo that, or call clip.refresh() to compare with the "
                        "model again."
                    )
                self._check_stores()
            if not self.reads_store():
                for template in self.templates:
                    if template.rows is None:
                        template.read()
        elif changed or any(template.rows is None for template in self.templates):
            for template in self.templates:
                template.compute()
            self.accept_weights()

    @property
    def _class_ids(self) -> Tensor:
        return torch.arange(len(self.tower.tokens), device=self.tower.tokens.device)

    def unit_embeddings(self, class_ids: Tensor) -> Tensor:
        """Unit-norm embeddings [n, D] of classes, without gradient, in chunks."""
        if self.tower.skip > 0:
            self._compute_features()
        with parametrize.cached():  # low-rank updates once, not for each chunk
            return _mean_of_units([template.unit_embeddings(class_ids) for template in self.templates])

    def class_embeddings(self, classes: slice = slice(None)) -> Tensor:
        """Unit-norm embeddings [C, D] of classes, by default all, in evaluation mode, cached until weights change."""
        device = self.tower.tokens.device.type
        options = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None, classes
        self.compare_weights()
        if self._embeddings is not None:
            embeddings, of_options, parts = self._embeddings
            comparable = not parts.is_hooked() and not parts.is_sharded()
            if options == of_options and comparable and not parts.content_changed():
                return embeddings
        with torch.inference_mode(False), evaluating([self.tower.model]):
            embeddings = self.unit_embeddings(self._class_ids[classes])
        self._embeddings = embeddings, options, Frozen(self.tower.parts)
        return embeddings

    # ---- folder ------------------------------------------------------------------------------------------------

    def use_folder(self, folder: Path) -> None:
        """Cache the features at the cut in a folder instead of in memory."""
        if self.tower.skip == 0:
            raise ValueError("SkipCLIP: text_cache keeps features at the cut, and with skip_layers=0 there is no cut.")
        for template, own in zip(self.templates, self._folders(folder), strict=True):
            template.use_folder(own)
        self.accept_weights()

    def prototypes(self, folder: Path | None, classes: slice = slice(None)) -> Tensor:
        """Unit-norm embeddings [C, D] of classes, by default all, before tuning; stored in `folder` if given."""
        if folder is None:
            return self.unit_embeddings(self._class_ids[classes])
        self._compute_features()
        stored = zip(self.templates, self._folders(folder), strict=True)
        every = _mean_of_units([template.stored_embeddings(own) for template, own in stored])
        return every if classes == slice(None) else every[classes].clone()

    def _folders(self, folder: Path) -> list[Path]:
        if len(self.templates) == 1:
            return [folder]
        return [folder / f"template_{number}" for number in range(len(self.templates))]

    def reads_store(self) -> bool:
        """Return True if each step reads the features of its classes from the folder, which on a GPU is a host sync."""
        stores = [template.store for template in self.templates if template.store is not None]
        nbytes, device = sum(store.nbytes for store in stores), self.tower.tokens.device
        return bool(stores) and not _fits_in_memory(nbytes, device)

    def _has_stores(self) -> bool:
        return self.templates[0].store is not None

    def _check_stores(self) -> None:
        identity = self.tower.lower_identity()
        for template in self.templates:
            assert template.store is not None
            template.store.check(identity)
        self.accept_weights()

    # ---- changes -----------------------------------------------------------------------------------------------

    def replace_towers(self, towers: Sequence[TextTower]) -> None:
        """Replace the towers by new ones, which were read from the model and cut."""
        for template, tower in zip(self.templates, towers, strict=True):
            template.tower = tower
        self.drop_cached()
        if self._has_stores():
            self._check_stores()

    def of_other_prompts(self, towers: Sequence[TextTower], device: torch.device) -> TextEncoder:
        """Return an encoder of the prompts of other towers on the same model, with the settings of this one."""
        if self._has_stores():
            raise RuntimeError(
                "SkipCLIP: set_classes cannot replace the classes of a text_cache. Create SkipCLIP again with another "
                "text_cache."
            )
        for tower in towers:
            tower.apply(lambda x: x.to(device))
            for name in ("skip", "memory", "attention_backend"):
                setattr(tower, name, getattr(self.tower, name))
        encoder = TextEncoder(towers, self.chunk)
        encoder.lower_device = self.lower_device
        return encoder

    def drop_cached(self) -> None:
        """Drop the features and embeddings that are cached in memory."""
        self._embeddings = None
        for template in self.templates:
            template.rows = None

    def apply(self, fn: Callable[[Tensor], Tensor], *, keep: bool = True) -> None:
        """Move or convert the tensors that belong to no module; features at the cut if `keep` and the dtype stays."""
        rows = [template.rows if keep else None for template in self.templates]
        self.drop_cached()
        for template, before in zip(self.templates, rows, strict=True):
            template.tower.apply(fn)
            if before is not None and (moved := fn(before)).dtype == before.dtype:
                template.rows = moved

    def accept_weights(self) -> None:
        """Record that the cached features are computed with the current weights below the cut."""
        self.weights = Frozen(self.tower.lower_parts)

    def compare_weights(self) -> None:
        """Compare the weights below the cut by content, and drop cached features if they differ."""
        if self.weights.content_changed():
            for template in self.templates:
                template.rows = None


def _mean_of_units(embeddings: Sequence[Tensor]) -> Tensor:
    """Unit-norm mean [n, D] of the unit-norm embeddings [n, D] of each template."""
    return embeddings[0] if len(embeddings) == 1 else unit_norm(torch.stack(list(embeddings)).mean(0))


def _fits_in_memory(nbytes: int, device: torch.device) -> bool:
    return device.type != "cpu" and nbytes <= _ROWS_ON_GPU

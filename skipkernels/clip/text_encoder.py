"""Class ids to text embeddings. Features at the cut and class embeddings are kept until weights change."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..boundary import LSkipBoundary
from ..store import digests
from ..towers import TextTower, evaluating
from ..towers.structure import Structure, WeightSnapshot, called_modules
from ..towers.text_store import TextStore, stored_prototypes


class TextEncoder:
    """Text tower of SkipCLIP.

    Args:
        tower: The text tower.
        chunk: Largest number of classes that run below the cut at once.

    Attributes:
        lower_device: Device of the modules below the cut, if it is not that of the rest.
        weights: The weights below the cut that gave the features that are kept.
    """

    lower_device: torch.device | None = None

    def __init__(self, tower: TextTower, chunk: int):
        self.tower, self.chunk = tower, chunk
        self._store: TextStore | None = None
        self._rows: Tensor | None = None  # of all classes at the cut
        self._embeddings: tuple[Tensor, Any] | None = None  # of all classes, and the weights they are from
        self.weights = WeightSnapshot(())
        self._called: tuple[Structure, Structure] | None = None  # modules that are called: all, and below the cut

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | dict.fromkeys(("_rows", "_embeddings", "_called"))  # of the modules of this process

    # ---- encoding ----------------------------------------------------------------------------------------------

    def encode(self, class_ids: Tensor) -> Tensor:
        """Class ids [K] to text embeddings [K, D], not normalised."""
        return self._from_kept()(class_ids) if self.tower.skip > 0 else self.encode_uncached(class_ids)

    def encode_uncached(self, class_ids: Tensor) -> Tensor:
        """Encode without the features that are kept."""
        tower = self.tower
        hidden = self.lower(class_ids) if tower.skip > 0 else tower.lower(tower.tokens[class_ids])
        selected = tower.prompts.select(class_ids)
        return tower.upper(selected.pack(hidden), selected)

    def lower(self, class_ids: Tensor | None = None) -> Tensor:
        """Hidden states [n, L, W] at the cut of some classes, or of all, without autocast."""
        tokens = self.tower.tokens if class_ids is None else self.tower.tokens[class_ids]
        with torch.autocast(tokens.device.type, enabled=False):
            lower_tokens = tokens.to(self.lower_device or tokens.device)
            return LSkipBoundary.apply(self.tower.lower, lower_tokens, self.chunk).to(tokens.device)

    def _from_kept(self) -> Callable[[Tensor], Tensor]:
        """Return the encoder of class ids [K] from features at the cut, kept in memory or in a folder."""
        tower = self.tower
        self._follow_called_modules()
        if self._store is not None:
            if self.weights.changed():
                self._check_store()
            gather = self._store.gather
        else:
            if self._rows is None or self.weights.changed():
                with torch.inference_mode(False), torch.no_grad():  # kept beyond the caller's context
                    self._rows = tower.prompts.pack(self.lower())
                self.weights = WeightSnapshot(tower.lower_parts)
            gather = partial(self._rows.index_select, 0)

        def encode(class_ids: Tensor) -> Tensor:
            selected = tower.prompts.select(class_ids)
            return tower.upper(gather(selected.row_numbers()), selected)

        return encode

    def unit_embeddings(self, class_ids: Tensor | None = None) -> Tensor:
        """Unit-norm embeddings [n, D] of some classes, or of all, without gradient, in chunks."""
        if class_ids is None:
            class_ids = torch.arange(len(self.tower.tokens), device=self.tower.tokens.device)
        with torch.no_grad():
            encode = self.encode_uncached if self.tower.skip == 0 else self._from_kept()
            embeddings = torch.cat([encode(chunk) for chunk in class_ids.split(self.chunk)])
            wide = torch.promote_types(embeddings.dtype, torch.float32)
            return nn.functional.normalize(embeddings.to(wide), dim=-1)

    def class_embeddings(self) -> Tensor:
        """Unit-norm embeddings [C, D] of all classes in evaluation mode, computed again after a change of weights."""
        device = self.tower.tokens.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self._follow_called_modules()
        self.compare_weights()
        parts = (*self.tower.upper_parameters(), *self.tower.lower_parameters())
        seen = autocast, digests(x.detach() for x in parts)
        if self._embeddings is None or self._embeddings[1] != seen:
            with torch.inference_mode(False), evaluating([self.tower.model]):
                self._embeddings = self.unit_embeddings(), seen
        return self._embeddings[0]

    # ---- folder ------------------------------------------------------------------------------------------------

    def keep_in(self, folder: Path) -> None:
        """Keep the features at the cut in a folder instead of in memory."""
        if self.tower.skip == 0:
            raise ValueError("SkipCLIP: text_cache keeps features at the cut, and with skip_layers=0 there is no cut.")
        self._store = TextStore(folder / "features", self.tower, self.lower, self.chunk)
        self.weights = WeightSnapshot(self.tower.lower_parts)

    def prototypes(self, folder: Path | None) -> Tensor:
        """Unit-norm embeddings [C, D] of all classes from before tuning, kept in a folder if there is one."""
        if folder is None:
            return self.unit_embeddings()
        return stored_prototypes(folder / "prototypes", self.tower, self.unit_embeddings)

    def _check_store(self) -> None:
        assert self._store is not None
        self._store.check(self.tower.lower_identity())
        self.weights = WeightSnapshot(self.tower.lower_parts)

    # ---- changes -----------------------------------------------------------------------------------------------

    def take(self, tower: TextTower) -> None:
        """Take a tower that was read again, and cut."""
        self.tower = tower
        self.forget()
        self.see_called_modules()
        if self._store is not None:
            self._check_store()

    def forget(self) -> None:
        """Drop the features and embeddings that are kept in memory."""
        self._rows = self._embeddings = None

    def apply(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Move the tensors that belong to no module."""
        self.tower.apply(fn)
        self.forget()

    def compare_weights(self) -> None:
        """Compare the weights below the cut by content, and drop features of other weights."""
        if self.weights.content_changed():
            self._rows = None

    def see_called_modules(self) -> None:
        """Take a snapshot of the modules that the tower calls."""
        self._called = (Structure(called_modules(self.tower)), Structure(called_modules(self.tower, lower=True)))

    def _follow_called_modules(self) -> None:
        """Drop what is kept if a module that the tower calls was given hooks or other settings."""
        if self._called is not None:
            every, lower = self._called
            if every.is_unchanged():
                return
            if self._store is not None and not lower.is_unchanged():
                raise RuntimeError(
                    "SkipCLIP: a module below the cut of the text tower was given hooks or other settings, which the "
                    "features of text_cache are without. Undo that, or call clip.refresh() to compare with the model "
                    "again."
                )
        self.forget()
        self.see_called_modules()

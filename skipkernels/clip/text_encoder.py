"""Encoding of classes to text embeddings. Features at the cut and embeddings are cached until weights change."""

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

_ROWS_ON_GPU = 256 << 20  # bytes of a folder that a GPU holds, so that no step waits: about 40,000 classes of ViT-B


class TextEncoder:
    """Text tower of SkipCLIP.

    Args:
        tower: The text tower.
        chunk: Largest number of classes that run below the cut at once.

    Attributes:
        lower_device: Device of the modules below the cut, if it differs from the device above the cut.
        weights: Snapshot of the weights below the cut that computed the cached features.
    """

    lower_device: torch.device | None = None

    def __init__(self, tower: TextTower, chunk: int):
        self.tower, self.chunk = tower, chunk
        self._store: TextStore | None = None
        self._rows: Tensor | None = None  # features of all classes at the cut
        self._embeddings: tuple[Tensor, Any] | None = None  # of all classes, and what they depend on
        self.weights = WeightSnapshot(())
        self._called: tuple[Structure, Structure] | None = None  # called modules: all, and below the cut

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | dict.fromkeys(("_rows", "_embeddings", "_called"))  # of this process only

    # ---- encoding ----------------------------------------------------------------------------------------------

    def encode(self, class_ids: Tensor, *, exact: bool = False) -> Tensor:
        """Class ids [K] to text embeddings [K, D], not normalised. With `exact` see `PackedPrompts.select`."""
        encode = self._cached_encoder() if self.tower.skip > 0 else self.encode_uncached
        return encode(class_ids, exact)

    def encode_uncached(self, class_ids: Tensor, exact: bool = False) -> Tensor:
        """Encode class ids without the cached features."""
        tower = self.tower
        hidden = self.lower(class_ids) if tower.skip > 0 else tower.lower(tower.tokens[class_ids])
        selected = tower.prompts.select(class_ids, exact=exact)
        return tower.upper(selected.pack(hidden), selected)

    def lower(self, class_ids: Tensor | None = None) -> Tensor:
        """Hidden states [n, L, W] of classes (by default all) at the cut, without autocast."""
        tokens = self.tower.tokens if class_ids is None else self.tower.tokens[class_ids]
        with torch.autocast(tokens.device.type, enabled=False):
            lower_tokens = tokens.to(self.lower_device or tokens.device)
            return LSkipBoundary.apply(self.tower.lower, lower_tokens, self.chunk).to(tokens.device)

    def _cached_encoder(self) -> Callable[..., Tensor]:
        """Return an encoder of class ids [K] that reads cached features, from memory or a folder."""
        tower = self.tower
        self._follow_called_modules()
        if self._store is not None:
            if self.weights.changed():
                self._check_store()
        elif self._rows is None or self.weights.changed():
            with torch.inference_mode(False), torch.no_grad():  # used beyond the caller's context
                self._rows = tower.prompts.pack(self.lower())
            self.accept_weights()
        gather = self._gather()

        def encode(class_ids: Tensor, exact: bool = False) -> Tensor:
            selected = tower.prompts.select(class_ids, exact=exact)
            return tower.upper(gather(selected.row_numbers()), selected)

        return encode

    def _gather(self) -> Callable[[Tensor], Tensor]:
        """Return a function from row numbers [R] to the features at the cut, [R, W]."""
        if self.reads_store():
            assert self._store is not None
            return self._store.gather
        if self._rows is None:
            assert self._store is not None
            with torch.inference_mode(False), torch.no_grad():
                self._rows = self._store.gather(
                    torch.arange(self.tower.prompts.row_count, device=self.tower.tokens.device)
                )
        return partial(self._rows.index_select, 0)

    def reads_store(self) -> bool:
        """Return True if each step reads the features of its classes from the folder, which on a GPU is a host sync."""
        return self._store is not None and not _fits_in_memory(self._store.nbytes, self.tower.tokens.device)

    def unit_embeddings(self, class_ids: Tensor | None = None) -> Tensor:
        """Unit-norm embeddings [n, D] of classes (by default all), without gradient, in chunks."""
        if class_ids is None:
            class_ids = torch.arange(len(self.tower.tokens), device=self.tower.tokens.device)
        with torch.no_grad():
            encode = self.encode_uncached if self.tower.skip == 0 else self._cached_encoder()
            embeddings = torch.cat([encode(chunk) for chunk in class_ids.split(self.chunk)])
            wide = torch.promote_types(embeddings.dtype, torch.float32)
            return nn.functional.normalize(embeddings.to(wide), dim=-1)

    def class_embeddings(self) -> Tensor:
        """Unit-norm embeddings [C, D] of all classes in evaluation mode, cached until weights change."""
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

    def use_folder(self, folder: Path) -> None:
        """Cache the features at the cut in a folder instead of in memory."""
        if self.tower.skip == 0:
            raise ValueError("SkipCLIP: text_cache keeps features at the cut, and with skip_layers=0 there is no cut.")
        self._store = TextStore(folder / "features", self.tower, self.lower, self.chunk)
        self.accept_weights()

    def prototypes(self, folder: Path | None) -> Tensor:
        """Unit-norm embeddings [C, D] of all classes before tuning; stored in `folder` if given."""
        if folder is None:
            return self.unit_embeddings()
        return stored_prototypes(folder / "prototypes", self.tower, self.unit_embeddings)

    def _check_store(self) -> None:
        assert self._store is not None
        self._store.check(self.tower.lower_identity())
        self.accept_weights()

    # ---- changes -----------------------------------------------------------------------------------------------

    def replace_tower(self, tower: TextTower) -> None:
        """Replace the tower by one that was read again and cut."""
        self.tower = tower
        self.drop_cached()
        self.see_called_modules()
        if self._store is not None:
            self._check_store()

    def of_other_prompts(self, tower: TextTower, device: torch.device) -> TextEncoder:
        """Return an encoder of the prompts of another tower on the same model, with the settings of this one."""
        if self._store is not None:
            raise RuntimeError(
                "SkipCLIP: set_classes cannot replace the classes of a text_cache. Create SkipCLIP again "
                "with another text_cache."
            )
        tower.apply(lambda x: x.to(device))
        for name in ("skip", "memory", "attention_backend"):
            setattr(tower, name, getattr(self.tower, name))
        encoder = TextEncoder(tower, self.chunk)
        encoder.lower_device = self.lower_device
        encoder.see_called_modules()
        return encoder

    def drop_cached(self) -> None:
        """Drop the features and embeddings that are cached in memory."""
        self._rows = self._embeddings = None

    def apply(self, fn: Callable[[Tensor], Tensor], *, keep: bool = True) -> None:
        """Move or convert the tensors that belong to no module; the features at the cut only if `keep`.

        Features are computed again in another dtype.
        """
        self.tower.apply(fn)
        rows = self._rows if keep else None
        self.drop_cached()
        if rows is not None and (moved := fn(rows)).dtype == rows.dtype:
            self._rows = moved
            self.see_called_modules()

    def is_current(self) -> bool:
        """Return True if no module that the tower calls, and no weight below the cut, has changed."""
        return self._called is not None and self._called[0].is_unchanged() and not self.weights.changed()

    def accept_weights(self) -> None:
        """Record the current weights below the cut as those of the cached features."""
        self.weights = WeightSnapshot(self.tower.lower_parts)

    def compare_weights(self) -> None:
        """Compare the weights below the cut by content, and drop cached features if they differ."""
        if self.weights.content_changed():
            self._rows = None

    def see_called_modules(self) -> None:
        """Take a snapshot of the modules that the tower calls."""
        self._called = (Structure(called_modules(self.tower)), Structure(called_modules(self.tower, lower=True)))

    def _follow_called_modules(self) -> None:
        """Drop cached values if a module that the tower calls has other hooks or settings than before."""
        if self._called is not None:
            every, lower = self._called
            if every.is_unchanged():
                return
            if self._store is not None and not lower.is_unchanged():
                raise RuntimeError(
                    "SkipCLIP: a module below the cut of the text tower has other hooks or settings than when the "
                    "features of text_cache were computed. Undo that, or call clip.refresh() to compare with the model "
                    "again."
                )
        self.drop_cached()
        self.see_called_modules()


def _fits_in_memory(nbytes: int, device: torch.device) -> bool:
    return device.type != "cpu" and nbytes <= _ROWS_ON_GPU

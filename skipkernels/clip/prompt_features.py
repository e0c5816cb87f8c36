"""Features of prompts at the cut, and text embeddings from them, for one prompt of each class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..boundary import LSkipBoundary, refusing_lost_gradients
from ..towers import TextTower
from ..towers.text_store import TextStore, stored_prototypes


class PromptFeatures:
    """Features at the cut of one prompt of each class, cached in memory or in a folder, and embeddings from them."""

    # Device of the modules below the cut, if it differs from the device above the cut
    lower_device: torch.device | None = None

    def __init__(self, tower: TextTower, chunk: int):
        self.tower, self.chunk = tower, chunk
        self.store: TextStore | None = None  # The folder, if one is used
        self.rows: Tensor | None = None  # Features of all classes in memory, [R, W], or None before they are computed

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"rows": None}

    def lower(self, class_ids: Tensor | None = None) -> Tensor:
        """Hidden states [n, L, W] of classes (by default all) at the cut, without autocast."""
        tokens = self.tower.tokens if class_ids is None else self.tower.tokens[class_ids]
        with torch.autocast(tokens.device.type, enabled=False):
            lower = refusing_lost_gradients(self.tower.lower, "text", "(…, 0)")
            lower_tokens = tokens.to(self.lower_device or tokens.device)
            return LSkipBoundary.apply(lower, lower_tokens, self.chunk).to(tokens.device)

    def compute(self) -> None:
        """Compute the features of all classes and keep them in memory."""
        prompts, rows, stop = self.tower.prompts, None, 0
        with torch.inference_mode(False), torch.enable_grad():  # used beyond the caller's context
            # Packed by chunks: hidden states [C, L, W] of whole prompts would take several times as much.
            for class_ids in torch.arange(len(self.tower.tokens), device=self.tower.tokens.device).split(self.chunk):
                packed = prompts.pack(self.lower(class_ids), class_ids)
                if rows is None:
                    rows = packed.new_empty(prompts.row_count, packed.shape[1])
                else:
                    packed = packed[prompts.prefix_length :]
                rows[stop : stop + len(packed)] = packed
                stop += len(packed)
        self.rows = rows

    def read(self) -> None:
        """Read the features of all classes from the folder and keep them in memory."""
        assert self.store is not None
        with torch.inference_mode(False), torch.no_grad():
            self.rows = self.store.gather(torch.arange(self.tower.prompts.row_count, device=self.tower.tokens.device))

    def use_folder(self, folder: Path) -> None:
        """Cache the features in a folder."""
        self.store = TextStore(folder / "features", self.tower, self.lower, self.chunk)

    def encode(self, class_ids: Tensor, exact: bool = False) -> Tensor:
        """Encode class ids [K] to embeddings [K, D] by the cached features. For `exact` see `PackedPrompts.select`."""
        selected = self.tower.prompts.select(class_ids, exact=exact)
        row_numbers = selected.row_numbers()
        if self.rows is not None:
            return self.tower.upper(self.rows.index_select(0, row_numbers), selected)
        assert self.store is not None
        return self.tower.upper(self.store.gather(row_numbers), selected)

    def encode_uncached(self, class_ids: Tensor, exact: bool = False) -> Tensor:
        """Encode class ids without the cached features."""
        tower = self.tower
        hidden = self.lower(class_ids) if tower.skip > 0 else tower.lower(tower.tokens[class_ids])
        selected = tower.prompts.select(class_ids, exact=exact)
        return tower.upper(selected.pack(hidden), selected)

    def unit_embeddings(self, class_ids: Tensor) -> Tensor:
        """Unit-norm embeddings [n, D] of classes, at least fp32, without gradient, in chunks."""
        encode = self.encode if self.tower.skip > 0 else self.encode_uncached
        with torch.no_grad():
            return unit_norm(torch.cat([encode(chunk) for chunk in class_ids.split(self.chunk)]))

    def stored_embeddings(self, folder: Path) -> Tensor:
        """Unit-norm embeddings [C, D] of all classes before tuning, stored in a folder."""
        return stored_prototypes(folder / "prototypes", self.tower, self.unit_embeddings)


def unit_norm(embeddings: Tensor) -> Tensor:
    """Unit-norm rows, at least fp32."""
    wide = torch.promote_types(embeddings.dtype, torch.float32)
    return nn.functional.normalize(embeddings.to(wide), dim=-1)

"""Encoding of classes to text embeddings. Features at the cut and embeddings are cached until weights change."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..boundary import LSkipBoundary, refusing_lost_gradients
from ..digests import digest_tensors
from ..features.table import FeatureTable
from ..towers import TextTower, evaluating
from ..towers.changes import Frozen

_ROWS_ON_GPU = 256 << 20  # bytes of a folder that a GPU holds, so that no step waits: about 40,000 classes of ViT-B


class PromptFeatures:
    """Features at the cut of one prompt of each class, in memory or in a folder, and embeddings from them."""

    def __init__(self, tower: TextTower, chunk: int, folder: Path | None = None):
        self.tower, self.chunk, self.folder = tower, chunk, folder
        self.table: FeatureTable | None = None  # Features of all classes [R, W], or None before they are computed

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"table": None}

    @property
    def rows(self) -> Tensor | None:
        """Features of all classes in memory, [R, W]; None before they are computed, and in a folder."""
        return None if self.table is None else self.table.features

    def lower(self, class_ids: Tensor | None = None) -> Tensor:
        """Hidden states [n, L, W] of classes (by default all) at the cut, without autocast."""
        tokens = self.tower.tokens if class_ids is None else self.tower.tokens[class_ids]
        with torch.autocast(tokens.device.type, enabled=False):
            lower = refusing_lost_gradients(self.tower.lower, "text", "(…, 0)")
            lower_tokens = tokens.to(self.tower.lower_device or tokens.device)
            return LSkipBoundary.apply(lower, lower_tokens, self.chunk).to(tokens.device)

    def compute(self) -> None:
        """Compute the features of all classes, or open those in the folder."""
        with torch.inference_mode(False), torch.enable_grad():  # used beyond the caller's context
            if self.folder is not None:
                from .text_cache import features_in_folder

                self.table = features_in_folder(self.folder / "features", self)
                return
            features: Tensor | None = None
            for first, rows, _ in self.chunks():
                if features is None:
                    features = rows.new_empty(self.tower.prompts.row_count, rows.shape[1])
                features[first : first + len(rows)] = rows
            assert features is not None
            self.table = FeatureTable(features)

    def chunks(self, missing: Any = None) -> Iterator[tuple[int, Tensor, int]]:
        """Yield (first row, rows [n, W], number of classes) of each chunk of classes, or of those with `missing` rows.

        Packed by chunks: hidden states [C, L, W] of whole prompts would take several times as much memory.
        """
        prompts, start, classes = self.tower.prompts, 0, 0
        ends = (prompts.starts + prompts.lengths).tolist()  # [C], the row behind each suffix
        for class_ids in torch.arange(len(self.tower.tokens), device=self.tower.tokens.device).split(self.chunk):
            classes += len(class_ids)
            end = ends[classes - 1]
            if missing is None or missing[start:end].any():
                packed = prompts.pack(self.lower(class_ids), class_ids)
                yield start, packed[prompts.prefix_length if start else 0 :], len(class_ids)
            start = end

    def read(self) -> None:
        """Read the features of all classes from the folder into memory."""
        assert self.table is not None
        ids = torch.arange(len(self.table), device=self.tower.tokens.device)
        with torch.inference_mode(False), torch.no_grad():
            self.table = FeatureTable(self.table.rows(ids))

    def encode(self, class_ids: Tensor, exact: bool = False) -> Tensor:
        """Encode class ids [K] to embeddings [K, D] by the cached features. For `exact` see `PackedPrompts.select`."""
        selected = self.tower.prompts.select(class_ids, exact=exact)
        assert self.table is not None
        return self.tower.upper(self.table.rows(selected.row_numbers), selected)

    def encode_uncached(self, class_ids: Tensor, exact: bool = False) -> Tensor:
        """Encode class ids without the cached features."""
        tower = self.tower
        hidden = self.lower(class_ids) if tower.skip > 0 else tower.lower(tower.tokens[class_ids])
        selected = tower.prompts.select(class_ids, exact=exact)
        return tower.upper(selected.pack(hidden), selected)

    def unit_embeddings(self, class_ids: Tensor) -> Tensor:
        """Unit-norm embeddings [n, D] of classes, at least fp32, without gradient, in chunks."""
        encode = self.encode_uncached if self.table is None else self.encode
        with torch.no_grad():
            return unit_norm(torch.cat([encode(chunk) for chunk in class_ids.split(self.chunk)]))


class TextEncoder:
    """Text tower of SkipCLIP, one for each template: a class has the mean embedding of its unit-norm prompts."""

    def __init__(self, towers: Sequence[TextTower], chunk: int):
        self.chunk = chunk
        self.templates = [PromptFeatures(tower, chunk) for tower in towers]
        # Embeddings of all classes, the autocast dtype, and the modules and weights above the cut that computed them
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
        return prompts.encode_uncached(torch.arange(len(tokens), device=device), exact=True)

    def embeddings_of(self, tokens: Tensor) -> Tensor:
        """Unit-norm embeddings [n, D] of prompts [n, L] or [n, T, L] in evaluation mode, not cached."""
        device = self.tower.tokens.device
        prompts = tokens.to(device, torch.int64)
        class_ids = torch.arange(len(prompts), device=device)
        with evaluating([self.tower.model]), parametrize.cached():
            towers = [self.tower.with_prompts(x) for x in (prompts.unbind(1) if prompts.ndim == 3 else [prompts])]
            return _mean_of_units([PromptFeatures(tower, self.chunk).unit_embeddings(class_ids) for tower in towers])

    def _compute_features(self) -> None:
        """Compute the cached features, or open them in their folder, unless they are up to date."""
        if not self.is_stale() and all(template.table is not None for template in self.templates):
            return
        self._embeddings = None
        for template in self.templates:
            template.compute()
        if self._has_folder() and not self.reads_folder():
            for template in self.templates:
                template.read()
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

    def class_embeddings(self) -> Tensor:
        """Unit-norm embeddings [C, D] of all classes in evaluation mode, cached until weights change."""
        device = self.tower.tokens.device.type
        autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        self.compare_weights()
        if self._embeddings is not None:
            embeddings, its_autocast, parts = self._embeddings
            comparable = not parts.is_hooked() and not parts.is_sharded()
            if autocast == its_autocast and comparable and not parts.content_changed():
                return embeddings
        with torch.inference_mode(False), evaluating([self.tower.model]):
            embeddings = self.unit_embeddings(self._class_ids)
        self._embeddings = embeddings, autocast, Frozen(self.tower.upper_parts)
        return embeddings

    # ---- folder ------------------------------------------------------------------------------------------------

    def use_folder(self, folder: Path) -> None:
        """Cache the features at the cut in a folder instead of in memory."""
        if self.tower.skip == 0:
            raise ValueError("SkipCLIP: text_cache keeps features at the cut, and with skip_layers=0 there is no cut.")
        folder = folder.absolute()  # a later change of the working directory has no effect
        for number, template in enumerate(self.templates):
            template.folder = folder if len(self.templates) == 1 else folder / f"template_{number}"

    def prototypes(self) -> Tensor:
        """Unit-norm embeddings [C, D] of all classes before tuning; kept in the folder, if there is one."""
        if not self._has_folder():
            return self.unit_embeddings(self._class_ids)
        from .text_cache import prototypes_in_folder

        self._compute_features()
        return _mean_of_units(
            [
                prototypes_in_folder(template.folder / "prototypes", template.tower, template.unit_embeddings)
                for template in self.templates
                if template.folder is not None
            ]
        )

    def reads_folder(self) -> bool:
        """Return True if each step reads the features of its classes from the folder, which on a GPU is a host sync."""
        tables = [template.table for template in self.templates if template.table is not None]
        nbytes = sum(len(table) * math.prod(table.shape) * table.dtype.itemsize for table in tables)
        return self._has_folder() and not _fits_in_memory(nbytes, self.tower.tokens.device)

    def _has_folder(self) -> bool:
        return self.templates[0].folder is not None

    # ---- changes -----------------------------------------------------------------------------------------------

    def replace_towers(self, towers: Sequence[TextTower]) -> None:
        """Replace the towers by new ones, which were read from the model and cut."""
        for template, tower in zip(self.templates, towers, strict=True):
            template.tower = tower
        self.drop_cached()

    def of_other_prompts(self, towers: Sequence[TextTower], device: torch.device) -> TextEncoder:
        """Return an encoder of the prompts of other towers on the same model, with the settings of this one."""
        if self._has_folder():
            raise RuntimeError(
                "SkipCLIP: set_classes cannot replace the classes of a text_cache. Create SkipCLIP again with another "
                "text_cache."
            )
        for tower in towers:
            tower.apply(lambda x: x.to(device))
            for name in ("skip", "memory", "attention_backend", "lower_device"):
                setattr(tower, name, getattr(self.tower, name))
        return TextEncoder(towers, self.chunk)

    def drop_cached(self) -> None:
        """Drop the features and embeddings that are cached in memory."""
        self._embeddings = None
        for template in self.templates:
            template.table = None

    def apply(self, fn: Callable[[Tensor], Tensor], *, keep: bool = True) -> None:
        """Move or convert the tensors that belong to no module; features at the cut if `keep` and the dtype stays."""
        rows = [template.rows if keep else None for template in self.templates]
        self.drop_cached()
        for template, before in zip(self.templates, rows, strict=True):
            template.tower.apply(fn)
            if before is not None and (moved := fn(before)).dtype == before.dtype:
                template.table = FeatureTable(moved)

    def trains_below(self) -> bool:
        """Return True if a weight that computed the cached features requires grad."""
        return self.weights.trains()

    def is_stale(self) -> bool:
        """Return True if the cached features were computed with other modules or weights."""
        return self.weights.changed()

    def accept_weights(self) -> None:
        """Record that the cached features are computed with the current weights below the cut."""
        self.weights = Frozen(self.tower.lower_parts)

    def compare_weights(self) -> None:
        """Compare the weights below the cut by content, and drop what is cached in memory if they differ."""
        if self.weights.content_changed():
            self.drop_cached()


def _mean_of_units(embeddings: Sequence[Tensor]) -> Tensor:
    """Unit-norm mean [n, D] of the unit-norm embeddings [n, D] of each template."""
    return embeddings[0] if len(embeddings) == 1 else unit_norm(torch.stack(list(embeddings)).mean(0))


def _fits_in_memory(nbytes: int, device: torch.device) -> bool:
    return device.type != "cpu" and nbytes <= _ROWS_ON_GPU


def unit_norm(embeddings: Tensor) -> Tensor:
    """Unit-norm rows, at least fp32."""
    wide = torch.promote_types(embeddings.dtype, torch.float32)
    return nn.functional.normalize(embeddings.to(wide), dim=-1)


# ---- prompts


def prompts_of(tokens: Tensor) -> Tensor:
    """Tokens [C, L], or [C, T, L] for several templates, int32 on the CPU."""
    return (tokens[:, 0] if tokens.ndim == 3 and tokens.shape[1] == 1 else tokens).to("cpu", torch.int32)


def prompts_digest(tokens: Tensor) -> str:
    """Digest of the prompts [C, L] or [C, T, L] of all classes."""
    return digest_tensors([("tokens", prompts_of(tokens))])


def check_tokens(tokens: Any) -> None:
    """Raise unless tokens are an integer tensor [C, L] or [C, T, L]."""
    if (
        not isinstance(tokens, Tensor)
        or tokens.ndim not in (2, 3)
        or tokens.numel() == 0
        or tokens.dtype not in (torch.int64, torch.int32)
    ):
        found = f"{tokens.dtype} {list(tokens.shape)}" if isinstance(tokens, Tensor) else type(tokens).__name__
        raise ValueError(
            f"SkipCLIP: tokens must be an int64 tensor [C, L], or [C, T, L] for T templates, with C, T and L ≥ 1; got "
            f"{found}. Tokenise a prompt of each class with the model's own tokenizer (from transformers: input_ids)."
        )


def check_range(function: str, argument: str, ids: Tensor, classes: int, remedy: str) -> None:
    """Raise if an id is outside [0, classes). A host sync on a GPU."""
    low, high = (int(x) for x in torch.aminmax(ids))
    if low < 0 or high >= classes:
        raise ValueError(f"{function}: {argument} must be in [0, C={classes}); got {low} to {high}. {remedy}")


def check_vocabulary(tokens: Tensor, vocabulary: int | None, argument: str = "SkipCLIP: tokens") -> None:
    """Raise if a token id is outside the vocabulary of the model."""
    smallest, largest = int(tokens.min()), int(tokens.max())
    if smallest < 0 or (vocabulary is not None and largest >= vocabulary):
        raise ValueError(
            f"{argument} must be ids in [0, {vocabulary}), the model's vocabulary; got {smallest} to {largest}. "
            "Use the model's own tokenizer."
        )

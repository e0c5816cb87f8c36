"""Images and captions of a step of pre-training, drawn by name."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import open_clip
import torch

from skipkernels.app.data.pictograms import TEMPLATE

from .pool import Pool

DIRECTIONS = set("left right undo redo next previous forward back backward e letter number".split())  # not mirrored


class Images:
    """Access to the images of a pool by name."""

    def __init__(self, pool: Pool, device: torch.device):
        self.alpha, self.color = (torch.from_numpy(each).to(device) for each in (pool.alpha, pool.color))
        self.by_name = np.argsort(pool.label, kind="stable")
        self.first = np.searchsorted(pool.label[self.by_name], np.arange(len(pool.names) + 1))
        self.mirrored = np.array([DIRECTIONS.isdisjoint(name.split()) for name in pool.names])

    def draw_classes(self, among: int, count: int, rng: np.random.Generator) -> np.ndarray:
        """Distinct classes, a name with four times the images twice as often."""
        keys = rng.exponential(size=among) / np.sqrt(np.diff(self.first[: among + 1]))
        return np.argsort(keys)[:count]

    def draw(self, classes: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """One image of each class, as indices."""
        first, last = self.first[classes], self.first[classes + 1]
        return self.by_name[first + (rng.random(len(classes)) * (last - first)).astype(np.int64)]

    def read(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Premultiplied RGBA in [0, 1], [B, 4, S, S], and which images are monochrome."""
        index = torch.from_numpy(indices).to(self.alpha.device)
        monochrome = len(self.alpha)
        mono = index < monochrome
        rgba = self.alpha.new_zeros(len(index), *self.color.shape[1:])
        rgba[mono, :, :, 3] = self.alpha[index[mono]]
        rgba[~mono] = self.color[index[~mono] - monochrome]
        return rgba.permute(0, 3, 1, 2).float() / 255, mono


class Captions:
    """Tokens of captions: a name, a sentence with it, or half of the time a sentence with the style.

    Words have their own tokens, so that the tokens of a sentence and of a name can be joined.
    """

    def __init__(self, model: str, names: Sequence[str], styles: Iterable[str]):
        self.tokenizer = open_clip.get_tokenizer(model)
        sentences = {
            style: f"{'an' if style[0] in 'aeiou' else 'a'} {style} icon of a " for style in set(styles) - {""}
        }
        self.openings = {style: self.tokenizer.encode(text) for style, text in sentences.items()}
        self.openings[""] = self.tokenizer.encode(TEMPLATE.format(""))
        self.names = [self.tokenizer.encode(str(name)) for name in names]

    def draw(self, classes: np.ndarray, styles: Iterable[str], rng: np.random.Generator) -> torch.Tensor:
        """Tokens of a caption for each class, [texts, L]."""
        length = self.tokenizer.context_length
        tokens = np.zeros((len(classes), length), np.int64)
        for row, index, style, draw in zip(tokens, classes, styles, rng.random(len(classes)), strict=True):
            opening = [] if draw < 0.25 else self.openings["" if draw < 0.5 else str(style)]
            text = [*opening, *self.names[index]][: length - 2]
            row[: len(text) + 2] = [self.tokenizer.sot_token_id, *text, self.tokenizer.eot_token_id]
        return torch.from_numpy(tokens)

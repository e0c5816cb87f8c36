"""The published training step in plain open_clip, the baseline of the benchmarks.

All 77 tokens run through every upper block, and the logits are dense. Otherwise it is favoured: features at the cut are
cached for images and for texts. The sampler is that of ours, by default with another tail in each step, where the
published one is drawn once per run.
"""

from __future__ import annotations

from typing import Protocol

import open_clip
import torch
import torch.nn.functional as F
from torch import Tensor

_CHUNK = 256  # texts per batch, encoded before the first step


class Sampler(Protocol):
    """A `RankSampler`, or another with its method `draw`."""

    def draw(self, num_classes: int, max_labels: int) -> Tensor:
        """Kept ranks [K]."""


def freeze(model: open_clip.CLIP, image_skip: int, text_skip: int) -> None:
    """Freeze everything below the cut, and the logit scale; set everything above the cut to train."""
    visual = model.visual
    model.requires_grad_(False)
    blocks = *visual.transformer.resblocks[image_skip:], *model.transformer.resblocks[text_skip:]
    for module in (*blocks, visual.ln_post, model.ln_final):
        module.requires_grad_(True)
    visual.proj.requires_grad_(True)
    model.text_projection.requires_grad_(True)


@torch.no_grad()
def choose_classes(image: Tensor, prototypes: Tensor, labels: Tensor, sampler: Sampler) -> Tensor:
    """The classes of a step from unit-norm image embeddings [B, D], [K] in ascending order."""
    scores = (image @ prototypes.T).amax(dim=0)
    scores[labels] = torch.inf
    order = scores.argsort(descending=True, stable=True)
    return order[sampler.draw(len(scores), len(labels))].sort().values


class PublishedStep:
    """(features at the cut [B, N, W], labels [B]) → (loss, class ids).

    The classes are sampled unless they are given, to compare two precisions on the same classes.
    """

    def __init__(self, model: open_clip.CLIP, tokens: Tensor, skip: int | tuple[int, int], sampler: Sampler):
        self.model, self.tokens, self.sampler = model, tokens, sampler
        self.image_skip, self.text_skip = (skip, skip) if isinstance(skip, int) else skip
        freeze(model, self.image_skip, self.text_skip)
        chunks = tokens.split(_CHUNK)
        with torch.no_grad():
            self.text_features = torch.cat([self._lower_text(chunk) for chunk in chunks])
            self.prototypes = torch.cat([model.encode_text(chunk, normalize=True) for chunk in chunks])

    def _lower_text(self, tokens: Tensor) -> Tensor:
        hidden = self.model.token_embedding(tokens) + self.model.positional_embedding
        for block in self.model.transformer.resblocks[: self.text_skip]:
            hidden = block(hidden, attn_mask=self.model.attn_mask)
        return hidden

    def image_features(self, images: Tensor) -> Tensor:
        """Features at the cut of images [B, 3, height, width]. open_clip has no public method for a part of a tower."""
        with torch.no_grad():
            hidden = self.model.visual._embeds(images)
            for block in self.model.visual.transformer.resblocks[: self.image_skip]:
                hidden = block(hidden)
        return hidden

    def __call__(self, features: Tensor, labels: Tensor, class_ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        model, visual = self.model, self.model.visual
        hidden = features
        for block in visual.transformer.resblocks[self.image_skip :]:
            hidden = block(hidden)
        image = F.normalize(visual._pool(hidden)[0] @ visual.proj, dim=-1)
        if class_ids is None:
            class_ids = choose_classes(image, self.prototypes, labels, self.sampler)
        text = self.text_features[class_ids]
        for block in model.transformer.resblocks[self.text_skip :]:
            text = block(text, attn_mask=model.attn_mask)
        ends = self.tokens[class_ids].argmax(dim=-1)
        text = F.normalize(model.ln_final(text)[torch.arange(len(ends)), ends] @ model.text_projection, dim=-1)
        logits = model.logit_scale.exp() * image @ text.T
        targets = torch.searchsorted(class_ids, labels)
        return F.cross_entropy(logits, targets), class_ids

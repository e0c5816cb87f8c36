"""The memory column of the paper's cost table, recomputed by formula.

    python -m bench.paper_cost

Nothing is measured: the column agrees with the estimate of a model summary (torchinfo's "estimated total size") of
ViT-B/16 in fp16, and not with what a GPU allocates. The summary adds

    the input images, in fp32;
    twice the outputs of every LayerNorm, Linear and convolution that runs, "for gradients";
    the parameters of these layers.

It leaves out attention, activation functions, gradients of parameters, the optimizer, and all else. Skip Tuning runs
the upper six blocks of each tower, with the kept classes; the number of kept classes is its expectation. Base-to-new
results are means over eleven datasets.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from statistics import fmean
from typing import NamedTuple

from skipkernels.selection import RankSampler

from .tables import show

# Base classes of ImageNet, Caltech101, Oxford Pets, Stanford Cars, Flowers102, Food101, FGVC Aircraft, SUN397, DTD,
# EuroSAT and UCF101: half of the classes, rounded up.
BASE_CLASSES = (500, 50, 19, 98, 51, 51, 50, 199, 24, 5, 51)
HALF = 2  # bytes of an fp16 element
INPUT = 3 * 224 * 224 * 4  # bytes of an image


class Tower(NamedTuple):
    """Sizes of a tower of ViT-B/16."""

    tokens: int
    width: int
    blocks: int = 12
    pooled_norm: bool = False  # the last LayerNorm takes one token only
    patch: int = 0  # side of the patches, which a convolution embeds

    def outputs(self) -> int:
        """Elements that the layers of this tower return for one image or text.

        A block has two LayerNorms and two Linears, of which one has 4·W outputs: 7·W per token. Attention calls no
        layer that the summary sees.
        """
        final = self.width if self.pooled_norm else self.tokens * self.width
        embedded = (2 * self.tokens - 1) * self.width if self.patch else 0  # patches, and a LayerNorm with one more
        return self.tokens * self.width * 7 * self.blocks + final + embedded

    def parameters(self) -> int:
        """Parameters of these layers."""
        of_block = 8 * self.width**2 + 9 * self.width
        embedded = 3 * self.patch**2 * self.width + 2 * self.width if self.patch else 0
        return of_block * self.blocks + 2 * self.width + embedded


IMAGE = Tower(197, 768, pooled_norm=True, patch=16)
TEXT = Tower(77, 512)


class Cost(NamedTuple):
    """A line of the table."""

    method: str
    protocol: str
    published: int
    megabytes: float


def summary(images: int, texts: float, image: Tower = IMAGE, text: Tower = TEXT) -> float:
    """The summary's estimate in bytes, with some images and texts."""
    elements = 2 * (images * image.outputs() + texts * text.outputs()) + image.parameters() + text.parameters()
    return images * INPUT + HALF * elements


def skip_tuning(classes: Iterable[int], decay: float) -> float:
    """The estimate for Skip Tuning with ω = ½ and batches of 4 images of one class, a mean over datasets."""
    image, text = IMAGE._replace(blocks=6, patch=0), TEXT._replace(blocks=6)
    found = []
    for each in classes:
        kept, probabilities = RankSampler(decay=decay).plan(each, 1)
        found.append(summary(4, kept + probabilities.sum().item(), image, text))
    return fmean(found)


def costs() -> list[Cost]:
    """The lines of the table. Published: Wu et al. 2025, in 10⁶ bytes."""
    mean, new, imagenet = fmean(BASE_CLASSES), "base-to-new", "ImageNet, 1,000 classes"
    return [
        Cost("KgCoOp, B = 32", new, 3188, summary(32, mean) / 1e6),
        Cost("DePT, B = 4", new, 1714, summary(4, mean) / 1e6),
        Cost("Skip Tuning, λ = 0.3", new, 404, skip_tuning(BASE_CLASSES, 0.3) / 1e6),
        Cost("Skip Tuning, λ = 0.1", new, 404, skip_tuning(BASE_CLASSES, 0.1) / 1e6),
        Cost("KgCoOp, B = 32", imagenet, 15254, summary(32, 1000) / 1e6),
        Cost("Skip Tuning, λ = 0.3", imagenet, 656, skip_tuning([1000], 0.3) / 1e6),
        Cost("Skip Tuning, λ = 0.1", imagenet, 656, skip_tuning([1000], 0.1) / 1e6),
    ]


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    show(("method", "protocol", "published", "by formula"), [(*row[:3], round(row.megabytes)) for row in costs()])


if __name__ == "__main__":
    main()

"""Tune `pictogram-tiny` on pairs of an image and a caption, and measure recall at k before and after.

    python examples/tune_pairs.py --epochs 6

A training image is an animal as one of two designers draws it; each animal has two captions. Features at the cut are
cached: of the images in a folder, of the captions in memory, by SkipCLIP. Each step draws one caption for each image.
Retrieval is measured on the drawings of a third designer.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence

import torch

import skipkernels as sk
from skipkernels.app.data import open_source
from skipkernels.app.demo import pictogram_tiny

CAPTIONS = ("{}", "an icon of a {}")


def main(arguments: Sequence[str] | None = None) -> tuple[sk.retrieval.Recall, sk.retrieval.Recall]:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--loss", choices=("softmax", "sigmoid"), default="softmax", help="of CLIP, or of SigLIP")
    parser.add_argument("--chunk", type=int, help="pairs encoded at a time; default: the whole batch")
    args = parser.parse_args(arguments)

    model, preprocess, tokenizer = pictogram_tiny.load()
    animals = open_source("pictograms:animals")
    captions = [caption.format(name) for name in animals.classes for caption in CAPTIONS]  # of animal c: 2c and 2c + 1
    image_of_caption = torch.arange(len(captions)) // len(CAPTIONS)

    clip = sk.SkipCLIP(model, tokenizer(captions), skip_layers=0.5)
    train, test = (animals.images(split, preprocess) for split in ("train", "test"))
    test_images = torch.stack([image for image, _ in test])

    @torch.no_grad()
    def evaluate() -> sk.retrieval.Recall:
        clip.eval()
        found = sk.retrieval.recall(clip.encode_image(test_images), clip.class_embeddings(), image_of_caption)
        clip.train()
        for name, recall_at in zip(("image to text", "text to image"), found, strict=True):
            print(f"  {name}:", "  ".join(f"R@{k} {share:.0%}" for k, share in recall_at.items()))
        return found

    groups = clip.parameter_groups(text_lr=5e-4, image_lr=5e-4)
    bias = None
    if args.loss == "sigmoid":  # the model was trained with a softmax: start with a probability of ½ at a cosine of 0.5
        bias = torch.nn.Parameter(-0.5 * model.logit_scale.exp().detach())
        groups.append({"params": [bias], "lr": 1e-2, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups)
    generator = torch.Generator().manual_seed(0)
    print(f"{len(train)} images, {len(captions)} captions\nzero-shot")
    before = evaluate()
    with tempfile.TemporaryDirectory() as folder:
        cache = sk.FeatureCache.build(folder, clip, train, progress=False)
        loader = cache.loader(args.batch_size, sampler="random")
        for _ in range(args.epochs):
            for features, labels in loader:
                drawn = torch.randint(len(CAPTIONS), labels.shape, generator=generator)
                ids = len(CAPTIONS) * labels + drawn
                sk.pairs.pair_loss(clip, features, ids, loss=args.loss, logit_bias=bias, chunk=args.chunk).backward()
                optimizer.step()
                optimizer.zero_grad()
    print(f"after {args.epochs} epochs")
    return before, evaluate()


if __name__ == "__main__":
    main()

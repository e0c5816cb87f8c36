"""The head of a run: fitted to its training images, and saved beside its weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from ...digests import digest_file
from ...features import FeatureCache
from ..data import InputError
from ..heads import Examples, Head, fit_head
from .checkpoint import HEAD
from .description import Description
from .setup import BATCH, RunSetup
from .weights import save_weights


@torch.no_grad()
def examples(setup: RunSetup, features: FeatureCache) -> Examples:
    """Embed training images, by their features, and the texts of their classes, with the weights as they are."""
    method = setup.method
    method.train(False)
    with setup.autocast():
        batches = features.loader(BATCH, "sequential", device=setup.device)
        image = torch.cat([method.embed(inputs) for inputs, _ in batches])
        text = method.class_embeddings(setup.task.tests[0].name)
    labels = features.labels.to(image.device)
    return Examples(image, labels, text, method.model.logit_scale.exp().item())


def use_fitted_head(setup: RunSetup, features: FeatureCache, l2: float) -> None:
    """Fit the head of the configuration to all training images, and classify the trained classes by it."""
    config = setup.config
    head = fit_head(config.head, examples(setup, features), l2, equal_priors=config.prior == "balanced")
    setup.method.use_head(head, setup.task.tests[0].classes)


def save_head(folder: Path, head: Head | None, described: Description) -> Description:
    """Write a head, if there is one; return the description that names it."""
    if head is None:
        return replace(described, head_xxh3=None)
    save_weights(folder / HEAD, head.tensors())
    return replace(described, head_xxh3=digest_file(folder / HEAD))


def load_head(folder: Path, described: Description) -> Head | None:
    """Read the head that a description names; None if there is none."""
    if described.head_xxh3 is None:
        return None
    path = folder / HEAD
    try:
        if digest_file(path) != described.head_xxh3:
            raise ValueError("it does not match classifier.json")
        return Head.from_tensors(load_file(path))
    except (OSError, ValueError, LookupError, SafetensorError) as error:
        raise InputError(
            f"{path}: missing or damaged ({error}). Copy the whole folder, or tune again in another folder, or in this "
            "one with `overwrite=True`."
        ) from error

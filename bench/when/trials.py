"""Changes of the default that were tried, on the names of the search, which no reported run has.

They are changes of the two classifiers that are the best somewhere: an anchored probe of the pretrained model, and a
Gaussian head after Skip Tuning. LP-FT (Kumar et al., "Fine-Tuning can Distort Pretrained Features and Underperform
Out-of-Distribution", ICLR 2022, arXiv 2202.10054) trains with the loss of a head: here the anchored probe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skipkernels import FeatureCache
from skipkernels.app.heads import Examples, Head, choose_l2, fit_head, gaussian_head, with_text
from skipkernels.app.methods import Method
from skipkernels.app.train.candidates import BLENDS
from skipkernels.app.train.interpolation import Interpolation
from skipkernels.app.train.setup import RunSetup

from ..rows import Row
from . import plan
from .accuracy import accuracies, rounded
from .runs import epochs_of, setup_of
from .tasks import Shift

NAME, IMAGE_ONLY = "skip, ω = ½", "skip, image only"
VIEWS = 4  # random crops of each image, beside the image
SEEDS = range(10, 15)
REFERENCE = "frozen + anchored"  # the others are compared with it

Trial = tuple[str, Any, Head | None]
"""Name, method and head."""


def planned(rows: Sequence[Row]) -> Iterator[plan.Run]:
    """All runs, with the best settings in `rows`: of LP-FT that of Skip Tuning with constant class embeddings."""
    for name in (NAME, IMAGE_ONLY):
        variant = plan.VARIANTS[name]
        for seed in SEEDS:
            yield plan.Run(Shift("all"), name, variant, plan.best(rows, variant.search), "search", seed)


def execute(run: plan.Run) -> list[dict[str, Any]]:
    """Try on the classes of a run. Returns a row for each trial."""
    setup = setup_of(run)
    tests = setup.test_features()
    found = []
    for name, method, head in changes(run, setup) if run.name == NAME else lp_ft(setup):
        found.append(run.columns | {"trial": name} | rounded(accuracies(setup, method, tests, head)))
    return found


def changes(run: plan.Run, setup: RunSetup) -> Iterator[Trial]:
    """Heads of the pretrained model, of the tuned one, and of the mean of both."""
    features, method = setup.train_features(), setup.method
    frozen = setup.examples(features)
    l2 = choose_l2("anchored", frozen)
    yield REFERENCE, method, fit_head("anchored", frozen, l2)
    views = with_views(run, frozen)
    yield "frozen + anchored, views", method, fit_head("anchored", views, l2 * len(views.image) / len(frozen.image))
    between = Interpolation(setup.trained)
    *_, _ = epochs_of(setup, features)
    tuned = setup.examples(features)
    yield "tuned + anchored", method, fit_head("anchored", tuned, l2)
    gaussian = fit_head("gaussian", tuned, 0)
    assert gaussian is not None
    yield "tuned + gaussian", method, gaussian
    alone = gaussian_head(tuned.image, tuned.labels, len(tuned.text))
    for alpha in (0.5, 2.0):
        yield f"tuned + gaussian, α = {alpha:g}", method, with_text(alone, *tuned, alpha)
    yield "tuned + gaussian, α by class", method, alpha_by_class(gaussian, tuned, frozen)
    both, examples = two_layers(method, features, tuned)
    yield "tuned + gaussian, two layers", both, fit_head("gaussian", examples, 0)
    between.end()
    between.set(BLENDS[1])
    yield "blended + gaussian", method, fit_head("gaussian", setup.examples(features), 0)


def lp_ft(setup: RunSetup) -> Iterator[Trial]:
    """LP-FT: train the image tower with the unit-norm weights of an anchored probe as the constant class embeddings.

    New classes keep their texts. Blended: the mean of the weights before and after; the class embeddings stay. The
    first trial has no training, so that it has what the norm changes.
    """
    features, method = setup.train_features(), setup.method
    frozen = setup.examples(features)
    probe = fit_head("anchored", frozen, choose_l2("anchored", frozen))
    assert probe is not None
    method.clip.texts.prototypes = F.normalize(probe.weight, dim=1)
    yield "frozen + anchored, unit norm", method, None
    between = Interpolation(setup.trained)
    *_, _ = epochs_of(setup, features)
    yield "LP-FT", method, None
    between.end()
    between.set(BLENDS[1])
    yield "LP-FT, blended", method, None


def with_views(run: plan.Run, frozen: Examples) -> Examples:
    """Examples with random crops of their images."""
    setup = setup_of(replace(run, variant=plan.Variant("skip", run.variant.settings | {"refresh": "epoch"})))
    crops = setup.train_features()
    views = [setup.examples(FeatureCache(crops.load_epoch(epoch), crops.labels)) for epoch in range(VIEWS)]
    image, labels = torch.cat([frozen.image, *(each.image for each in views)]), frozen.labels.repeat(1 + VIEWS)
    return frozen._replace(image=image, labels=labels)


def alpha_by_class(gaussian: Head, tuned: Examples, frozen: Examples) -> Head:
    """A Gaussian head with a larger weight α_c beside the texts for classes that these recognise less: 2 − 2 times the
    mean probability of the class for its images, before tuning."""
    logits = Head.of_text(frozen.text, frozen.scale).logits(frozen.image)
    right = logits.softmax(dim=1).gather(1, frozen.labels[:, None]).squeeze(1)
    counts = frozen.labels.bincount(minlength=len(frozen.text))
    alpha = 2 - 2 * right.new_zeros(len(counts)).index_add_(0, frozen.labels, right) / counts
    text = Head.of_text(tuned.text, tuned.scale)
    weight = text.weight + alpha[:, None] * (gaussian.weight - text.weight)
    return replace(gaussian, weight=weight, bias=alpha * gaussian.bias)


def two_layers(method: Method, features: FeatureCache, tuned: Examples) -> tuple[Any, Examples]:
    """A method and examples with embeddings that also have the mean token at the cut, of equal norm; texts: zeros."""

    def embed(inputs: Tensor) -> Tensor:
        return torch.cat([F.normalize(part, dim=1) for part in (method.embed(inputs), inputs.mean(dim=1))], dim=1)

    def widened(text: Tensor) -> Tensor:
        return F.pad(text, (0, image.shape[1] - text.shape[1]))

    with torch.no_grad():
        image = torch.cat([embed(inputs) for inputs, _ in features.loader(256, "sequential")])
    both = SimpleNamespace(name=method.name, train=method.train, embed=embed)
    both.class_embeddings = lambda name: widened(method.class_embeddings(name))
    return both, Examples(image, tuned.labels, widened(tuned.text), math.sqrt(2) * tuned.scale)

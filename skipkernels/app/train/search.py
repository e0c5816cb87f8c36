"""Trials of candidates on held-out training images, and the choice between them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...features import FeatureCache
from ...options import HeadName
from ..heads import Examples, choose_l2, cosine_logits, fit_head, halves, ranks
from ..report.formats import plural
from ..results.class_metrics import accuracy, metrics_of_test
from ..results.predictions import top_classes
from .calibration import calibrate
from .candidates import Candidate, Choice, groups_of, untested
from .interpolation import Interpolation
from .setup import RunSetup
from .trainer import REMEDY, Trainer

FEW = 400  # training images, below which all of them are held out, half by half
# Held-out images otherwise: a fifth of all, at least and at most these numbers, but one of each class.
SHARE, LEAST, MOST = 0.2, 200, 2000


def held_out_masks(labels: Tensor, given: int) -> list[Tensor]:
    """Return a mask [n] of held-out images for each split.

    The last `given` images, if they are a val split. Else the two halves of few images, or a fifth of many, of each
    class with two images and more; empty if there is none.

    >>> [mask.tolist() for mask in held_out_masks(torch.tensor([0, 0, 1, 1, 2]), 0)]
    [[True, False, True, False, False], [False, True, False, True, False]]
    """
    count = len(labels)
    if given:
        return [torch.arange(count) >= count - given]
    half = halves(labels)
    if not (half >= 0).any():
        return []
    if count < FEW:
        return [half == 0, half == 1]
    share = min(max(SHARE, LEAST / count), MOST / count)
    counts = labels.bincount()
    held = (counts * share).ceil().clamp(max=counts - 1)
    return [ranks(labels) >= (counts - held)[labels]]


@dataclass(eq=False)
class Trial:
    """Results of a candidate on held-out images."""

    candidate: Candidate
    accuracy: float  # in per cent
    balanced_accuracy: float
    loss: float
    logits: Tensor | None  # [n, C]; not kept if it can't be chosen

    @classmethod
    def scored(cls, candidate: Candidate, logits: Tensor, labels: Tensor) -> Trial:
        """Score logits [n, C] of held-out images."""
        top = logits.argmax(dim=1)
        plain, of_classes = (accuracy(labels, top, balanced=each) for each in (False, True))
        return cls(candidate, plain, of_classes, F.cross_entropy(logits.double(), labels).item(), logits)

    @property
    def score(self) -> tuple[float, float]:
        """Accuracy by which candidates are compared; of equal ones a lower loss is better."""
        balanced = self.candidate.asked.balances
        return round(self.balanced_accuracy if balanced else self.accuracy, 6), -self.loss

    def row(self, images: int, *, chosen: bool) -> dict[str, Any]:
        """Return what metrics.json has of the candidate."""
        return {
            "name": self.candidate.name,
            "accuracy": round(self.accuracy, 4),
            "balanced_accuracy": round(self.balanced_accuracy, 4),
            "loss": round(self.loss, 6),
            "images": images,
            "new_names": self.candidate.new_names,
            "chosen": chosen,
        }


def best(trials: Sequence[Trial]) -> tuple[Trial, int]:
    """Return the trial with the highest accuracy, and of equal ones the lowest loss; and the number of equal ones."""
    top = max(trials, key=lambda trial: trial.score)
    return top, sum(trial.score[0] == top.score[0] for trial in trials) - 1


@dataclass(eq=False)
class Split:
    """A split of the training images: those that are held out, and the penalties of heads for the others."""

    held_out: Tensor  # mask [n]
    l2: dict[HeadName, float] = field(default_factory=dict)  # chosen on the pretrained model


class Search:
    """Trials of all candidates of a configuration, on a model with its pretrained weights, which it has again after.

    Args:
        setup: Setup of the run.
        features: Features of all training images.
        frozen: All training images on the pretrained model.

    Attributes:
        groups: Candidates that share a training; see `groups_of`.
        splits: Splits of the training images; empty if none can be held out.
        trials: Trials so far, the first of the texts on pretrained embeddings.
    """

    def __init__(self, setup: RunSetup, features: FeatureCache, frozen: Examples):
        self.setup, self.config, self.features, self.frozen = setup, setup.config, features, frozen
        self.tests_new = len(setup.task.tests) > 1
        self.groups = groups_of(setup.config, tests_new=self.tests_new)
        masks = held_out_masks(features.labels, setup.task.held_out)
        self.splits = [Split(mask) for mask in masks]
        self.labels = torch.cat([features.labels[mask] for mask in masks] or [features.labels[:0]])
        self.trials: list[Trial] = []
        self._between = Interpolation(setup.trained)

    @property
    def factors(self) -> list[float]:
        """Factors of the learning rates of each training."""
        return [group[0].factor for group in self.groups if group[0].factor is not None]

    @property
    def steps(self) -> int:
        """Number of training steps of all candidates together."""
        size, epochs = self.config.batch_size or 1, self.config.epochs or 0
        per_epoch = [math.ceil(int((~split.held_out).sum()) / size) for split in self.splits]
        return len(self.factors) * epochs * sum(per_epoch)

    @property
    def allowed(self) -> list[Trial]:
        """Trials so far that can be chosen."""
        return [trial for trial in self.trials if not trial.candidate.compared]

    # ---- trials ------------------------------------------------------------------------------------------------------

    def run(self, advance: Callable[[], None] = lambda: None) -> Iterator[list[Trial]]:
        """Yield the trials of each group, none if its training diverged. `advance` is called after each step."""
        for group in self.groups if self.splits else ():
            trials = self.tried(group, advance)
            self.trials += trials
            best_so_far = self._best()[0] if self.allowed else None
            for trial in self.trials[1:]:
                if trial is not best_so_far:
                    trial.logits = None  # of all candidates they can be gigabytes
            yield trials

    def tried(self, group: Sequence[Candidate], advance: Callable[[], None] = lambda: None) -> list[Trial]:
        """Try candidates that share a training, on each split; none if it diverged."""
        try:
            logits = [self._try_split(group, split, advance) for split in self.splits]
        except FloatingPointError:
            return []
        of_candidates = map(torch.cat, zip(*logits, strict=True))
        return [Trial.scored(one, of_one, self.labels) for one, of_one in zip(group, of_candidates, strict=True)]

    def _try_split(self, group: Sequence[Candidate], split: Split, advance: Callable[[], None]) -> list[Tensor]:
        """Train without the held-out images of a split; return the logits [n, C] of these by each candidate."""
        factor = group[0].factor
        logits = []
        try:
            if factor is not None:
                self._train(factor, ~split.held_out, advance)
            self._between.end()
            for blend, blended in itertools.groupby(group, key=lambda candidate: candidate.blend):
                self._between.set(blend)
                examples = self.frozen if factor is None else self.setup.examples(self.features)
                if not (examples.image.isfinite().all() and examples.text.isfinite().all()):
                    raise FloatingPointError
                logits += [self._logits(candidate.head, examples, split) for candidate in blended]
        finally:
            self._between.end()
            self._between.set(0)
        return logits

    def _train(self, factor: float, images: Tensor, advance: Callable[[], None]) -> None:
        """Train on the images of a mask [n]; the sampler of classes has its state again afterwards."""
        config = replace(self.config, **Candidate(self.config, factor).settings)
        sampler = self.setup.method.class_sampler
        before = None if sampler is None else sampler.state_dict()
        part = self.features.subset(images.nonzero().squeeze(1))
        trainer = Trainer(config, self.setup.method, part)
        try:
            for _ in range(config.epochs or 0):
                trainer.epoch(advance, lambda loss: None)
        finally:
            if sampler is not None and before is not None:
                sampler.load_state_dict(before)

    @torch.no_grad()
    def _logits(self, name: HeadName, examples: Examples, split: Split) -> Tensor:
        """Fit a head to the images of a split that are not held out; return the logits [n, C] of the others."""
        held = split.held_out.to(examples.image.device)
        image = examples.image[held]
        if name == "none":
            return cosine_logits(image, examples.text, self.setup.method.model.logit_scale).float().cpu()
        if name not in split.l2:
            split.l2[name] = choose_l2(name, _part(self.frozen, ~held))
        balanced = self.config.prior == "balanced"
        head = fit_head(name, _part(examples, ~held), split.l2[name], equal_priors=balanced)
        assert head is not None
        return head.logits(image).float().cpu()

    # ---- choice ------------------------------------------------------------------------------------------------------

    def _best(self) -> tuple[Trial, str]:
        """Return the best trial so far, and why it is."""
        if not self.allowed:
            raise FloatingPointError(f"tune: the training of every candidate diverged. {REMEDY}")
        if self.tests_new:
            return self.allowed[-1], "new classes are tested, and held-out images do not show what these lose"
        top, equal = best(self.allowed)
        because = f"highest {'balanced ' * self.config.balances}accuracy on {len(self.labels)} held-out images"
        return top, because + (f", equal to {plural(equal, 'other')}; lowest loss" if equal else "")

    def choice(self, *, stopped: bool) -> Choice:
        """Return the choice among the trials so far; `stopped` before all of them."""
        asked = self.config.identity()
        if not self.splits:
            candidate = untested(self.groups, tests_new=self.tests_new)
            because = "no class has two training images, so that none can be held out"
            return Choice(asked, candidate.settings, because)
        chosen, because = self._best()
        first, images = self.trials[0], len(self.labels)
        ranked = sorted(self.trials, key=lambda trial: (trial is chosen, trial.score), reverse=True)
        assert first.logits is not None and chosen.logits is not None
        fields, thresholds = calibrate(chosen.logits, self.labels)
        accuracies = {"zero_shot": round(first.accuracy, 4), "tuned": round(chosen.accuracy, 4)}
        classes, tops = self.setup.task.tests[0].classes, map(top_classes, (first.logits, chosen.logits))
        return Choice(
            asked,
            chosen.candidate.settings,
            because + (", of those before Ctrl-C" if stopped else ""),
            candidates=[trial.row(images, chosen=trial is chosen) for trial in ranked],
            calibration=fields,
            validation={"images": images, **accuracies, "thresholds": thresholds},
            by_class=[metrics_of_test(self.labels, top, classes) for top in tops],
        )


def _part(examples: Examples, images: Tensor) -> Examples:
    return examples._replace(image=examples.image[images], labels=examples.labels[images])

"""Choice between candidates (`method="auto"`, `head="auto"`) by their accuracy on held-out training images.

    frozen:     the texts, and each head, on the pretrained embeddings
    trained:    Skip Tuning with each of `FACTORS` of its learning rates, with the texts and each head
    blended:    the mean of these weights and the pretrained ones, with the texts and each head

All of them share the features at the cut, which are computed once. The chosen one is then trained on all images,
held-out ones included.

Where new classes are tested, held-out images of trained classes do not show what a candidate costs them. So only those
that cost little are compared: an anchored probe on pretrained and on blended weights, and the latter are chosen only if
they are clearly better. A Gaussian head raises logits of trained classes alone, and a linear probe has none for others.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from ...features import FeatureCache
from ...options import HeadName
from ..config import TuneConfig
from ..heads import Examples, choose_l2, fit_head, halves, ranks
from ..methods.cosine import cosine_logits
from ..methods.registry import AUTO
from ..report.formats import plural
from ..report.words import name_of_classifier
from ..results.class_metrics import image_scores, metrics_of_test
from ..results.predictions import top_classes
from .calibration import calibrate
from .choice import Choice
from .precision import REMEDY
from .setup import RunSetup
from .trainer import Trainer
from .weights import Interpolation

FACTORS = (1.0, 3.0, 10.0)
"""Factors of the default learning rates."""
BLENDS = (1.0, 0.5)
"""Weights of the tuned model; 1/2 is what Wortsman et al. (WiSE-FT) recommend where nothing is known about new data."""
FEW = 400  # training images, below which all of them are held out, half by half
CLEAR = 2.0  # standard errors of a difference on the same images, above which it is clear
# Held-out images otherwise: a fifth of all, at least and at most these numbers, but one of each class.
SHARE, LEAST, MOST = 0.2, 200, 2000


@dataclass(frozen=True)
class Candidate:
    """A classifier to compare.

    Attributes:
        method: Name of the method.
        factor: Factor of its learning rates; None: it is not trained.
        blend: Weight of the trained model in a mean with the pretrained one.
        head: Head on its embeddings.
    """

    method: str
    factor: float | None
    blend: float = 1.0
    head: HeadName = "none"

    @property
    def name(self) -> str:
        """Name in tables."""
        return name_of_classifier(self.method, self.head, factor=self.factor, blend=self.blend)

    @property
    def new_names(self) -> bool:
        """True if it classifies classes without training images, by their texts."""
        return self.head != "probe"

    def settings(self, config: TuneConfig) -> dict[str, Any]:
        """Fields of the configuration that trains it on all images, in place of those of `config`."""
        settings: dict[str, Any] = {"method": self.method, "head": self.head, "train_on_validation": True}
        if self.head == "none":
            settings["prior"] = "images"  # the other is that of a head
        if self.factor is None:
            return settings | {"epochs": 0, "blend": 1.0}
        rates = {name: getattr(config, name) for name in ("text_lr", "image_lr")}
        settings |= {name: float(f"{self.factor * rate:.6g}") for name, rate in rates.items() if rate is not None}
        return settings | {"blend": self.blend}


@dataclass(eq=False)
class Trial:
    """Results of a candidate on held-out images; the logits of those that can't be chosen are not kept."""

    candidate: Candidate
    seconds: float = 0.0
    logits: list[Tensor] = field(default_factory=list)  # [n, C] of each split
    accuracy: float = 0.0
    balanced_accuracy: float = 0.0
    scores: Tensor = field(default_factory=lambda: torch.zeros(0))  # [n], with the mean of one of these
    loss: float = math.inf

    def score(self, labels: Tensor, balanced: bool) -> None:
        """Compute the accuracies in per cent, the scores of one of them, and the loss of all logits."""
        logits = torch.cat(self.logits)
        plain, of_classes = (image_scores(labels, logits.argmax(dim=1), balanced=each) for each in (False, True))
        self.accuracy, self.balanced_accuracy = plain.mean().item(), of_classes.mean().item()
        self.scores = of_classes if balanced else plain
        self.loss = F.cross_entropy(logits.double(), labels).item()

    def gain(self, other: Trial) -> tuple[float, float]:
        """Difference to another trial on the same images, and `CLEAR` standard errors of it, in points."""
        difference = self.scores - other.scores
        error = difference.std(correction=0).item() / math.sqrt(len(difference))
        return difference.mean().item(), CLEAR * error

    def row(self, *, chosen: bool) -> dict[str, Any]:
        """Return what metrics.json has of the candidate."""
        return {
            "name": self.candidate.name,
            "accuracy": round(self.accuracy, 4),
            "balanced_accuracy": round(self.balanced_accuracy, 4),
            "images": len(self.scores),
            "seconds": round(self.seconds, 4),
            "new_names": self.candidate.new_names,
            "chosen": chosen,
        }


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


class Search:
    """Trials of all candidates of a configuration, on a model with its pretrained weights, which it has again after.

    Args:
        setup: Setup of the run.
        features: Features of all training images.

    Attributes:
        advance: Called after each training step.
        frozen: All training images on the pretrained model.
        masks: Mask [n] of the held-out images of each split.
        trials: Trials so far, the first of the texts on pretrained embeddings.
    """

    def __init__(self, setup: RunSetup, features: FeatureCache):
        self.setup, self.config, self.features = setup, setup.config, features
        self.advance: Callable[[], None] = lambda: None
        self.masks = held_out_masks(features.labels, setup.task.held_out)
        self.labels = torch.cat([features.labels[mask] for mask in self.masks] or [features.labels[:0]])
        self.trials: list[Trial] = []
        self.frozen = setup.examples(features)
        self._between = Interpolation(setup.trained)
        self._l2: dict[tuple[int, HeadName], float] = {}  # by split

    @property
    def method(self) -> str:
        """Name of the method that is trained."""
        return "skip" if self.config.method == AUTO else self.config.method

    @property
    def factors(self) -> tuple[float, ...]:
        """Factors of the learning rates; none for a method or a run without steps."""
        if not self.config.epochs:
            return ()
        return FACTORS if self.config.method == AUTO else (1.0,)

    @property
    def steps(self) -> int:
        """Number of training steps of all candidates together."""
        size, epochs = self.config.batch_size or 1, self.config.epochs or 0
        per_epoch = [math.ceil(int((~mask).sum()) / size) for mask in self.masks]
        return len(self.factors) * epochs * sum(per_epoch)

    def run(self) -> Iterator[list[Trial]]:
        """Yield the trials of frozen embeddings, then those of each training, blended and not; none if it diverged."""
        frozen = self._heads if self._chooses_frozen else []
        yield self._tried([Candidate(self.method, None, head=head) for head in dict.fromkeys(["none", *frozen])])
        for factor in self.factors:
            yield self._tried(
                [Candidate(self.method, factor, blend, head) for blend in self._blends for head in self._heads]
            )

    @property
    def _heads(self) -> list[HeadName]:
        """Heads to compare."""
        if self.config.head not in ("auto", None):
            return [self.config.head]  # type: ignore[list-item]
        return ["anchored"] if self._tests_new else list(get_args(HeadName))

    @property
    def _blends(self) -> tuple[float, ...]:
        """Blends to compare."""
        if self.config.method != AUTO or self.config.blend != 1:
            return (self.config.blend,)
        return BLENDS[1:] if self._tests_new else BLENDS

    @property
    def _chooses_frozen(self) -> bool:
        """True if frozen embeddings can be chosen."""
        return self.config.method == AUTO or not self.factors

    def _tried(self, candidates: list[Candidate]) -> list[Trial]:
        """Try candidates with the same training on each split; none if it diverged."""
        trials = [Trial(candidate) for candidate in candidates]
        try:
            for split in range(len(self.masks)):
                self._try_split(trials, split)
        except FloatingPointError:
            return []
        for trial in trials:
            trial.score(self.labels, self.config.balances)
        self.trials += trials
        kept = [self.trials[0], *([self._best()[0]] if self.allowed else [])]
        for trial in self.trials:
            if trial not in kept:
                trial.logits = []  # of all candidates they can be gigabytes
        return trials

    def _try_split(self, trials: list[Trial], split: int) -> None:
        """Train without the held-out images of a split, and add the logits of these to the trials."""
        factor, started = trials[0].candidate.factor, time.perf_counter()
        try:
            if factor is not None:
                self._train(factor, ~self.masks[split])
            self._between.end()
            trained = time.perf_counter() - started
            for blend, blended in itertools.groupby(trials, key=lambda trial: trial.candidate.blend):
                started = time.perf_counter()
                self._between.set(blend)
                examples = self.frozen if factor is None else self.setup.examples(self.features)
                if not (examples.image.isfinite().all() and examples.text.isfinite().all()):
                    raise FloatingPointError
                embedded = time.perf_counter() - started
                for trial in blended:
                    started = time.perf_counter()
                    trial.logits.append(self._logits(trial.candidate.head, examples, split))
                    trial.seconds += trained + embedded + time.perf_counter() - started
        finally:
            self._between.end()
            self._between.set(0)

    def _train(self, factor: float, images: Tensor) -> None:
        config = replace(self.config, **Candidate(self.method, factor).settings(self.config))
        method, classes = self.setup.method, self.setup.task.tests[0].classes
        sampler = method.class_sampler
        before = None if sampler is None else sampler.state_dict()
        part = self.features.subset(images.nonzero().squeeze(1))
        trainer = Trainer(config, method, part, classes)
        try:
            for _ in range(config.epochs or 0):
                trainer.epoch(self.advance, lambda loss: None)
        finally:
            if sampler is not None and before is not None:
                sampler.load_state_dict(before)

    @torch.no_grad()
    def _logits(self, name: HeadName, examples: Examples, split: int) -> Tensor:
        """Fit a head to the images of a split that are not held out; return the logits [n, C] of the others."""
        held = self.masks[split].to(examples.image.device)
        image = examples.image[held]
        if name == "none":
            return cosine_logits(image, examples.text, self.setup.method.model.logit_scale).float().cpu()
        if (split, name) not in self._l2:
            self._l2[split, name] = choose_l2(name, _part(self.frozen, ~held))
        balanced = self.config.prior == "balanced"
        head = fit_head(name, _part(examples, ~held), self._l2[split, name], equal_priors=balanced)
        assert head is not None
        return head.logits(image).float().cpu()

    @property
    def _tests_new(self) -> bool:
        """True if the protocol tests classes that are not trained."""
        return len(self.setup.task.tests) > 1

    @property
    def allowed(self) -> list[Trial]:
        """Trials so far that can be chosen: the first is only a comparison, if the method or the head is given."""
        trials = (trial for trial in self.trials if trial.candidate.head in self._heads)
        return [trial for trial in trials if trial.candidate.factor is not None or self._chooses_frozen]

    def _best(self) -> tuple[Trial, str]:
        """Return the trial to choose, and why: that with the highest accuracy, of equal ones the lower loss.

        Where new classes are tested, training lowers the accuracy on these, which held-out images do not show. There
        trained weights are chosen only if they are clearly better than pretrained ones.
        """
        if not self.allowed:
            raise FloatingPointError(f"tune: the training of every candidate diverged. {REMEDY}")

        def accuracy(trial: Trial) -> float:
            return round(trial.scores.mean().item(), 6)

        def highest(trials: Iterable[Trial]) -> Trial:
            return max(trials, key=lambda trial: (accuracy(trial), -trial.loss))

        top = highest(self.allowed)
        equal = sum(accuracy(trial) == accuracy(top) for trial in self.allowed) - 1
        by = f"{'balanced ' if self.config.balances else ''}accuracy on {len(self.labels)} held-out images"
        frozen = [trial for trial in self.allowed if trial.candidate.factor is None]
        if not (self._tests_new and frozen) or top in frozen:
            return top, f"highest {by}" + (f", equal to {plural(equal, 'other')}; lowest loss" if equal else "")
        simple = highest(frozen)
        gains = [(trial, *trial.gain(simple)) for trial in self.allowed]
        clear = [trial for trial, gain, error in gains if gain > error]
        best = highest(clear or frozen)
        gain, error = (best if clear else top).gain(simple)
        points = f"{gain:+.1f} ± {error:.1f} points of {by}"
        if clear:
            return best, f"clearly above {simple.candidate.name}, {points}"
        return best, f"{top.candidate.name} is not clearly above it, {points}"

    def choice(self, stopped: bool) -> Choice:
        """Return the choice among the trials so far; `stopped` before all of them."""
        config = self.config
        asked = config.identity()
        if not self.masks:
            settings = Candidate(self.method, None, head="anchored").settings(config)
            because = "no class has two training images, so that none can be held out"
            return Choice(asked, settings, because)
        best, because = self._best()
        first, tested = self.trials[0], len(self.labels)
        because += ", of those before Ctrl-C" if stopped else ""
        fields, thresholds = calibrate(torch.cat(best.logits), self.labels)
        validation = {"images": tested, "zero_shot": round(first.accuracy, 4), "tuned": round(best.accuracy, 4)}
        classes = self.setup.task.tests[0].classes
        by_class = [
            metrics_of_test(self.labels, top_classes(torch.cat(trial.logits)), classes) for trial in (first, best)
        ]
        return Choice(
            asked,
            settings=best.candidate.settings(config),
            candidates=[trial.row(chosen=trial is best) for trial in self.trials],
            because=because,
            calibration=fields,
            validation=validation | {"thresholds": thresholds},
            by_class=by_class,
        )


def _part(examples: Examples, images: Tensor) -> Examples:
    return examples._replace(image=examples.image[images], labels=examples.labels[images])

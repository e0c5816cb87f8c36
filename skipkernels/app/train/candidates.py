"""Candidates between which a run chooses (`method="auto"`, `head="auto"`), and the record of its choice; see `search`.

    frozen:     the texts, and each head, on the pretrained embeddings
    trained:    Skip Tuning with each of `FACTORS` of its learning rates, with the texts and each head
    blended:    the mean of these weights and the pretrained ones, with the texts and each head

All of them share the features at the cut, which are computed once. The chosen one is then trained on all images,
held-out ones included.

Where new classes are tested, held-out images of trained classes do not show what a candidate costs them, so their
accuracy does not choose. Blended weights with a Gaussian head cost new classes little, and are chosen; pretrained
weights, with an anchored probe, if nothing is trained.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from ...formatting import first_line
from ...options import HeadName
from ..config import RATES, TuneConfig
from ..data import InputError
from ..methods.registry import AUTO
from ..report.words import name_of_run
from ..results.files import CANDIDATES
from ..untrusted import read_object, validated

FACTORS: tuple[float, ...] = (1.0, 3.0, 10.0)
"""Factors of the default learning rates."""
BLENDS: tuple[float, ...] = (1.0, 0.5)
"""Weights of the tuned model; 1/2 is what Wortsman et al. (WiSE-FT) recommend where nothing is known about new data."""


@dataclass(frozen=True)
class Candidate:
    """A classifier to compare."""

    asked: TuneConfig  # resolved configuration that leaves the method or the head open
    factor: float | None  # of its learning rates; None: it is not trained
    blend: float = 1.0  # weight of the trained model in a mean with the pretrained one
    head: HeadName = "none"
    compared: bool = False  # only, and can't be chosen

    @property
    def name(self) -> str:
        """Name in tables: that of its run."""
        return name_of_run(replace(self.asked, **self.settings))

    @property
    def new_names(self) -> bool:
        """True if it classifies classes without training images, by their texts."""
        return self.head != "probe"

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of the configuration that trains it on all images, in place of those of `asked`."""
        settings: dict[str, Any] = {"method": self.asked.method_class().name, "head": self.head}
        settings |= {"prior": "images" if self.head == "none" else self.asked.prior, "train_on_validation": True}
        if self.factor is None:
            return settings | {"epochs": 0, "blend": 1.0}
        rates = {name: getattr(self.asked, name) for name in RATES}
        settings |= {name: float(f"{self.factor * rate:.6g}") for name, rate in rates.items() if rate is not None}
        return settings | {"blend": self.blend}


def groups_of(config: TuneConfig, *, tests_new: bool) -> list[list[Candidate]]:
    """Return the candidates: first those of the pretrained weights, then those that share a training, by its factor.

    The very first has the texts on pretrained embeddings. Without a choice of the method or of the head it is compared.

    Args:
        config: Configuration that leaves the method or the head open.
        tests_new: True if classes are tested that are not trained.
    """
    assert config.head is not None
    factors, blends = FACTORS, BLENDS
    of_frozen: tuple[HeadName, ...] = get_args(HeadName)
    of_trained = of_frozen
    if tests_new:
        factors, blends = FACTORS[1:2], BLENDS[1:]  # the blend halves what training changes
        of_frozen, of_trained = ("anchored",), ("gaussian",)
    if config.method != AUTO:  # settings that are given
        factors, blends = (1.0,), (config.blend,)
    if config.blend != 1:
        blends = (config.blend,)
    if config.head != "auto":
        of_frozen = of_trained = (config.head,)
    if not config.epochs:  # nothing is trained
        factors = ()
    if config.method != AUTO and factors:  # pretrained weights are only compared
        of_frozen = ()
    heads = dict.fromkeys(["none", *of_frozen])
    frozen = [Candidate(config, None, head=head, compared=head not in of_frozen) for head in heads]
    return [
        frozen,
        *([Candidate(config, factor, blend, head) for blend in blends for head in of_trained] for factor in factors),
    ]


def untested(groups: Sequence[Sequence[Candidate]], *, tests_new: bool) -> Candidate:
    """Return the candidate of a run without held-out images.

    It is the last where new classes are tested; else the first but zero-shot, with an anchored probe if the head is
    open.
    """
    candidates = [one for group in groups for one in group if (one.head, one.factor) != ("none", None)]
    return candidates[-1] if tests_new else min(candidates, key=lambda one: one.head != "anchored")


@dataclass(frozen=True)
class Choice:
    """The chosen candidate, and how it came about: the contents of candidates.json."""

    asked: dict[str, Any]  # `TuneConfig.identity` of the configuration that asked for a choice
    settings: dict[str, Any]  # fields of the configuration, which replace those
    because: str
    candidates: list[dict[str, Any]] = field(default_factory=list)  # for metrics.json; none if no image was held out
    calibration: dict[str, Any] = field(default_factory=dict)  # fields of a `Description`
    validation: dict[str, Any] | None = None  # for metrics.json
    by_class: list[dict[str, Any]] = field(default_factory=list)  # on the held-out images: zero-shot, chosen
    seconds: float = 0.0  # of all trials

    @classmethod
    def read(cls, folder: Path) -> Choice | None:
        """Read the choice of a run folder; None if it has none."""
        path = folder / CANDIDATES
        if not path.is_file():
            return None
        try:
            return validated(cls, read_object(path))
        except (OSError, ValueError) as error:
            raise InputError(f"{path}: damaged ({first_line(error)}). Tune again with `overwrite=True`.") from error

    def to_json(self) -> str:
        """Contents of the file."""
        return json.dumps(asdict(self), indent=2) + "\n"

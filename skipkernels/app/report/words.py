"""Words for values of options: methods, tests and shots."""

from __future__ import annotations

from ..config import TuneConfig
from ..methods.registry import METHOD_NAMES
from .formats import plural

HEADS = {
    "anchored": "anchored probe",
    "gaussian": "Gaussian head",
    "probe": "linear probe",
    "auto": "a choice of heads",
}
"""Names of heads."""
_TESTS = {
    "base": "trained classes",
    "new": "new classes",
    "all": "all classes",
    "validation": "validation images",
    "validation_balanced": "validation images, balanced",
    "harmonic": "harmonic mean",
}


def name_of_method(method: str) -> str:
    """Return the name of a method, or the text itself.

    >>> name_of_method("skip"), name_of_method("linear-probe")
    ('Skip Tuning', 'linear probe')
    """
    return METHOD_NAMES.get(method, method)


def name_of_run(config: TuneConfig) -> str:
    """Return the name of what classifies in a run of a resolved configuration.

    It has the factors of the learning rates over those of the recipe, of which pictogram-tiny has 3e-4.

    >>> config = TuneConfig(method="skip", head="anchored", blend=0.5, text_lr=9e-4, image_lr=9e-4, device="cpu")
    >>> name_of_run(config.resolved())
    'Skip Tuning ×3, blended + anchored probe'
    >>> name_of_run(TuneConfig(method="skip", text_lr=3e-3, device="cpu").resolved())
    'Skip Tuning ×10 (texts) and ×1 (images)'
    >>> name_of_run(TuneConfig(method="skip", epochs=0, head="gaussian", prior="balanced", device="cpu").resolved())
    'frozen + Gaussian head with equal priors'
    """
    if config.method == "auto":
        return name_of_method(config.method)
    if config.epochs == 0 and config.has_steps:
        name = "zero-shot" if config.head == "none" else "frozen"
    else:
        name = name_of_method(config.method) + _times(config.rate_factors)
    name += ", blended" if config.blend != 1 else ""
    if config.head in ("none", None):
        return name
    return f"{name} + {HEADS[config.head]}{' with equal priors' if config.prior == 'balanced' else ''}"


def _times(factors: dict[str, float]) -> str:
    """Factors of the learning rates; one for equal ones, and "" for 1."""
    if len(set(factors.values())) > 1:
        return f" ×{factors['text_lr']:g} (texts) and ×{factors['image_lr']:g} (images)"
    return "".join(f" ×{factor:g}" for factor in set(factors.values()) if factor != 1)


def name_of_test(test: str) -> str:
    """Return the name of a test or of a summary of a protocol, or the text itself, which is a dataset.

    >>> name_of_test("base"), name_of_test("pictograms:food")
    ('trained classes', 'pictograms:food')
    """
    return _TESTS.get(test, test)


def shots_text(config: TuneConfig) -> str:
    """Return how many images train in a run of a resolved configuration.

    >>> from dataclasses import replace
    >>> config = TuneConfig(data="imagefolder:photos", method="skip", device="cpu")
    >>> shots_text(replace(config, shots="all").resolved()), shots_text(replace(config, shots=1).resolved())
    ('all training images', 'at most 1 image of each class')
    >>> shots_text(replace(config, train_on_validation=True).resolved())
    'at most 16 images of each class, and any validation images'
    """
    options = config.task_options()
    if options.shots == "all":
        return "all training images"
    validating = options.train_on_validation and options.validation != "none"
    return f"at most {plural(options.shots, 'image')} of each class{', and any validation images' * validating}"


def before_text(config: TuneConfig) -> str:
    """Return which changes of the trained model its epochs do not have yet.

    >>> before_text(TuneConfig(method="skip", head="anchored", blend=0.5).resolved())
    ', before its blend and its head'
    """
    later = ["blend"] * (config.blend != 1) + ["head"] * (config.head != "none")
    return f", before its {' and its '.join(later)}" if later else ""


def title_of(config: TuneConfig, *between: str) -> str:
    """Return the title of a page, from a resolved configuration: model, data, other texts, and training images."""
    return " · ".join([f"{config.model} on {config.data}", *between, shots_text(config)])

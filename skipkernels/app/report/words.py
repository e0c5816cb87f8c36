"""Words for values of options: methods, tests and shots."""

from __future__ import annotations

from ...options import Prior, Shots
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


def name_of_classifier(
    method: str, head: str | None, prior: Prior = "images", *, factor: float | None = 1.0, blend: float = 1.0
) -> str:
    """Return the name of a method with a factor of its learning rates, None without training, a blend and a head.

    >>> name_of_classifier("skip", "anchored", factor=3.0, blend=0.5), name_of_classifier("skip", "none", factor=None)
    ('Skip Tuning ×3, blended + anchored probe', 'zero-shot')
    >>> name_of_classifier("skip", "gaussian", "balanced")
    'Skip Tuning + Gaussian head with equal priors'
    """
    if factor is None:
        name = "zero-shot" if head == "none" else "frozen"
    else:
        name = name_of_method(method) + (f" ×{factor:g}" if factor != 1 else "")
    name += ", blended" if blend != 1 else ""
    if head in ("none", None):
        return name
    return f"{name} + {HEADS[head]}{' with equal priors' if prior == 'balanced' else ''}"


def name_of_run(config: TuneConfig) -> str:
    """Return the name of what classifies in a run of a resolved configuration.

    >>> config = TuneConfig(method="skip", head="anchored", blend=0.5, text_lr=9e-4, image_lr=9e-4, device="cpu")
    >>> name_of_run(config.resolved())  # pictogram-tiny has 3e-4
    'Skip Tuning ×3, blended + anchored probe'
    """
    if config.method == "auto":
        return name_of_method(config.method)
    factor = None if config.epochs == 0 and config.has_steps else config.factor
    return name_of_classifier(config.method, config.head, config.prior, factor=factor, blend=config.blend)


def name_of_test(test: str) -> str:
    """Return the name of a test or of a summary of a protocol, or the text itself, which is a dataset.

    >>> name_of_test("base"), name_of_test("pictograms:food")
    ('trained classes', 'pictograms:food')
    """
    return _TESTS.get(test, test)


def shots_text(shots: Shots) -> str:
    """Return the number of training images.

    >>> shots_text("all"), shots_text(1), shots_text(16)
    ('all training images', '1 image of each class', '16 images of each class')
    """
    return "all training images" if shots == "all" else f"{plural(int(shots), 'image')} of each class"


def title_of(config: TuneConfig, *between: str) -> str:
    """Return the title of a page, from a resolved configuration: model, data, other texts, and training images."""
    assert config.shots is not None
    at_most = "at most " if config.own_data and config.shots != "all" else ""  # a class may have fewer
    return " · ".join([f"{config.model} on {config.data}", *between, at_most + shots_text(config.shots)])

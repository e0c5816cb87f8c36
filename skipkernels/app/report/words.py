"""Words for values of options: methods, tests and shots."""

from __future__ import annotations

from ...options import Shots
from ..config import TuneConfig
from .rendering import plural

# Options of others are their names.
_METHODS = {"skip": "Skip Tuning", "full": "full fine-tuning", "auto": "a choice of candidates"}
_TESTS = {
    "base": "trained classes",
    "new": "new classes",
    "all": "all classes",
    "validation": "validation images",
    "harmonic": "harmonic mean",
    "targets": "mean of the targets",
}


def name_of_method(method: str) -> str:
    """Return the name of a method, or the text itself.

    >>> name_of_method("skip"), name_of_method("linear-probe")
    ('Skip Tuning', 'linear-probe')
    """
    return _METHODS.get(method, method)


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
    """Return the title of a page: model, data, other texts, and training images."""
    at_most = "at most " if config.own_data and config.chosen_shots != "all" else ""  # a class may have fewer
    return " · ".join([f"{config.model} on {config.data}", *between, at_most + shots_text(config.chosen_shots)])

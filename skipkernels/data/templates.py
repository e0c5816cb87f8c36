"""Prompt templates: the paper's set, CoOp's set, and one's own."""

from __future__ import annotations

from collections.abc import Sequence

from .base import InputError

PHOTO = "a photo of a {}."

# Wu et al. 2025, by the names of `coop.DATASETS`.
PAPER = {
    "imagenet": PHOTO,
    "caltech101": "itap of a {}.",
    "oxford_pets": "a bad photo of a {}, a type of pet.",
    "stanford_cars": "a photo of the {}, a type of car.",
    "oxford_flowers": "a close-up photo of a {}.",
    "food101": "a photo of the nice {}.",
    "fgvc_aircraft": "a bright photo of a {}, a type of aircraft.",
    "sun397": PHOTO,
    "dtd": "itap of a {}.",
    "eurosat": "a centered satellite photo of {}.",
    "ucf101": "a photo of a {}, a type of sport.",
    "imagenetv2": PHOTO,
    "imagenet_sketch": "a sketch of a {}.",
    "imagenet_a": "a bad photo of a {}.",
    "imagenet_r": "a rendition of a {}.",
}
# Zhou et al. 2022.
COOP = {
    "imagenet": PHOTO,
    "caltech101": PHOTO,
    "oxford_pets": "a photo of a {}, a type of pet.",
    "stanford_cars": PHOTO,
    "oxford_flowers": "a photo of a {}, a type of flower.",
    "food101": "a photo of {}, a type of food.",
    "fgvc_aircraft": "a photo of a {}, a type of aircraft.",
    "sun397": PHOTO,
    "dtd": "{} texture.",
    "eurosat": "a centered satellite photo of {}.",
    "ucf101": "a photo of a person doing {}.",
    "imagenetv2": PHOTO,
    "imagenet_sketch": PHOTO,
    "imagenet_a": PHOTO,
    "imagenet_r": PHOTO,
}
SETS = {"paper": PAPER, "coop": COOP}

Templates = str | Sequence[str] | None  # one, several, the name of a set, or the default: as `templates_of` takes them


def format_prompt(template: str, name: str) -> str:
    """A template with the name of a class.

    >>> format_prompt("a photo of a {}.", "apple pie")
    'a photo of a apple pie.'
    """
    return template.replace("{}", name)


def templates_of(dataset: str | None, templates: Templates = None, default: str = PHOTO) -> tuple[str, ...]:
    """The templates of a dataset.

    Args:
        dataset: A name of `PAPER`, or None for another dataset.
        templates: Templates of one's own, of which the first is for training; or "paper" or "coop". By default the
            paper's.
        default: For a dataset of which neither set has one.

    Raises:
        InputError: If a template does not have exactly one {}, has other braces, or stands beside a set.

    Example:
        >>> templates_of("dtd"), templates_of("dtd", "coop"), templates_of(None, ["{}!", "a {}."])
        (('itap of a {}.',), ('{} texture.',), ('{}!', 'a {}.'))
    """
    chosen = ["paper"] if templates is None else [templates] if isinstance(templates, str) else list(templates)
    if len(chosen) == 1 and chosen[0] in SETS:
        return (SETS[chosen[0]].get(dataset or "", default),)
    if not chosen:
        raise InputError(f"--template: there must be at least one, such as {PHOTO!r}; got none.")
    if any(template in SETS for template in chosen):
        raise InputError(
            f"--template: {' and '.join(SETS)} are sets, which can't be combined with other templates; got "
            f"{', '.join(map(repr, chosen))}. Name one set alone, or give templates of your own alone."
        )
    for template in chosen:
        if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
            raise InputError(
                f"--template: expected {' or '.join(SETS)}, or templates with one {{}} each, where the name of the "
                f"class goes, and no other braces, such as {PHOTO!r}; got {template!r}."
            )
    return tuple(chosen)

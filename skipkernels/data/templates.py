"""Prompt templates: the paper's set, CoOp's set, or the user's."""

from __future__ import annotations

from collections.abc import Sequence

from .base import InputError

PHOTO = "a photo of a {}."

# Wu et al. 2025; the keys are those of `coop.DATASETS`.
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
TEMPLATE_SETS = {"paper": PAPER, "coop": COOP}

Templates = str | Sequence[str] | None  # see `resolve_templates`


def format_prompt(template: str, name: str) -> str:
    """Replace {} in a template by the name of a class.

    >>> format_prompt("a photo of a {}.", "apple pie")
    'a photo of a apple pie.'
    """
    return template.replace("{}", name)


def resolve_templates(dataset: str | None, templates: Templates = None, default: str = PHOTO) -> tuple[str, ...]:
    """Return the templates of a dataset.

    Args:
        dataset: A key of `PAPER`, or None for another dataset.
        templates: Templates, the first for training; or "paper" or "coop", the sets of those papers. Default: "paper".
        default: Template of a dataset that is not in the sets.

    Raises:
        InputError: If a template does not have exactly one {}, has other braces, or is combined with a set.

    Example:
        >>> resolve_templates("dtd"), resolve_templates("dtd", "coop"), resolve_templates(None, ["{}!", "a {}."])
        (('itap of a {}.',), ('{} texture.',), ('{}!', 'a {}.'))
    """
    chosen = ["paper"] if templates is None else [templates] if isinstance(templates, str) else list(templates)
    if len(chosen) == 1 and chosen[0] in TEMPLATE_SETS:
        return (TEMPLATE_SETS[chosen[0]].get(dataset or "", default),)
    if not chosen:
        raise InputError(f"resolve_templates: templates must have an item, such as {PHOTO!r}; got none.", "templates")
    sets = list(TEMPLATE_SETS)
    if any(template in sets for template in chosen):
        raise InputError(
            f"resolve_templates: {' and '.join(sets)} are sets, which can't be combined with other templates; got "
            f"{', '.join(map(repr, chosen))}. Give one set, or only templates of your own.",
            "templates",
        )
    for template in chosen:
        if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
            raise InputError(
                f"resolve_templates: templates must be {' or '.join(sets)}, or templates with one {{}} each, which "
                f"the class name replaces, and no other braces, such as {PHOTO!r}; got {template!r}.",
                "templates",
            )
    return tuple(chosen)

"""Prompt templates: the paper's set, CoOp's set, or the user's."""

from __future__ import annotations

from collections.abc import Sequence

from ...published import COOP, PAPER, PHOTO
from .base import InputError

TEMPLATE_SETS = {"paper": PAPER, "coop": COOP}

Templates = str | Sequence[str] | None  # see `resolve_templates`


def prompts(templates: Sequence[str], classes: Sequence[str]) -> tuple[list[str], ...]:
    """Return for each template a list with the prompt of each class, its name in place of {}.

    >>> prompts(["a photo of a {}.", "{}"], ["apple pie"])
    (['a photo of a apple pie.'], ['apple pie'])
    """
    return tuple([template.replace("{}", name) for name in classes] for template in templates)


def resolve_templates(dataset: str | None, templates: Templates = None, default: str = PHOTO) -> tuple[str, ...]:
    """Return the templates of a dataset: `templates`, or its entry in the set "paper" or "coop", else `default`.

    >>> resolve_templates("dtd"), resolve_templates("dtd", "coop"), resolve_templates(None, ["{}!", "a {}."])
    (('itap of a {}.',), ('{} texture.',), ('{}!', 'a {}.'))
    """
    chosen = ["paper"] if templates is None else [templates] if isinstance(templates, str) else list(templates)
    if len(chosen) == 1 and chosen[0] in TEMPLATE_SETS:
        return (TEMPLATE_SETS[chosen[0]].get(dataset or "", default),)
    if not chosen:
        raise InputError(f"must have an item, such as {PHOTO!r}; got none.", "templates", "open_source")
    for template in chosen:
        if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
            raise InputError(
                f"must be {' or '.join(TEMPLATE_SETS)} alone, or templates with one {{}} "
                f"each, which the class name replaces, and no other braces, such as {PHOTO!r}; got {template!r}.",
                "templates",
                "open_source",
            )
    return tuple(chosen)

"""Names of classes: as prompts have them, each different, and in the order of labels."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from .base import InputError


def class_names(location: str, names: Sequence[str], remedy: str, argument: str = "data") -> tuple[str, ...]:
    """Normalize the names of classes; none may be empty, or equal to another in lower case.

    `location`, a `remedy` besides another name, and `argument` are for error messages.

    >>> class_names("open_source", ["sea_lion", "owl"], "…")
    ('sea lion', 'owl')
    """
    original: dict[str, str] = {}
    found = []
    for name in names:
        if not isinstance(name, str):
            raise InputError(f"{location}: class names must be text; got {name!r}. Write it out.", argument)
        normalized = normalize_class_name(name)
        if not normalized or normalized != normalized.encode(errors="ignore").decode():  # a folder that is not in UTF-8
            raise InputError(f"{location}: a class can't be named {name!a}. Rename it, or {remedy}.", argument)
        if normalized.casefold() in original:
            both = f"{original[normalized.casefold()]!r} and {name!r} are the same class name"
            raise InputError(f"{location}: {both}: no prompt can tell them apart. Rename one, or {remedy}.", argument)
        original[normalized.casefold()] = name
        found.append(normalized)
    return tuple(found)


def normalize_class_name(name: str) -> str:
    """Compose accents (NFC), as tokenizers expect, and replace underscores and runs of white space by one space.

    >>> normalize_class_name("sea_lion ")
    'sea lion'
    """
    return " ".join(unicodedata.normalize("NFC", name).replace("_", " ").split())


def labels_by_name(location: str, found: Sequence[str], remedy: str) -> tuple[list[int], tuple[str, ...]]:
    """Return the label of each image, and the class names by label, in the order of the sorted names.

    `found` is the class of each image, as text; see `class_names` for the others.
    """
    names = sorted(set(found))
    label_of = {name: label for label, name in enumerate(names)}
    return [label_of[name] for name in found], class_names(location, names, remedy)

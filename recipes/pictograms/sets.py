"""Icon sets of @iconify/json: which may be used, the family of each, and what is held out of pre-training.

A family is the work of one designer: sets that render the same drawings, or continue an older set, are one family.
"""

from __future__ import annotations

PACKAGE = "@iconify/json@2.2.535"

# Licences that allow to ship weights trained on the icons. No share-alike, no copyleft.
SHIPPED = {"MIT", "Apache-2.0", "ISC", "BSD-3-Clause", "CC0-1.0", "CC-BY-3.0", "CC-BY-4.0"}
DROPPED_CATEGORIES = {"Logos", "Programming"}
DROPPED_SETS = {"devicon-line", "devicon-original"}  # logos that have no category
TEST_ONLY = {"openmoji"}  # CC-BY-SA: only measured on, neither trained on nor shipped

EMOJI = ("noto", "twemoji", "openmoji", "fluent-emoji")  # families of the tasks, which share 1,561 names
FLAGS = ("circle-flags", "flag", "flagpack", "cif")
HELD_OUT = {*EMOJI, *FLAGS, "game-icons"}
TASKS = {  # Noto's categories of concrete names
    "animals": "Animals & Nature",
    "food": "Food & Drink",
    "objects": "Objects",
    "travel": "Travel & Places",
    "activities": "Activities",
}

_RENDERINGS = ("-color", "-outline", "-solid", "-twotone", "-flat", "-high-contrast", "-monotone", "-mono", "-v1")
_RENDERINGS += ("-light", "-regular", "-poly", "-lab", "-pop", "-print", "-pencil", "-brands")
_FAMILIES = {"material-symbols": "ic", "bx": "boxicons", "bxs": "boxicons", "uim": "uil", "uit": "uil", "uis": "uil"}
_FAMILIES |= {
    "fa6": "fa",
    "fa7": "fa",
    "famicons": "ion",
    "lucide": "feather",
    "mi": "mono-icons",
    "streamline-guidance": "guidance",
    "wpf": "icons8",
}


def family(prefix: str) -> str:
    """Name of a set's family.

    >>> family("fluent-emoji-flat"), family("fa7-solid"), family("streamline-plump-color")
    ('fluent-emoji', 'fa', 'streamline-plump')
    """
    for rendering in _RENDERINGS:
        prefix = prefix.removesuffix(rendering)
    return _FAMILIES.get(prefix, prefix)


def is_used(prefix: str, info: dict) -> bool:
    """True if a set is in the table: a licence that may be shipped, or test only; no logos or file types."""
    licence, category = info["license"].get("spdx"), info.get("category")
    dropped = prefix in DROPPED_SETS or category in DROPPED_CATEGORIES
    return prefix in TEST_ONLY or (licence in SHIPPED and not dropped)

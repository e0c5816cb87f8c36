"""Names of icons as words, without styles, sizes and numbers; names of logos; words held out of pre-training."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Collection, Iterable

# Style of an icon by the word in its name; "" is a word that says nothing about the drawing.
STYLES = dict.fromkeys(("outline", "outlined", "line", "linear", "stroke"), "outline")
STYLES |= dict.fromkeys(("filled", "fill", "solid", "f", "baseline"), "filled")
STYLES |= dict.fromkeys(("duotone", "twotone", "duo"), "two-tone")
STYLES |= dict.fromkeys(("rounded", "round", "r"), "rounded") | dict.fromkeys(("thin", "light"), "thin")
STYLES |= {"sharp": "sharp", "bold": "bold", "flat": "flat", "broken": "broken", "color": "colorful"}
STYLES |= dict.fromkeys(("regular", "alt", "remix", "print", "pop", "pencil", "loop", "transition", "expressive"), "")
STYLES |= dict.fromkeys(("o", "one", "two", "rtl", "ltr", "mirrored", "small"), "")
_ALWAYS = {"outline", "outlined", "filled", "fill", "solid", "duotone", "twotone", "alt", "rtl", "ltr"}
_SHARE = 0.04  # other words are styles in sets where at least this share of the names end with them

_SIZE = re.compile(r"\d+(px|x\d+)?|sm|md|lg|xl|xs")
_LOGO_WORDS = {"logo", "logos", "brand", "brands", "logotype", "wordmark"}
_LOGO_SETS = 3

WORDS_HELD_OUT = 175
_COMMON = set("and with of the in on no for from at over not to up down left right three two one".split())
_COMMON |= set("red blue green yellow white black brown orange purple large small medium new old open".split())


def set_styles(names: Collection[str], suffixes: Iterable[str] = ()) -> set[str]:
    """Words that are styles at the end of a set's names: the set's own list, and frequent ones."""
    last = Counter(name.rsplit("-", 1)[-1] for name in names)
    frequent = {word for word, count in last.items() if word in STYLES and count >= _SHARE * len(names)}
    listed = {word for suffix in suffixes for word in suffix.split("-")}
    return _ALWAYS | frequent | (listed & STYLES.keys())


def clean(raw: str, styles: Collection[str], prefixes: Collection[str] = ()) -> tuple[str, str]:
    """Return an icon's name in words, and its style.

    >>> clean("arrow-left-circle-24-filled", {"filled"}), clean("coffee-cup-02", set()), clean("light-bulb", set())
    (('arrow left circle', 'filled'), ('coffee cup', ''), ('light bulb', ''))
    """
    words = raw.replace("two-tone", "twotone").split("-")
    found = []
    if len(words) > 1 and words[0] in prefixes:
        found.append(STYLES.get(words.pop(0), ""))
    while len(words) > 1 and (words[-1] in styles or _SIZE.fullmatch(words[-1])):
        found.append(STYLES.get(words.pop(), ""))
    words[-1] = re.sub(r"(?<=[a-z]{3})\d+$", "", words[-1])
    return " ".join(words), next(filter(None, found), "")


def is_word_name(name: str) -> bool:
    """True for a name with a word of at least three letters, and at most five words."""
    words = name.split()
    return len(words) <= 5 and any(len(word) >= 3 and word.isalpha() for word in words)


def logo_names(sets: Iterable[Iterable[str]]) -> set[str]:
    """Names that at least three sets of logos have."""
    counts = Counter(name for names in sets for name in set(names))
    return {name for name, count in counts.items() if count >= _LOGO_SETS}


def is_logo(name: str, logos: Collection[str]) -> bool:
    """True for the name of a logo."""
    return name in logos or not _LOGO_WORDS.isdisjoint(name.split())


def held_out_words(concrete: Iterable[str]) -> set[str]:
    """Draw the words that are held out from the words of the concrete names."""
    words = {word for name in concrete for word in name.split() if len(word) >= 3 and word.isalpha()}
    return set(random.Random(0).sample(sorted(words - _COMMON), WORDS_HELD_OUT))


def has_word(name: str, words: Collection[str]) -> bool:
    """True if a word of a name, in singular or plural, is one of `words`.

    >>> has_word("two cats", {"cat"}), has_word("boxes", {"box"}), has_word("catalog", {"cat"})
    (True, True, False)
    """
    forms = {form for word in name.split() for form in (word, word.removesuffix("s"), word.removesuffix("es"))}
    plurals = {form for word in name.split() for form in (f"{word}s", f"{word}es")}
    return not (forms | plurals).isdisjoint(words)

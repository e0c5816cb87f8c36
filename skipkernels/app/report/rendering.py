"""Rendering of the templates: escaping, formats of numbers, and the policy that allows only the page's own script."""

from __future__ import annotations

import base64
import functools
import hashlib
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ...formatting import decimal
from .plots import finite

MISSING = "–"
_SHORT = 22  # characters of a shortened name


def render(template: str, **values: Any) -> str:
    """Return a page. Every value is escaped, except the SVG of plots; lone surrogates of file names become "?"."""
    return _environment().get_template(template).render(values).encode(errors="replace").decode()


def part(name: str, *values: Any) -> Markup:
    """Return a part of a page, by a macro of parts.html.j2. Values are escaped as by `render`."""
    return getattr(_environment().get_template("parts.html.j2").module, name)(*values)


@functools.cache
def _environment() -> Environment:
    loader = PackageLoader("skipkernels.app.report")
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )

    def source(name: str) -> Markup:
        return Markup(loader.get_source(environment, name)[0])

    environment.globals |= {"source": source, "policy": policy}
    environment.filters |= {
        "decimal": decimal,
        "number": number,
        "image": image_source,
        "plural": plural,
        "share": share,
        "short": short,
        "svg": Markup,  # of a plot: matplotlib has escaped its texts
    }
    return environment


def policy(script: str, others: str = "img-src data:") -> str:
    """Content security policy of a page: a browser runs no other script than this one, whatever a class is called.

    `others` are further directives, about what the page loads.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; {others}; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def number(value: float | None, spec: str = ".1f", unit: str = "") -> str:
    """Format a number; a dash if it is missing or not finite.

    >>> number(57.25), number(-3.5, "+.1f"), number(None), number(2.0, ".0f", " s")
    ('57.2', '−3.5', '–', '2 s')
    """
    return f"{value:{spec}}{unit}".replace("-", "−") if finite(value) else MISSING


def percent(value: float | None) -> str:
    """Format a percentage.

    >>> percent(57.25).replace("\N{NO-BREAK SPACE}", " ")
    '57.2 %'
    """
    return number(value, ".1f", "\N{NO-BREAK SPACE}%")


def short(name: str) -> str:
    """Shorten a long name in the middle: names of classes often begin alike.

    >>> short("latin small letter o with ring"), short("red fox")
    ('latin smal…o with ring', 'red fox')
    """
    return f"{name[:10]}…{name[-11:].lstrip()}" if len(name) > _SHORT else name


def share(value: float) -> str:
    """Format a probability.

    >>> share(0.004), share(0.5), share(0.9999)
    ('<1 %', '50 %', '>99 %')
    """
    return "<1 %" if value < 0.01 else ">99 %" if value > 0.99 else f"{100 * value:.0f} %"


def image_source(data: bytes) -> str:
    """Address of an image with its data."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def plural(count: int, noun: str, nouns: str = "") -> str:
    """Return a number with its noun.

    >>> plural(1, "class", "classes"), plural(1200, "image")
    ('1 class', '1,200 images')
    """
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"

"""Pages and parts of pages, by the templates in `templates`, which escape every value.

A page loads nothing, and runs no other script than its own.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ...formatting import decimal
from .formats import number, plural, probability


def render(template: str, **values: Any) -> str:
    """Return a page. Lone surrogates, of file names that are not in UTF-8, become "?"."""
    return _environment().get_template(template).render(values).encode(errors="replace").decode()


def part(name: str, *values: Any) -> Markup:
    """Return a part of a page, by a macro of parts.html.j2."""
    return getattr(_environment().get_template("parts.html.j2").module, name)(*values)


@functools.cache
def _environment() -> Environment:
    loader = PackageLoader("skipkernels.app.report")
    environment = Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )

    def source(name: str) -> Markup:
        return Markup(loader.get_source(environment, name)[0])

    environment.globals |= {"source": source, "policy": _policy}
    environment.filters |= {each.__name__: each for each in (decimal, number, plural, probability, image_source)}
    return environment


def _policy(script: str, others: str = "img-src data:") -> str:
    """Content security policy of a page: a browser runs no other script than this one, whatever a class is called.

    `others` are further directives, about what the page loads.
    """
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return f"default-src 'none'; {others}; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"


def image_source(data: bytes) -> str:
    """Address of an image with its data."""
    kind = "png" if data.startswith(b"\x89PNG") else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"

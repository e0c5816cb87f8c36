"""Hooks of mkdocs: make pages that are written for GitHub work on the documentation site.

Links to files outside docs/ become links to the repository, except pictures, which are copied to the site. The path
behind the language of a block (```python examples/tune_pairs.py) becomes the title of the block. `HouseStyle` is
for docstrings.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

LINK = re.compile(r"\]\((?P<path>\.\./[^)#\s]*)(?P<anchor>#[^)\s]*)?\)")
BLOCK = re.compile(r"^(?P<fence>\s*```)(?P<language>\w+) (?P<path>[\w./-]+)$", re.MULTILINE)
DOCTEST = re.compile(r"^>>> .*(?:\n.+)*", re.MULTILINE)


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Rewrite the links and blocks of a page."""

    def link(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join("docs", posixpath.dirname(page.file.src_uri), match["path"]))
        if path.startswith("docs/"):
            return match.group()
        if path.endswith(".svg"):
            if files.get_file_from_path(path) is None:
                files.append(File(path, ".", config.site_dir, config.use_directory_urls))
            return f"]({posixpath.relpath(path, posixpath.dirname(page.file.src_uri) or '.')})"
        return f"]({config.repo_url}/blob/main/{path}{match['anchor'] or ''})"

    def block(match: re.Match[str]) -> str:
        return f'{match["fence"]}{match["language"]} title="{match["path"]}"'

    return BLOCK.sub(block, LINK.sub(link, markdown))


def on_page_context(context: Any, page: Page, config: MkDocsConfig, nav: Any) -> None:
    """Remove the link for editing from pages that consist of docstrings."""
    if page.file.src_uri.startswith("api/"):
        page.edit_url = None


class HouseStyle(griffe.Extension):
    """Make docstrings Google's, with a section "Examples" and other examples in blocks; show defaults of options."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object before it is parsed."""
        if obj.docstring is not None:
            text = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)
            obj.docstring.value = DOCTEST.sub(r"```pycon\n\g<0>\n```", text)

    def on_attribute(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Replace `option(default, minimum=…)` by the default."""
        if isinstance(attr.value, griffe.ExprCall) and str(attr.value.function) == "option":
            attr.value = attr.value.arguments[0]

"""Pages as trees of elements, for tests."""

from __future__ import annotations

from html.parser import HTMLParser
from xml.etree.ElementTree import Element, TreeBuilder

VOID = {"meta", "link", "br", "img", "input"}


class Page:
    """A page as a tree of elements. An unbalanced tag is an error, and so is an attribute that is given twice."""

    def __init__(self, text: str):
        parser = _Parser()
        parser.feed(text)
        parser.close()
        assert not parser.open, "all tags are closed"
        self.root = parser.builder.close()

    @property
    def text(self) -> str:
        return text_of(self.root)

    @property
    def rows(self) -> list[list[str]]:
        """Texts of the cells of all tables."""
        return [[text_of(cell) for cell in row] for row in self.root.iter("tr")]

    def section(self, name: str) -> Element | None:
        """Section of that address; None if the page has none."""
        return self.root.find(f".//section[@id='{name}']")


def text_of(element: Element) -> str:
    """Text of an element, without scripts and styles."""
    if element.tag in ("script", "style"):
        return ""
    return (element.text or "") + "".join(text_of(child) + (child.tail or "") for child in element)


class _Parser(HTMLParser):
    """Parser that builds the tree of a page."""

    def __init__(self):
        super().__init__()
        self.builder, self.open = TreeBuilder(), []

    def handle_starttag(self, tag, attributes):
        assert len(dict(attributes)) == len(attributes)
        self.builder.start(tag, {name: value or "" for name, value in attributes})
        self.open.append(tag)
        if tag in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag
        self.builder.end(tag)

    def handle_data(self, data):
        self.builder.data(data.replace("\N{NO-BREAK SPACE}", " "))

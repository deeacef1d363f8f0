"""A page as its reader's browser takes it apart: elements, attributes, text."""

from __future__ import annotations

import re
from html.parser import HTMLParser

# Every element and attribute that a page may have; no script, image, link to elsewhere, form.
ELEMENTS = {
    "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "p", "a", "nav",
    "dl", "dt", "dd", "div", "span", "small", "figure", "figcaption", "svg", "g", "path", "rect",
    "details", "summary", "i", "article", "code", "pre", "b", "ol", "li", "table", "thead",
    "tbody", "tr", "th", "td", "footer",
}  # fmt: skip
ATTRIBUTES = {
    "lang", "charset", "http-equiv", "content", "name", "id", "class", "style", "href", "title",
    "role", "aria-label", "viewbox", "preserveaspectratio", "d", "x", "y", "width", "height",
    "transform", "stroke", "open",
}  # fmt: skip
# Values that a browser acts on: each must be one that the page makes itself.
ACTED_ON = {
    "href": re.compile(r"#(finding-\d+|timeline|maps|findings|layers)"),
    "style": re.compile(r"(--?[a-z]+:[\d.]+(px|rem|%)?;?|[a-z]+:(#[0-9a-f]{6}|[\d.]+(%|rem)?);?)+"),
    "class": re.compile(r"[a-z ]+"),
    "id": re.compile(r"finding-\d+|timeline|maps|findings|layers"),
    "d": re.compile(r"[MLHVhZ\d. -]*"),
}


class Page(HTMLParser):
    """Parsed without forgiveness: `skeleton` is elements and attribute names, `texts` the rest."""

    def __init__(self, source: str) -> None:
        super().__init__(convert_charrefs=True)
        self.skeleton: list[str] = []
        self.acted_on: list[tuple[str, str]] = []
        self.values: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.comments: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        assert self._open == [], f"never closed: {self._open}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.skeleton.append(" ".join([tag, *(name for name, _ in attrs)]))
        assert tag in ELEMENTS, tag
        assert {name for name, _ in attrs} <= ATTRIBUTES, attrs
        self.acted_on += [(name, value or "") for name, value in attrs if name in ACTED_ON]
        self.values += [value or "" for _, value in attrs]
        if tag != "meta":
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag
        self.skeleton.append(f"/{tag}")

    def handle_data(self, data: str) -> None:
        self.texts.append((self._open[-1] if self._open else "", data))

    def handle_comment(self, data: str) -> None:
        self.comments.append(data)

    def handle_pi(self, data: str) -> None:
        raise AssertionError(f"processing instruction {data!r}")

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(f"declaration {data!r}")

    def text(self) -> str:
        """All text but the style."""
        return "".join(data for tag, data in self.texts if tag != "style")


def assert_harmless(source: str) -> Page:
    """Parse a page and prove that nothing in it acts but what the page itself is made of."""
    page = Page(source)
    for name, value in page.acted_on:
        assert ACTED_ON[name].fullmatch(value), (name, value)
    return page

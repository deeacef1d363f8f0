"""HTML that cannot be broken out of: whatever is not made here as a tag is escaped text."""

from __future__ import annotations

import html
from collections.abc import Iterable, Iterator

from tensortrace.text import escape, shorten

# No text of a log is worth more on a page; its two ends stay.
LONGEST_TEXT = 4000


class Html(str):
    """A piece of finished HTML."""

    __slots__ = ()


Child = str | Iterable["Child"] | None


def tag(name: str, /, *children: Child, **attributes: object) -> Html:
    """Make an element; names are of this program, children and values may come from a log.

    Args:
        name: of the element.
        children: `Html` goes in as it is, other text escaped, iterables piece by piece.
        attributes: ``_`` in a name stands for ``-``, one at its end is dropped (``class_``);
            None and False leave the attribute out, True writes it without a value, `Html` is
            taken for a value that is escaped already.
    """
    written = "".join(
        f" {_name(key)}" if value is True else f' {_name(key)}="{_value(value)}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    inside = "".join(_flat(children))
    empty = name in _EMPTY and not inside
    return Html(f"<{name}{written}>" + ("" if empty else f"{inside}</{name}>"))


_EMPTY = frozenset(("meta", "br"))


def draw(d: str, **attributes: object) -> Html:
    """Make a path; `d` is drawn by this program and may be long."""
    return tag("path", **attributes, d=Html(d))


def text(raw: str) -> Html:
    """Make text of what a log says: control characters visible, nothing in it a tag or a quote."""
    lines = shorten(raw, LONGEST_TEXT).split("\n")
    return Html(html.escape("\n".join(map(escape, lines)), quote=True))


def joined(children: Child) -> Html:
    """Put pieces after each other, as `tag` does with its children."""
    return Html("".join(_flat([children])))


def _flat(children: Iterable[Child]) -> Iterator[str]:
    for child in children:
        if isinstance(child, Html):
            yield child
        elif isinstance(child, str):
            yield text(child)
        elif child is not None:
            yield from _flat(child)


def _value(value: object) -> str:
    return value if isinstance(value, Html) else text(str(value))


def _name(key: str) -> str:
    return key.rstrip("_").replace("_", "-")

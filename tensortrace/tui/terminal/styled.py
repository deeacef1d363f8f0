"""Lines and glyphs of the viewer.

A line on the screen is a list of ``(text, style name)`` pieces: plain data that tests read without
a terminal. What colours the names stand for is in `looks`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from rich.cells import cell_len, set_cell_size

# One line of the screen: pieces of escaped text, each with the name of a style.
Styled = list[tuple[str, str]]


@dataclass(frozen=True, slots=True)
class Glyphs:
    """The signs the viewer draws with; every set has the same meaning."""

    bars: str
    cursor: str
    unknown: str
    more: str
    arrow: str
    rule: str
    here: str
    folded: str
    unfolded: str
    heat: str


UNICODE = Glyphs(
    bars="▁▂▃▄▅▆▇█", cursor="▶", unknown="·", more="…", arrow="→", rule="─", here="▲",
    folded="▸", unfolded="▾", heat="·░▒▓█",
)  # fmt: skip
ASCII = Glyphs(
    bars="_.,-:=+#", cursor=">", unknown=" ", more="~", arrow="->", rule="-", here="^",
    folded="+", unfolded="-", heat=".:-=+*%@",
)  # fmt: skip

# Signs that a line of code is broken at: after those that close, before those that open.
CODE = ",;)]}.([{/"


def clip(text: str, width: int, glyphs: Glyphs = UNICODE) -> str:
    """Cut a text to a width in terminal cells, with a sign where something is missing."""
    if cell_len(text) <= width:
        return text
    return set_cell_size(text, max(0, width - 1)) + glyphs.more if width > 0 else ""


@lru_cache(4096)
def clip_path(path: str, width: int, glyphs: Glyphs = UNICODE) -> str:
    """Shorten a module path to a width so that it can still be told from its neighbours.

    Every part keeps its beginning and the number at its end, the last part most:
    ``enc….stage…3.blo….11.norm…residual``. Where that is too long the first parts are left out.
    """
    if cell_len(path) <= width:
        return path
    *outer, last = path.split(".")

    def kept(cells: int, more: int = 0) -> list[str]:
        end = _clip_part(last, min(3 * cells + more, len(last)), glyphs)
        return [*(_clip_part(part, cells, glyphs) for part in outer), end]

    low, high = 0, max(map(len, (*outer, last)))
    while low < high:
        middle = (low + high + 1) // 2
        fits = cell_len(".".join(kept(middle))) <= width
        low, high = (middle, high) if fits else (low, middle - 1)
    for more in (2, 1, 0) if low else ():
        told = ".".join(kept(low, more))
        if cell_len(told) <= width:
            return told
    short = kept(1)
    for at in range(1, len(short)):
        told = glyphs.more + ".".join(short[at:])
        if cell_len(told) <= width:
            return told
    return clip(last, width, glyphs)


def _clip_part(part: str, keep: int, glyphs: Glyphs) -> str:
    """A part of a path with `keep` of its cells, more if it ends in a number."""
    digits = len(part) - len(part.rstrip("0123456789"))
    end = max(min(digits, 4), keep // 3 if keep >= 6 else 0)
    if cell_len(part) <= keep + cell_len(glyphs.more) or digits == len(part):
        return part
    start = set_cell_size(part, max(1, keep - end)).rstrip()
    told = start + glyphs.more + (part[-end:] if end else "")
    return told if cell_len(told) < cell_len(part) else part


def clip_words(text: str, width: int, glyphs: Glyphs = UNICODE) -> str:
    """Cut a text as `clip` does, but no number: what is left of one would be read as another."""
    if cell_len(text) <= width:
        return text
    held = set_cell_size(text, max(0, width - 1)).rstrip()
    words, last = held.rpartition(" ")[::2]
    if not text[len(held) :][:1].isspace() and any(letter.isdigit() for letter in last):
        held = f"{words} " if words else ""
    return clip(held + glyphs.more, width, glyphs) if width > 0 else ""


def joined(line: Styled) -> Styled:
    """Put neighbours of one style together: drawing a piece costs as much as a long one."""
    held: Styled = []
    for text, style in line:
        if held and held[-1][1] == style:
            held[-1] = (held[-1][0] + text, style)
        else:
            held.append((text, style))
    return held


def cut(line: Styled, width: int, glyphs: Glyphs = UNICODE) -> Styled:
    """Cut a line of pieces to a width, with a sign where something is missing."""
    held: Styled = []
    if cell_len("".join(text for text, _ in line).rstrip()) <= width:
        return line
    room = width - cell_len(glyphs.more)
    for text, style in line:
        if cell_len(text) > room:
            return [*held, (set_cell_size(text, max(0, room)) + glyphs.more, style)]
        held.append((text, style))
        room -= cell_len(text)
    return held


def wrapped(line: Styled, width: int, hang: int = 0) -> list[Styled]:
    """Break a line of pieces into lines of a width, at spaces where there are any.

    Args:
        hang: cells before the lines that follow the first.
    """
    hang = min(hang, width // 2)
    lines: list[Styled] = []
    for start, stop in _breaks("".join(text for text, _ in line), width, hang):
        held: Styled = [(" " * hang, "")] if lines and hang else []
        at = 0
        for text, style in line:
            part = text[max(0, start - at) : max(0, stop - at)]
            at += len(text)
            if part:
                held.append((part, style))
        lines.append(held)
    return lines


def _breaks(text: str, width: int, hang: int) -> Iterator[tuple[int, int]]:
    """Where the lines of a text begin and end."""
    start, room = 0, max(1, width)
    # Cells before each character: to measure what is left anew for each line takes its square.
    before = [0, *accumulate(map(cell_len, text))]
    while before[-1] - before[start] > room:
        # Characters that fit: one of two cells may not.
        stop = max(start + 1, bisect_right(before, before[start] + room) - 1)
        stop = _break_before(text, start, stop)
        yield start, stop
        start = stop + len(text[stop:]) - len(text[stop:].lstrip(" "))
        room = max(1, width - hang)
    yield start, len(text)


def _break_before(text: str, start: int, stop: int) -> int:
    """Where to break before a place: at a space, else at a sign of code, else right there."""
    half = (start + stop) // 2
    space = text.rfind(" ", half, stop + 1)
    if space >= 0 and not text[start:space].isspace():
        return space
    for at in range(stop - 1, half, -1):
        if text[at] in CODE and not text[at + 1].isdigit():  # as in 1.5, or 10,000
            return at + (text[at] in ",;)]}")
    return stop


def fit(text: str, width: int, glyphs: Glyphs = UNICODE, *, right: bool = False) -> str:
    """Cut or pad a text to exactly a width in terminal cells."""
    text = clip(text, width, glyphs)
    padding = " " * (width - cell_len(text))
    return padding + text if right else text + padding

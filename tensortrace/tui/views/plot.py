"""A curve as lines of text: braille dots, two by four in a cell; stars in plain ASCII."""

from __future__ import annotations

import math
from collections.abc import Sequence

from tensortrace.tui.terminal.styled import ASCII, Glyphs

# What a column shows: the smallest and the largest of its numbers; None where there is none.
Extent = tuple[float, float] | None
BRAILLE = 0x2800
# The dots of a cell, top to bottom, of its left and of its right half.
DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def is_log(extents: Sequence[Extent]) -> bool:
    """Whether the numbers ask for a logarithmic scale: all above 0, over a hundredfold apart."""
    held = [extent for extent in extents if extent is not None]
    if not held:
        return False
    low, high = min(e[0] for e in held), max(e[1] for e in held)
    return low > 0 and high / low > 100


def curve(extents: Sequence[Extent], wide: int, height: int, glyphs: Glyphs) -> list[str]:
    """Draw a curve through columns of `wide` cells, top line first.

    Between columns that both have numbers the line is drawn through; where one has none it ends.
    """
    across, down = (1, 1) if glyphs is ASCII else (2, 4)
    levels = height * down
    spans = _dots(extents, levels)
    dots = _spread(spans, wide * across)
    if glyphs is ASCII:
        return ["".join("*" if _hit(dot, levels - 1 - row) else " " for dot in dots)
                for row in range(height)]  # fmt: skip
    lines = []
    for row in range(height):
        line = []
        for left in range(0, len(dots), 2):
            bits = 0
            for half in (0, 1):
                for part in range(4):
                    if _hit(dots[left + half], levels - 1 - (row * 4 + part)):
                        bits |= DOTS[half][part]
            line.append(chr(BRAILLE + bits) if bits else " ")
        lines.append("".join(line))
    return lines


def _hit(dot: tuple[int, int] | None, level: int) -> bool:
    return dot is not None and dot[0] <= level <= dot[1]


def _dots(extents: Sequence[Extent], levels: int) -> list[tuple[float, float] | None]:
    """Scale numbers to levels ``0 .. levels - 1``."""
    held = [extent for extent in extents if extent is not None]
    if not held:
        return [None] * len(extents)
    low, high = min(e[0] for e in held), max(e[1] for e in held)
    log = is_log(extents)
    bottom, top = (math.log(low), math.log(high)) if log else (low, high)

    def level(value: float) -> float:
        # In quarters, as the difference of two large numbers may not be a float.
        extent = top / 4 - bottom / 4
        if not extent:
            return (levels - 1) / 2
        share = ((math.log(value) if log else value) / 4 - bottom / 4) / extent
        return max(0.0, min(1.0, share)) * (levels - 1)

    return [None if e is None else (level(e[0]), level(e[1])) for e in extents]


def _spread(spans: Sequence[tuple[float, float] | None], each: int) -> list[tuple[int, int] | None]:
    """Give every column `each` dots; neighbours are joined, so that the curve has no holes."""
    dots: list[tuple[int, int] | None] = []
    for at, span in enumerate(spans):
        after = spans[at + 1] if at + 1 < len(spans) else None
        for i in range(each):
            if span is None:
                dots.append(None)
                continue
            low, high = span
            if i == 0 or after is None:
                dots.append((round(low), round(high)))
                continue
            share = i / each
            middle, other = (low + high) / 2, (after[0] + after[1]) / 2
            point = round(middle + (other - middle) * share)
            dots.append((point, point))
    for at in range(1, len(dots)):
        before, here = dots[at - 1], dots[at]
        if before is not None and here is not None:
            if here[0] > before[1] + 1:
                dots[at] = (before[1] + 1, here[1])
            elif here[1] < before[0] - 1:
                dots[at] = (here[0], before[0] - 1)
    return dots

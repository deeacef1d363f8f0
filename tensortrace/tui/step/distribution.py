"""How large the elements of tensors are, as one row of bars each over a common scale."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from tensortrace.magnitudes import counts_of, lower_end
from tensortrace.records import BUCKETS, Tensor
from tensortrace.text import number_text
from tensortrace.tui.terminal.styled import UNICODE, Glyphs, Styled, clip, fit

_TITLE = "magnitudes"
# Names longer than this leave no room for the bars at 80 columns.
_NAME = 20
# The ranges that the scale names: they begin at 2 ** -32, 2 ** -16, 1 and 2 ** 16.
_NAMED = (1, 5, 9, 13)
# Ranges that hold no number of a dtype stay empty: smallest above 0 and largest of float16.
_REACH = {"float16": (3, 12)}


def distribution_lines(
    tensors: Iterable[tuple[str, Tensor]], width: int, glyphs: Glyphs = UNICODE
) -> list[Styled]:
    """Draw how many elements lie in each range of magnitude, of tensors of which that was counted.

    A bar is as high as its share of the fullest range; zeros, NaN and infinity are in none.

    Args:
        tensors: by name, escaped.
        width: in terminal cells; from 21 on no line is wider.
    Returns:
        A line for each tensor, under them the scale; none if nothing was counted.
    """
    drawn = [(name, tensor, counts) for name, tensor in tensors if (counts := counts_of(tensor))]
    if not drawn:
        return []
    longest = max(len(_TITLE), *(len(name) for name, _, _ in drawn))
    wide = max(1, min(_NAME, longest, width - 4 - BUCKETS))
    each = 2 if width >= 4 + wide + 2 * BUCKETS else 1
    rest = width - 4 - wide - each * BUCKETS - 2
    lines: list[Styled] = []
    for name, tensor, counts in drawn:
        bars = _bars(counts, _REACH.get(tensor.dtype, (0, BUCKETS - 1)), each, glyphs)
        most = "  " + clip(_most(counts), rest, glyphs) if rest > 0 else ""
        lines.append([(f"  {fit(name, wide, glyphs)}  ", ""), (bars, "ok"), (most, "")])
    scale = clip(_scale(each), width - 4 - wide, glyphs)
    lines.append([(f"  {fit(_TITLE, wide, glyphs)}  {scale}", "faint")])
    return lines


def _bars(counts: Sequence[int], reach: tuple[int, int], each: int, glyphs: Glyphs) -> str:
    top, steps = max(counts), len(glyphs.bars)
    bars = ""
    for i, count in enumerate(counts):
        empty = glyphs.unknown if reach[0] <= i <= reach[1] else " "
        bars += (glyphs.bars[(count * steps - 1) // top] if count else empty) * each
    return bars


def _most(counts: Sequence[int]) -> str:
    """Say in words which range is the fullest."""
    i = max(range(BUCKETS), key=counts.__getitem__)
    low, high = number_text(lower_end(i)), number_text(lower_end(i + 1))
    place = f"from {low}" if i == BUCKETS - 1 else f"below {high}" if i == 0 else f"{low} to {high}"
    return f"{counts[i] / sum(counts):.0%} {place}"


def _scale(each: int) -> str:
    scale = ""
    for i in _NAMED[:: 3 - each]:
        scale = f"{scale:<{i * each}}{number_text(lower_end(i))}"
    return scale

"""The profile that a finding measured over depth, as small bars: where a gradient vanishes."""

from __future__ import annotations

import math
from typing import Any

from tensortrace.records import Finding
from tensortrace.text import escape, number_text
from tensortrace.tui.terminal.styled import UNICODE, Glyphs, Styled, clip, fit

# Of a deeper network so many of the first and of the last layers are shown.
ENDS = 20
NAME_TO, NUMBER, BAR_TO = 32, 10, 30


def profile_lines(finding: Finding, width: int, glyphs: Glyphs = UNICODE) -> list[Styled]:
    """Draw the numbers of a finding's evidence over depth, one module a line.

    Args:
        finding: its evidence may hold ``profile`` or ``modules``, a list of ``[path, number]``.
        width: in terminal cells; the bars are logarithmic and take what names and numbers leave.
    """
    for name in ("profile", "modules"):
        pairs = pairs_of(finding.evidence.get(name))
        if pairs:
            head = f"  {name} over depth (bars: log scale)"
            return [[(clip(head, width, glyphs), "faint")], *bars(pairs, width, glyphs)]
    return []


def pairs_of(value: Any) -> list[tuple[str, float]]:
    """Read ``[[path, number], ...]``; empty if it is anything else."""
    pairs: list[tuple[str, float]] = []
    for item in value if isinstance(value, list | tuple) and len(value) > 1 else ():
        match item:
            case [str(path), int(number) | float(number)] if not isinstance(number, bool):
                pairs.append((path, float(number)))
            case [str(path), None | str()]:
                pairs.append((path, math.nan))
            case _:
                return []
    return pairs


def bars(pairs: list[tuple[str, float]], width: int, glyphs: Glyphs) -> list[Styled]:
    """Draw a bar a pair, the longest for the largest."""
    logs = [math.log10(abs(n)) for _, n in pairs if math.isfinite(n) and n]
    low, high = (min(logs), max(logs)) if logs else (0.0, 0.0)
    name = min(NAME_TO, max(len(escape(path)) for path, _ in pairs), max(4, width // 3))
    room = max(1, min(BAR_TO, width - name - NUMBER - 8))
    lines: list[Styled] = []
    for at, (path, number) in enumerate(pairs):
        if ENDS <= at < len(pairs) - ENDS:
            if at == ENDS:
                lines.append([(f"    ({len(pairs) - 2 * ENDS} more)", "faint")])
            continue
        share = 0.0
        if number and math.isfinite(number):
            share = (math.log10(abs(number)) - low) / (high - low) if high > low else 1.0
        bar = glyphs.bars[-1] * round(1 + share * (room - 1)) if share or number else ""
        text = number_text(number) if math.isfinite(number) else "-"
        lines.append([
            ("    ", ""), (fit(escape(path) or "(root)", name, glyphs), ""),
            (text.rjust(NUMBER) + "  ", ""), (bar if math.isfinite(number) else "", "op"),
        ])  # fmt: skip
    return lines

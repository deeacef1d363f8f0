"""Which panes a screen of a size has room for: a pure function of size and choices."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PaneName = Literal["findings", "calls", "detail", "source"]
PANES: tuple[PaneName, ...] = ("findings", "calls", "detail", "source")

FINDINGS_FROM, SOURCE_FROM = 110, 140
# The first line and the last.
HEAD_AND_KEYS = 2
DETAIL_FROM_HEIGHT, AXIS_FROM_HEIGHT, TABS_FROM_HEIGHT = 16, 14, 20


@dataclass(frozen=True, slots=True)
class Arrangement:
    """The visible panes, and heights in lines."""

    visible: frozenset[PaneName]
    tabs: bool
    timeline: int
    bottom: int


def arrange(width: int, height: int, zoom: PaneName | None, source: bool | None) -> Arrangement:
    """Choose the panes for a screen.

    Args:
        zoom: the one pane that is shown alone.
        source: whether the user wants the source pane; None leaves it to the width. On a narrow
            screen it takes the place of the detail.
    """
    tabs = height >= TABS_FROM_HEIGHT
    timeline = 2 if height >= AXIS_FROM_HEIGHT else 1
    # The table gets the larger part, on a low screen half of what the other lines leave; at 80x24
    # the detail has eight lines inside its frame.
    body = height - HEAD_AND_KEYS - tabs - timeline
    bottom = min(max(10, int(height * 0.42)), (body + 1) // 2)
    if zoom is not None:
        return Arrangement(frozenset({zoom}), tabs, timeline, height)
    visible: set[PaneName] = {"calls"}
    if width >= FINDINGS_FROM:
        visible.add("findings")
    if height >= DETAIL_FROM_HEIGHT:
        shown = width >= SOURCE_FROM if source is None else source
        if shown:
            visible.add("source")
        if not shown or width >= FINDINGS_FROM:
            visible.add("detail")
    elif source:
        visible = {"source"}
    return Arrangement(frozenset(visible), tabs, timeline, bottom)

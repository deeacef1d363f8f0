"""What stands over the main screen, with that behind it: a list to choose from, the help.

Textual sends all that is behind through Rich, piece by piece, each time that a line changes: 25 ms
of the 55 that such a key took (measured at 120x40 on two cores). Here its strips are taken as they
are; a style is darkened once.
"""

from __future__ import annotations

from functools import lru_cache

from rich.segment import Segment
from rich.style import Style as RichStyle
from textual.color import Color
from textual.css.styles import RulesMap
from textual.screen import Screen, ScreenResultType
from textual.strip import Strip
from textual.style import Style
from textual.visual import RenderOptions, Visual, VisualType

from tensortrace.tui.terminal.paints import Immediate


class Over(Immediate[ScreenResultType]):
    """The part of a screen that draws what is behind it.

    It is the last base of such a screen: style rules are inherited through the first.
    """

    def render(self) -> VisualType:  # type: ignore[override]  # any widget may give a Visual
        """Draw the screen behind, as dark as the background says."""
        stack = self.app.screen_stack
        at = stack.index(self) if self in stack else 0
        return Behind(stack[at - 1], self) if at else super().render()


class Behind(Visual):
    """The lines of a screen, darkened by the background of the one over it."""

    def __init__(self, screen: Screen[object], over: Screen[ScreenResultType]) -> None:
        self.screen, self.over = screen, over

    def render_strips(
        self, width: int, height: int | None, style: Style, options: RenderOptions
    ) -> list[Strip]:
        """Take the lines as they are drawn at the moment."""
        colour = self.over.styles.background
        return [
            Strip(
                [Segment(text, darkened(held, colour)) for text, held, _ in strip],
                strip.cell_length,
            )
            for strip in self.screen._compositor.render_strips()
        ]

    def get_optimal_width(self, rules: RulesMap, container_width: int) -> int:
        """All of it."""
        return container_width

    def get_height(self, rules: RulesMap, width: int) -> int:
        """All of it."""
        return self.screen.size.height


@lru_cache(4096)
def darkened(style: RichStyle | None, colour: Color) -> RichStyle:
    """Lay a colour that is partly transparent over a style; what a click does is left out."""
    style = RichStyle() if style is None else style.clear_meta_and_links()
    if not colour.a:
        return style
    letters, ground = (
        None if one is None else (Color.from_rich_color(one) + colour).rich_color
        for one in (style.color, style.bgcolor)
    )
    return style + RichStyle.from_color(letters, ground)

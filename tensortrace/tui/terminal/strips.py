"""Lines of the screen that cost little: to make, to draw again, and for the garbage collector.

Each of Textual's strips has seven caches, 16 objects, and one that is cut nowhere holds itself in
one of them. Of those that are made for a key, thousands, all waited for the collector, which stops
the screen meanwhile: 20 ms twice a second, 100 ms now and then (textual 8.2.8, 120x40, two cores).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.segment import Segment, Segments
from rich.style import Style
from textual._styles_cache import StylesCache
from textual.app import App
from textual.color import Color
from textual.css.styles import RulesMap
from textual.filter import LineFilter
from textual.geometry import Region
from textual.scrollbar import ScrollBar, ScrollBarRender
from textual.strip import Strip
from textual.style import Style as VisualStyle
from textual.visual import RenderOptions, Visual, VisualType
from textual.widget import Widget

# What can be dragged of a scrollbar, in ASCII.
THUMB = "#"


class Line(Strip):
    """A strip that keeps how it was cut and filtered last; other caches are made when asked for."""

    __slots__ = ("_cuts", "_filter", "_filtered", "_parts")

    def __init__(self, segments: Iterable[Segment], cell_length: int | None = None) -> None:
        self._segments, self._cell_length = list(segments), cell_length
        self._cuts: list[int] = []
        self._parts: list[Strip] = []
        self._filter: tuple[LineFilter, Color] | None = None
        # None: it is the line itself, which must not hold itself.
        self._filtered: Line | None = None

    def __getattr__(self, name: str) -> Any:
        """Make what Textual's strip has from the beginning."""
        made = getattr(Strip(self._segments, self._cell_length), name)
        setattr(self, name, made)
        return made

    def divide(self, cuts: Iterable[int]) -> Sequence[Strip]:
        """Cut it at some cells."""
        length = self.cell_length
        wanted = [cut for cut in cuts if cut <= length]
        if wanted == [length]:
            return [self]
        if wanted != self._cuts:
            parts = zip([0, *wanted], wanted, Segment.divide(self._segments, wanted), strict=False)
            self._cuts = wanted
            self._parts = [Line(segments, stop - start) for start, stop, segments in parts]
        return self._parts

    def apply_filter(self, filter: LineFilter, background: Color) -> Strip:
        """Change its colours; most are as they are wanted."""
        if self._filter != (filter, background):
            segments = filter.apply(self._segments, background)
            same = segments == self._segments
            self._filter = filter, background
            self._filtered = None if same else Line(segments, self._cell_length)
        return self if self._filtered is None else self._filtered


def filled(pieces: Iterable[Segment], width: int, ground: Style) -> Line:
    """Make a line of a width from pieces: what they leave is filled, what is too long is cut."""
    line = Line(pieces)
    room = width - line.cell_length
    if room > 0:
        return Line([*line, Segment(" " * room, ground)], width)
    return Line(line.crop(0, width), width) if room else line


class LineCache(StylesCache):
    """The lines of a widget as they were drawn last, with its border."""

    def render_line(self, *args: Any, **options: Any) -> Strip:
        """Draw one."""
        drawn = super().render_line(*args, **options)
        return Line(drawn, drawn.cell_length)


class Drawn(Widget):
    """A widget that draws its lines itself."""

    def __init__(self, *children: Widget, **options: Any) -> None:
        super().__init__(*children, **options)
        self._styles_cache = LineCache()


class Bar(ScrollBar, Drawn):
    """A scrollbar, drawn without Rich in between."""

    def render(self) -> VisualType:  # type: ignore[override]  # any widget may give a Visual
        """Draw what the scrollbar would have Rich draw."""
        made = super().render()
        return Cells(made, self.app) if isinstance(made, ScrollBarRender) else made


class Cells(Visual):
    """The cells of a scrollbar."""

    def __init__(self, bar: ScrollBarRender, app: App[Any]) -> None:
        self.bar, self.app = bar, app

    def render_strips(
        self, width: int, height: int | None, style: VisualStyle, options: RenderOptions
    ) -> list[Strip]:
        """Draw each cell in a line of its own."""
        room = self.app.console_options.update(width=width, height=height)
        base = style.rich_style
        return [
            Line([Segment(self.sign_of(cell), base + cell.style)], width)
            for part in self.bar.__rich_console__(self.app.console, room)
            if isinstance(part, Segments)
            for cell in part.segments
        ]

    def sign_of(self, cell: Segment) -> str:
        """The sign of a cell; a terminal without block elements gets one that it has."""
        if not self.app.has_class("-ascii"):
            return cell.text
        grabbed = cell.style is not None and cell.style.meta.get("@mouse.down") == "grab"
        return (THUMB if grabbed else " ") * cell.cell_length

    def get_optimal_width(self, rules: RulesMap, container_width: int) -> int:
        """As wide as it may be."""
        return container_width

    def get_height(self, rules: RulesMap, width: int) -> int:
        """Any; it is given one."""
        return 1


class Ground(Widget):
    """A container that shows its background alone: all its lines are one.

    Textual draws each of them, though panes lie over them: a quarter of what a full screen takes.
    It is the last base of such a container: style rules are inherited through the first.
    """

    def render_lines(self, crop: Region) -> list[Strip]:
        """Draw the lines."""
        strip = Strip.blank(crop.width, self.visual_style.rich_style)
        for one in self.get_line_filters():
            strip = strip.apply_filter(one, self.background_colors[1])
        return [strip] * crop.height

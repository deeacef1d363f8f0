"""A pane of lines on the screen: virtual, so that only the visible lines are ever made."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.content import Content
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.scrollbar import ScrollBar
from textual.strip import Strip

from tensortrace.text import escape
from tensortrace.tui.kept import Kept
from tensortrace.tui.terminal.looks import look_of
from tensortrace.tui.terminal.strips import Bar, Drawn, filled
from tensortrace.tui.terminal.styled import ASCII, UNICODE, Styled, cut, joined

# Makes line `part` of item `at` for a width, with the cursor on it or not.
Draw = Callable[[int, int, int, bool], Styled]
KEPT_STRIPS = 1000
# Items that stay in sight above and below the cursor.
AROUND = 2


class Pane(ScrollView, Drawn, inherit_bindings=False, can_focus=True):
    """A list of items of `height` lines each, with a cursor or (`cursor=None`) without.

    Args:
        title: the static title; what comes from a log goes through `set_title`.
        sticky: lines at the top that stay, drawn as item -1.
    """

    class Moved(Message):
        """The cursor is on another item."""

        def __init__(self, pane: Pane, at: int) -> None:
            super().__init__()
            self.pane, self.at = pane, at

    class Opened(Message):
        """An item was opened: Enter, or a click on the item that the cursor is on."""

        def __init__(self, pane: Pane, at: int) -> None:
            super().__init__()
            self.pane, self.at = pane, at

    class Clicked(Message):
        """An item was clicked, or a line at the top (`at` is -1), `x` cells from the left."""

        def __init__(self, pane: Pane, at: int, x: int) -> None:
            super().__init__()
            self.pane, self.at, self.x = pane, at, x

    class Resized(Message):
        """The pane has another size: what is laid out for its room is to be drawn again."""

        def __init__(self, pane: Pane) -> None:
            super().__init__()
            self.pane = pane

    def __init__(
        self, name: str, title: str, *, height: int = 1, sticky: int = 0, cursor: bool = True
    ) -> None:
        super().__init__(id=name)
        self.border_title = Content(title)
        self.item_height, self.sticky = height, sticky
        self.cursor: int | None = 0 if cursor else None
        self.count = 0
        self._draw: Draw = lambda at, part, width, here: []
        # By item, part, width in all and beside a scrollbar, focus, whether it is the topmost item.
        self._strips: Kept[tuple[int, int, int, int, bool, bool], Strip] = Kept(KEPT_STRIPS)
        # The style while lines are drawn, and that of the strips.
        self._base: Style | None = None
        self._kept_in: Style | None = None

    def set_title(self, text: str) -> None:
        """Name the pane; the text is escaped and is never markup."""
        self.border_title = Content(escape(text))

    def show(self, count: int, draw: Draw, cursor: int = 0, *, keep: bool = False) -> None:
        """Show items; with `keep` the scroll position stays where the cursor allows it."""
        self.count, self._draw = count, draw
        self._strips.clear()
        self._resize_content()
        if self.cursor is not None:
            self.cursor = max(0, min(cursor, count - 1))
            self.call_after_refresh(self._reveal)
            self._reveal()
        elif not keep:
            self.scroll_to(y=0, animate=False)
        self.refresh()

    def _resize_content(self) -> None:
        height = self.count * self.item_height + self.sticky
        self.virtual_size = Size(self.size.width, height)

    def on_resize(self) -> None:
        """Draw for the new width; the cursor stays in sight."""
        self._resize_content()
        self.call_after_refresh(self._reveal)
        self.post_message(self.Resized(self))

    def move_to(self, at: int, around: int = AROUND) -> None:
        """Put the cursor on an item, or scroll there in a pane without a cursor.

        Args:
            around: items that stay in sight beside it.
        """
        if self.cursor is None:
            self.scroll_to(y=at, animate=False)
            return
        at = max(0, min(at, self.count - 1))
        if at == self.cursor or self.count == 0:
            return
        self.place(at, around)
        self.post_message(self.Moved(self, at))

    def place(self, at: int, around: int = AROUND) -> None:
        """Put the cursor on an item without telling anybody."""
        before, top = self.cursor or 0, round(self.scroll_y)
        self.cursor = max(0, min(at, self.count - 1))
        self._reveal(around)
        if round(self.scroll_y) != top:
            self.refresh()
            return
        height, width = self.item_height, self.size.width
        lines = [self.sticky + item * height - top for item in (before, self.cursor)]
        self.refresh(*(Region(0, y, width, height) for y in lines))

    def move_by(self, lines: int) -> None:
        """Move the cursor, or scroll, by some items."""
        at = round(self.scroll_y) if self.cursor is None else self.cursor
        self.move_to(at + lines)

    def move_page(self, pages: float) -> None:
        """Move by a share of what is visible."""
        visible = max(1, (self.size.height - self.sticky) // self.item_height - 1)
        lines = max(1, round(visible * abs(pages)))
        self.move_by(lines if pages > 0 else -lines)

    def move_end(self, last: bool) -> None:
        """Go to the first or the last item."""
        self.move_to(self.count if last else 0)

    def texts(self, width: int, most: int) -> Iterator[str]:
        """Every line as plain text, at most so many."""
        for part in range(self.sticky):
            yield "".join(text for text, _ in self._draw(-1, part, width, False))
        for line in range(min(most, self.count * self.item_height)):
            at, part = divmod(line, self.item_height)
            yield "".join(text for text, _ in self._draw(at, part, width, at == self.cursor))
        if most < self.count * self.item_height:
            yield f"(the first {most} lines of {self.count * self.item_height})"

    def _reveal(self, items: int = AROUND) -> None:
        """Scroll the cursor into sight with a little around it; far jumps put it in the middle."""
        if self.show_vertical_scrollbar:
            # One that has just appeared stands at the top.
            self.vertical_scrollbar.position = self.scroll_y
        if self.cursor is None:
            return
        height, page = self.item_height, max(1, self.size.height - self.sticky)
        top, y = round(self.scroll_y), self.cursor * height
        around = min(items * height, max(0, (page - height) // 2))
        if top + around <= y <= top + page - height - around:
            return
        if height > page:  # of an item that has no room its beginning says what it is
            top = y
        elif y < top - page or y > top + 2 * page:
            top = y - page // 2
        else:
            top = y - around if y < top + around else y + height + around - page
        self.scroll_to(y=max(0, min(top, self.count * height - page)), animate=False, force=True)

    @property
    def vertical_scrollbar(self) -> ScrollBar:
        """Its scrollbar, made when it is asked for."""
        if self._vertical_scrollbar is None:
            self._vertical_scrollbar = bar = Bar(name="vertical")
            bar.display = False
            self.app._start_widget(self, bar)
        return self._vertical_scrollbar

    def render_lines(self, crop: Region) -> list[Strip]:
        """Draw the visible lines, all in one style: to ask for it costs as much as a line."""
        self._base = self.rich_style
        if self._base != self._kept_in:  # the theme is another
            self._strips.clear()
            self._kept_in = self._base
        try:
            return super().render_lines(crop)
        finally:
            self._base = None

    def render_line(self, y: int) -> Strip:
        """Draw one visible line."""
        width = self.size.width
        line = y - self.sticky
        if line < 0:
            return self._strip(-1, y, width, False)
        at, part = divmod(line + round(self.scroll_y), self.item_height)
        if at >= self.count:
            return Strip.blank(width, self.rich_style)
        return self._strip(at, part, width, at == self.cursor)

    @property
    def topmost(self) -> int:
        """The item of the first line that scrolls."""
        return round(self.scroll_y) // self.item_height

    def _strip(self, at: int, part: int, width: int, here: bool) -> Strip:
        base = self._base or self.rich_style
        # The scrollbar lies over the last cells: a sign that something is cut stands before it.
        seen = width - self.show_vertical_scrollbar * self.styles.scrollbar_size_vertical
        key = (at, part, width, seen, here and self.has_focus, at == self.topmost)
        strip = self._strips.get(key) if not here else None
        if strip is None:
            glyphs = ASCII if self.app.has_class("-ascii") else UNICODE
            look = look_of(self.app.theme)
            ground = base + (look.cursor if self.has_focus else look.blurred) if here else base
            pieces = [
                # The rows are escaped where they are made; this is the last gate to the terminal.
                # What has a background of its own keeps it, with which its colour can be read.
                Segment(escape(text), ground + look.styles[style])
                for text, style in cut(joined(self._draw(at, part, width, here)), seen, glyphs)
            ]
            strip = filled(pieces, width, ground)
            if not here:
                self._strips[key] = strip
        return strip

    def on_focus(self) -> None:
        """The cursor line looks different with and without the focus."""
        self.refresh()

    def on_blur(self) -> None:
        """The cursor line looks different with and without the focus."""
        self.refresh()

    def on_click(self, event: events.Click) -> None:
        """Select the item under the pointer; a click on the selected one opens it."""
        y = event.get_content_offset(self)
        if y is None:
            return
        if y.y < self.sticky:
            self.post_message(self.Clicked(self, -1, y.x))
            return
        at = (y.y - self.sticky + round(self.scroll_y)) // self.item_height
        if at >= self.count:
            return
        self.post_message(self.Clicked(self, at, y.x))
        if self.cursor is None:
            return
        if at == self.cursor:
            self.post_message(self.Opened(self, at))
        else:
            # What was clicked stays under the pointer, so that a second click opens it.
            self.move_to(at, 0)

"""The line that names the views: which there are, by which key, and which one is shown."""

from __future__ import annotations

from rich.cells import cell_len
from rich.segment import Segment
from textual import events
from textual.message import Message
from textual.strip import Strip

from tensortrace.tui.terminal.looks import look_of
from tensortrace.tui.terminal.strips import Drawn, filled

# The views by the keys 1, 2, ...; each but the first is a class in `views`.
TABS = ("step", "timeline", "layers", "tensor", "flow", "source", "findings")


def tab_texts(names: tuple[str, ...], shown: str, width: int) -> list[tuple[str, str]]:
    """Write the tabs as ``(view, text)``; where it is narrow only the shown one has its name."""
    texts = [(name, f" {TABS.index(name) + 1} {name.capitalize()} ") for name in names]
    if sum(cell_len(text) for _, text in texts) <= width:
        return texts
    return [(name, text if name == shown else f" {TABS.index(name) + 1} ") for name, text in texts]


class Tabs(Drawn):
    """The line; a click on a name shows its view."""

    DEFAULT_CSS = "Tabs { height: 1; }"

    class Picked(Message):
        """A view was clicked."""

        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__(id="tabs")
        self.names, self.shown = names, names[0]

    def show(self, name: str) -> None:
        """Mark another view as the one that is shown."""
        self.shown = name
        self.refresh()

    def render_line(self, y: int) -> Strip:
        """Draw the line; brackets say without colour which view is shown."""
        base, width = self.rich_style, self.size.width
        styles = look_of(self.app.theme).styles
        pieces = []
        for name, text in tab_texts(self.names, self.shown, width):
            here = name == self.shown
            told = f"[{text[1:-1]}]" if here else text
            pieces.append(Segment(told, base + styles["bar-strong" if here else "bar-faint"]))
        return filled(pieces, width, base)

    def on_click(self, event: events.Click) -> None:
        """Ask for the view under the pointer."""
        at = 0
        for name, text in tab_texts(self.names, self.shown, self.size.width):
            at += cell_len(text)
            if event.x < at:
                self.post_message(self.Picked(name))
                return

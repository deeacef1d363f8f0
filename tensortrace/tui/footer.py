"""The line of keys at the bottom."""

from __future__ import annotations

from typing import ClassVar

from rich.cells import cell_len
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding
from textual.screen import Screen
from textual.strip import Strip

from tensortrace.tui.terminal.strips import Drawn, filled

# What is named however narrow the screen is.
ALWAYS = ("help", "quit")


class Keys(Drawn):
    """The keys of the moment and what they do, drawn from pieces; a click presses one.

    Textual's own footer is a widget for each key, made anew whenever the focus moves: 40 ms in
    which no other key is answered, and 15 ms of the start (measured on two cores).
    """

    COMPONENT_CLASSES: ClassVar[set[str]] = {"keys--key", "keys--told"}
    DEFAULT_CSS = """
    Keys {
        dock: bottom;
        height: 1;
        & .keys--key {
            color: $footer-key-foreground;
            background: $footer-key-background;
            text-style: bold;
        }
        & .keys--told {
            color: $footer-description-foreground;
            background: $footer-description-background;
        }
        &:hover { pointer: pointer; }
    }
    """

    def __init__(self) -> None:
        super().__init__(id="keys")
        self.held: list[Binding] = []

    def on_mount(self) -> None:
        """Show other keys whenever other keys do something."""
        self.screen.bindings_updated_signal.subscribe(self, self.take)

    def take(self, screen: Screen[object]) -> None:
        """Show the keys of a screen; of two that do the same, the first."""
        if screen is not self.screen:
            return
        shown = [held.binding for held in screen.active_bindings.values() if held.binding.show]
        first = {binding.action: binding for binding in reversed(shown)}
        held = [binding for binding in shown if binding is first[binding.action]]
        if held != self.held:
            self.held = held
            self.refresh()

    def texts(self) -> list[tuple[Binding, tuple[str, str]]]:
        """The keys that there is room for, each as it is shown, and what it does.

        The last ones that lead on give way: from help one learns of all the others.
        """
        texts = [
            (one, (f" {self.app.get_key_display(one)} ", f"{one.description} "))
            for one in self.held
        ]
        over = sum(cell_len("".join(text)) for _, text in texts) - self.size.width
        for one in reversed(texts[:]):
            if over > 0 and one[0].action not in ALWAYS:
                texts.remove(one)
                over -= cell_len("".join(one[1]))
        return texts

    def render_line(self, y: int) -> Strip:
        """Draw the line."""
        base = self.rich_style
        key, told = (self.get_component_rich_style(f"keys--{part}") for part in ("key", "told"))
        styles = (base + key, base + told)
        pairs = [pair for _, pair in self.texts()]
        pieces = [Segment(*one) for pair in pairs for one in zip(pair, styles, strict=True)]
        return filled(pieces, self.size.width, Style(bgcolor=base.bgcolor))

    def on_mouse_down(self, event: events.MouseDown) -> None:
        """Press the key under the pointer."""
        at = 0
        for binding, texts in self.texts():
            at += sum(map(cell_len, texts))
            if event.x < at:
                self.app.simulate_key(binding.key)
                return

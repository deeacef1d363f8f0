"""What comes over the main screen: the help, and the line that asks for a step or a text."""

from __future__ import annotations

import textwrap
from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.screen import ModalScreen
from textual.widgets import Input

from tensortrace.tui.bindings import help_lines
from tensortrace.tui.dialogs.over import Over
from tensortrace.tui.footer import Keys
from tensortrace.tui.panes import Pane
from tensortrace.tui.terminal.styled import ASCII, UNICODE, Glyphs, Styled

SIGNS = (
    ("x", "error, NaN or infinite"),
    ("!", "warning, near the range of the dtype"),
    ("i", "note"),
    (".", "ok"),
    ("0", "all zeros"),
    ("?", "empty, or not measured"),
)


PROMISE = (
    "The viewer reads the log alone: no network, no pickle, no other file of yours. It writes what"
    " x asks for, and the place that you leave."
)
# Cells of the column of keys, and of a page that has room.
KEY_WIDTH, HELP_WIDTH = 20, 78


# How a terminal without their signs names the keys.
ARROWS = str.maketrans({"↑": "up", "↓": "down", "←": "left", "→": "right"})


def help_page(view: str, width: int, glyphs: Glyphs = UNICODE) -> list[Styled]:
    """Write the help page from the table of keys, those of a view first; long lines are wrapped."""
    lines: list[Styled] = []
    signs = [("Signs", ""), *SIGNS]
    for shown, told in [*help_lines(view), *signs]:
        if not told:
            lines.append([(f" {shown}", "strong")])
            continue
        keys = shown.translate(ARROWS) if glyphs is ASCII else shown
        head = f"   {keys:<{KEY_WIDTH - 2}}"
        rest = textwrap.wrap(told, max(12, width - len(head) - 1))
        lines += [
            [(head if at == 0 else " " * len(head), ""), (part, "")] for at, part in enumerate(rest)
        ]
    lines.append([])
    return lines + [[(f" {line}", "")] for line in textwrap.wrap(PROMISE, max(20, width - 2))]


class Help(ModalScreen[None], Over[None]):
    """All keys and signs; any of the closing keys goes back."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("q,escape,question_mark,f1,enter", "dismiss", "Close", show=False),
        Binding("j,space,pagedown", "turn(0.5)", "Down", show=False),
        Binding("k,b,pageup", "turn(-0.5)", "Up", show=False),
        Binding("down", "line(1)", "Next line", show=False),
        Binding("up", "line(-1)", "Previous line", show=False),
        Binding("g,home", "end(False)", "First line", show=False),
        Binding("G,end", "end(True)", "Last line", show=False),
    ]

    def __init__(self, view: str = "step") -> None:
        super().__init__()
        self.view, self.width = view, 0

    def compose(self) -> ComposeResult:
        """One scrolling page."""
        yield Pane("help", f"Keys in {self.view}: j and k scroll, esc closes", cursor=False)

    @property
    def page(self) -> Pane:
        """The page."""
        return self.query_one("#help", Pane)

    def on_mount(self) -> None:
        """Show the page, at once as wide as it will be."""
        # Beside the lines are the frame and the scrollbar.
        self.draw(min(HELP_WIDTH, self.app.size.width) - 3)
        self.set_focus(self.page)

    def on_pane_resized(self, message: Pane.Resized) -> None:
        """Wrap the lines to another width."""
        message.stop()
        if message.pane.size.width != self.width:
            self.draw(message.pane.size.width)

    def draw(self, width: int) -> None:
        """Show the lines, wrapped to a width."""
        glyphs = ASCII if self.app.has_class("-ascii") else UNICODE
        self.width, lines = width, help_page(self.view, width, glyphs)
        self.page.styles.height = len(lines) + 2
        self.page.show(len(lines), lambda at, part, width, here: lines[at], keep=True)

    def action_turn(self, pages: float) -> None:
        """Scroll where the screen is too small for the page."""
        self.page.move_page(pages)

    def action_line(self, lines: int) -> None:
        """Scroll by lines."""
        self.page.move_by(lines)

    def action_end(self, last: bool) -> None:
        """Go to the first or the last line."""
        self.page.move_end(last)


class Prompt(Input):
    """The line at the bottom that asks for something; Esc alone takes it away.

    A name that is rubbed out to type another one must not end the question: what is typed next
    would be taken for keys of the viewer.
    """

    class Answered(Message):
        """The user pressed Enter: what was asked (":", "/" or ">"), and the text."""

        def __init__(self, sign: str, text: str) -> None:
            super().__init__()
            self.sign, self.text = sign, text

    class Left(Message):
        """The user gave up the question."""

    def __init__(self) -> None:
        super().__init__(id="prompt", compact=True, select_on_focus=False)
        # What stands in front, and the text with it as it was before the last key.
        self.sign = self.held = ":"
        self.display = False

    def ask(self, sign: str, text: str = "") -> None:
        """Show the line with a sign in front, and a text to change, and take the focus."""
        self.sign, self.held = sign, sign + text
        self.value = self.held
        self.cursor_position = len(self.value)
        self._show(True)
        # At once: `focus` would wait, and letters sent together would go elsewhere.
        self.screen.set_focus(self)

    def _show(self, shown: bool) -> None:
        """Take the place of the footer, or give it back."""
        self.display = shown
        if not shown:
            self.screen.set_focus(None)
        self.screen.query_one(Keys).display = not shown

    def on_key(self, event: events.Key) -> None:
        """End the question at once: a binding is looked up after the keys that came with it."""
        ends = {"escape": self.cancel, "enter": self.answer}
        if self.display and event.key not in ends:
            return
        event.stop()
        event.prevent_default()
        if self.display:
            ends[event.key]()
        else:  # typed after the end of the question
            self.app.simulate_key(event.key)

    def answer(self) -> None:
        """Hand on the answer."""
        self._show(False)
        self.post_message(self.Answered(self.sign, self.value.removeprefix(self.sign).strip()))

    def on_input_changed(self, event: Input.Changed) -> None:
        """The sign stays in front, whatever is rubbed out."""
        event.stop()
        if not self.display:
            return
        if not self.value.startswith(self.sign):
            # Typed in front of the sign, or the sign itself was rubbed out.
            front = self.value.removesuffix(self.held)
            rest = self.held[1:] if front != self.value else ""
            at = self.cursor_position + 1
            self.value = self.sign + front + rest
            self.cursor_position = at
        self.held = self.value

    def cancel(self) -> None:
        """Give up."""
        self._show(False)
        self.post_message(self.Left())

    def on_blur(self, event: events.Blur) -> None:
        """A click elsewhere gives up too; what is told late of the last question does not."""
        if self.display and self.screen.focused is not self:
            self.cancel()

    def on_hide(self, event: events.Hide) -> None:
        """Keep the focus where the next question was asked before this was told."""
        if self.display:
            event.prevent_default()

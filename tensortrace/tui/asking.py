"""The questions of the viewer's last line: a step, a text to search, the name of a new file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from textual.actions import SkipAction
from textual.widgets import Input

from tensortrace.tui import save
from tensortrace.tui.dialogs.screens import Prompt
from tensortrace.tui.header import program_of
from tensortrace.tui.panes import Pane

if TYPE_CHECKING:
    from tensortrace.tui.frame import Frame
    from tensortrace.tui.seek import Seeker

# Over a picture of the screen.
TITLE = "tensortrace"


class Asker:
    """Asks for a line of text, and does what was answered."""

    def __init__(self, frame: Frame, seeker: Seeker) -> None:
        self.frame, self.stand, self.seeker = frame, frame.stand, seeker

    def ask_save(self) -> None:
        """Ask for the name of a file to write the view to."""
        stand = self.stand
        self.ask(">", save.free_name(stand.log, stand.number, stand.shown))

    def ask(self, sign: str, text: str = "") -> None:
        """Ask for something by its sign, unless something else is being typed or asked."""
        frame = self.frame
        if isinstance(frame.focused, Input) or len(frame.screen_stack) > 1:
            raise SkipAction
        frame.untell()
        frame.query_one(Prompt).ask(sign, text)

    def take(self, sign: str, text: str) -> None:
        """Do what was answered: go to the step, start the search, or write the file."""
        if sign == ":":
            self.go_to_step(text.removeprefix("step").strip())
        elif sign == ">":
            # The picture is that of the screen without the question.
            self.frame.call_after_refresh(self.save_view, text)
        elif text:
            self.seeker.find_text(text)

    def go_to_step(self, text: str) -> None:
        """Go to a step by its number."""
        if not text:
            return
        if not (text.isascii() and text.isdigit()):
            self.frame.tell(f"{text} is not a step number", "warning")
            return
        self.stand.following = False
        number = int(text[:18])
        first, last = self.stand.log.first_step(), self.stand.log.last_step()
        if not first <= number <= last:
            self.frame.tell(f"this log has steps {first} to {last}", "warning")
        self.stand.remember()
        self.stand.go_to(number)

    def save_view(self, name: str) -> None:
        """Write what is shown to a new file, and say where it is."""
        if not name:
            return
        frame, log, number = self.frame, self.stand.log, self.stand.number
        view = frame.view
        within = frame.screen_stack[0].query("#main" if view is None else f"#{view.id}")
        panes = [p for p in within.first().query(Pane) if p.display and p.size.height]
        head = f"{program_of(log)}  step {number}/{log.last_step()}  {self.stand.shown}"
        try:
            text = (
                frame.export_screenshot(title=TITLE)
                if name.lower().endswith(".svg")
                else save.text_of(head, panes)
            )
            frame.tell(f"written to {save.write_new(name, text)}")
        except FileExistsError:
            frame.tell(f"{name} is there already: nothing was written", "warning")
        except OSError as err:
            frame.tell(f"cannot be written: {err.strerror}: {name}", "warning")
        except ValueError:  # a NUL in the name
            frame.tell("cannot be written: this is no name of a file", "warning")

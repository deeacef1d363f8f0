"""The questions of the viewer's last line: a step, a text to search, the name of a new file."""

from __future__ import annotations

from textual.actions import SkipAction
from textual.widgets import Input

from tensortrace.tui import save
from tensortrace.tui.dialogs.screens import Prompt
from tensortrace.tui.header import program_of
from tensortrace.tui.panes import Pane
from tensortrace.tui.walk import Walker

# Over a picture of the screen.
TITLE = "tensortrace"


class Asker(Walker):
    """The part of the viewer that asks something and does what was answered."""

    def action_ask_step(self) -> None:
        """Ask for a step number."""
        self.ask(":")

    def action_ask_search(self) -> None:
        """Ask for a text to search."""
        self.ask("/")

    def action_ask_save(self) -> None:
        """Ask for the name of a file to write the view to."""
        self.ask(">", save.free_name(self.log_, self.number, self.shown))

    def ask(self, sign: str, text: str = "") -> None:
        """Ask for something, unless something else is being typed or asked."""
        if isinstance(self.focused, Input) or len(self.screen_stack) > 1:
            raise SkipAction
        self.untell()
        self.query_one(Prompt).ask(sign, text)

    def action_hit(self, direction: int) -> None:
        """Go to the next or previous hit of the search."""
        if self.term:
            self.find(direction)
        else:
            self.action_ask_search()

    def on_prompt_answered(self, message: Prompt.Answered) -> None:
        """Go to the step, or start the search."""
        self.active_or_table()
        if message.sign == "/":
            if message.text:
                self.term, self.hit = message.text, None
                self.find(1)
            return
        if message.sign == ">":
            # The picture is that of the screen without the question.
            self.call_after_refresh(self.save_view, message.text)
            return
        text = message.text.removeprefix("step").strip()
        if not text:
            return
        if not (text.isascii() and text.isdigit()):
            self.tell(f"{text} is not a step number", "warning")
            return
        self.stand.following = False
        number = int(text[:18])
        first, last = self.log_.first_step(), self.log_.last_step()
        if not first <= number <= last:
            self.tell(f"this log has steps {first} to {last}", "warning")
        self.stand.remember()
        self.stand.go_to(number)

    def save_view(self, name: str) -> None:
        """Write what is shown to a new file, and say where it is."""
        if not name:
            return
        within = self.screen_stack[0].query("#main" if self.view is None else f"#{self.view.id}")
        panes = [p for p in within.first().query(Pane) if p.display and p.size.height]
        head = f"{program_of(self.log_)}  step {self.number}/{self.log_.last_step()}  {self.shown}"
        try:
            text = (
                self.export_screenshot(title=TITLE)
                if name.lower().endswith(".svg")
                else save.text_of(head, panes)
            )
            self.tell(f"written to {save.write_new(name, text)}")
        except FileExistsError:
            self.tell(f"{name} is there already: nothing was written", "warning")
        except OSError as err:
            self.tell(f"cannot be written: {err.strerror}: {name}", "warning")
        except ValueError:  # a NUL in the name
            self.tell("cannot be written: this is no name of a file", "warning")

    def on_prompt_left(self) -> None:
        """Give the focus back."""
        self.active_or_table()

    def active_or_table(self) -> None:
        """Give the focus to the table, or to the pane that is shown alone."""
        self.give_focus(self.main_pane)

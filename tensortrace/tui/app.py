"""The viewer's first screen: walk a run step by step, from a finding to its cause.

`Viewer` has a method for each key, and objects with a job each that it hands most of them on to.
They know the screen and the place that it shows (`Frame`), and not each other; what more one needs
it is given where it is made. What one of them brings in and others care about ends here.
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import msgspec
from textual.app import SystemCommand
from textual.binding import BindingType
from textual.screen import Screen

from tensortrace.export.contents import in_order_of_cause
from tensortrace.records import Finding, Severity
from tensortrace.run import Ranks, Run, start_run
from tensortrace.text import carries, pasted
from tensortrace.tui import places
from tensortrace.tui.ahead import Ahead
from tensortrace.tui.asking import Asker
from tensortrace.tui.background import Reader
from tensortrace.tui.bindings import KEYS, Key, bindings, in_view
from tensortrace.tui.dialogs.choose import Palette
from tensortrace.tui.dialogs.pick import Pick
from tensortrace.tui.dialogs.screens import Help, Prompt
from tensortrace.tui.dialogs.toggle import Toggle
from tensortrace.tui.folding import Folding
from tensortrace.tui.frame import Frame
from tensortrace.tui.layout import PANES
from tensortrace.tui.opening import Opener, Opening
from tensortrace.tui.palette import Places
from tensortrace.tui.panes import Pane
from tensortrace.tui.seek import Seeker
from tensortrace.tui.step import findings
from tensortrace.tui.step.calls import MEANINGS, columns
from tensortrace.tui.tabs import Tabs
from tensortrace.tui.terminal.looks import LOOKS
from tensortrace.tui.terminal.quick import TIDY_EVERY_S, answering_soon, keep_what_is_there
from tensortrace.tui.terminal.styled import ASCII, UNICODE, Glyphs
from tensortrace.tui.timeline import Timeline
from tensortrace.tui.walk import Walker

# What some call the same as writing a view to a file.
EXPORT_TITLE = "Export, save"


class Viewer(Frame):
    """The program: one method for each action of the table in `bindings`."""

    BINDINGS: ClassVar[list[BindingType]] = bindings()
    COMMANDS = Frame.COMMANDS | {Places}

    def __init__(
        self,
        log: Run | Ranks,
        step: int | None = None,
        glyphs: Glyphs = UNICODE,
        *,
        opening: Opening | None = None,
        memory: Path | None = None,
    ) -> None:
        super().__init__(log, glyphs)
        # Where to begin, and the place that is remembered.
        self.opener = Opener(self, opening or Opening(step), memory)
        # The whole log, its growth, other ranks.
        self.reader = Reader(self, self.take_findings, self.take_growth)
        # A text in the logs.
        self.seeker = Seeker(self, self.reader.open_beside)
        # From a row to those that belong to it; what is inside a call.
        self.walker, self.folding = Walker(self), Folding(self)
        # The last line, and what was answered there.
        self.asker = Asker(self, self.seeker)
        # Views that were not asked for yet.
        self.ahead = Ahead(self)

    def on_load(self) -> None:
        """Leave the terminal as it was, too, where a signal ends the process."""
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) == signal.SIG_DFL:  # nohup has the latter ignored
                asyncio.get_running_loop().add_signal_handler(number, self.end_by, number)

    def end_by(self, number: int) -> None:
        """End with the code that a shell gives a signal, and remember the place."""
        self.exit(return_code=128 + number)
        self.opener.keep_place()

    def on_mount(self) -> None:
        """Open at the first error; what is read in threads begins once the screen stands."""
        self.set_class(self.glyphs is ASCII, "-ascii")
        # Another program had the terminal meanwhile.
        self.app_resume_signal.subscribe(self, lambda _: self.action_paint_anew())
        self.arrange()
        self.opener.open()
        self.take_findings()
        self.tell_notice()
        self.reader.offer_ranks()
        self.give_focus(self.pane("calls"))
        self.screen.call_after_refresh(self.call_after_refresh, self.start_reading)

    # ---- what is read

    def start_reading(self) -> None:
        """Read the log, and make the views ahead once it is read."""
        self.reader.begin()
        self.ahead.begin()

    def take_findings(self) -> None:
        """Show what was found so far, in the view too; go to what was asked for."""
        self.show_findings()
        if self.view is not None:
            self.details.want()
        self.opener.look_for_finding()

    def show_findings(self) -> None:
        """Show what was found so far, and the worst of it to whoever has pressed no key yet."""
        stand = self.stand
        held = findings.in_order(stand.ranks.findings)
        stand.modules = stand.log.modules
        self.title_findings()
        if held == stand.found and stand.ranks.indexed < 1:
            return
        stand.take(held)
        if stand.at_finding in held:
            self.pane("findings").cursor = held.index(stand.at_finding)
        # A warning only once all is read: an error may come later in the log.
        causes = held if len(stand.ranks.runs) == 1 else self.in_order_of_cause()
        first = findings.first_error(causes) or (
            findings.first_of(causes, "warning") if stand.ranks.indexed >= 1 else None
        )
        if not self.touched and first is not None and first != stand.at_finding:
            self.go_to_finding(first)
        self.draw_findings()
        self.draw_top()

    def in_order_of_cause(self) -> list[Finding]:
        """All findings, the cause first."""
        return in_order_of_cause(self.found, several=len(self.stand.ranks.runs) > 1)

    def take_growth(self) -> None:
        """Show what was written to the log meanwhile."""
        self.tell_notice()
        self.take_findings()
        self.grow()

    def grow(self) -> None:
        """Show what came: the last step if the run is followed, else the same place."""
        if self.stand.following:
            self.stand.stay_at_end()
        elif self.number >= self.log_.last_step() or self.rows.step.summary is None:
            self.stand.go_to(self.number)
        if self.view is not None:
            self.details.want()

    def tell_notice(self) -> None:
        """Say once that a log was truncated, replaced or damaged."""
        for run in self.reader.noticed():
            if run is self.log_:
                self.forget()
                if self.stand.run_id != run.header.run_id:
                    self.begin_anew()
            if run.notice:
                self.tell(run.notice, "warning")

    def begin_anew(self) -> None:
        """Another run is in the log: follow it if that was asked for, else begin as with any."""
        self.touched = False
        self.stand.begin_anew()
        self.opener.open_anew()

    # ---- commands by name

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """Offer every key of the table by its name in the palette."""
        for key in KEYS:
            if key.action != "command_palette" and (not key.views or self.shown in key.views):
                title = key.help[0].upper() + key.help[1:]
                yield SystemCommand(title, f"key {key.shown}", self.runner(key))
                if key.action == "ask_save":
                    more = f"{EXPORT_TITLE}: {key.help}"
                    yield SystemCommand(more, f"key {key.shown}", self.runner(key))

        for name in LOOKS:
            yield SystemCommand(f"Theme: {name}", "colours of the viewer", self.chooser(name))

    def chooser(self, theme: str) -> Callable[[], object]:
        """Make a callable that changes the theme, for the palette."""
        return partial(self.call_later, self.action_theme, theme)

    def action_command_palette(self) -> None:
        """Open the palette, unless it is open."""
        if not isinstance(self.screen, Palette):
            self.push_screen(Palette(id="--command-palette"))

    def runner(self, key: Key) -> Callable[[], object]:
        """Make a callable that does what a key does, for the palette."""
        at_view = bool(key.views) and "step" not in key.views
        return partial(self.call_later, self.run_action, key.action, self.view if at_view else self)

    def keep_tidy(self) -> None:
        """Collect garbage between the keys from now on."""
        self.turns.tidying = self.set_interval(TIDY_EVERY_S, self.turns.tidy)

    @property
    def active(self) -> Pane:
        """The pane that has the focus; the table if none has."""
        return self.focused if isinstance(self.focused, Pane) else self.main_pane

    # ---- move

    def action_move(self, lines: int) -> None:
        """Move the cursor or scroll by lines."""
        self.leave_end(lines < 0)
        self.active.move_by(lines)

    def action_page(self, pages: float) -> None:
        """Move by pages."""
        self.leave_end(pages < 0)
        self.active.move_page(pages)

    def action_top(self) -> None:
        """Go to the first line."""
        self.leave_end(True)
        self.active.move_end(False)

    def action_bottom(self) -> None:
        """Go to the last line."""
        self.active.move_end(True)

    def leave_end(self, up: bool) -> None:
        """Whoever goes up in the table wants to look at it: what comes is followed no more."""
        if up and self.active is self.pane("calls"):
            self.stand.following = False

    # ---- walk

    def action_step(self, steps: int) -> None:
        """Go to a step before or after, at the same place in it."""
        self.stand.following = False
        self.stand.go_to(self.number + steps)

    def action_finding(self, direction: int) -> None:
        """Go to the next or previous finding."""
        self.walk_findings(direction, None)

    def action_warning(self, direction: int) -> None:
        """Go to the next or previous warning."""
        self.walk_findings(direction, "warning")

    def walk_findings(self, direction: int, only: Severity | None) -> None:
        """Go to a finding; the one that the cursor came to last counts as here."""
        current = self.stand.at_finding
        row = self.row
        if current is not None and (row is None or current not in row.findings):
            current = None
        found = findings.neighbour(self.found, current, self.stand.here, direction, only)
        if found is None:
            what = only or "finding"
            self.tell(f"no {'next' if direction > 0 else 'previous'} {what}")
            return
        self.stand.following = False
        self.stand.remember()
        self.go_to_finding(found)

    def action_rank(self, direction: int) -> None:
        """Go to the same place on the next rank; those that lie beside the log are opened first."""
        stand = self.stand
        if stand.log.live:
            stand.ranks.look_beside()  # another may have begun since
        if stand.ranks.beside:
            self.reader.open_beside()
        runs = stand.ranks.runs
        if len(runs) == 1:
            self.tell("this run has one rank only, or the logs of others are elsewhere")
            return
        following = stand.following
        stand.turn_to(runs[(runs.index(stand.log) + direction) % len(runs)])
        if following and stand.log.live:
            stand.stay_at_end()
        else:
            stand.go_to(stand.number)
        self.tell(f"rank {stand.log.header.rank} of {stand.log.header.world_size}")

    def action_jump_back(self) -> None:
        """Go back to where the last jump began."""
        self.walker.back()

    def action_sources(self) -> None:
        """Go to what made an input of the row."""
        self.walker.sources()

    def action_uses(self) -> None:
        """Go to what used an output of the row."""
        self.walker.uses()

    def action_counterpart(self) -> None:
        """Go from a call to its gradient, and back."""
        self.walker.counterpart()

    def action_causes(self) -> None:
        """Walk the causes of the finding at the row."""
        self.walker.causes()

    def action_before(self) -> None:
        """Go to the same place in the nearest earlier step that has it."""
        self.walker.before()

    def on_pick_walked(self, message: Pick.Walked) -> None:
        """Go along with the cursor of a list whose lines are rows."""
        self.walker.go_along(message.at)

    def action_unfold(self) -> None:
        """Show what is inside the call, or go into it."""
        self.folding.unfold()

    def action_fold(self) -> None:
        """Hide what is inside the call, or go to the call around."""
        self.folding.fold()

    def action_fold_all(self, shown: bool) -> None:
        """Show what all calls of the step hide, or hide it."""
        self.folding.fold_all(shown)

    # ---- views

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Leave out the keys that do nothing in the view that is shown."""
        return in_view(action, self.shown)

    def action_view(self, name: str) -> None:
        """Show a view by its key."""
        self.look_at(name)

    def look_at(self, name: str) -> None:
        """Show a view of the place; one key leads back to the first that one looked at it from."""
        if name != self.shown:
            self.stand.remember_once()
        self.show_view(name)

    def chart(self, statistic: object) -> None:
        """Draw a statistic over the steps in the timeline."""
        from tensortrace.tui.views.timeline import TimelineView

        self.stand.remember()
        self.show_view("timeline")
        view = self.screen_stack[0].query_one("#view-timeline", TimelineView)
        view.take(statistic)

    def on_tabs_picked(self, message: Tabs.Picked) -> None:
        """Show the view that was clicked."""
        self.look_at(message.name)

    # ---- panes

    def action_open(self) -> None:
        """Open the ops of a call that hides them, else the detail; or go to the finding."""
        if self.view is not None:
            self.view.open(self.active, self.active.cursor or 0)
        elif self.active.id == "findings":
            self.open_finding(self.active.cursor or 0)
        elif self.active.id == "calls" and not self.folding.open(self.stand.cursor()):
            if not self.pane("detail").display:
                self.zoom = "detail"
                self.arrange()
                self.call_after_refresh(self.details.want)
            self.give_focus(self.pane("detail"))

    def action_leave(self) -> None:
        """Cancel a search, leave a pane that is alone, go to the table, go to the call around."""
        if self.seeker.cancel():
            self.tell("search given up")
            return
        if self.view is not None:
            if self.view.give_up():
                self.tell("reading given up: the curve has what was read")
            elif self.active is self.main_pane:
                self.show_view("step")
            else:
                self.give_focus(self.main_pane)
            return
        if self.zoom is None and self.active.id == "calls" and self.focused is not None:
            self.folding.fold()
            return
        if self.zoom is not None:
            self.zoom = None
            self.arrange()
            self.call_after_refresh(self.redraw)
        self.give_focus(self.pane("calls"))

    def action_pane(self, direction: int) -> None:
        """Give the focus to the next visible pane."""
        within = [self.pane(name) for name in PANES] if self.view is None else self.view.query(Pane)
        shown = [pane for pane in within if pane.display]
        at = next((i for i, pane in enumerate(shown) if pane is self.active), 0)
        self.give_focus(shown[(at + direction) % len(shown)])

    def action_source(self) -> None:
        """Show the source pane, or hide it."""
        self.source_wanted = not self.pane("source").display
        self.zoom = None
        self.arrange()
        self.call_after_refresh(self.redraw)

    def action_zoom(self) -> None:
        """Show the active pane alone, or all again."""
        active = next(name for name in PANES if name == self.active.id)
        self.zoom = None if self.zoom is not None else active
        self.arrange()
        self.call_after_refresh(self.redraw)

    def action_columns(self) -> None:
        """Choose the columns of the table."""
        width = self.pane("calls").size.width
        shown = self.columns
        if shown is None:
            shown = frozenset(columns(width).widths)

        def done(answer: tuple[frozenset[str] | None] | None) -> None:
            if answer is not None:
                self.columns = answer[0]
                self.draw_calls(self.stand.cursor())
                held = columns(self.pane("calls").size.width, self.columns).widths
                missing = [name for name in MEANINGS if name in (answer[0] or held)]
                missing = [name for name in missing if name not in held]
                if missing:
                    self.tell(f"no room here for {', '.join(missing)}")

        self.push_screen(Toggle(list(MEANINGS.items()), shown, self.glyphs), done)

    # ---- questions

    def action_ask_step(self) -> None:
        """Ask for a step number."""
        self.asker.ask(":")

    def action_ask_search(self) -> None:
        """Ask for a text to search."""
        self.asker.ask("/")

    def action_ask_save(self) -> None:
        """Ask for the name of a file to write the view to."""
        self.asker.ask_save()

    def action_hit(self, direction: int) -> None:
        """Go to the next or previous hit of the search."""
        if self.seeker.term:
            self.seeker.find(direction)
        else:
            self.action_ask_search()

    def on_prompt_answered(self, message: Prompt.Answered) -> None:
        """Do what was answered, with the focus back."""
        self.active_or_table()
        self.asker.take(message.sign, message.text)

    def on_prompt_left(self) -> None:
        """Give the focus back."""
        self.active_or_table()

    def active_or_table(self) -> None:
        """Give the focus to the table, or to the pane that is shown alone."""
        self.give_focus(self.main_pane)

    # ---- other

    def action_copy(self) -> None:
        """Copy the record of the row as JSON: control characters are escaped in it."""
        copied = self.view.copied() if self.view is not None else None
        if copied is not None:
            self.copy_to_clipboard(pasted(copied[0]))
            self.tell(f"copied {copied[1]}")
        elif self.row is not None and self.row.record is not None:
            record = msgspec.json.encode(self.row.record).decode("utf-8", "replace")
            self.copy_to_clipboard(pasted(record))
            self.tell("copied the record as JSON")

    def action_follow(self) -> None:
        """Follow the run that is being written, or stay."""
        if not self.log_.live:
            self.tell("this run has ended: there is nothing to follow")
            return
        if self.stand.following:
            self.stand.following = False
        else:
            self.stand.stay_at_end()
        self.draw_top()

    def action_help(self) -> None:
        """Show all keys."""
        self.push_screen(Help(self.shown))

    def action_theme(self, name: str) -> None:
        """Change the colours, and remember them."""
        self.theme = LOOKS[name].theme.name
        self.opener.keep_theme(name)

    def action_help_quit(self) -> None:
        """Say which key ends it: ctrl+c is pressed by mistake too."""
        self.tell("q quits; the place is kept")

    async def action_quit(self) -> None:
        """Remember the place and end."""
        self.opener.keep_place()
        await super().action_quit()

    # ---- what the panes tell

    def on_pane_moved(self, message: Pane.Moved) -> None:
        """Show the detail of the row that the cursor came to."""
        if message.pane.id == "calls":
            self.stand.anchor = self.row
            self.details.want()

    def on_pane_opened(self, message: Pane.Opened) -> None:
        """A click on the selected item opens it."""
        if message.pane.id == "findings":
            self.open_finding(message.at)
        elif message.pane.id == "calls":
            self.action_open()

    def open_finding(self, at: int) -> None:
        """Go to a finding of the findings pane."""
        if at < len(self.found):
            self.stand.remember()
            self.go_to_finding(self.found[at])
            self.give_focus(self.pane("calls"))

    def on_timeline_picked(self, message: Timeline.Picked) -> None:
        """Go to the step that was clicked."""
        self.stand.following = False
        self.stand.remember()
        self.stand.go_to(message.number)


def choose_glyphs() -> Glyphs:
    """Take plain ASCII where standard output cannot carry more."""
    return UNICODE if carries(sys.stdout.encoding, UNICODE.bars) else ASCII


def view(
    path_or_run: str | Path | Run | Ranks,
    step: int | None = None,
    mouse: bool = True,
    *,
    opening: Opening | None = None,
) -> int:
    """Open the viewer and stay in it until the user quits.

    Args:
        path_or_run: a log, or a run or the ranks of one that are open already.
        step: where to open; None means where one was, else at the first error, warning or step.
        mouse: whether the terminal sends mouse clicks to the viewer instead of selecting text.
        opening: where to open, if it is more than a step.
    Returns:
        An exit code: 0, or 1 if the viewer itself failed.
    Raises:
        LogError: the path is no log.
    """
    run = path_or_run if isinstance(path_or_run, Run | Ranks) else start_run(path_or_run)
    asked = opening or Opening(step)
    app = Viewer(run, glyphs=choose_glyphs(), opening=asked, memory=places.folder())
    with answering_soon():
        app.call_later(app.call_after_refresh, keep_what_is_there)
        app.call_later(app.keep_tidy)
        app.run(mouse=mouse)
    return app.return_code or 0

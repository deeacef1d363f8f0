"""What is written to the terminal: only the cells that changed, and they are all that changed."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
from rich.color import ColorSystem
from rich.segment import Segment
from rich.style import Style
from textual.screen import Screen
from textual.strip import Strip

from tensortrace.run import Run, open_run
from tensortrace.tui.app import Viewer
from tensortrace.tui.terminal.painting import Changes, Painted, pieces
from tests.benchmarks.terminal import Shown
from tests.tui.samples import make_log
from tests.tui.screen import settle, text_of, until

SIZE = (120, 40)


class Watched(Viewer):
    """A viewer that writes to a terminal of the test's, as it would to a real one."""

    CSS_PATH = Path(inspect.getfile(Viewer)).with_name("app.tcss")

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.terminal, self.nbytes = Shown(*SIZE), 0
        self.mirror = Painted(*SIZE)

    def _display(self, screen: Screen[object], renderable: Any) -> None:
        super()._display(screen, renderable)
        if renderable is not None and not self._batch_count:
            written = Changes(renderable, self.mirror).render_segments(self.console).encode()
            self.nbytes += len(written)
            self.terminal.feed(written)


async def test_the_terminal_shows_what_the_screen_is_after_every_key(tmp_path: Path) -> None:
    app = Watched(open_run(make_log(tmp_path)))
    async with app.run_test(size=SIZE) as pilot:
        await settle(app, pilot)
        keys = ["j", "space", "]", "2", "3", "m", "7", "j", "4", "escape", "question_mark",
                "escape", "slash", "a", "escape", "ctrl+p", "escape", "escape", "g"]  # fmt: skip
        for key in keys:
            await pilot.press(key)
            await settle(app, pilot)
            # The cursor of a line of text blinks by style alone.
            assert app.terminal.text.split() == text_of(app).split(), key


async def test_a_simple_move_is_few_bytes(tmp_path: Path) -> None:
    app = Watched(open_run(make_log(tmp_path)))
    async with app.run_test(size=SIZE) as pilot:
        await settle(app, pilot)
        assert app.nbytes > 3000
        # What else is read of the log, and the detail of the first row, are written later.
        await until(pilot, lambda: "ended" in text_of(app) and "Detail" in text_of(app))
        # The long detail of a flagged row moves the whole table: the first rows have short ones.
        await pilot.press("g")
        await settle(app, pilot)
        for key in ("j", "j", "k", "colon", "1", "escape"):
            app.nbytes = 0
            await pilot.press(key)
            await settle(app, pilot)
            assert app.nbytes < 4000, key


async def test_the_screen_is_drawn_again_where_another_program_wrote_on_it(tmp_path: Path) -> None:
    app = Viewer(open_run(make_log(tmp_path)))
    async with app.run_test(size=SIZE) as pilot:
        await settle(app, pilot)
        before = app.painted
        assert (before.width, before.height) == SIZE
        await pilot.press("ctrl+l")
        await until(pilot, lambda: app.painted is not before)
        before = app.painted
        app.app_resume_signal.publish(app)
        await until(pilot, lambda: app.painted is not before)


def written(painted: Painted, x: int, *texts: tuple[str, str]) -> str:
    strip = Strip([Segment(text, Style(color=colour)) for text, colour in texts])
    return painted.paint(0, x, strip, ColorSystem.TRUECOLOR)


def test_only_runs_of_changed_cells_are_written() -> None:
    painted = Painted(40, 1)
    assert written(painted, 0, ("abcdefghijklmnopqrstuvwxyz", "red")).count("\x1b[1;") == 1
    assert written(painted, 0, ("abcdefghijklmnopqrstuvwxyz", "red")) == ""
    again = written(painted, 0, ("AbcdefghijklmnopqrstuvwxyZ", "red"))
    assert again == "\x1b[1;1HA\x1b[1;26HZ"  # in the colour that it writes in already
    # Between near changes the same is written again: that is shorter than to go there.
    assert written(painted, 0, ("abcd", "red"), ("e", "blue")).count("\x1b[1;") == 1


def test_a_look_is_changed_by_what_differs() -> None:
    strips = [
        Strip([Segment("a", Style.parse(one)), Segment("b", Style.parse(other))])
        for one, other in (
            ("#010203 on #040506", "#070809 on #040506"),
            ("bold red on blue", "bright_red on blue"),
            ("red on bright_blue", "on color(200)"),
            ("color(100)", "none"),
        )
    ]
    told = []
    for strip in strips:
        painted = Painted(2, 1)
        told.append(painted.paint(0, 0, strip, ColorSystem.TRUECOLOR) + painted.end())
    assert told == [
        "\x1b[1;1H\x1b[38;2;1;2;3;48;2;4;5;6ma\x1b[38;2;7;8;9mb\x1b[0m",
        "\x1b[1;1H\x1b[1;31;44ma\x1b[0;91;44mb\x1b[0m",
        "\x1b[1;1H\x1b[31;104ma\x1b[39;48;5;200mb\x1b[0m",
        "\x1b[1;1H\x1b[38;5;100ma\x1b[0mb",
    ]


def test_a_blank_has_no_colour_of_letters() -> None:
    painted = Painted(10, 1)
    written(painted, 0, ("a    b", "red"))
    assert written(painted, 1, ("    ", "blue")) == ""


def test_a_wide_character_is_written_whole() -> None:
    painted, shown = Painted(10, 1), Shown(10, 1)
    for texts in ("漢字ab", "漢x ab", "  字ab", "x漢 ab", "e\u0301 漢  "):
        shown.feed(written(painted, 0, (texts, "red")).encode())
        assert shown.text.rstrip() == texts.rstrip(), texts


def test_what_lies_over_a_strip_does_not_hide_it_for_ever() -> None:
    painted = Painted(20, 1)
    written(painted, 0, ("under under", "red"))
    written(painted, 3, ("OVER", "red"))
    assert "er un"[:2] in written(painted, 0, ("under under", "red"))


@pytest.mark.parametrize("place", [(0, 25), (3, 0)])
def test_what_is_beside_the_screen_is_not_written(place: tuple[int, int]) -> None:
    painted = Painted(20, 2)
    assert painted.paint(*place, Strip([Segment("far")]), ColorSystem.TRUECOLOR) == ""


def test_an_update_of_another_kind_has_no_pieces() -> None:
    assert list(pieces(None)) == []  # type: ignore[arg-type]

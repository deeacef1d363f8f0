"""Screens over the main one: what is behind them looks as Textual would draw it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rich.segment import Segment
from textual.renderables.background_screen import BackgroundScreen
from textual.screen import Screen

from tensortrace.tui.app import Viewer
from tensortrace.tui.dialogs.choose import Palette
from tensortrace.tui.dialogs.over import Over
from tensortrace.tui.dialogs.pick import Pick
from tensortrace.tui.dialogs.screens import Help
from tensortrace.tui.dialogs.toggle import Toggle
from tensortrace.tui.panes import Pane
from tests.tui.samples import make_open_run
from tests.tui.screen import settle, text_of, until

KEYS = {"question_mark": Help, "C": Toggle, "c": Pick, "ctrl+p": Palette}


def cells(pieces: list[Segment]) -> list[tuple[str, object, object, object]]:
    """Each letter with its colours."""
    return [
        (letter, style and style.color, style and style.bgcolor, style and style.bold)
        for text, style, _ in pieces
        for letter in text
    ]


def as_textual_draws(behind: Screen[object], over: Screen[object]) -> list[list[Segment]]:
    """The oracle: the lines of a screen behind another."""
    renderable = BackgroundScreen(behind, over.styles.background)
    console = over.app.console
    options = over.app.console_options.update(width=over.size.width, height=over.size.height)
    return console.render_lines(renderable, options)


@pytest.mark.parametrize("key", KEYS)
async def test_what_is_behind_looks_as_textual_draws_it(tmp_path: Path, key: str) -> None:
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(app, pilot)
        await pilot.press(key)
        await until(pilot, lambda: isinstance(app.screen, KEYS[key]))
        await settle(app, pilot)
        over: Any = app.screen
        assert isinstance(over, Over)
        assert [cells(list(strip)) for strip in drawn(over)] == [
            cells(line) for line in as_textual_draws(app.screen_stack[0], over)
        ]


def drawn(over: Any) -> list[Any]:
    """The lines of what is behind."""
    return [over.render_line(y) for y in range(over.size.height)]


async def test_what_changes_behind_is_seen(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(app, pilot)
        await pilot.press("question_mark")
        await until(pilot, lambda: isinstance(app.screen, Help))
        app.tell("not seen through the help")
        app.stand.go_to(0)
        await until(pilot, lambda: " step 0/" in text_of(app))


async def test_the_help_is_scrolled_line_by_line_and_to_its_end(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(app, pilot)
        await pilot.press("question_mark")
        await until(pilot, lambda: " Move" in text_of(app))
        await pilot.press("down")
        await until(pilot, lambda: " Move" not in text_of(app))
        await pilot.press("up")
        await until(pilot, lambda: " Move" in text_of(app))
        await pilot.press("G")
        await until(pilot, lambda: "the place that you leave." in text_of(app))
        await pilot.press("g", "j")
        await until(pilot, lambda: " Move" not in text_of(app))


@pytest.mark.parametrize("width", [40, 60])
async def test_no_word_of_the_help_is_cut_where_it_is_narrow(tmp_path: Path, width: int) -> None:
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(width, 200)) as pilot:
        await settle(app, pilot)
        await pilot.press("question_mark")
        await until(pilot, lambda: "you leave." in text_of(app))
        page = app.screen.query_one("#help", Pane)
        words = [word for y in range(page.size.height) for word in page.render_line(y).text.split()]
        told = " ".join(words)
        assert "…" not in told
        assert "b from a call to its gradient, and back p" in told
        assert "It writes what x asks for, and the place that you leave." in told

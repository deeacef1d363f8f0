"""A pane of lines, in a program of its own."""

from __future__ import annotations

import pytest
from textual.app import App, ComposeResult
from textual.pilot import Pilot

from tensortrace.tui.panes import Pane
from tests.tui.screen import until


class Lines(App[None]):
    """One pane as large as the screen."""

    CSS = "Pane { overflow-x: hidden; overflow-y: auto; scrollbar-size-vertical: 1; }"

    def __init__(self, *, cursor: bool = False) -> None:
        super().__init__()
        self.with_cursor = cursor
        self.opened: list[int] = []

    def on_pane_opened(self, message: Pane.Opened) -> None:
        """Keep what was opened."""
        self.opened.append(message.at)

    def compose(self) -> ComposeResult:
        """The pane."""
        yield Pane("only", "Lines", cursor=self.with_cursor)


def rows(app: App[None]) -> list[str]:
    """What is on the screen, line by line."""
    strips = app.screen._compositor.render_strips()
    return ["".join(segment.text for segment in strip) for strip in strips]


async def fill(app: App[None], pilot: Pilot[None], count: int) -> None:
    pane = app.query_one(Pane)
    pane.show(count, lambda at, part, width, here: [(f"{at} " + "x" * 60, "")])
    await until(pilot, lambda: "0 xxx" in rows(app)[0])
    await until(pilot, lambda: pane.show_vertical_scrollbar == (count > 10))


@pytest.mark.parametrize("count", [5, 50])
async def test_the_sign_of_a_cut_line_is_seen_beside_a_scrollbar(count: int) -> None:
    app = Lines()
    async with app.run_test(size=(40, 10)) as pilot:
        await fill(app, pilot, count)
        await until(pilot, lambda: rows(app)[0].rstrip(" ▁▂▃▄▅▆▇█").endswith("x…"))
        assert all("x…" in row for row in rows(app)[: min(count, 10)])


async def test_a_line_that_fits_beside_the_scrollbar_is_not_cut() -> None:
    app = Lines()
    async with app.run_test(size=(65, 10)) as pilot:
        await fill(app, pilot, 50)
        assert not any("…" in row for row in rows(app))


async def test_under_the_cursor_a_piece_keeps_the_background_that_it_is_read_on() -> None:
    app = Lines(cursor=True)
    async with app.run_test(size=(20, 5)) as pilot:
        pane = app.query_one(Pane)
        pane.show(2, lambda at, part, width, here: [("nan", "flag"), ("-", "ok"), ("now", "here")])
        await until(pilot, lambda: "nan-now" in rows(app)[0])
        first, second = ([piece.style for piece in pane.render_line(y)] for y in (0, 1))
        assert [first[0], first[2]] != [first[1]] * 2
        assert [style.bgcolor for style in (first[0], first[2])] == [
            style.bgcolor for style in (second[0], second[2])
        ]
        assert first[1].bgcolor == first[3].bgcolor != second[1].bgcolor


async def test_what_is_clicked_stays_under_the_pointer() -> None:
    app = Lines(cursor=True)
    async with app.run_test(size=(40, 12)) as pilot:
        pane = app.query_one(Pane)
        pane.show(50, lambda at, part, width, here: [(f"item {at}", "")], 20)
        await until(pilot, lambda: "item 20" in "".join(rows(app)))
        top = pane.topmost
        for y in (0, pane.size.height - 1):
            for _ in range(2):
                await pilot.click(pane, offset=(2, y))
                await until(pilot, lambda y=y: pane.cursor == top + y)  # type: ignore[misc]
        await until(pilot, lambda: app.opened == [top, top + pane.size.height - 1])
        assert pane.topmost == top


async def test_an_item_that_is_higher_than_the_pane_stands_at_its_first_line() -> None:
    app = Lines(cursor=True)
    async with app.run_test(size=(40, 4)) as pilot:
        pane = app.query_one(Pane)
        pane.item_height = 6
        pane.show(5, lambda at, part, width, here: [(f"item {at} line {part}", "")])
        for at in (0, 1, 2, 4, 3, 0):
            pane.move_to(at)
            await until(pilot, lambda at=at: f"item {at} line 0" in rows(app)[0])

"""A view looks the same however the terminal came to its size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from tensortrace.tui.app import Viewer
from tensortrace.tui.tabs import TABS
from tests.tui.samples import make_open_run
from tests.tui.screen import settle, text_of, until

SMALL, LARGE = (80, 24), (200, 60)


async def show(app: Viewer, pilot: Pilot[Any], view: str) -> str:
    """Show the begin of a view: how far a table is scrolled depends on what was done before."""
    await settle(app, pilot)
    await pilot.press(str(TABS.index(view) + 1))
    await until(pilot, lambda: app.view is None or app.view.ready)
    await settle(app, pilot)
    await pilot.press("g")
    await settle(app, pilot)
    return text_of(app)


@pytest.mark.parametrize("view", TABS)
@pytest.mark.parametrize(("before", "after"), [(SMALL, LARGE), (LARGE, SMALL)])
async def test_a_view_looks_as_if_it_had_always_been_of_its_size(
    tmp_path: Path, view: str, before: tuple[int, int], after: tuple[int, int]
) -> None:
    fresh = Viewer(make_open_run(tmp_path))
    async with fresh.run_test(size=after) as pilot:
        wanted = await show(fresh, pilot, view)
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=before) as pilot:
        await show(app, pilot, view)
        await pilot.resize_terminal(*after)
        await settle(app, pilot)
        await until(pilot, lambda: text_of(app) == wanted)


@pytest.mark.parametrize(("before", "after"), [(SMALL, LARGE), (LARGE, SMALL)])
async def test_the_line_of_steps_takes_the_width_that_there_is(
    tmp_path: Path, before: tuple[int, int], after: tuple[int, int]
) -> None:
    run = make_open_run(tmp_path, steps=90, bad=80)  # cells of one column, or of two
    fresh = Viewer(run)
    async with fresh.run_test(size=after) as pilot:
        await settle(fresh, pilot)
        wanted = text_of(fresh).splitlines()[2:4]
    app = Viewer(run)
    async with app.run_test(size=before) as pilot:
        await settle(app, pilot)
        await pilot.resize_terminal(*after)
        await settle(app, pilot)
        await until(pilot, lambda: text_of(app).splitlines()[2:4] == wanted)


@pytest.mark.parametrize("width", [24, 40, 60, 80, 120])
async def test_help_and_quit_are_named_on_every_screen(tmp_path: Path, width: int) -> None:
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(width, 24)) as pilot:
        await settle(app, pilot)
        last = text_of(app).splitlines()[-1]
        assert last.rstrip().endswith("? Help  q Quit")
        assert ("s Source" in last) == (width >= 80)
        await pilot.click(offset=(last.index("? Help") + 2, 23))
        await until(pilot, lambda: app.screen.query("#help"))

"""The command palette by typing: an action, a module, a step, a finding; Enter goes there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from textual.command import CommandList, CommandPalette
from textual.pilot import Pilot

from tensortrace.tui.app import Viewer
from tests.tui.samples import BAD_STEP, make_open_run
from tests.tui.screen import settle, until


def offered(app: Viewer) -> list[str]:
    """The names in the list of the palette, the best one first."""
    found = app.screen.query_one(CommandList)
    return [str(found.get_option_at_index(at).prompt) for at in range(found.option_count)]


async def type_in_palette(app: Viewer, pilot: Pilot[Any], text: str, wanted: str) -> None:
    """Type, wait until what is wanted is the first in the list, press Enter."""
    await pilot.press("ctrl+p")
    await until(pilot, lambda: isinstance(app.screen, CommandPalette))
    await pilot.press(*text)
    await until(pilot, lambda: any(wanted in name for name in offered(app)[:1]))
    await pilot.press("enter")
    await until(pilot, lambda: not isinstance(app.screen, CommandPalette))
    await settle(app, pilot)


@pytest.fixture
def app(tmp_path: Path) -> Viewer:
    return Viewer(make_open_run(tmp_path), step=2)


async def test_an_action_by_its_name(app: Viewer) -> None:
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(app, pilot)
        await type_in_palette(app, pilot, "heat map", "Layers by steps, a heat map")
        await until(pilot, lambda: app.shown == "layers")
        await type_in_palette(app, pilot, "fewer steps", "Fewer steps in a column")
        assert app.shown == "layers"


async def test_a_module_by_its_path(app: Viewer) -> None:
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(app, pilot)
        await type_in_palette(app, pilot, "0.mlp", "blocks.0.mlp")
        await until(pilot, lambda: app.row.record.module == "blocks.0.mlp")
        assert app.number == 2


@pytest.mark.parametrize("text", ["7", "step 7"])
async def test_a_step_by_its_number(app: Viewer, text: str) -> None:
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(app, pilot)
        await type_in_palette(app, pilot, text, "Step 7")
        await until(pilot, lambda: app.number == 7)
        await pilot.press("backspace")
        await until(pilot, lambda: app.number == 2)


async def test_a_finding_by_its_code(app: Viewer) -> None:
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(app, pilot)
        await type_in_palette(app, pilot, "tt101", "TT101")
        await until(pilot, lambda: app.number == BAD_STEP)
        assert [finding.code for finding in app.row.findings] == ["TT101"]

"""What the screen looks like; a snapshot changes only on purpose (`pytest --snapshot-update`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot

from tensortrace.tui.app import Viewer
from tensortrace.tui.terminal.styled import ASCII, UNICODE, Glyphs
from tests.tui.nets import make_op_run
from tests.tui.samples import make_open_run
from tests.tui.screen import settle
from tests.tui.views.test_layers import make_layered_run

LOOKS: dict[str, tuple[tuple[int, int], Glyphs, list[str]]] = {
    "narrow": ((80, 24), UNICODE, []),
    "tiny": ((40, 10), UNICODE, []),
    "wide": ((120, 40), UNICODE, []),
    "huge": ((200, 60), UNICODE, []),
    "ascii": ((80, 24), ASCII, ["s"]),
    "help": ((100, 60), UNICODE, ["question_mark"]),
}


async def look_at(app: Viewer, pilot: Pilot[Any], keys: list[str]) -> None:
    await settle(app, pilot)
    for key in keys:
        await pilot.press(key)
        await settle(app, pilot)


@pytest.mark.parametrize("look", LOOKS)
def test_the_screen_looks_as_it_did(snap_compare: Any, tmp_path: Path, look: str) -> None:
    size, glyphs, keys = LOOKS[look]
    app = Viewer(make_open_run(tmp_path), glyphs=glyphs)

    async def ready(pilot: Pilot[Any]) -> None:
        await look_at(app, pilot, keys)

    assert snap_compare(app, terminal_size=size, run_before=ready)


VIEWS: dict[str, tuple[tuple[int, int], Glyphs, list[str]]] = {
    "timeline": ((80, 24), UNICODE, ["2"]),
    "layers": ((80, 24), UNICODE, ["3", "j", "l"]),
    "tensor": ((120, 40), UNICODE, ["4"]),
    "flow": ((120, 40), UNICODE, ["5"]),
    "findings": ((120, 40), UNICODE, ["7"]),
    "ascii": ((80, 24), ASCII, ["3"]),
}


@pytest.mark.parametrize("look", VIEWS)
def test_the_views_look_as_they_did(snap_compare: Any, tmp_path: Path, look: str) -> None:
    size, glyphs, keys = VIEWS[look]
    make = make_layered_run if look in ("layers", "ascii") else make_open_run
    app = Viewer(make(tmp_path), glyphs=glyphs)

    async def ready(pilot: Pilot[Any]) -> None:
        await look_at(app, pilot, keys)

    assert snap_compare(app, terminal_size=size, run_before=ready)


def test_the_opened_calls_look_as_they_did(snap_compare: Any, tmp_path: Path) -> None:
    app = Viewer(make_op_run(tmp_path, level="module"))

    async def ready(pilot: Pilot[Any]) -> None:
        await look_at(app, pilot, ["plus", "c"])

    assert snap_compare(app, terminal_size=(120, 40), run_before=ready)

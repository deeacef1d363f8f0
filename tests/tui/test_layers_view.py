"""The heat map of layers by steps: where its keys lead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from tensortrace.records import Module, ModuleColumns, Record, Step
from tensortrace.run import Run, open_run
from tensortrace.tui.app import Viewer
from tests.builders import make_call, make_end, make_header, make_tensor, write_log
from tests.tui.samples import make_finding
from tests.tui.screen import settle, text_of

PATHS = ["", "first", "second", "last"]


def layered_records(steps: int = 30, bad: int | None = 20) -> Iterator[Record]:
    """A net whose gradient shrinks towards its first layer, with a NaN in `second` at a step."""
    yield make_header(argv=["layers.py"])
    for path in PATHS:
        yield Module(step=0, path=path, cls="Linear" if path else "Net")
    for step in range(steps):
        for seq, path in enumerate(PATHS, 1):
            yield make_call(seq, path, step=step, parent=None if seq == 1 else 1,
                            outputs=[("output", seq)], tensors=[make_tensor(seq, 4)])  # fmt: skip
        flags = ["", "", "n" if step == bad else "", ""]
        if step == bad:
            yield make_finding(step, 3, module="second", op=None)
        yield Step(step=step, seq=9, update=step + 1, loss=2.0 / (step + 1), modules=ModuleColumns(
            path=PATHS, output_rms=[1.0, 0.5, 0.7, 1.0], zero_frac=[0.0, 0.9, 0.5, 0.0],
            grad_rms=[0.1, 1e-7, 1e-4, 0.1], update_ratio=[None, 1e-6, 1e-3, 1e-2], flags=flags,
        ))  # fmt: skip
    yield make_end(steps - 1, steps=steps)


def make_layered_run(folder: Path, steps: int = 30, bad: int | None = 20) -> Run:
    return open_run(write_log(folder / "log.jsonl", layered_records(steps, bad)))


async def test_the_map_shows_every_layer_from_the_step_lines(tmp_path: Path) -> None:
    app = Viewer(make_layered_run(tmp_path, bad=None))
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("3")
        await settle(app, pilot)
        text = text_of(app)
        assert "[3 Layers]" in text
        assert "gradient rms  1e-07" in text
        assert all(path in text for path in PATHS)
        assert app.focused is app.view.main


async def test_enter_goes_to_the_call_of_the_layer_and_backspace_comes_back(tmp_path: Path) -> None:
    app = Viewer(make_layered_run(tmp_path, bad=None))
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("3")
        await settle(app, pilot)
        await pilot.press("j", "j", *"lllll")
        assert "second  Linear  step 5" in text_of(app)
        await pilot.press("enter")
        await settle(app, pilot)
        assert (app.shown, app.number, app.row.record.module) == ("step", 5, "second")
        await pilot.press("backspace")
        await settle(app, pilot)
        assert (app.shown, app.number) == ("layers", 0)
        await pilot.press("escape")
        await settle(app, pilot)
        assert app.shown == "step"


async def test_the_cursor_opens_at_the_finding_and_a_flag_leads_to_its_step(tmp_path: Path) -> None:
    app = Viewer(make_layered_run(tmp_path, steps=400))
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("3")
        await settle(app, pilot)
        text = text_of(app)
        assert "second  Linear  steps 20 to 29  x NaN" in text
        assert "the largest of each: gradient rms 0.0001" in text
        app.view.here = 25
        await pilot.press("l", "h", "enter")
        await settle(app, pilot)
        assert (app.shown, app.number, app.row.record.module) == ("step", 20, "second")


async def test_m_shows_the_other_quantities_in_turn(tmp_path: Path) -> None:
    app = Viewer(make_layered_run(tmp_path))
    async with app.run_test(size=(100, 30), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("3")
        titles = []
        for _ in range(5):
            await settle(app, pilot)
            titles.append(str(app.view.main.border_title))
            await pilot.press("m")
        names = ["gradient rms", "output rms", "update ratio", "zero fraction", "gradient rms"]
        assert titles == [f"Layers: {name}, a step a column" for name in names]


async def test_plus_and_minus_zoom_around_the_cursor(tmp_path: Path) -> None:
    app = Viewer(make_layered_run(tmp_path, steps=400, bad=None), step=200)
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("3")
        await settle(app, pilot)
        assert "10 steps a column" in text_of(app)
        await pilot.press("plus", "plus", "plus")
        await settle(app, pilot)
        assert "a step a column" in text_of(app)
        assert "▲ 200" in text_of(app)
        await pilot.press("minus", *["minus"] * 5)
        await settle(app, pilot)
        assert "10 steps a column" in text_of(app)


async def test_a_click_on_a_cell_puts_the_cursor_there(tmp_path: Path) -> None:
    app = Viewer(make_layered_run(tmp_path, bad=None))
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("3")
        await settle(app, pilot)
        pane = app.view.main
        room = 19  # cells for the names at this width
        await pilot.click(pane, offset=(1 + room + 7 * app.view.wide, 1 + 3 + 3))
        await settle(app, pilot)
        assert "last  Linear  step 7" in text_of(app)


async def test_a_click_on_a_tab_shows_its_view(tmp_path: Path) -> None:
    app = Viewer(make_layered_run(tmp_path))
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        at = text_of(app).splitlines()[1].index("3 Layers")
        await pilot.click(offset=(at, 1))
        await settle(app, pilot)
        assert app.shown == "layers"
        await pilot.click(offset=(3, 1))
        await settle(app, pilot)
        assert app.shown == "step"


async def test_y_copies_the_numbers_of_the_layer(tmp_path: Path) -> None:
    app = Viewer(make_layered_run(tmp_path, steps=3, bad=None))
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("3", "j")
        await settle(app, pilot)
        await pilot.press("y")
        head, *lines = app.clipboard.splitlines()
        assert head == "step\tfirst gradient rms"
        assert lines == ["0\t1e-07", "1\t1e-07", "2\t1e-07"]

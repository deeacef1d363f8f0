"""The heat map of layers by steps: where its keys lead."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from tensortrace.records import Module, ModuleColumns, Record, Step
from tensortrace.run import Run, open_run
from tensortrace.tui.app import Viewer
from tensortrace.tui.grid import Grid
from tensortrace.tui.span import Span
from tensortrace.tui.trend import trend_text
from tensortrace.tui.views.heat import HeatMap, scale_of, told_lines
from tensortrace.tui.views.layers import NO_LAYERS
from tensortrace.tui.views.tracks import Statistic
from tests.builders import make_call, make_end, make_header, make_late_run, make_tensor, write_log
from tests.tui.samples import make_finding, make_open_run
from tests.tui.screen import settle, text_of, told, until

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


async def test_a_low_screen_has_room_for_layers_before_all(tmp_path: Path) -> None:
    app = Viewer(make_layered_run(tmp_path))
    async with app.run_test(size=(40, 12), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("3")
        await settle(app, pilot)
        assert all(path in text_of(app) for path in PATHS)
        await pilot.press("tab")
        assert app.focused is app.view.main
        await pilot.resize_terminal(40, 24)
        await settle(app, pilot)
        await until(pilot, lambda: "Here" in text_of(app))
        assert all(path in text_of(app) for path in PATHS)


async def test_layers_stand_in_the_order_of_the_network_at_every_place(tmp_path: Path) -> None:
    records = list(layered_records(40, bad=None))
    for at, record in enumerate(records):
        if isinstance(record, Step) and record.step > 20:  # as in a turn that begins elsewhere
            held = record.modules
            back = {name: getattr(held, name)[::-1] for name in held.__struct_fields__}
            records[at] = msgspec.structs.replace(record, modules=ModuleColumns(**back))
    app = Viewer(open_run(write_log(tmp_path / "log.jsonl", records)), step=30)
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("3")
        await settle(app, pilot)
        names = [line[2:9].strip() for line in text_of(app).splitlines()[6:10]]
        assert names == ["Net", "first", "second", "last"]
        await pilot.press("g", "j", "j")
        assert "second  Linear  step" in text_of(app)
        await pilot.press("y")
        assert app.clipboard.startswith("step\tsecond gradient rms")


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


async def test_the_map_of_gradients_marks_what_is_not_finite_in_gradients(tmp_path: Path) -> None:
    columns = ModuleColumns(path=["grads", "outputs", "unsaid"], output_rms=[1.0] * 3,
                            grad_rms=[1.0] * 3, flags=["ng", "io", "n"])  # fmt: skip
    steps = [Step(step=n, seq=1, modules=columns) for n in range(3)]
    run = open_run(write_log(tmp_path / "log.jsonl", [make_header(), *steps, make_end(2)]))
    grid = Grid(Span(0, 1, 3))
    grid.add(run.summaries(0, 3))
    shown = {
        name: [HeatMap(grid, name, scale_of(grid, name), 3, 1).cell(row, 1)[0] for row in range(3)]
        for name in ("grad_rms", "output_rms", "update_ratio")
    }
    assert shown["grad_rms"][0] == shown["output_rms"][2] == shown["grad_rms"][2] == "n"
    assert shown["output_rms"][1] == "i"
    assert not {shown["grad_rms"][1], shown["output_rms"][0]} & set("ni")
    assert shown["update_ratio"] == ["n", "i", "n"]
    told = "".join(text for text, _ in told_lines(grid, 0, 1, {}, 80)[0])
    assert told.endswith("x NaN, in a gradient")
    head = [told_lines(grid, 0, 1, {}, width)[0] for width in range(40, 60)]
    assert all("".join(text for text, _ in line).endswith(", in a gradient") for line in head)
    record = make_call(1, "grads", step=1)
    assert "x" not in trend_text(grid, record)
    assert trend_text(grid, msgspec.structs.replace(record, phase="backward"))[:3] == "xxx"
    assert [Statistic(n, "outputs").of(steps[0]) for n in ("output_rms", "grad_rms")][1] == 1.0
    assert math.isnan(Statistic("output_rms", "outputs").of(steps[0]) or 0.0)


async def test_a_log_without_numbers_of_layers_says_so(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("3")
        await settle(app, pilot)
        await until(pilot, lambda: NO_LAYERS in text_of(app))


@pytest.mark.parametrize("kept", [6, 0])
async def test_a_thin_step_without_calls_says_so_one_before_a_finding_has_them(
    tmp_path: Path, kept: int
) -> None:
    app = Viewer(open_run(write_log(tmp_path / "log.jsonl", make_late_run(kept))), step=0)
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("3")
        await settle(app, pilot)
        await pilot.press("g", "j", "enter")
        await settle(app, pilot)
        assert (app.shown, app.number) == ("step", 0)
        assert ("no calls to go to" in told(app)) == (kept == 0)
        assert kept == 0 or app.row.record.module == "fc1"

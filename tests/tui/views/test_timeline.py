"""The curves over all steps: what they are drawn from, where the keys lead."""

from __future__ import annotations

import json
import math
from pathlib import Path

from textual.command import CommandPalette

from tensortrace.records import ModuleColumns, Step
from tensortrace.run import open_run
from tensortrace.tui.app import Viewer
from tensortrace.tui.span import Span
from tensortrace.tui.step.rows import StepRows
from tensortrace.tui.terminal.styled import ASCII, UNICODE
from tensortrace.tui.views.plot import curve, is_log
from tensortrace.tui.views.site import Held, held_of
from tensortrace.tui.views.site_track import in_turn, of_site
from tensortrace.tui.views.tracks import GRAD_NORM, LOSS, Statistic, Tracks, statistics
from tests.builders import make_call, make_late_run, make_tensor, write_log
from tests.tui.samples import BAD_STEP, make_open_run
from tests.tui.screen import settle, text_of, told, until
from tests.tui.test_palette import offered
from tests.tui.views.test_layers import make_layered_run


def test_a_column_keeps_the_ends_and_the_first_step_that_is_not_finite() -> None:
    losses = [2.0, "NaN", 0.5, "Infinity", None, 1.0]
    steps = [Step(step=at, seq=1, loss=loss) for at, loss in enumerate(losses)]
    for order in (steps, steps[::-1], [*steps, *steps]):
        tracks = Tracks(Span(0, 4, 2), [LOSS])
        tracks.add(list(order))
        assert (tracks.low[0].tolist(), tracks.high[0].tolist()) == ([0.5, 1.0], [2.0, 1.0])
        assert tracks.bad[0].tolist() == [1, -1]


def test_a_number_of_a_module_is_not_finite_where_its_flags_say_so() -> None:
    columns = ModuleColumns(path=["a", "b"], grad_rms=[1.0, 2.0], flags=["", "n"])
    step = Step(step=0, seq=1, modules=columns)
    assert Statistic("grad_rms", "a").of(step) == 1.0
    assert math.isnan(Statistic("grad_rms", "b").of(step) or 0.0)
    assert Statistic("grad_rms", "c").of(step) is None
    assert Statistic("output_rms", "a").of(step) is None
    assert Statistic("grad_rms", "a") in statistics(["a"])


def test_a_curve_rises_with_its_numbers_and_has_no_holes() -> None:
    lines = curve([(0.0, 0.0), (1.0, 1.0), (2.0, 2.0), None, (2.0, 2.0)], 1, 3, ASCII)
    assert lines == ["  * *", " *   ", "*    "]
    steep = curve([(0.0, 0.0), (2.0, 2.0)], 1, 3, ASCII)
    assert steep == [" *", " *", "* "]
    flat = curve([(1.0, 1.0)] * 3, 1, 1, UNICODE)
    assert len(set(flat[0])) == 1
    assert curve([None, None], 2, 2, UNICODE) == ["    ", "    "]


def test_the_scale_is_logarithmic_over_a_hundredfold_only() -> None:
    assert is_log([(1.0, 101.0)])
    assert not is_log([(1.0, 100.0)])
    assert not is_log([(0.0, 1e9)])
    assert not is_log([None])


def test_numbers_at_the_ends_of_the_range_are_drawn() -> None:
    lines = curve([(-1.7e308, -1.7e308), (1.7e308, 1.7e308), (5e-324, 5e-324)], 1, 3, ASCII)
    assert lines[0][1] == "*"
    assert lines[2][0] == "*"


async def test_the_timeline_shows_loss_and_gradient_with_the_finding_marked(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("2")
        await settle(app, pilot)
        text = text_of(app)
        assert "loss  here not finite  x: not finite in 1 column" in text
        assert "grad norm  here not finite" in text
        marks = next(line for line in text.splitlines() if "findings" in line)
        wide = app.view.wide
        gutter = app.view.left_of(78)
        assert marks[1 + gutter + 7 * wide] == "x"
        assert marks[1 + gutter + 3 * wide] == "!"


async def test_h_and_l_move_the_cursor_and_enter_goes_to_the_step(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("2")
        await settle(app, pilot)
        await pilot.press("h", "h")
        assert app.number == BAD_STEP
        await pilot.press("enter")
        await settle(app, pilot)
        assert (app.shown, app.number) == ("step", BAD_STEP - 2)
        await pilot.press("2")
        await settle(app, pilot)
        await pilot.press("G", "enter")
        await settle(app, pilot)
        assert app.number == 9


async def test_m_asks_for_another_statistic_by_its_letters(tmp_path: Path) -> None:
    app = Viewer(make_layered_run(tmp_path))
    async with app.run_test(size=(100, 30), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("2", "m")
        await settle(app, pilot)
        await pilot.press(*"secondupdate")
        await settle(app, pilot)
        await pilot.pause(0.3)
        await pilot.press("down", "enter")
        await settle(app, pilot)
        assert app.view.chosen == Statistic("update_ratio", "second")
        assert "second update ratio  here" in text_of(app)


async def test_brackets_and_findings_move_the_cursor_too(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path), step=0)
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("2", "right_square_bracket")
        await settle(app, pilot)
        assert app.view.here == 1
        await pilot.press("e")
        await settle(app, pilot)
        assert (app.shown, app.view.here) == ("timeline", 3)


async def test_a_click_puts_the_cursor_on_a_column_and_another_opens_its_step(
    tmp_path: Path,
) -> None:
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("2")
        await settle(app, pilot)
        at = (1 + app.view.left_of(78) + 4 * app.view.wide, 6)
        await pilot.click(app.view.main, offset=at)
        await settle(app, pilot)
        assert (app.view.here, app.number) == (4, BAD_STEP)
        await pilot.click(app.view.main, offset=at)
        await settle(app, pilot)
        assert (app.shown, app.number) == ("step", 4)


def test_every_statistic_of_a_tensor_and_none_of_the_finite_where_others_are() -> None:
    tensor = make_tensor(1, 4, min=-3.0, max=2.0, mean=0.5, std=1.5, norm=4.0, zeros=1)
    held = Held("output", make_call(1, "a"), "outputs", "output", tensor)
    told = {one.name: one.of_tensor(tensor) for one in of_site(held, "a")}
    assert told == {
        "mean": 0.5, "std": 1.5, "min": -3.0, "max": 2.0, "largest magnitude": 3.0, "rms": 2.0,
        "norm": 4.0, "zero fraction": 0.25, "NaN elements": 0.0, "infinite elements": 0.0,
        "elements": 4.0,
    }  # fmt: skip
    bad = make_tensor(1, 4, nan=1, min=-3.0, max=2.0, mean=0.5, std=1.5, norm=4.0, zeros=1)
    told = {one.name: one.of_tensor(bad) for one in of_site(held, "a")}
    assert math.isnan(told["mean"] or 0.0)
    assert (told["NaN elements"], told["zero fraction"]) == (1.0, 0.25)
    assert {one.of_tensor(None) for one in of_site(held, "a")} == {None}


def test_steps_are_read_from_coarse_to_fine() -> None:
    order = list(in_turn(list(range(12)), lambda step: step // 4))
    assert order[:3] == [0, 4, 8]
    assert order[3:6] == [2, 6, 10]
    assert sorted(order) == list(range(12))
    assert list(in_turn([], lambda step: 0)) == []


async def test_t_charts_a_statistic_of_the_tensor_over_all_full_steps(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path), step=2)
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await settle(app, pilot)
        app.stand.go_to_seq(2, 2)
        await pilot.press("4")
        await settle(app, pilot)
        await pilot.press("t")
        await until(pilot, lambda: isinstance(app.screen, CommandPalette))
        await pilot.press(*"std")
        await until(pilot, lambda: any("std" in name for name in offered(app)[:1]))
        await pilot.press("enter")
        await until(pilot, lambda: app.shown == "timeline" and app.view.ready)
        await settle(app, pilot)
        tracks = app.view.tracks
        assert tracks.low[2, :10].tolist() == [0.5 * (1 + 0.2 * step) for step in range(10)]
        assert f"{app.view.label(app.view.chosen)}  here 0.7" in text_of(app)
        # Ten steps take all the width.
        assert app.view.wide > 8
        known = dict(app.view.chosen.known)
        await pilot.press("m")
        await until(pilot, lambda: isinstance(app.screen, CommandPalette))
        await pilot.press(*"output norm")
        await until(pilot, lambda: any("output norm" in name for name in offered(app)))
        await pilot.press("escape")
        await until(pilot, lambda: not isinstance(app.screen, CommandPalette))
        assert app.view.chosen.known == known
        await pilot.press("backspace")
        await until(pilot, lambda: app.shown == "tensor")


def test_a_statistic_of_a_tensor_is_read_from_the_step_before_a_finding_too(tmp_path: Path) -> None:
    run = open_run(write_log(tmp_path / "log.jsonl", make_late_run()))
    rows = StepRows(run.step(1))
    site = of_site(held_of(rows[rows.at_seq(2)], rows)[0], "fc1")[0]
    tracks = Tracks(Span(0, 1, 2), [site])
    tracks.add(run.heads(0, 2))
    assert list(tracks.read_on(run, lambda: False))
    assert site.known == {0: 0.0, 1: 0.0}
    assert tracks.low.tolist() == [[0.0, 0.0]]


async def test_what_is_drawn_anyway_is_drawn_once(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path), step=4)
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("2")
        await settle(app, pilot)
        app.view.take(GRAD_NORM)
        await settle(app, pilot)
        assert text_of(app).count("grad norm  here") == 1
        assert app.view.tracks.held == (LOSS, GRAD_NORM)


async def test_the_cursor_looks_around_and_the_place_stays_until_enter(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path), step=4)
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await settle(app, pilot)
        for key in "23":
            await pilot.press(key)
            await settle(app, pilot)
            await pilot.press(*"lll")
            assert app.view.here == 7
            await pilot.press("1")
            await settle(app, pilot)
            assert app.number == 4
            await pilot.press(key)
            await settle(app, pilot)
            assert app.view.here == 4
        await pilot.press("2")
        await settle(app, pilot)
        await pilot.press("G", "enter")
        await settle(app, pilot)
        assert (app.shown, app.number) == ("step", 9)


async def test_a_statistic_of_a_long_path_is_named_with_its_number(tmp_path: Path) -> None:
    path = "hierarchical_backbone.stage_number_2.residual_blocks.17.normalisation_before_residual"
    app = Viewer(make_open_run(tmp_path), step=2)
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("2")
        await settle(app, pilot)
        app.view.take(Statistic("grad_rms", path))
        await settle(app, pilot)
        title = next(line for line in text_of(app).splitlines() if "gradient rms" in line)
        assert "17.norm" in title
        assert title.rstrip("│ ").endswith("gradient rms  here -")


async def test_y_copies_the_step_under_the_cursor(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path), step=2)
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("2")
        await settle(app, pilot)
        await pilot.press("l", "y")
        copied = json.loads(app.clipboard)
        assert (copied["kind"], copied["step"]) == ("step", 3)
        assert "copied the line of step 3 as JSON" in told(app)


async def test_esc_ends_the_reading_of_full_steps_and_keeps_what_was_read(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path), step=2)
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("2")
        await settle(app, pilot)
        view = app.view
        view.took(view.held, 0.4, view.read_to, True)
        assert "full steps 40% read (esc stops)" in str(view.main.border_title)
        await pilot.press("escape")
        assert app.shown == "timeline"
        assert "reading given up" in told(app)
        await pilot.press("escape")
        await until(pilot, lambda: app.shown == "step")

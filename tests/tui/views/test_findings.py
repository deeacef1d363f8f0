"""The list of all findings: its order, its filters, and the way from one to its cause."""

from __future__ import annotations

from pathlib import Path

from tensortrace.run import open_run
from tensortrace.tui.app import Viewer
from tensortrace.tui.views.findings import family_of
from tests.builders import write_log
from tests.tui.samples import BAD_STEP, make_finding, make_open_run, records
from tests.tui.screen import settle, text_of, told, until


def test_the_family_is_the_digit_of_the_code() -> None:
    assert family_of(make_finding(code="TT402")) == "4"
    assert family_of(make_finding(code="TTx02")) == ""
    assert family_of(make_finding(code="TT")) == ""
    assert family_of(make_finding(code="MINE1")) == ""


async def test_the_cause_comes_first_with_explanation_chain_and_source(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path), step=0)
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("7", "g")
        await settle(app, pilot)
        text = text_of(app)
        assert "Findings by cause, 2" in text
        assert [f.code for f in app.view.held] == ["TT402", "TT101"]
        await pilot.press("j")
        await settle(app, pilot)
        text = text_of(app)
        assert "use log_softmax" in text
        assert "#9 softmax" in text
        assert "chance = scores.softmax(-1)" in text
        assert app.number == 0


async def test_filters_leave_out_families_and_severities(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("7", "f")
        await settle(app, pilot)
        assert [f.code for f in app.view.held] == ["TT101"]
        assert "1 of 2: non-finite" in text_of(app)
        await pilot.press("v", "v")
        await settle(app, pilot)
        assert app.view.held == []
        assert "0 of 2: non-finite, warnings" in text_of(app)
        await pilot.press("f")
        await settle(app, pilot)
        assert [f.code for f in app.view.held] == ["TT402"]
        await pilot.press("f", "v", "v")
        await settle(app, pilot)
        assert len(app.view.held) == 2


async def test_enter_goes_to_the_finding_and_c_walks_its_causes(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path), step=0)
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("7", "G", "enter")
        await settle(app, pilot)
        assert (app.shown, app.number, app.row.seq) == ("step", BAD_STEP, 10)
        await pilot.press("backspace")
        await settle(app, pilot)
        assert (app.shown, app.number) == ("findings", 0)
        await pilot.press("G", "c")
        await settle(app, pilot)
        assert "Causes of TT101 in step 7" in text_of(app)
        await pilot.press("k", "enter")
        await settle(app, pilot)
        assert (app.shown, app.number, app.row.seq) == ("step", BAD_STEP, 9)


async def test_c_says_where_to_look_of_a_finding_without_a_chain(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path), step=0)
    async with app.run_test(size=(120, 40), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("7", "g", *"jjjj")
        await settle(app, pilot)
        while app.view.finding.chain:
            await pilot.press("k")
        code = app.view.finding.code
        await pilot.press("c")
        await settle(app, pilot)
        assert app.shown == "step"
        assert f"{code} has no chain of causes: the detail says why, 7 what was found" in told(app)


async def test_a_run_without_findings_says_so(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path, steps=2, bad=None))
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("7", "enter", "c", "f", "v", "y")
        await settle(app, pilot)
        assert "No findings" in text_of(app)


async def test_y_copies_the_finding_in_words_and_as_json(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("7")
        await settle(app, pilot)
        await pilot.press("y")
        assert app.clipboard.startswith("error TT101 nonfinite-forward: log makes 12")
        assert '"code":"TT101"' in app.clipboard


async def test_a_finding_of_a_whole_step_leads_to_the_call_of_its_module(tmp_path: Path) -> None:
    whole = make_finding(
        5, None, id="w", code="TT202", check="vanishing-gradient", phase="backward",
        module="stem.conv", op=None, tensor=None, location=None, chain=[], severity="warning",
        evidence={"profile": [["stem.conv", 2.5e-14], ["head[/x]", 0.5], ["lost", None]]},
    )  # fmt: skip
    kept = list(records(8, None))
    kept.insert(next(i for i, r in enumerate(kept) if r.step == 5), whole)
    app = Viewer(open_run(write_log(tmp_path / "log.jsonl", kept)))
    async with app.run_test(size=(120, 60), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("e")
        await settle(app, pilot)
        assert app.number == 5
        record = app.row.record
        assert (record.module, record.phase) == ("stem.conv", "backward")
        assert app.row.findings == (whole,)
        text = text_of(app)
        assert "profile over depth" in text
        assert "head[/x]" in text
        assert text.count("\u2588") > 20


async def test_the_pane_wraps_messages_where_there_is_room(tmp_path: Path) -> None:
    long = "the first part of it, then more of the same to read: " + "x" * 20 + " and the end"
    kept = list(records(8, None))
    one = make_finding(5, 10, id="w", message=long)
    kept.insert(next(i for i, r in enumerate(kept) if r.step == 5), one)
    app = Viewer(open_run(write_log(tmp_path / "log.jsonl", kept)))
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(app, pilot)
        await until(pilot, lambda: app.pane("findings").item_height >= 5)
        await until(pilot, lambda: "and the end" in text_of(app))
        await pilot.resize_terminal(120, 14)
        await until(pilot, lambda: app.pane("findings").item_height < 5)
        await pilot.resize_terminal(120, 40)
        await until(pilot, lambda: app.pane("findings").item_height >= 5)


async def test_list_and_explanation_are_laid_out_for_the_room_that_there_is(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("7")
        await settle(app, pilot)
        assert "log makes 12 of 640 elements -inf: its input has 12 zeros" in text_of(app)
        await pilot.resize_terminal(200, 60)
        whole = "softmax underflows to exact zeros when two scores are more than 104 apart"
        await until(pilot, lambda: whole in text_of(app))
        # Beside it the list is narrow, and has lines to spare for the message.
        await until(pilot, lambda: "│   input has 12 zeros  " in text_of(app))


async def test_the_cursor_stays_where_it_was_put_when_the_view_is_drawn_again(
    tmp_path: Path,
) -> None:
    app = Viewer(make_open_run(tmp_path))
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("7")
        await settle(app, pilot)
        view = app.view
        assert (app.stand.at_finding.code, view.main.cursor) == ("TT101", 1)
        await pilot.press("g")
        await settle(app, pilot)
        app.take_findings()
        await settle(app, pilot)
        await until(pilot, lambda: "x TT101 step 7" not in text_of(app).partition("Why")[2])
        assert (view.main.cursor, view.finding.code) == (0, "TT402")
        await pilot.press("1", "7")
        await settle(app, pilot)
        assert (view.main.cursor, view.finding.code) == (1, "TT101")

"""The view of the source on the screen: where its keys lead, what goes along."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from tensortrace.records import Call, Record, Source, Step
from tensortrace.run import Run, open_run
from tensortrace.tui.app import Viewer
from tensortrace.tui.views.source import SourceView
from tests.builders import make_call, make_end, make_header, write_log
from tests.export.listed import FILE, make_listed, make_plain
from tests.tui.nets import LOG_AT, make_op_run
from tests.tui.samples import make_open_run
from tests.tui.screen import settle, text_of, told, until
from tests.tui.test_hostile import FORBIDDEN, PAYLOADS, hostile_records

NARROW, WIDE = (80, 24), (120, 40)


def make_log(folder: Path, records: Sequence[Record] | None = None) -> Run:
    kept = make_listed() if records is None else records
    return open_run(write_log(folder / "log.jsonl", [*kept, make_end(2, steps=3)]))


def view_of(app: Viewer) -> SourceView:
    assert isinstance(app.view, SourceView)
    return app.view


def line_of(app: Viewer) -> tuple[int, int]:
    """The line that the walk is at, and its seq."""
    view = view_of(app)
    line = view.executed.lines[view.at]
    return line.location.line, line.seq


async def press(app: Viewer, pilot: object, *keys: str) -> None:
    for key in keys:
        await pilot.press(key)  # type: ignore[attr-defined]
        await settle(app, pilot)  # type: ignore[arg-type]


async def test_next_and_previous_walk_the_lines_in_order(tmp_path: Path) -> None:
    app = Viewer(make_log(tmp_path), 0)
    async with app.run_test(size=NARROW, notifications=True) as pilot:
        await settle(app, pilot)
        await press(app, pilot, "6")
        assert line_of(app) == (14, 0)
        await press(app, pilot, ".", ".", ".")
        assert line_of(app) == (6, 4)
        assert "train_step > Net.forward, line 6" in text_of(app)
        await press(app, pilot, ",")
        assert line_of(app) == (5, 3)
        await press(app, pilot, ",", ",", ",")
        assert line_of(app) == (14, 0)
        assert "this is the first line of the step" in text_of(app)


async def test_into_out_and_over(tmp_path: Path) -> None:
    app = Viewer(make_log(tmp_path), 0)
    async with app.run_test(size=NARROW, notifications=True) as pilot:
        await settle(app, pilot)
        await press(app, pilot, "6", ".", ".", "h")
        assert line_of(app) == (15, 1)
        await press(app, pilot, "l")
        assert line_of(app) == (5, 3)
        await press(app, pilot, ">", ">")
        assert line_of(app) == (7, 5)
        await press(app, pilot, "<", "left")
        assert line_of(app) == (15, 1)
        await press(app, pilot, ">")
        assert line_of(app) == (16, 13)
        await press(app, pilot, "right")
        assert line_of(app) == (16, 13)
        assert "no line of what this one calls" in text_of(app)
        await press(app, pilot, "h")
        assert "what called this function was" in text_of(app)


async def test_the_variables_are_those_of_the_line(tmp_path: Path) -> None:
    app = Viewer(make_log(tmp_path), 1)
    async with app.run_test(size=WIDE, notifications=True) as pilot:
        await settle(app, pilot)
        await press(app, pilot, "6", *"." * 7)
        assert line_of(app) == (8, 8)
        text = text_of(app)
        assert "Variables, 1 changed here" in text
        assert "* x     [8, 128, 64] f32  x nan" in text
        assert "x TT101 layers.1 made 64 NaN" in text
        assert "layer <Linear 1>" in text


async def test_enter_on_a_tensor_goes_to_the_call_that_made_it_and_backspace_comes_back(
    tmp_path: Path,
) -> None:
    app = Viewer(make_log(tmp_path), 0)
    async with app.run_test(size=NARROW, notifications=True) as pilot:
        await settle(app, pilot)
        await press(app, pilot, "6", ".", "tab")
        assert line_of(app) == (15, 1)
        assert app.focused is view_of(app).variables
        await press(app, pilot, "enter")
        assert (app.shown, app.row.record.seq) == ("step", 2)
        await press(app, pilot, "backspace")
        assert app.shown == "source"
        assert line_of(app) == (15, 1)


async def test_enter_on_what_no_call_made_says_so(tmp_path: Path) -> None:
    app = Viewer(make_log(tmp_path), 0)
    async with app.run_test(size=NARROW, notifications=True) as pilot:
        await settle(app, pilot)
        await press(app, pilot, "6", "tab", "j", "enter")
        assert "no call of this step made ids" in text_of(app)
        await press(app, pilot, "k", "enter")
        assert "model is no tensor" in text_of(app)
        assert app.shown == "source"


async def test_a_call_that_gave_back_what_it_was_given_did_not_make_it(tmp_path: Path) -> None:
    records = make_listed()
    same = make_call(2, None, op="to", inputs=[("self", 0)], outputs=[("output", 0)])
    at = next(i for i, r in enumerate(records) if isinstance(r, Call) and r.seq == 2)
    app = Viewer(make_log(tmp_path, [*records[:at], same, *records[at + 1 :]]), 0)
    async with app.run_test(size=NARROW, notifications=True) as pilot:
        await settle(app, pilot)
        await press(app, pilot, "6", "tab", "j", "enter")
        assert app.shown == "source"
        assert "no call of this step made ids" in told(app)


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (True, "trace(lines={'depth': 2}) has those of your functions"),
        ("{'depth': 3}", "no function of yours, or this call of it was passed over"),
        ("Lines(output=None, depth=1, watch=())", "trace(lines={'depth': 2})"),
    ],
)
async def test_a_line_that_one_cannot_go_into_says_why(
    tmp_path: Path, options: object, why: str
) -> None:
    records = [make_header(options={"lines": options}), *make_listed()[1:]]
    app = Viewer(make_log(tmp_path, records), 0)
    async with app.run_test(size=NARROW, notifications=True) as pilot:
        await settle(app, pilot)
        await press(app, pilot, "6", ".", ">", "l")
        assert line_of(app)[0] == 16
        assert why in told(app)


async def test_enter_on_a_line_of_code_runs_to_its_next_execution(tmp_path: Path) -> None:
    app = Viewer(make_log(tmp_path), 0)
    async with app.run_test(size=WIDE, notifications=True) as pilot:
        await settle(app, pilot)
        await press(app, pilot, "6", "j", "j", "enter")
        assert line_of(app) == (16, 13)
        await press(app, pilot, "j", "enter")
        assert "line 17 did not run in this step" in text_of(app)
        await press(app, pilot, "k", "k", "enter")
        assert line_of(app) == (15, 1)  # none is ahead: back to the last one


async def test_the_place_goes_along_into_the_other_views_and_back(tmp_path: Path) -> None:
    app = Viewer(make_log(tmp_path), 0)
    async with app.run_test(size=NARROW, notifications=True) as pilot:
        await settle(app, pilot)
        await press(app, pilot, "6", *"." * 5)
        assert line_of(app) == (8, 6)
        await press(app, pilot, "1")
        assert app.row.record.seq == 6
        await press(app, pilot, "j", "6")
        assert line_of(app) == (7, 7)


async def test_the_line_under_the_cursor_is_broken_and_can_be_read(tmp_path: Path) -> None:
    records = make_listed()
    at = next(i for i, record in enumerate(records) if isinstance(record, Source))
    text = records[at].text.replace("logits = ", "logits = " + "1 * " * 40 + "FAR + ", 1)
    assert "FAR" in text
    records[at] = msgspec.structs.replace(records[at], text=text)
    app = Viewer(make_log(tmp_path, records), 0)
    async with app.run_test(size=NARROW, notifications=True) as pilot:
        await settle(app, pilot)
        await press(app, pilot, "6")
        assert "FAR" not in text_of(app)
        await press(app, pilot, "j", "j")  # line 14 is broken too
        assert "FAR" in text_of(app)
        assert line_of(app) == (14, 0)
        await press(app, pilot, "enter")
        assert line_of(app) == (15, 1)
        assert "FAR" in text_of(app)
        view = view_of(app)
        assert {view.function.rows[row][0] for row, part in view.parts if part} == {15}
        await press(app, pilot, "G")
        assert view.parts[view.main.cursor] == (len(view.function.rows) - 1, 0)
        assert {view.function.rows[row][0] for row, part in view.parts if part} == {15}
        await press(app, pilot, ">")
        assert line_of(app) == (16, 13)
        assert not any(part for _, part in view.parts)


async def test_a_finding_and_another_step_are_one_key_away(tmp_path: Path) -> None:
    app = Viewer(make_log(tmp_path), 0)
    async with app.run_test(size=NARROW, notifications=True) as pilot:
        await settle(app, pilot)
        await press(app, pilot, "6", "e")
        assert app.number == 1
        assert line_of(app) == (8, 8)
        await press(app, pilot, "]")
        assert app.number == 2
        assert line_of(app)[0] == 8
        assert "[8, 97, 64] f32" in text_of(app)


async def test_a_line_with_a_lambda_is_shown_within_its_function(tmp_path: Path) -> None:
    inner = Source(step=0, file=FILE, name="train_step.<locals>.<lambda>", first_line=16,
                   text="    loss = logits.mean()\n")  # fmt: skip
    header, *others = make_listed()
    app = Viewer(make_log(tmp_path, [header, inner, *others]), 0)
    async with app.run_test(size=NARROW) as pilot:
        await settle(app, pilot)
        await press(app, pilot, "6", ".", ">")
        assert line_of(app) == (16, 13)
        assert "logits = model(ids)" in text_of(app)


async def test_a_log_without_lines_walks_the_lines_that_made_calls(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path), 0)
    async with app.run_test(size=WIDE, notifications=True) as pilot:
        await settle(app, pilot)
        await press(app, pilot, "6")
        text = text_of(app)
        assert "trace(lines=True)" in text
        assert "for x, y in loader" in text
        await press(app, pilot, ".", ".")
        assert line_of(app)[0] == 14
        await press(app, pilot, ">")
        assert re.search("▶ +15 +loss.backward\\(\\)", text_of(app))


async def test_at_a_replayed_op_the_source_is_that_of_its_line(tmp_path: Path) -> None:
    app = Viewer(make_op_run(tmp_path, level="module"))
    async with app.run_test(size=WIDE, notifications=True) as pilot:
        await settle(app, pilot)
        assert app.row.record.seq == 42
        await press(app, pilot, "6")
        assert line_of(app) == (LOG_AT.line, 42)
        assert re.search(r"▶x +7 +return \(x \* x\).log\(\) +log \[4, 8\]", text_of(app))
        await press(app, pilot, ",", ".")
        assert app.row.record.seq == 42


async def test_a_step_of_calls_in_a_run_with_lines_is_said_to_be_thinned(tmp_path: Path) -> None:
    records = [make_header(cwd="", options={"lines": True}), *make_plain()[1:]]
    app = Viewer(make_log(tmp_path, records), 0)
    async with app.run_test(size=WIDE) as pilot:
        await settle(app, pilot)
        await press(app, pilot, "6")
        assert "this step is not kept in full" in text_of(app)


async def test_a_step_without_any_line_says_what_to_do(tmp_path: Path) -> None:
    records = [*make_listed(2), Step(step=2, seq=1, full=False)]
    app = Viewer(make_log(tmp_path, records), 2)
    async with app.run_test(size=NARROW, notifications=True) as pilot:
        await settle(app, pilot)
        await press(app, pilot, "6", ".", ",", ">", "<", "l", "h", "enter", "tab", "enter", "y")
        assert "No line of yours is in this step of the log." in text_of(app)
        await press(app, pilot, "[")
        assert "train_step, line" in text_of(app)


async def test_the_line_is_copied_as_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []
    app = Viewer(make_log(tmp_path), 0)
    monkeypatch.setattr(app, "copy_to_clipboard", copied.append)
    async with app.run_test(size=NARROW, notifications=True) as pilot:
        await settle(app, pilot)
        await press(app, pilot, "6", ".", "y")
        assert json.loads(copied[0])["location"]["line"] == 15
        assert "copied the line as JSON" in text_of(app)


async def test_escape_leaves_the_variables_then_the_view(tmp_path: Path) -> None:
    app = Viewer(make_log(tmp_path), 0)
    async with app.run_test(size=NARROW, notifications=True) as pilot:
        await settle(app, pilot)
        await press(app, pilot, "6", "tab", "escape")
        assert app.focused is view_of(app).main
        await press(app, pilot, "escape")
        assert app.shown == "step"


@pytest.mark.parametrize("size", [(20, 8), WIDE], ids=str)
@pytest.mark.parametrize("records", [make_listed(), make_plain()], ids=["lines", "calls"])
async def test_every_size_can_be_drawn_and_changed(
    tmp_path: Path, size: tuple[int, int], records: list[Record]
) -> None:
    app = Viewer(make_log(tmp_path, records), 1)
    async with app.run_test(size=size) as pilot:
        await settle(app, pilot)
        await press(app, pilot, "6", ".", ".")
        await pilot.resize_terminal(60, 20)
        await until(pilot, lambda: "6" in text_of(app))


# What is drawn is held for each of them in `test_executed`.
@pytest.mark.parametrize("payload", PAYLOADS[::4])
async def test_hostile_strings_are_shown_and_never_obeyed(tmp_path: Path, payload: str) -> None:
    app = Viewer(open_run(write_log(tmp_path / "log.jsonl", hostile_records(payload))))
    async with app.run_test(size=NARROW, notifications=True) as pilot:
        await settle(app, pilot)
        await press(app, pilot, "6", ".", ",", "tab", "enter")
        assert not set(text_of(app)) & FORBIDDEN
        assert app.is_running

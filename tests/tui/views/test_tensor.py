"""One tensor: its numbers, its gradient beside it, the same tensor in other steps."""

from __future__ import annotations

import re
from pathlib import Path

from tensortrace.records import Tensor
from tensortrace.run import open_run
from tensortrace.tui.app import Viewer
from tensortrace.tui.span import Span
from tensortrace.tui.step.rows import StepRows
from tensortrace.tui.terminal.styled import ASCII
from tensortrace.tui.views.site import beside, held_of, over_steps, tensor_in
from tensortrace.tui.views.tensor import box_lines
from tests.builders import make_late_run, make_steps, make_tensor, write_log
from tests.tui.nets import make_op_run
from tests.tui.samples import make_log
from tests.tui.screen import settle, text_of


def rows_of(path: Path, step: int) -> StepRows:
    return StepRows(open_run(path).step(step))


def test_a_forward_call_has_its_outputs_their_gradients_and_its_inputs(tmp_path: Path) -> None:
    rows = rows_of(write_log(tmp_path / "log.jsonl", make_steps(2)), 1)
    row = rows[rows.at_seq(2)]
    held = held_of(row, rows)
    assert [one.label for one in held] == ["output", "gradient of output[0]", "input"]
    assert [one.tensor.id for one in held] == [2, 5, 1]
    assert beside(held[0], held) is held[1]
    assert beside(held[1], held) is held[0]


def test_a_parameter_has_its_gradient_beside_it(tmp_path: Path) -> None:
    rows = rows_of(write_log(tmp_path / "log.jsonl", make_steps(1)), 0)
    held = held_of(rows[rows.at_seq(6)], rows)
    assert [(one.label, one.tensor.id) for one in held] == [("value", 6), ("gradient", 7)]
    assert beside(held[0], held) is held[1]


def test_a_gradient_has_the_value_that_it_is_of_beside_it(tmp_path: Path) -> None:
    rows = rows_of(write_log(tmp_path / "log.jsonl", make_steps(1)), 0)
    held = held_of(rows[rows.at_seq(4)], rows)
    labels = ["gradient of output[0]", "gradient to input", "output"]
    assert [one.label for one in held][:2] == labels[:2]
    assert held[-1].label == "output"
    assert beside(held[0], held) is held[-1]


def test_the_same_tensor_is_found_in_the_other_steps(tmp_path: Path) -> None:
    run = open_run(make_log(tmp_path))
    rows = StepRows(run.step(0))
    held = held_of(rows[rows.at_seq(2)], rows)[:1]
    assert held[0].label == "output"
    found = dict(over_steps(run, Span(0, 1, 10), held, 0, lambda: False))
    deviations = [found[step][0].std for step in range(10)]
    assert deviations == [0.5 * (1 + 0.2 * step) for step in range(10)]
    assert list(over_steps(run, Span(0, 1, 10), held, 0, lambda: True)) == []


def test_a_column_shows_the_step_one_is_in_unless_another_is_not_finite(tmp_path: Path) -> None:
    run = open_run(make_log(tmp_path))
    held = {step: held_of((rows := StepRows(run.step(step)))[rows.at_seq(2)], rows)[:1]
            for step in (0, 2)}  # fmt: skip
    deviation = {step: 0.5 * (1 + 0.2 * step) for step in range(10)}
    for here, shown in ((0, 0), (2, 2)):
        found = dict(over_steps(run, Span(0, 5, 2), held[here], here, lambda: False))
        assert [found[column][0].std for column in (0, 1)] == [deviation[shown], deviation[5]]
    for here in (0, 5, 9):
        rows = StepRows(run.step(here))
        back = [one for one in held_of(rows[rows.at_seq(8)], rows) if one.gradient]
        found = dict(over_steps(run, Span(0, 5, 2), back, here, lambda: False))
        assert [found[column][0].nan for column in (0, 1)] == [0, 640]


def test_the_step_before_a_finding_has_its_column(tmp_path: Path) -> None:
    run = open_run(write_log(tmp_path / "log.jsonl", make_late_run()))
    rows = StepRows(run.step(1))
    held = held_of(rows[rows.at_seq(2)], rows)[:1]
    found = dict(over_steps(run, Span(0, 1, 2), held, 1, lambda: False))
    assert [found[step][0].id for step in (0, 1)] == [2, 2]


def test_another_call_or_a_step_without_it_gives_nothing(tmp_path: Path) -> None:
    run = open_run(make_log(tmp_path))
    rows = StepRows(run.step(0))
    held = held_of(rows[rows.at_seq(2)], rows)[0]
    assert isinstance(tensor_in(run.step(3), held), Tensor)
    assert tensor_in(run.step(99), held) is None


def test_a_box_goes_from_min_to_max_thick_within_the_deviation() -> None:
    tensor = make_tensor(1, 4, min=0.0, max=10.0, mean=5.0, std=2.0)
    lines = box_lines([tensor, None], 1, 11, 1, ASCII)
    column = [line[1][0] for line in lines]
    assert "".join(column) == "|||##o##|||"
    assert [line[2][1] for line in lines] == ["here"] * 11
    bad = make_tensor(1, 4, nan=1, min=None, max=None, mean=None, std=None)
    assert box_lines([bad], 1, 3, 5, ASCII)[0][1] == ("x", "error")


async def test_the_page_has_numbers_gradient_series_flow_and_source(tmp_path: Path) -> None:
    app = Viewer(open_run(make_log(tmp_path)), step=2)
    async with app.run_test(size=(120, 50), notifications=True) as pilot:
        await settle(app, pilot)
        app.stand.go_to_seq(2, 8)
        await pilot.press("4")
        await settle(app, pilot)
        text = text_of(app)
        assert "Tensor output of head, step 2" in text
        assert "[output] gradient of output[0]" in text
        assert "output over steps  10 steps: min to max" in text
        assert "gradient of output[0] over steps  10 steps" in text
        assert re.search("where  train.py:12  scores = model\\(x\\)", text)
        await pilot.press("l")
        await settle(app, pilot)
        assert "Tensor gradient of output[0] of head" in text_of(app)
        await pilot.press("right_square_bracket")
        await settle(app, pilot)
        assert "Tensor gradient of output[0] of head, step 3" in text_of(app)
        await pilot.press("y", "enter")
        await settle(app, pilot)
        assert '"grad_of":7' in app.clipboard
        assert app.shown == "step"


async def test_a_tensor_of_one_step_alone_has_no_chart(tmp_path: Path) -> None:
    app = Viewer(make_op_run(tmp_path, level="module"))
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("4")
        await settle(app, pilot)
        lines = [line.strip("│ ") for line in text_of(app).splitlines()]
        at = next(i for i, line in enumerate(lines) if line.startswith("output over steps  1 step"))
        assert lines[at + 1].startswith("from   input")
        assert "where  net.py:7  return (x * x).log()" in "\n".join(lines)


async def test_columns_of_several_steps_say_so(tmp_path: Path) -> None:
    app = Viewer(open_run(make_log(tmp_path, steps=100, bad=None)), step=57)
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        app.stand.go_to_seq(57, 8)
        await pilot.press("4")
        await settle(app, pilot)
        assert "output over steps  50 steps, one of every 2: min to" in text_of(app)
        column = app.view.span.column(57)
        assert app.view.series[column][0] == app.view.held[0].tensor


async def test_a_row_without_a_tensor_says_so(tmp_path: Path) -> None:
    app = Viewer(open_run(make_log(tmp_path)), step=2)
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("G", "4", "l", "y")
        await settle(app, pilot)
        assert "this row has no tensor" in text_of(app)

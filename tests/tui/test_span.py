"""Steps as columns, and what the step lines say of the modules in them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from rich.cells import cell_len

from tensortrace.records import ModuleColumns, Step
from tensortrace.tui.grid import FLAGS, Grid
from tensortrace.tui.span import Span, fitting, reading_order, shifted, span_of, used, zoomed
from tensortrace.tui.terminal.looks import HEAT
from tensortrace.tui.terminal.styled import ASCII
from tensortrace.tui.trend import sample
from tensortrace.tui.views.columns import Columns
from tensortrace.tui.views.heat import LEVELS, HeatMap, scale_of, told_lines


def step_line(
    step: int, *, full: bool = True, rested: bool = False, **columns: list[object]
) -> Step:
    held = ModuleColumns(**columns)  # type: ignore[arg-type]
    return Step(step=step, seq=9, full=full, rested=rested, modules=held)


@pytest.mark.parametrize(
    ("last", "width", "per"),
    [(0, 80, 1), (79, 80, 1), (80, 80, 2), (399, 80, 5), (99_999, 80, 2000), (5, 1, 10)],
)
def test_a_column_holds_as_many_steps_as_make_the_run_fit(last: int, width: int, per: int) -> None:
    assert fitting(0, last, width) == per


def test_zoom_goes_by_one_two_five_ten_and_ends_at_one() -> None:
    sizes = [100]
    while sizes[-1] > 1:
        sizes.append(zoomed(sizes[-1], True))
    assert sizes == [100, 50, 20, 10, 5, 2, 1]
    assert zoomed(1, True) == 1
    assert zoomed(20, False) == 50


def test_columns_begin_at_multiples_so_that_they_stay_while_the_run_grows() -> None:
    span = span_of(3, 97, 10, 10, 50)
    assert (span.start, span.stop) == (0, 100)
    assert shifted(span, 3, 98, 50, 10) == span
    assert [span.column(n) for n in (3, 9, 10, 99)] == [0, 0, 1, 9]
    assert used(span, 42) == 5


def test_a_span_moves_when_the_step_is_outside() -> None:
    span = span_of(0, 1000, 10, 10, 0)
    moved = shifted(span, 0, 1000, 500, 10)
    assert 0 <= moved.column(500) < 10
    assert moved.start % 10 == 0


def test_every_step_is_read_and_first_one_of_each_column() -> None:
    span = Span(0, 20, 5)
    blocks = list(reading_order(span, 3, 96, 50))
    assert sorted({n for block in blocks for n in block}) == list(range(3, 97))
    assert sorted(span.column(block.start) for block in blocks[:5]) == [0, 1, 2, 3, 4]
    assert span.column(blocks[0].start) == span.column(50)


def test_a_cell_keeps_the_largest_and_every_flag_in_whatever_order_steps_come() -> None:
    steps = [
        step_line(0, path=["", "a"], grad_rms=[1.0, None], flags=["", ""]),
        step_line(1, path=["", "a"], grad_rms=[3.0, 0.5], flags=["", "n"], full=False),
        step_line(2, path=["a", "b"], grad_rms=[0.25, 0.0], flags=["f", ""]),
    ]
    for order in ([0, 1, 2], [2, 1, 0, 1]):
        grid = Grid(Span(0, 5, 2))
        grid.add([steps[at] for at in order])
        rows = {path: grid.paths.index(path) for path in ("", "a", "b")}
        assert grid.values["grad_rms"][rows[""], 0] == 3.0
        assert grid.values["grad_rms"][rows["a"], 0] == 0.5
        assert math.isnan(grid.values["grad_rms"][rows["a"], 1])
        assert grid.flags[rows["a"], 0] == FLAGS["n"] | FLAGS["f"]
        assert (grid.at[rows["a"], 0], grid.full[0]) == (2, 0)


def test_rows_are_in_the_order_of_the_modules_and_not_in_that_of_reading() -> None:
    modules = ["", "a", "b", "c"]
    for order in (["b", "", "c", "a"], ["", "a", "b", "c"], ["z", "y", "c", "b", "a", ""]):
        grid = Grid(Span(0, 1, 3))
        grid.add([step_line(at, path=[path], flags=[""]) for at, path in enumerate(order[:3])])
        grid.add([step_line(2, path=order, flags=[""] * len(order))])
        found = [grid.paths[row] for row in grid.in_order(modules)]
        assert found == [*modules, *sorted(set(order) - set(modules))]


def test_the_sign_stands_on_the_column_of_the_cursor_wherever_its_steps_have_room() -> None:
    for per in (1, 50):
        held = Columns(Span(100, per, 40), 40, 1, 10)
        for column in range(40):
            text = "".join(piece for piece, _ in held.steps_line(column, 50))
            steps = held.span.steps(column)
            told = f"{steps.start}-{steps.stop - 1}" if per > 1 else f"{steps.start}"
            assert len(text) == 50
            assert text.index("▲") == 10 + column, text
            assert f"▲ {told}" in text or f"{told} ▲" in text


def test_names_of_layers_take_what_the_columns_leave_in_cells_of_the_screen() -> None:
    paths = [f"backbone.stage_{i}.日本語のとても長い名前のレイヤー" for i in range(3)]
    grid = Grid(Span(0, 1, 10))
    grid.add([step_line(n, path=paths, grad_rms=[1.0] * 3, flags=[""] * 3) for n in range(10)])
    longest = max(map(cell_len, paths))
    for width in range(20, 240):
        held = HeatMap(grid, "grad_rms", scale_of(grid, "grad_rms"), 10, 1, longest=longest)
        lines = [held.row_line(row, 0, {}, width, here=False) for row in range(3)]
        names = [line[1][0] for line in lines]
        assert len({cell_len(line[0][0] + line[1][0]) for line in lines}) == 1
        assert all(cell_len(name) == held.gutter(width) - 1 for name in names)
        assert all(name.count("…") <= 3 for name in names)
        if width >= 40:
            assert len(set(names)) == 3
        if width >= 80:
            assert [name.strip() for name in names] == paths
        told = ["".join(text for text, _ in told_lines(grid, row, 0, {}, width)[0])
                for row in range(3)]  # fmt: skip
        assert all(cell_len(text) <= width for text in told)


def test_arrays_of_other_lengths_are_left_out() -> None:
    grid = Grid(Span(0, 1, 3))
    grid.add([step_line(0, path=["", "a"], grad_rms=[1.0], flags=["n"])])
    assert math.isnan(grid.values["grad_rms"][0, 0])
    assert grid.flags[0, 0] == FLAGS["n"]


def test_the_colours_grow_with_the_power_of_ten_and_glyphs_say_it_without_them() -> None:
    grid = Grid(Span(0, 1, 6))
    values = [1e-6, 1e-4, 1e-2, 1.0, 0.0, None]
    for at, value in enumerate(values):
        grid.add([step_line(at, path=["a"], grad_rms=[value], flags=[""])])
    held = HeatMap(grid, "grad_rms", scale_of(grid, "grad_rms"), 6, 1, ASCII)
    cells = [held.cell(0, column) for column in range(6)]
    levels = [HEAT.index(style) for _, style in cells[:4]]
    assert levels == sorted(set(levels))
    assert len({glyph for glyph, _ in cells}) == 6
    assert cells[4] == ("0", "zero")
    assert cells[5] == (" ", "")


def test_a_step_at_rest_shows_the_numbers_before_it() -> None:
    grid = Grid(Span(0, 1, 5))
    known: list[tuple[list[object], bool]] = [
        ([None, 2.0], True), ([1e-3, 2.0], False), ([None, 3.0], True), ([None, None], True),
        ([None, 2.0], False),
    ]  # fmt: skip
    steps = [
        step_line(at, path=["a", "b"], grad_rms=rms, flags=["", ""], rested=rested)
        for at, (rms, rested) in enumerate(known)
    ]
    for order in (steps, steps[::-1]):
        grid.add(order)
        # What nobody has looked at yet stays empty, and so does what was not there when one did.
        np.testing.assert_array_equal(
            grid.numbers("grad_rms", 0), [math.nan, *[1e-3] * 3, math.nan]
        )
        np.testing.assert_array_equal(grid.numbers("grad_rms", 1), [2.0, 2.0, 3.0, 3.0, 2.0])
    held = HeatMap(grid, "grad_rms", scale_of(grid, "grad_rms"), 5, 1, ASCII)
    row = held.row_line(0, 0, {}, 80, here=False)
    assert [held.cell(0, at) for at in range(5)] == row[-5:]
    assert row[-5] == row[-1] == (" ", "")
    assert row[-4] == row[-3] == row[-2] != (" ", "")
    told = ["".join(text for line in told_lines(grid, 0, at, {}, 200) for text, _ in line)
            for at in (1, 2)]  # fmt: skip
    assert "gradient rms 0.001  " in told[0]
    assert "gradient rms 0.001 (before)  " in told[1]


def test_a_trend_asks_for_steps_that_are_looked_at() -> None:
    span = span_of(0, 999, 20, 50, 0)
    asked = [steps.start for steps in sample(span, 0, 999)]
    assert len(asked) == 2 * len(range(0, 1000, span.per))
    assert all(step % 10 == 0 for step in asked)
    assert [steps.start for steps in sample(Span(3, 2, 3), 3, 8)] == [3, 4, 5, 6, 7, 8]


def test_viridis_grows_lighter_step_by_step() -> None:
    from tensortrace.tui.terminal.looks import VIRIDIS

    def light(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    lights = [light(colour) for colour in VIRIDIS]
    assert lights == sorted(lights)


def test_a_scale_is_of_ordinary_floats_at_the_ends_of_their_range() -> None:
    grid = Grid(span_of(0, 1, 2, 1, 0))
    grid.add([step_line(0, path=["a", "b"], grad_rms=[5e-324, 1.7e308], flags=["", ""])])
    scale = scale_of(grid, "grad_rms")
    assert (scale.level(5e-324), scale.level(1.7e308)) == (0, LEVELS - 1)

"""The table of a step: columns that the user chose, trends of the rows, the palette's places."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from msgspec.structs import replace

from tensortrace.records import Call, ModuleColumns, Step
from tensortrace.run import open_run
from tensortrace.tui.app import Viewer
from tensortrace.tui.grid import Grid
from tensortrace.tui.span import Span
from tensortrace.tui.step.calls import MEANINGS, SHOWN_FROM, WIDTHS, columns, head_line
from tensortrace.tui.step.cells import cells
from tensortrace.tui.step.row import Row
from tensortrace.tui.terminal.styled import ASCII
from tensortrace.tui.trend import sample, trend_span, trend_text
from tests.builders import make_call, make_end, make_header, make_late_run, make_steps, write_log
from tests.tui.samples import BAD_STEP, make_open_run
from tests.tui.screen import settle, text_of, told
from tests.tui.views.test_layers import make_layered_run


@pytest.mark.parametrize("width", [20, 40, 60, 78, 100, 118, 160])
def test_the_columns_fit_whatever_was_chosen(width: int) -> None:
    for chosen in (None, frozenset(), frozenset(MEANINGS), frozenset({"min", "max"})):
        held = columns(width, chosen)
        total = held.name + 2 + sum(held.widths.values())
        assert total == width or held.name == 8
        if chosen is not None and width >= 60:
            assert total <= width


def test_every_column_has_a_meaning_and_a_width() -> None:
    assert set(MEANINGS) == set(WIDTHS)
    assert set(SHOWN_FROM) <= set(MEANINGS)


def test_what_was_asked_for_stays_longer_than_what_the_width_shows() -> None:
    for width in range(72, 160):
        shown = frozenset(columns(width).widths)
        held = columns(width, shown | {"min", "max"}).widths
        assert {"min", "max"} <= set(held), width


async def test_a_column_without_room_is_told(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path), step=0)
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("C", "g", *["j"] * 7, "space", "j", "space", "enter")
        await settle(app, pilot)
        head = next(line for line in text_of(app).splitlines() if "module or op" in line)
        assert "min" in head and "max" in head
        assert "std" not in head
        assert "no room here for mean, std" in told(app)


def test_a_chosen_column_is_named_in_the_head() -> None:
    text = head_line(100, chosen=frozenset({"min", "zeros"}))[0][0]
    assert "min" in text and "zeros" in text
    assert "mean" not in text


def trend_grid() -> Grid:
    grid = Grid(Span(0, 1, 4))
    for step, (rms, flag) in enumerate([(1.0, ""), (2.0, ""), (3.0, "n")]):
        grid.add([Step(step=step, seq=1, modules=ModuleColumns(
            path=["a"], output_rms=[rms], grad_rms=[math.pi], flags=[flag]))])  # fmt: skip
    return grid


def test_a_trend_rises_and_marks_what_is_not_finite() -> None:
    held = trend_grid()
    assert trend_text(held, make_call(1, "a"), ASCII) == ASCII.bars[0] + ASCII.bars[4] + "x"
    back = make_call(2, "a", phase="backward", forward=1)
    assert trend_text(held, back, ASCII) == ASCII.bars[-1] * 2 + "x"
    assert trend_text(held, make_call(3, "b"), ASCII) == ""
    assert trend_text(held, make_call(4, "a", op="relu"), ASCII) == ""
    assert trend_text(None, make_call(1, "a"), ASCII) == ""


def test_a_trend_reads_two_steps_of_each_column() -> None:
    span = trend_span(5, 99_999)
    blocks = list(sample(span, 5, 99_999))
    assert len(blocks) <= 16
    assert all(len(block) == 1 and 5 <= block[0] <= 99_999 for block in blocks)


async def test_the_trend_is_in_the_rows_where_there_is_room(tmp_path: Path) -> None:
    app = Viewer(make_layered_run(tmp_path), step=0)
    async with app.run_test(size=(160, 40), notifications=True) as pilot:
        await settle(app, pilot)
        lines = text_of(app).splitlines()
        assert any("trend" in line for line in lines)
        row = next(line for line in lines if "second  Linear" in line)
        assert "████x█" in row


async def test_the_topmost_row_says_its_phase_wherever_one_scrolls(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path), step=0)
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        table, rows = app.pane("calls"), app.rows
        begins = {i for i in range(1, len(rows)) if rows[i - 1].section != rows[i].section}
        tops = set()
        for _ in rows:
            await pilot.press("j")
            await settle(app, pilot)
            top, height = table.topmost, table.size.height - 1
            tops.add(top)
            shown = [table.render_line(1 + y).text[6:10].strip() for y in range(height)]
            told = {top + y for y, word in enumerate(shown) if word}
            assert told == {top, *(at for at in begins if top < at < top + height)}
        assert len(tops) > 3


async def test_columns_are_switched_on_and_off_with_space(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path), step=0)
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("C", "g", "j", "j", "space")
        await pilot.press(*"jjjjj", "space", "enter")
        await settle(app, pilot)
        head = next(line for line in text_of(app).splitlines() if "module or op" in line)
        assert "shape" not in head
        assert "min" in head
        await pilot.press("C", "a")
        await settle(app, pilot)
        assert app.columns is None
        await pilot.press("C", "space", "escape")
        assert app.columns is None


async def test_the_palette_goes_to_findings_modules_and_steps(tmp_path: Path) -> None:
    app = Viewer(make_open_run(tmp_path), step=0)

    async def choose(pilot: object, text: str) -> None:
        await pilot.press("ctrl+p")  # type: ignore[attr-defined]
        await pilot.pause()  # type: ignore[attr-defined]
        await pilot.press(*text)  # type: ignore[attr-defined]
        await pilot.pause(0.4)  # type: ignore[attr-defined]
        await pilot.press("down", "enter")  # type: ignore[attr-defined]
        await settle(app, pilot)  # type: ignore[arg-type]

    async with app.run_test(size=(100, 30), notifications=True) as pilot:
        await settle(app, pilot)
        await choose(pilot, "TT101")
        assert (app.number, app.row.seq) == (BAD_STEP, 10)
        await choose(pilot, "5")
        assert app.number == 5
        await choose(pilot, "blocks.0.mlp")
        assert (app.number, app.row.record.module) == (5, "blocks.0.mlp")
        await choose(pilot, "heat map")
        assert app.shown == "layers"


def test_the_time_on_a_gpu_is_a_column_of_its_own() -> None:
    record = make_call(1, "a", host_ns=2_000_000, device_ns=130_000)
    held = cells(Row(record, "forward"), {}.get, {})
    assert (held.time, held.device) == ("2 ms", "130 µs")
    assert "device" in head_line(100, chosen=frozenset({"device"}))[0][0]
    assert "device" not in head_line(200)[0][0]


async def test_the_detail_says_what_a_call_took_on_the_gpu(tmp_path: Path) -> None:
    steps = make_steps(1)
    at = next(i for i, record in enumerate(steps) if isinstance(record, Call))
    steps[at] = replace(steps[at], device_ns=130_000, allocated=3_100_000_000)
    path = write_log(tmp_path / "log.jsonl", [make_header(), *steps, make_end(0)])
    app = Viewer(open_run(path), step=0)
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(app, pilot)
        assert "forward, 130 µs on the GPU, GPU memory 3.1 GB" in text_of(app)


@pytest.mark.parametrize(
    ("kept", "told"), [(6, ""), (4, ", not all calls kept"), (0, ", calls not kept")]
)
async def test_the_step_before_a_finding_has_its_calls_in_order(
    tmp_path: Path, kept: int, told: str
) -> None:
    app = Viewer(open_run(write_log(tmp_path / "log.jsonl", make_late_run(kept))), step=0)
    async with app.run_test(size=(100, 30), notifications=True) as pilot:
        await settle(app, pilot)
        assert app.pane("calls").border_title == f"Step 0{told}"
        seqs = [row.seq for row in app.rows]
        assert seqs == sorted(seqs) and len(seqs) == kept + 2
        rows = app.rows
        assert [rows.position(rows.at_offset(rows.offset(at))) for at in range(len(rows))] == [
            *range(len(rows))
        ]

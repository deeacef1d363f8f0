"""Which rows a step has: ops stand inside their call, and show when it is opened."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tensortrace.records import Call
from tensortrace.run import open_run
from tensortrace.tui.app import Viewer
from tensortrace.tui.step.calls import row_line
from tensortrace.tui.step.folds import Opened
from tensortrace.tui.step.rows import StepRows
from tensortrace.tui.step.slots import LARGE
from tensortrace.tui.terminal.styled import ASCII
from tests.builders import make_call, write_log
from tests.tui.nets import make_op_run
from tests.tui.screen import settle
from tests.tui.step.test_rows import rows_of, text


def seqs(rows: StepRows) -> list[int | None]:
    return [row.seq for row in rows if isinstance(row.record, Call)]


def test_ops_inside_modules_have_no_row_until_their_call_is_opened(tmp_path: Path) -> None:
    rows = StepRows(make_op_run(tmp_path).step(0))
    assert seqs(rows) == [1, 2, 4, 7, 9, 10, 11, 14, 16]
    rows.put(2, True)
    assert seqs(rows) == [1, 2, 4, 5, 6, 7, 9, 10, 11, 14, 16]
    assert [rows.inside(at) for at in range(5)] == [0, 1, 2, 0, 0]
    assert [row.depth for row in rows[2:5]] == [1, 2, 2]
    rows.put(2, False)
    assert seqs(rows) == [1, 2, 4, 7, 9, 10, 11, 14, 16]


def test_backward_ops_stand_under_the_gradient_of_their_module(tmp_path: Path) -> None:
    rows = StepRows(make_op_run(tmp_path).step(0))
    at = seqs(rows).index(11) + 1  # the loss has a row too
    assert rows[at].seq == 11
    rows.put(at, True)
    assert seqs(rows)[6:9] == [11, 12, 13]
    assert [row.depth for row in rows[at : at + 3]] == [0, 1, 1]
    assert rows.owner(at + 2) == at


def test_replayed_ops_stand_under_the_call_that_they_repeat(tmp_path: Path) -> None:
    rows = StepRows(make_op_run(tmp_path, level="module").step(2), Opened(every=True))
    assert seqs(rows)[:8] == [1, 2, 40, 4, 41, 42, 7, 9]
    assert "replayed" in text(row_line(rows, 2, {}, 120))


def test_a_replayed_op_after_an_inner_call_stays_after_it(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [
        make_call(1, "m"),
        make_call(2, "m.a", parent=1),
        make_call(3, "m.b", parent=1),
        make_call(4, "m.b.c", parent=3),
        make_call(9, "m", phase="backward", forward=1),
        make_call(10, "m", op="first", parent=1, replay=True),
        make_call(11, "m.a", op="second", parent=2, replay=True),
        make_call(12, "m", op="third", parent=1, replay=True),
        make_call(13, "m.b", op="fourth", parent=3, replay=True),
        make_call(14, "m", op="fifth", parent=1, replay=True),
        make_call(15, "m", op="back", phase="backward", forward=12, parent=1, replay=True),
    ])  # fmt: skip
    rows.opened.every = True
    rows.fold()
    assert seqs(rows) == [1, 10, 2, 11, 12, 3, 13, 4, 14, 9, 15]


def test_what_is_open_stays_open_from_step_to_step(tmp_path: Path) -> None:
    run, opened = make_op_run(tmp_path), Opened()
    StepRows(run.step(0), opened).put(2, True)
    assert 6 in seqs(StepRows(run.step(1), opened))
    assert 3 not in seqs(StepRows(run.step(1), opened))


def test_all_open_but_one(tmp_path: Path) -> None:
    rows = StepRows(make_op_run(tmp_path).step(0), Opened(every=True))
    assert seqs(rows) == list(range(1, 8)) + list(range(9, 17))
    rows.put(1, False)
    assert [s for s in range(1, 17) if s not in seqs(rows)] == [3, 8]


def test_a_finding_inside_a_closed_call_shows_at_the_call(tmp_path: Path) -> None:
    rows = StepRows(make_op_run(tmp_path).step(2))
    assert rows.under(2) == "error"
    for width in range(30, 200):  # a scrollbar lies over the last cell
        assert text(row_line(rows, 2, {}, width))[: width - 1].endswith("x in it")
    finding = rows.step.findings[0]
    at = rows.reveal(rows.find_finding(finding))
    assert rows[at].findings == (finding,)
    assert rows.under(2) is None


def test_the_marker_says_whether_the_ops_show(tmp_path: Path) -> None:
    rows = StepRows(make_op_run(tmp_path).step(0))
    assert "+ act  Act, 2 ops" in text(row_line(rows, 2, dict(make_op_run(tmp_path).modules), 120,
                                                glyphs=ASCII))  # fmt: skip
    rows.put(2, True)
    assert "- act" in text(row_line(rows, 2, {}, 120, glyphs=ASCII))


def nested(folder: Path) -> StepRows:
    back: dict[str, Any] = {"phase": "backward"}
    return rows_of(folder, [
        make_call(1, ""),
        make_call(2, "m", parent=1),
        make_call(3, "m.a", parent=2),
        make_call(4, "m.a", op="mul", parent=3),
        make_call(5, "m.b", parent=2),
        make_call(6, "n", parent=1),
        make_call(7, "n", forward=6, **back),
        make_call(8, "m.b", forward=5, **back),
        make_call(9, "m.a", op="mul", forward=4, parent=3, **back),
        make_call(10, "m.a", forward=3, **back),
        make_call(11, "m", forward=2, **back),
    ])  # fmt: skip


def test_a_closed_module_hides_its_calls_and_their_gradients(tmp_path: Path) -> None:
    rows = nested(tmp_path)
    rows.opened.every = True
    rows.fold()
    assert seqs(rows) == list(range(1, 12))
    assert [rows.holds(at) for at in range(3)] == [2, 2, 0]
    rows.close(1, True)
    assert seqs(rows) == [1, 2, 6, 7, 11]
    assert rows.closed(1)
    assert "+ m  2 calls" in text(row_line(rows, 1, {}, 120, glyphs=ASCII))
    rows.close(1, False)
    assert 4 in seqs(rows)


def test_all_modules_but_the_outermost_close_at_once(tmp_path: Path) -> None:
    rows = nested(tmp_path)
    rows.close_all()
    assert seqs(rows) == [1, 2, 6, 7, 11]


def test_a_row_inside_closed_modules_opens_them_when_it_is_gone_to(tmp_path: Path) -> None:
    rows = nested(tmp_path)
    rows.close(0, True)
    rows.close(1, True)
    assert seqs(rows) == [1]
    assert rows[rows.reveal(rows.at_seq(8) or 0)].seq == 8
    rows.close(0, True)
    assert rows[rows.reveal(rows.at_seq(4) or 0)].seq == 4


async def test_h_and_l_close_and_open_modules_and_minus_and_plus_all(tmp_path: Path) -> None:
    app = Viewer(make_op_run(tmp_path), step=0)
    async with app.run_test(size=(100, 30), notifications=True) as pilot:
        await settle(app, pilot)
        await pilot.press("g", "h")
        # The gradient of a parameter (16) belongs to no call that one could close.
        assert seqs(app.rows) == [1, 7, 9, 10, 16]
        await pilot.press("l")
        assert seqs(app.rows) == [1, 2, 4, 7, 9, 10, 11, 14, 16]
        await pilot.press("l")
        assert app.row.seq == 2
        await pilot.press("plus")
        assert seqs(app.rows) == [*range(1, 8), *range(9, 17)]
        await pilot.press("minus")
        assert seqs(app.rows) == [1, 2, 4, 7, 9, 10, 11, 14, 16]
        await pilot.press("h", "h", "enter")
        await settle(app, pilot)
        assert seqs(app.rows) == [1, 2, 4, 7, 9, 10, 11, 14, 16]


@pytest.mark.parametrize(
    "calls",
    [
        [make_call(1, "a", op="x", parent=1), make_call(2, "b", op="y", parent=3)],
        [make_call(1, "a", op="x", phase="backward", forward=1)],
        [make_call(5, "a", parent=9), make_call(9, "a", op="x", parent=5),
         make_call(9, "b", op="x", parent=9)],
        [make_call(1 << 61, "a"), make_call((1 << 62) + 1, "b", op="x", parent=1 << 61)],
        [make_call(1, "a", op="x", parent=-1, forward=-5, phase="backward")],
    ],
)  # fmt: skip
def test_a_log_that_contradicts_itself_is_shown(tmp_path: Path, calls: list[Call]) -> None:
    rows = rows_of(tmp_path, calls)
    rows.opened.every = True
    rows.fold()
    assert len(rows) == len(list(rows)) == len(calls)


def test_a_large_step_is_folded_once_a_thread_has_read_it(tmp_path: Path) -> None:
    calls = [
        make_call(i, "m", op="x" if i % 10 else None, parent=i // 10 * 10 if i % 10 else None)
        for i in range(LARGE + 10)
    ]
    rows = StepRows(open_run(write_log(tmp_path / "log.jsonl", calls)).step(0))
    assert len(rows) == LARGE + 10
    rows.fold(rows.read_folds())
    assert seqs(rows) == list(range(0, LARGE + 10, 10))
    assert rows[rows.reveal(rows.at_seq(27) or 0)].seq == 27

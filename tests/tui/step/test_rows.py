"""Rows of a step and their text, without a screen."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len

from tensortrace.records import (
    Action,
    Line,
    Location,
    Module,
    Optimizer,
    Param,
    Record,
    Source,
    Step,
)  # fmt: skip
from tensortrace.run import open_run
from tensortrace.tui.search import places_of
from tensortrace.tui.step.calls import columns, head_line, row_line
from tensortrace.tui.step.cells import cells, health, worst_health
from tensortrace.tui.step.detail import detail_lines, finding_lines, snippet, wrap
from tensortrace.tui.step.findings import finding_line
from tensortrace.tui.step.rows import StepRows
from tensortrace.tui.step.slots import LARGE, NEAR
from tensortrace.tui.terminal.styled import ASCII, Styled, clip_path, clip_words, wrapped
from tests.builders import HERE, make_call, make_tensor, write_log
from tests.tui.samples import BAD_STEP, make_finding, make_open_run


def rows_of(folder: Path, records: Iterable[Record], step: int = 0) -> StepRows:
    return StepRows(open_run(write_log(folder / "log.jsonl", records)).step(step))


def text(lines: Styled | list[Styled]) -> str:
    if lines and isinstance(lines[0], list):
        return "\n".join(text(line) for line in lines)  # type: ignore[arg-type]
    return "".join(piece for piece, _ in lines)  # type: ignore[misc]


def test_depth_follows_the_parents(tmp_path: Path) -> None:
    rows = StepRows(make_open_run(tmp_path).step(0))
    told = {row.record.module: row.depth for row in rows if row.section == "forward" and row.depth}
    assert told["stem.conv"] == 2
    assert told["head"] == 1


def test_a_parent_that_the_log_lost_leaves_the_row_at_the_margin(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [make_call(7, "a", parent=3), make_call(9, "b", parent=9)])
    assert [row.depth for row in rows[:1]] == [0]
    assert len(rows) == 2


def test_only_the_rows_that_are_asked_for_are_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = open_run(
        write_log(tmp_path / "log.jsonl", [make_call(i, f"m{i}") for i in range(3000)])
    ).step(0)
    decoded: set[int] = set()
    plain = type(step).record
    monkeypatch.setattr(type(step), "record", lambda s, i: (decoded.add(i), plain(s, i))[1])
    rows = StepRows(step)
    for at in range(2000, 2020):
        row_line(rows, at, {}, 120)
    assert len(rows) == 3000
    assert decoded <= set(range(2000 - NEAR, 2021))


def test_an_action_stands_in_the_section_around_it(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [
        Action(step=0, seq=1, action="fetch"),
        make_call(2, "a"),
        Action(step=0, seq=3, action="loss", detail={"value": 1.5}),
        make_call(4, "a", phase="backward", forward=2),
        Action(step=0, seq=5, action="zero_grad"),
        Optimizer(step=0, seq=6, index=0, cls="SGD"),
        Step(step=0, seq=7),
    ])  # fmt: skip
    assert [row.section for row in rows] == [
        "forward", "forward", "loss", "backward", "backward", "optimizer", "step",
    ]  # fmt: skip


def test_a_finding_stands_at_its_seq_else_its_parameter_else_alone(tmp_path: Path) -> None:
    value = make_tensor(1, 2)
    rows = rows_of(tmp_path, [
        make_call(1, "a"),
        Param(step=0, seq=2, optimizer=0, name="a.weight", value=value),
        make_finding(0, 1, id="one"),
        make_finding(0, None, id="two", param="a.weight"),
        make_finding(0, None, id="three"),
        make_finding(0, 99, id="four"),
    ])  # fmt: skip
    assert [[f.id for f in row.findings] for row in rows] == [["one"], ["two"], ["three"], ["four"]]
    assert [rows.find_finding(f) for row in rows for f in row.findings] == [0, 1, 2, 3]


def test_the_same_place_is_found_in_another_step(tmp_path: Path) -> None:
    run = make_open_run(tmp_path)
    first, second = StepRows(run.step(0)), StepRows(run.step(1))
    assert [second.find(first[at], 0) for at in range(len(first))] == list(range(len(first)))
    assert second.find(None, 4) == 4


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({}, ". ok"),
        ({"nan": 1, "posinf": 1}, "x nan"),
        ({"neginf": 1}, "x inf"),
        ({"zeros": 6}, "0 zero"),
        ({"unmeasured": "meta", "max": None}, "? none"),
        ({"numel": 0, "max": None}, "? empty"),
        ({"dtype": "float16", "max": 33000.0}, "! big"),
        ({"dtype": "float16", "max": 32000.0}, ". ok"),
        ({"dtype": "int64", "max": 1e12}, ". ok"),
    ],
)
def test_the_health_of_a_tensor_is_a_sign_and_a_word(changes: dict[str, Any], word: str) -> None:
    assert health(make_tensor(1, 2, 3, **changes))[0] == word


def test_a_bad_input_of_a_good_output_is_only_a_note() -> None:
    tensors = {1: make_tensor(1, 2, neginf=1), 2: make_tensor(2, 2)}
    call = make_call(1, "attn", inputs=[("mask", 1)], outputs=[("output", 2)])
    assert worst_health(call, tensors.get) == ("i inf in", "note")
    worse = make_call(1, "attn", inputs=[("x", 2)], outputs=[("a", 2), ("b", 1)])
    assert worst_health(worse, tensors.get) == ("x inf", "error")


def test_a_backward_row_shows_the_gradient_that_arrived(tmp_path: Path) -> None:
    tensors = {1: make_tensor(1, 4, 5), 2: make_tensor(2, 4, 6)}
    rows = rows_of(tmp_path, [
        make_call(1, "a", phase="backward", inputs=[("output[0]", 1)], outputs=[("input", 2)]),
    ])  # fmt: skip
    assert cells(rows[0], tensors.get, {}).shape == "[4, 5]"


def test_a_call_that_raised_shows_nothing_that_it_made(tmp_path: Path) -> None:
    given = make_tensor(1, 4, 7688, nan=3)
    call = make_call(2, "a", inputs=[("input[0]", 1)], tensors=[given], exception="RuntimeError")
    rows = rows_of(tmp_path, [call])
    held = cells(rows[0], partial(rows.tensor_near, rows.slot(0)), {})
    assert (held.shape, held.dtype, held.mean, held.health) == ("", "", "", "x raised")
    assert "a   raised RuntimeError  " in text(row_line(rows, 0, {}, 100))


def test_a_row_shows_nothing_of_what_a_call_was_given(tmp_path: Path) -> None:
    given = {1: make_tensor(1, 4, 5, nan=3)}
    unknown = make_call(1, "a", inputs=[("input[0]", 1)], outputs=[("output[0]", 2)])
    nothing = make_call(2, "a", inputs=[("input[0]", 1)])
    for row in rows_of(tmp_path, [unknown, nothing]):
        held = cells(row, given.get, {})
        assert (held.shape, held.dtype, held.zeros, held.health) == ("", "", "", "i nan in")


def test_a_module_is_named_below_the_one_it_ran_in(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, [make_call(1, ""), make_call(2, "a.b", parent=1),
                              make_call(3, "a.b.c", parent=2, nth=1)])  # fmt: skip
    modules = {path: Module(step=0, path=path, cls="Net") for path in ("", "a.b", "a.b.c")}
    named = [cells(row, partial(rows.tensor_near, 0), modules) for row in rows]
    assert [(c.name, c.kind) for c in named] == [("Net", ""), ("a.b", "Net"), ("c", "Net #2")]


@pytest.mark.parametrize("width", [8, 20, 38, 56, 64, 76, 78, 88, 96, 118, 136, 162, 198])
def test_a_line_is_exactly_as_wide_as_its_pane(tmp_path: Path, width: int) -> None:
    run = make_open_run(tmp_path)
    rows = StepRows(run.step(BAD_STEP))
    lines = [row_line(rows, at, run.modules, width, glyphs=ASCII) for at in range(len(rows))]
    held = columns(width)
    total = 2 + held.name + sum(held.widths.values())
    assert {len(text(line)) for line in [*lines, head_line(width)]} == {total}
    assert total == max(width, total if width < 40 else 0)


def test_ascii_lines_hold_nothing_else(tmp_path: Path) -> None:
    run = make_open_run(tmp_path)
    rows = StepRows(run.step(BAD_STEP))
    lines = [row_line(rows, at, {}, 78, here=True, glyphs=ASCII) for at in range(len(rows))]
    assert text(lines).replace("µ", "u").isascii()


def test_the_detail_tells_finding_numbers_gradient_and_source(tmp_path: Path) -> None:
    run = make_open_run(tmp_path)
    rows = StepRows(run.step(BAD_STEP))
    source = run.source("train.py", 12)
    at = rows.find_module("blocks.0.mlp")
    told = text(detail_lines(rows[at], rows, run.modules, source, 78))
    assert "output [64, 32] f32 cpu" in told
    assert "grad of output[0]" in told
    assert "nan 640" in told
    assert "▶   12         scores = model(x)" in told
    bad = text(detail_lines(rows[rows.at_seq(10) or 0], rows, run.modules, source, 78))
    assert bad.startswith("x TT101 nonfinite-forward: log makes 12 of 640 elements -inf")
    assert "use log_softmax" in bad


@pytest.mark.parametrize("width", [40, 78, 99, 100, 160])
def test_the_numbers_of_a_tensor_are_all_there_at_every_width(tmp_path: Path, width: int) -> None:
    run = make_open_run(tmp_path)
    rows = StepRows(run.step(0))
    lines = detail_lines(rows[rows.find_module("head")], rows, run.modules, None, width)
    for number in ("0.06", "0.5", "12.5", "-2.1", "3.2", "42"):
        assert number in text(lines)
    assert all(len(text(line)) <= max(width, 45) for line in lines)


def test_a_large_step_is_looked_through_for_what_belongs_to_a_row(tmp_path: Path) -> None:
    far = [make_call(i, f"m{i}", tensors=[make_tensor(i, 2)]) for i in range(3000)]
    call = make_call(3000, "late", inputs=[("input", 5)])
    back = make_call(3001, "late", phase="backward", forward=3000, inputs=[("output[0]", 6)])
    rows = rows_of(tmp_path, [*far, call, back])
    row = rows[3000]
    assert rows.large
    assert "input" not in text(detail_lines(row, rows, {}, None, 78))
    rows.gather(row, lambda: True)
    assert rows.backward_of(3000) == []
    rows.gather(row, lambda: False)
    assert rows.backward_of(3000) == [back]
    assert "  input [2] f32" in text(detail_lines(row, rows, {}, None, 78))


def test_a_large_step_shows_what_a_line_far_inside_a_call_describes(tmp_path: Path) -> None:
    made = {"inputs": [("input", 1)], "outputs": [("output", 2)]}
    inside = [make_call(i, "a", op="x", parent=1) for i in range(2, LARGE + 20)]
    end = Line(step=0, seq=LARGE + 20, location=HERE, tensors=[make_tensor(2, 9, nan=2)])
    first = make_call(0, "in", outputs=[("output", 1)], tensors=[make_tensor(1, 7)])
    rows = rows_of(tmp_path, [first, make_call(1, "a", **made), *inside, end])

    def shown() -> tuple[str, str]:
        at = rows.position(rows.at_seq(1) or 0) or 0
        held = cells(rows[at], partial(rows.tensor_near, rows.slot(at)), {})
        return held.shape, held.health

    assert rows.large
    assert shown() == ("", "")  # not known yet
    rows.fold(rows.read_folds())
    assert shown() == ("[9]", "x nan")


def test_a_snippet_without_stored_source_is_the_line_itself() -> None:
    assert "loss = model(x)" in text(snippet(HERE, None, 3))


def test_a_snippet_and_a_search_take_lines_as_python_does() -> None:
    source = Source(
        step=0, file="t.py", name="f", first_line=7,
        text="def f(x):\n    \x0c\n    s = '\u2028'\n    return x.log()\n",
    )  # fmt: skip
    shown = text(snippet(Location("t.py", 10, "f"), source, 1)).split("\n")
    assert shown[-1].split()[-3:] == ["10", "return", "x.log()"]
    assert places_of("x.log()", [source]) == {("t.py", 10)}


def test_a_space_at_the_end_of_a_line_is_not_carried_to_the_next() -> None:
    text = "softmax underflows to exact zeros when two scores are far apart"
    for width in range(20, 60):
        head, *rest = wrap("  why  ", text, width)
        assert head.startswith("  why  softmax")
        assert all(line[:7].isspace() and not line[7].isspace() for line in rest)
        assert " ".join([head[7:], *(line[7:] for line in rest)]) == text
    assert wrap("x ", "", 30) == ["x "]


@pytest.mark.parametrize("width", [24, 60, 78, 110])
def test_long_code_and_values_can_be_read_in_the_detail(tmp_path: Path, width: int) -> None:
    place = Location(HERE.file, 12, "train", "loss = " + "model(x) + " * 30 + "FAR_CODE")
    value = "['" + "item', '" * 30 + "FAR_VALUE']"
    path = ".".join(f"stage_number_{i}" for i in range(9)) + ".FAR_PATH"
    action = Action(step=0, seq=1, action="fetch", detail={"of": value}, location=place)
    call = make_call(2, path, location=place)
    rows = rows_of(tmp_path, [action, call])
    for row, far in zip(rows, ("FAR_VALUE", "FAR_PATH"), strict=False):
        lines = detail_lines(row, rows, {}, None, width)
        assert all(cell_len(text(line)) <= width for line in lines)
        assert far in text(lines)
        assert "FAR_CODE" in text(lines)


@pytest.mark.parametrize("width", [1, 2, 5, 9, 20, 80])
def test_a_broken_line_holds_all_of_it_in_the_width(width: int) -> None:
    line = [
        ("  ab, ", "strong"),
        ("日本語のテキスト", "op"),
        (" " * 5 + "f(x, 1.5).g", ""),
        ("", "ok"),
    ]
    for hang in (0, 3, 50):
        lines = wrapped(line, width, hang)
        assert all(cell_len(text(part)) <= max(3, width) for part in lines)
        whole = "".join(text(part) for part in lines).replace(" ", "")
        assert whole == text(line).replace(" ", "")
        assert {style for part in lines for _, style in part} <= {"strong", "op", ""}


def test_a_message_without_end_is_cut_and_says_so() -> None:
    lines = wrap("x ", "word " * 5000, 80)
    assert len(lines) < 100
    assert "21000 more characters" in " ".join(lines)


def test_long_paths_can_be_told_apart_in_a_narrow_column() -> None:
    paths = [
        f"hierarchical_backbone.stage_number_{stage}.residual_blocks.{block}.{end}"
        for stage in range(3) for block in (1, 11, 12) for end in ("normalisation", "projection")
    ]  # fmt: skip
    for width in range(18, 90):
        short = [clip_path(path, width) for path in paths]
        assert len(set(short)) == len(paths), width
        assert all(cell_len(path) <= width for path in short)
        assert all(path.isascii() for path in (clip_path(path, width, ASCII) for path in paths))
    assert clip_path("日本語のとても長い名前.0", 12) == "日本…名前.0"
    found = [make_finding(module=path, op="norm") for path in paths]
    listed = ["".join(t for t, _ in finding_line(f, 1, {}, 34)) for f in found]
    assert len(set(listed)) == len(paths)
    assert all(line.endswith(" norm") and cell_len(line) <= 34 for line in listed)
    for width in range(30):
        assert cell_len(clip_path("日本語のとても長い名前.0.レイヤー", width)) <= width


@pytest.mark.parametrize(
    ("width", "told"),
    [(20, "update 0.00454, x"), (16, "update 0.00454,…"), (15, "update …"), (14, "update …"),
     (9, "update …"), (8, "update…"), (3, "up…"), (0, "")],
)  # fmt: skip
def test_a_number_is_left_out_and_never_cut(width: int, told: str) -> None:
    assert clip_words("update 0.00454, x", width) == told
    assert clip_words("1.2e-105", 7) == "…"


def test_a_row_without_room_for_a_number_leaves_it_out(tmp_path: Path) -> None:
    rows = StepRows(make_open_run(tmp_path).step(0))
    at = next(i for i, row in enumerate(rows) if getattr(row.record, "name", "") == "head.weight")
    for width in range(20, 120):
        shown = text(row_line(rows, at, {}, width))
        assert "update 0.002 " in shown or "update 0" not in shown


@pytest.mark.parametrize("width", [30, 40, 79, 120])
def test_the_line_of_a_finding_is_broken_and_not_cut(width: int) -> None:
    code = "return -(target * p.log() + (1 - target) * (1 - p).log()).mean() * scale"
    finding = make_finding(location=Location("/far/train.py", 37, "loss", f"    {code}"))
    lines = ["".join(text for text, _ in line) for line in finding_lines(finding, {}, width)]
    at = next(i for i, line in enumerate(lines) if line.startswith("  line train.py:37  "))
    told = " ".join(line.strip() for line in lines[at:])
    assert told.startswith(f"line train.py:37  {code} why")
    assert max(map(len, lines)) <= width

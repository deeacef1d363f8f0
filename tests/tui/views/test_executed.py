"""The walk over executed lines as a state machine, and what its panes write, without a screen."""

from __future__ import annotations

from typing import Any

import pytest
from rich.cells import cell_len

from tensortrace.records import (
    Action,
    Line,
    Location,
    Module,
    Optimizer,
    Record,
    Tensor,
    Variable,
)
from tensortrace.tui.terminal.styled import ASCII
from tensortrace.tui.views.executed import Executed, read_executed
from tensortrace.tui.views.source_lines import (
    beside_lines,
    function_at,
    note_text,
    source_line,
    title_of,
    whole_lines,
)
from tensortrace.tui.views.variables import (
    item_line,
    items_at,
    name_width,
    tensor_text,
    whole_item,
)
from tests.builders import make_call, make_tensor
from tests.export.listed import (
    at,
    held,
    in_forward,
    make_found,
    make_line,
    make_sources,
    step_records,
)
from tests.tui.test_hostile import FORBIDDEN, PAYLOADS


def walk(*records: Record, modules: dict[str, Module] | None = None) -> Executed:
    return read_executed(records, modules or {})


def sample(step: int = 0) -> Executed:
    """By index: 0 call, 1 logits, then in forward 2 call, 3 x, 4 for, 5 x, 6 for, 7 x, 8 for,
    9 scale, 10 return, 11 its value; 12 loss, 13 backward, 14 return, 15 its value."""
    return walk(*step_records(step))


def numbers(executed: Executed, indices: list[int | None]) -> list[int | None]:
    return [None if i is None else executed.lines[i].location.line for i in indices]


def text(pieces: list[tuple[str, str]]) -> str:
    return "".join(piece for piece, _ in pieces)


def loop() -> Executed:
    """A loop recorded at its 1st and 4th turn: `for`, `x`, `for` (at seq 20, x since 5), `x`."""
    return walk(
        make_line(0, at(14), what="call"),
        make_line(1, at(15), Variable("i", "0")),
        make_line(2, at(16), Variable("x", "10")),
        make_line(20, at(15), Variable("i", "3", "0"), nth=3, passed_over=2, since=4),
        make_line(21, at(16), Variable("x", "13", "10"), nth=3, passed_over=2, since=5),
        make_line(22, at(17)),
    )


def test_a_variable_that_was_set_anew_and_passed_over_since_is_marked_as_older() -> None:
    executed = loop()
    stale = [{v.name for v in executed.variables(i) if v.stale} for i in range(len(executed))]
    assert stale == [set(), set(), set(), {"x"}, set(), set()]
    items = [item for item in items_at(executed, 3, (), 80) if item.value is not None]
    lines = [text(item_line(item, executed, 4, 60)) for item in items]
    assert [line[:6] for line in lines] == ["* i   ", "~ x   "]
    told = beside_lines(executed, 3, ())
    assert {number for number, beside in told.items() if beside.stale} == {16}
    row = text(source_line((16, "x = i"), told[16], executed, 80, current=False, longest=10))
    assert "~ x = 10" in row


def test_members_beside_tensors_stand_in_both_panes() -> None:
    pair = Variable("pair", "[tensor<...>, 3]", tensors=[("[0]", 1)], others=[("[1]", "3")])
    later = Variable("pair", "[tensor<...>, 4]", pair.text, [("[0]", 1)], [("[1]", "4")])
    executed = walk(make_line(0, at(15), pair), make_line(1, at(16), later))
    values = {v.name: (v.text, v.was) for v in executed.variables(1)}
    assert values["pair[1]"] == ("4", "3")
    assert "pair[1] = 4" in note_text(executed.lines[1], executed)


# -- where the walk goes


def test_lines_are_walked_by_seq_whatever_their_order_in_the_log() -> None:
    executed = walk(*reversed(step_records(0)))
    assert numbers(executed, list(range(len(executed)))) == [
        14, 15, 5, 6, 7, 8, 7, 8, 7, 9, 10, 10, 16, 27, 28, 28,
    ]  # fmt: skip


def test_into_is_the_first_line_of_the_frame_that_the_line_called() -> None:
    executed = sample()
    assert executed.into(1) == 2
    assert executed.lines[2].what == "call"


@pytest.mark.parametrize("at", [0, 5, 12, 15])
def test_there_is_nothing_inside_a_line_that_called_nothing(at: int) -> None:
    assert sample().into(at) is None


@pytest.mark.parametrize("at", [2, 7, 11])
def test_out_is_the_line_that_called_wherever_one_is_in_the_function(at: int) -> None:
    assert sample().out(at) == 1


def test_there_is_nothing_around_the_outermost_frame() -> None:
    assert sample().out(0) is None
    assert sample().out(13) is None


def test_over_stays_in_the_frame() -> None:
    executed = sample()
    assert executed.over(1, 1) == 12
    assert executed.over(12, -1) == 1
    assert executed.over(2, -1) is None
    assert executed.over(11, 1) is None


def test_the_stack_leads_from_the_outermost_line_to_here() -> None:
    assert sample().stack(7) == [1, 7]


def test_a_record_belongs_to_the_line_that_was_running() -> None:
    executed = sample()
    assert executed.lines[executed.at_seq(2)].seq == 1  # the call that the line made
    assert executed.lines[executed.at_seq(8)].seq == 8
    assert executed.at_seq(None) == len(executed) - 1


def test_after_a_function_returned_what_follows_belongs_to_its_caller() -> None:
    # loss = criterion(model(x)): the criterion runs when the lines of the model are done.
    records: list[Record] = [
        make_line(0, at(15), held("loss", 1)),
        make_line(2, in_forward(5), what="call", frame=2, depth=1),
        make_line(3, in_forward(10), what="return", frame=2, depth=1),
        make_call(4, "criterion", location=at(15)),
    ]
    executed = walk(*records)
    assert executed.at_seq(4) == 0
    assert executed.at_seq(3) == 2


def test_the_next_execution_of_a_line_is_found_ahead_and_behind() -> None:
    executed = sample()
    assert executed.same_line(3, 8) == 5
    assert executed.same_line(5, 8) == 7
    assert executed.same_line(7, 8) is None
    assert executed.same_line(7, 8, -1) == 5
    assert executed.same_line(1, 8) is None  # another function


def test_recursion_has_a_frame_for_each_call() -> None:
    place = Location("f.py", 2, "f")
    executed = walk(*(make_line(i, place, frame=i, depth=i) for i in range(4)))
    assert [executed.into(i) for i in range(4)] == [1, 2, 3, None]
    assert [executed.out(i) for i in range(4)] == [None, 0, 1, 2]


def test_threads_do_not_mix() -> None:
    executed = walk(
        make_line(0, at(15)),
        make_line(1, in_forward(5), frame=1, depth=1, thread=7),
        make_line(2, in_forward(6), frame=2, depth=1),
        make_line(3, in_forward(7), frame=1, depth=1, thread=7),
    )
    assert executed.into(0) == 2
    assert executed.out(1) is None
    assert executed.over(1, 1) == 3


def test_a_frame_whose_callers_were_not_recorded_stands_alone() -> None:
    executed = walk(make_line(0, at(15), depth=3, frame=0), make_line(1, at(16), depth=3, frame=0))
    assert executed.out(0) is None
    assert executed.over(0, 1) == 1


def test_an_empty_step_can_be_asked() -> None:
    executed = walk()
    assert len(executed) == 0
    assert executed.at_seq(3) == executed.at_seq(None) == 0


# -- variables


def values(executed: Executed, at: int) -> dict[str, tuple[str, int | None, bool]]:
    return {v.name: (v.text, v.tensor, v.changed) for v in executed.variables(at)}


def test_variables_are_what_the_frame_made_of_them_so_far() -> None:
    executed = sample()
    assert values(executed, 5) == {
        "x": ("tensor<...>", 2, True), "layer": ("<Linear 0>", None, False),
        "ids": ("tensor<...>", 0, False), "self": ("<Net>", None, False),
    }  # fmt: skip
    assert list(values(executed, 6)) == ["layer", "x", "self", "ids"]
    assert "x" not in values(executed, 12)


def test_a_changed_variable_knows_what_it_was() -> None:
    (layer, *_) = sample().variables(6)
    assert (layer.text, layer.was) == ("<Linear 1>", "<Linear 0>")
    (x, *_) = sample().variables(7)
    assert (x.tensor, x.before) == (3, 2)


def test_tensors_inside_a_value_are_variables_of_their_own() -> None:
    batch = Variable("batch", "{...}", tensors=[("['ids']", 1), ("['mask']", 2)])
    less = Variable("batch", "{...}", "{...}", tensors=[("['ids']", 3)])
    other = Variable("batches", "3")
    executed = walk(make_line(0, at(15), batch, other), make_line(1, at(16), less))
    assert list(values(executed, 0)) == ["batch['ids']", "batch['mask']", "batches"]
    # What is no longer in it is gone; a variable whose name begins alike stays.
    assert values(executed, 1) == {
        "batch['ids']": ("{...}", 3, True), "batches": ("3", None, False),
    }  # fmt: skip


def test_a_name_that_becomes_no_tensor_is_the_new_value_alone() -> None:
    executed = walk(
        make_line(0, at(15), Variable("x", "[...]", tensors=[("[0]", 1)])),
        make_line(1, at(16), Variable("x", "None", "[...]")),
    )
    assert values(executed, 1) == {"x": ("None", None, True)}


def test_what_a_frame_held_before_the_step_is_no_change() -> None:
    executed = walk(make_line(0, at(15), Variable("n", "3", "3"), Variable("k", "1"), what="call"))
    assert {v.name: v.changed for v in executed.variables(0)} == {"n": False, "k": True}


# -- lines made of calls


def calls_only() -> Executed:
    """Net runs at line 15: a Sequential with two layers at line 6, an op at 9; then the loss."""
    records: list[Record] = [
        make_call(0, None, op="rand", location=at(15), outputs=[("output", 0)]),
        make_call(1, "", location=at(15), outputs=[("output", 4)]),
        make_call(2, "body", parent=1, location=in_forward(6), outputs=[("output", 2)]),
        make_call(3, "body.0", parent=2, location=in_forward(6), outputs=[("output", 1)]),
        make_call(4, "body.1", parent=2, location=in_forward(6), outputs=[("output", 2)]),
        make_call(5, "", parent=1, op="norm", location=in_forward(9), outputs=[("output", 3)]),
        make_call(6, None, op="mean", location=at(15), outputs=[("output", 5)],
                  tensors=[make_tensor(i, 4) for i in range(6)]),
        Action(step=0, seq=7, action="loss", tensor=5, location=at(27)),
        make_call(8, "", phase="backward", forward=1, location=at(15)),
        make_call(9, "", replay=True, location=at(15)),
        Optimizer(step=0, seq=10, index=0, cls="SGD", location=at(28)),
    ]  # fmt: skip
    return walk(*records, modules={"": Module(step=0, path="", cls="Net")})


def test_without_lines_the_lines_that_made_calls_are_walked() -> None:
    executed = calls_only()
    assert not executed.recorded
    assert numbers(executed, list(range(len(executed)))) == [15, 6, 9, 27, 28]
    assert [v.name for v in executed.lines[0].changed] == ["rand", "Net", "mean"]
    assert [v.name for v in executed.lines[1].changed] == ["body"]


def test_without_lines_one_goes_into_a_module_and_out_again() -> None:
    executed = calls_only()
    assert executed.into(0) == 1
    assert executed.out(2) == 0
    assert executed.over(1, 1) == 2
    assert executed.over(0, 1) == 3


def test_without_lines_each_call_leads_to_its_line() -> None:
    executed = calls_only()
    found = {seq: executed.lines[executed.at_seq(seq)].location.line for seq in range(8)}
    assert found == {0: 15, 1: 15, 2: 6, 3: 6, 4: 6, 5: 9, 6: 15, 7: 27}


def test_without_lines_what_has_no_tensor_is_named_once() -> None:
    executed = walk(
        make_call(0, "body", location=at(6)),
        make_call(1, "head", location=at(7), exception="ValueError"),
        Action(step=0, seq=2, action="loss", tensor=5, location=at(8), detail={"value": 2.25}),
        modules={"": Module(step=0, path="", cls="Net")},
    )
    assert [note_text(line, executed) for line in executed.lines] == [
        "body", "head = raised ValueError", "loss = 2.25",
    ]  # fmt: skip


def with_replay() -> Executed:
    """Net runs at line 15; its line 6 calls a layer, 8 is ops alone, 9 calls another layer.

    A replay repeats all of it from seq 20 on: an op of the first layer, the ops of lines 8 and 9,
    an op of the second layer, and back again.
    """
    again: dict[str, Any] = {"replay": True}
    records: list[Record] = [
        make_call(1, "", location=at(15)),
        make_call(2, "a", parent=1, location=in_forward(6)),
        make_call(3, "b", parent=1, location=in_forward(9)),
        make_call(4, "", phase="backward", forward=1),
        Action(step=0, seq=5, action="clip", location=at(27)),
        make_call(20, "a", op="linear", parent=2, location=in_forward(6), **again),
        make_call(21, "", op="mul", parent=1, location=in_forward(8), **again),
        make_call(22, "", op="exp", parent=1, location=in_forward(9), **again),
        make_call(23, "b", op="log", parent=3, location=at(3, "b.forward"), **again),
        make_call(24, "b", op="log", parent=3, forward=23, phase="backward", **again),
        make_call(25, "b", op="sub", parent=99, location=at(4, "b.forward"), **again),
    ]
    return walk(*records)


def test_what_a_replay_repeated_is_walked_where_it_ran() -> None:
    executed = with_replay()
    assert numbers(executed, list(range(len(executed)))) == [15, 6, 8, 9, 3, 27]
    # A line that ran in the step itself is known by its own record.
    assert [line.seq for line in executed.lines] == [1, 2, 21, 3, 23, 5]
    assert [v.name for v in executed.lines[3].changed] == ["exp", "b"]
    assert numbers(executed, list(executed.stack(4))) == [15, 9, 3]
    assert numbers(executed, [executed.over(2, 1), executed.over(2, -1)]) == [9, 6]


def test_replayed_calls_and_gradients_lead_to_the_line_that_they_repeat() -> None:
    executed = with_replay()
    found = {seq: executed.lines[executed.at_seq(seq)].location.line for seq in range(20, 25)}
    assert found == {20: 6, 21: 8, 22: 9, 23: 3, 24: 3}


def test_what_ran_in_the_step_belongs_to_no_line_of_a_replay() -> None:
    executed = with_replay()
    assert numbers(executed, [executed.at_seq(seq) for seq in (4, 6, 30)]) == [9, 27, 27]


def test_a_replay_leads_to_the_recorded_line_that_it_repeats() -> None:
    records: list[Record] = [
        make_line(0, at(15), held("logits", 4)),
        make_call(1, "", location=at(15)),
        make_line(2, in_forward(5), what="call", frame=2, depth=1),
        make_line(3, in_forward(6), held("x", 1), frame=2, depth=1),
        make_call(4, "a", parent=1, location=in_forward(6)),
        make_line(5, in_forward(9), held("x", 2), frame=2, depth=1),
        make_line(6, at(27)),
        make_call(20, "", op="mul", parent=1, location=in_forward(9), replay=True),
        make_call(21, "a", op="log", parent=4, location=at(3, "a.forward"), replay=True),
        make_call(22, "a", op="log", parent=4, forward=21, phase="backward", replay=True),
        make_call(23, "a", op="log", replay=True),
    ]
    executed = walk(*records)
    assert numbers(executed, [executed.at_seq(seq) for seq in (20, 21, 22)]) == [9, 6, 6]
    assert executed.recorded
    assert len(executed) == 5


# -- the source pane

SOURCE = make_sources()[1]


def pane(executed: Executed, here: int, width: int = 90, **options: Any) -> list[str]:
    function = function_at(executed, here, SOURCE)
    told = beside_lines(executed, here, options.pop("findings", []))
    number = executed.lines[here].location.line
    return [
        text(source_line(row, told.get(row[0]), executed, width, current=row[0] == number,
                         longest=30, **options)).rstrip()
        for row in function.rows
    ]  # fmt: skip


def test_the_source_shows_where_one_is_how_often_lines_ran_and_what_they_made() -> None:
    assert pane(sample(), 6) == [
        "      5      def forward(self, ids):         ids [8, 128] i64",
        "      6          x = self.embed(ids)         x [8, 128, 64] f32",
        "▶     7   2x     for layer in self.layers:   layer = <Linear 1>",
        "      8              x = layer(x)            x [8, 128, 64] f32",
        "      9          scale = 1 / x.norm()        scale = 0.5",
        "     10          return x * scale",
    ]


def test_what_runs_only_later_is_faint() -> None:
    executed = sample()
    told = beside_lines(executed, 3, [])
    assert [told[n].ahead for n in (5, 6, 7, 9)] == [False, False, True, True]
    pieces = source_line((9, "x"), told[9], executed, 90, current=False, longest=10)
    assert pieces[-1][1] == "faint"


def test_a_line_that_made_a_nan_and_one_with_a_finding_have_a_sign() -> None:
    rows = pane(
        sample(1), 11, findings=[make_found(step=1, severity="warning", location=in_forward(6))]
    )
    assert rows[1].startswith(" !    6")
    assert rows[3].startswith(" x    8   4x ")
    assert rows[3].endswith("x [8, 128, 64] f32 x nan")
    assert rows[5].endswith("return [8, 128, 64] f32 x nan")


def test_without_a_stored_function_the_lines_that_ran_are_shown() -> None:
    executed = walk(
        make_line(0, Location("m.py", 7, "f", "  b = 2")), make_line(1, Location("m.py", 3, "f"))
    )
    assert function_at(executed, 0, None).rows == [(3, ""), (7, "b = 2")]


def test_code_gives_way_only_as_far_as_it_must() -> None:
    executed = walk(make_line(0, at(15), Variable("n", "3")))
    told = beside_lines(executed, 0, [])[15]
    long = "abcdefghij" * 4
    wide = text(source_line((15, long), told, executed, 80, current=True, longest=20))
    assert long in wide
    assert wide.rstrip().endswith("n = 3")
    narrow = text(source_line((15, long), told, executed, 40, current=True, longest=20))
    assert len(narrow) == 40


@pytest.mark.parametrize("width", [40, 60, 90, 200])
def test_a_line_can_be_read_to_its_end(width: int) -> None:
    code = "    " + " + ".join(f"wide({i}, 日本)" for i in range(20)) + "  # THE_END"
    values = ", ".join(f"'key{i}': {i}" for i in range(5)) + "}"
    line = make_line(0, at(15), Variable("settings", "{" + values))
    told = beside_lines(walk(line), 0, [])[15]
    lines = whole_lines((15, code), told, walk(line), width, current=True, longest=40)
    assert len(lines) > 1
    assert all(cell_len(text(part)) <= width - 1 for part in lines)
    assert all(not text(part)[:13].strip() for part in lines)
    marked = " ".join("".join(t.strip() for t, style in part if style == "mark") for part in lines)
    assert marked.replace(" ", "") == code.replace(" ", "")
    noted = " ".join(t for part in lines for t, style in part if style == "ok")
    assert not noted or noted.replace("  ", " ").endswith("'key4': 4}")


def test_the_title_says_the_way_from_the_outermost_function() -> None:
    assert title_of(sample(), 5, 80) == "train_step > Net.forward, line 8, 900 µs (6 of 16)"
    assert title_of(sample(), 11, 80).startswith("train_step > Net.forward, line 10, returns")


def test_a_title_without_room_leaves_the_outermost_functions_out() -> None:
    walked = with_replay()
    titles = [
        "train_step > Net.forward > b.forward, line 3 (5 of 6 of those that made calls)",
        "train_step > Net.forward > b.forward, line 3 (5 of 6)",
        "~ > Net.forward > b.forward, line 3 (5 of 6)",
        "~ > b.forward, line 3 (5 of 6)",
    ]
    for longer, title in zip([None, *titles], [*titles, titles[-1]], strict=True):
        width = 200 if longer is None else len(longer) - 1
        assert title_of(walked, 4, width, ASCII) == title


# -- the pane of variables


def variable_lines(executed: Executed, at: int, **options: Any) -> list[str]:
    items = items_at(executed, at, options.pop("findings", []), 70)
    wide = name_width(items, 72)
    return [text(item_line(item, executed, wide, 72, **options)).rstrip() for item in items]


def test_variables_have_shape_dtype_health_and_where_their_values_lie() -> None:
    assert variable_lines(sample(1), 7) == [
        "x the first NaN or infinity of this step",
        "2 executions before it were not recorded",
        "* x     [8, 128, 64] f32  x nan  -1..1 mean 0",
        "  layer <Linear 1>",
        "  self  <Net>",
        "  ids   [8, 128] i64  . ok  -1..1 mean 0",
    ]


@pytest.mark.parametrize("width", [30, 60, 100])
def test_a_long_value_can_be_read_to_its_end(width: int) -> None:
    long = "{" + ", ".join(f"'key {i}': {i}" for i in range(20)) + "}"
    executed = walk(make_line(0, at(15), Variable("settings", long, "None")))
    item = items_at(executed, 0, [], width)[0]
    lines = [text(line) for line in whole_item(item, executed, 8, width)]
    assert all(cell_len(line) <= width for line in lines)
    assert lines[0].startswith("* settings None → {'key 0': 0,")
    assert " ".join(line.strip() for line in lines).endswith("'key 19': 19}")
    assert len(lines) > 1
    tensor = items_at(sample(), 3, [], width)[0]
    assert len(whole_item(tensor, sample(), 8, width)) == 1


def test_a_changed_value_shows_what_it_was() -> None:
    assert variable_lines(sample(), 6)[0] == "* layer <Linear 0> → <Linear 1>"
    assert variable_lines(sample(), 6, glyphs=ASCII)[0] == "* layer <Linear 0> -> <Linear 1>"


def test_a_tensor_of_another_shape_or_dtype_shows_what_it_was() -> None:
    one, other = make_tensor(1, 8, 64), make_tensor(2, 8, 10, dtype="bfloat16")
    assert tensor_text(other, one) == "[8, 64] f32 → [8, 10] bf16"
    assert tensor_text(one, one) == tensor_text(one, None) == "[8, 64] f32"


def test_what_is_wrong_comes_first_then_what_is_returned() -> None:
    line = make_line(
        0, at(15), what="return", value=held("return", 1), flags=["nonfinite", "broadcast"],
        tensors=[make_tensor(1, mean=2.5)], passed_over=3,
    )  # fmt: skip
    told = variable_lines(walk(line), 0, findings=[make_found(step=0)])
    assert told[0].startswith("x TT101 layers.1 made 64 NaN")
    assert "x the first NaN or infinity of this step" in told
    assert "! shapes were broadcast" in told
    assert "* return [] f32  . ok  = 2.5" in told
    assert "3 executions before it were not recorded" in told


def test_an_exception_is_told_as_one() -> None:
    line = make_line(0, at(15), what="exception", value=Variable("exception", "ValueError: no"))
    assert variable_lines(walk(line), 0) == ["x raised ValueError: no"]


def hostile(payload: str) -> list[Line]:
    place = Location(payload, 3, payload, payload)
    inner = Variable(payload, payload, payload, tensors=[(payload, 1)])
    tensors: list[Tensor] = [make_tensor(1, 2, dtype=payload, device=payload)]
    return [
        make_line(0, place, Variable(payload, payload, "x"), inner, tensors=tensors),
        make_line(1, place, what="exception", value=Variable(payload, payload)),
        make_line(2, place, what="return", value=Variable(payload, payload)),
    ]


@pytest.mark.parametrize("payload", PAYLOADS)
@pytest.mark.parametrize("width", [8, 30, 200])
def test_hostile_strings_are_escaped_and_stay_within_the_width(payload: str, width: int) -> None:
    executed = walk(*hostile(payload))
    finding = make_found(step=0, code=payload, message=payload, location=executed.lines[0].location)
    for here in range(len(executed)):
        told = beside_lines(executed, here, [finding])
        lines = [
            text(source_line((3, payload), told.get(3), executed, width, current=True, longest=9)),
            note_text(executed.lines[here], executed),
        ]
        items = items_at(executed, here, [finding], width)
        lines += [
            text(item_line(item, executed, name_width(items, width), width)) for item in items
        ]
        assert not set("".join(lines)) & FORBIDDEN

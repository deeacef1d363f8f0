from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from tensortrace.errors import UsageError
from tensortrace.export.flows import Flow, FunctionFlow, bad_text, flow_text, grouped
from tensortrace.export.lines import Listing, gather_lines
from tensortrace.export.lines_json import render_lines_json
from tensortrace.export.lines_reader import MOST_LINES, MOST_NAMES
from tensortrace.export.lines_text import render_lines
from tensortrace.records import Action, Location, Record, Source, Step, Variable
from tensortrace.run import open_run
from tensortrace.tui.views.executed import read_executed
from tensortrace.tui.views.source_lines import beside_lines, function_at, source_line
from tensortrace.tui.views.variables import item_line, items_at
from tests.builders import make_call, make_header, make_run, make_tensor
from tests.export.canonical import make_canonical, write_log
from tests.export.hostile import FORBIDDEN, PAYLOADS
from tests.export.listed import (
    FILE,
    at,
    held,
    in_forward,
    make_found,
    make_line,
    make_listed,
    make_plain,
    make_sources,
)
from tests.export.test_text import assert_golden


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Relative paths, so that a listing names them the same on every machine.
    monkeypatch.chdir(tmp_path)


def listing(*records: Record, **options: Any) -> Listing:
    return gather_lines(open_run(write_log(Path("log.jsonl"), make_run(records))), **options)


def text(*records: Record, width: int = 100, steps: range | None = None) -> str:
    return "".join(render_lines(listing(*records, steps=steps), width=width))


def function(found: Listing, name: str) -> FunctionFlow:
    return next(f for f in found.functions if f.name == name)


def flow(*shapes: tuple[int, ...], dtype: str = "float32") -> Flow:
    one = Flow("x")
    for step, shape in enumerate(shapes):
        one.add(make_tensor(0, *shape, dtype=dtype), step)
    return one


# -- shapes that change


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ([(8, 64)], "[8, 64] f32"),
        ([(8, 64)] * 5, "[8, 64] f32"),
        ([(8, 128, 64), (8, 97, 64)], "[8, 128→97, 64] f32"),
        ([(8, 128), (8, 97), (4, 128)], "[8→4, 128→97] f32"),
        ([(n, 2) for n in (5, 9, 7)], "[5→9→7, 2] f32"),
        ([(n, 2) for n in (5, 9, 7, 30, 1)], "[1..30, 2] f32"),
        ([(8, 64), (8,)], "[8, 64] f32 | [8] f32"),
        ([(2,) * n for n in (1, 2, 3, 4, 5)], "[2] f32 | [2, 2] f32 | [2, 2, 2] f32 | more"),
        ([()], "[] f32 = 0"),
        ([(0, 3)], "[0, 3] f32"),
    ],
)
def test_a_shape_shows_how_each_dim_changed(shapes: list[tuple[int, ...]], expected: str) -> None:
    assert flow_text(flow(*shapes)) == expected


def test_a_change_of_dtype_is_told_as_another_kind() -> None:
    one = flow((8, 4))
    one.add(make_tensor(1, 8, 4, dtype="bfloat16"), 1)
    assert flow_text(one) == "[8, 4] f32 | [8, 4] bf16"


def test_a_tensor_without_a_shape_is_a_question_mark() -> None:
    one = Flow("x")
    one.add(make_tensor(1, numel=7).__class__(id=1, numel=7, mean=None), 0)
    assert flow_text(one) == "[?] f32"


def test_a_tensor_of_one_element_shows_its_first_and_last_value() -> None:
    one = Flow("loss")
    for step, mean in enumerate((2.5, 9.0, 0.4125)):
        one.add(make_tensor(1, mean=mean), step)
    assert flow_text(one) == "[] f32 = 2.5→9→0.412"
    one.add(make_tensor(1, mean=0.5), 3)
    assert flow_text(one) == "[] f32 = 2.5→..→0.5 (0.412..9)"
    assert flow_text(one, "->") == "[] f32 = 2.5->..->0.5 (0.412..9)"


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        (["0", "1"], "0→1"),
        (["0", "1", "0"], "0→1→0"),
        (["7800.00001", "7800.00002", "7800.00003"], "7800"),
        (["0", "1", "2", "3"], "0→..→3"),
        (["0", "7", "2", "3"], "0→..→3 (0..7)"),
        (["'a'", "'b'", "'c'", "'d'"], "'a'→..→'d'"),
        (["a" * 20, "b" * 20, "c" * 20], f"{'a' * 20}→..→{'c' * 20}"),
    ],
)
def test_values_in_between_are_told_or_there_is_a_sign_that_there_were_some(
    said: list[str], expected: str
) -> None:
    one = Flow("x")
    for text in said:
        one.say(text, 0)
    assert flow_text(one) == f"= {expected}"


@pytest.mark.parametrize(
    ("text", "bad"),
    [
        ("nan", True), ("[0.5, nan]", True), ("{'x': nan}", True), ("'nan'", False),
        ("'a nan'", False), ("<nanny>", False), ("inf", False), ("torch.nan", False),
    ],
)  # fmt: skip
def test_a_nan_among_the_values_shows_whatever_came_after_it(text: str, bad: bool) -> None:
    one = Flow("x")
    for step, said in enumerate(["1.5", text, "2.5"]):
        one.say(said, step)
    assert bad_text(one) == ("x nan (step 1)" if bad else "")


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("4.072051048278809", "4.07"),
        ("0.5", "0.5"),
        ("1.5000e+30", "1.5e+30"),
        ("1" * 30, "11111111111…11111111111"),
    ],
)
def test_a_long_float_is_rounded(said: str, expected: str) -> None:
    one = Flow("x")
    one.say(said, 0)
    assert flow_text(one) == f"= {expected}"


def test_what_was_not_finite_is_told_with_its_first_step() -> None:
    one = Flow("x")
    for step, changes in enumerate(({}, {"neginf": 2}, {"nan": 1}, {"nan": 3})):
        one.add(make_tensor(1, 4, **changes), step)
    assert bad_text(one) == "x nan (step 2) x inf (step 1)"


def test_names_with_the_same_shape_are_told_together() -> None:
    flows = [flow((8, 4)), flow((8, 4)), flow((3,))]
    assert [(len(group), told) for group, told in grouped(flows)] == [
        (2, "[8, 4] f32"), (1, "[3] f32"),
    ]  # fmt: skip


# -- golden text


def test_the_listing_of_a_run_with_lines() -> None:
    assert_golden("lines", text(*make_listed()))


def test_the_listing_at_60_columns() -> None:
    assert_golden("lines-narrow", text(*make_listed(), width=60))


def test_the_listing_of_one_step_in_ascii() -> None:
    found = listing(*make_listed(), steps=range(1, 2))
    assert_golden("lines-step", "".join(render_lines(found, plain=True)))


def test_the_listing_of_a_run_without_lines_shows_calls_and_how_to_get_lines() -> None:
    assert_golden("lines-calls", text(*make_plain()))


def test_the_listing_of_the_canonical_run() -> None:
    assert_golden("lines-canonical", text(*make_canonical()))


# -- what is counted


@pytest.mark.parametrize("line", [14, 15])
def test_a_function_is_called_at_its_decorator_or_its_def(line: int) -> None:
    source = Source(step=0, file=FILE, name="train_step", first_line=14,
                    text="@trace\ndef train_step():\n    x = 1\n    y = 2\n")  # fmt: skip
    # A step that begins within the function is no call of it.
    records = [make_line(0, at(line), what="call"), make_line(1, at(16), what="call")]
    assert function(listing(source, *records), "train_step").entered == 1


def test_executions_include_those_that_were_passed_over_and_their_time_is_estimated() -> None:
    line = function(listing(*make_listed()), "Net.forward").lines[8]
    # Two records a step, the second of which passed over two: 4 executions, 2 ms measured.
    assert (line.executions, line.recorded, line.host_ns) == (12, 6, 6_000_000)
    assert line.time_ns == 12_000_000
    assert "~12 ms" in text(*make_listed())


def test_shares_are_of_the_function_and_sum_to_all_of_it() -> None:
    whole = function(listing(*make_listed()), "train_step")
    assert sum(line.time_ns for line in whole.lines.values()) == whole.time_ns
    assert round(100 * whole.lines[27].time_ns / whole.time_ns) == 75


def test_only_the_steps_asked_for_are_read() -> None:
    found = listing(*make_listed(), steps=range(2, 10))
    assert found.whole == 1
    assert (
        flow_text(function(found, "train_step").lines[15].variables["logits"]) == "[8, 97, 64] f32"
    )


def test_functions_stand_in_order_of_their_first_line() -> None:
    assert [f.name for f in listing(*make_listed()).functions] == ["train_step", "Net.forward"]


def test_a_tensor_may_be_described_after_the_line_that_holds_it() -> None:
    # The logits are described by the call that the line made, which is a later record.
    assert "logits [8, 128→97, 64] f32" in text(*make_listed())


def test_a_tensor_that_nothing_describes_is_left_out() -> None:
    found = listing(make_line(0, at(15), held("x", 99)), Step(step=0, seq=1))
    assert function(found, "train_step").lines[15].variables["x"].kinds == {}


def test_an_id_means_another_tensor_in_another_step() -> None:
    records = [
        make_line(0, at(15), held("x", 1), tensors=[make_tensor(1, 2)]),
        make_line(0, at(15), held("x", 1), step=1),
    ]
    line = function(listing(*records), "train_step").lines[15]
    assert flow_text(line.variables["x"]) == "[2] f32"
    assert line.executions == 2


def test_what_a_frame_holds_when_a_step_begins_in_it_is_no_change() -> None:
    again = make_line(0, at(15), Variable("n", "3", "3"), Variable("k", "4"), what="call")
    line = function(listing(again), "train_step").lines[15]
    assert list(line.variables) == ["k"]


def test_a_return_of_nothing_and_an_address_are_no_news() -> None:
    records = [
        make_line(0, at(15), Variable("f", "<function f at 0x7f01>")),
        make_line(1, at(15), Variable("f", "<function f at 0x7f02>", "<function f at 0x7f01>")),
        make_line(2, at(15), what="return", value=Variable("return", "None")),
        make_line(3, at(16), what="return", value=Variable("yield", "3")),
    ]
    told = text(*records)
    assert "# f = <function f>\n" in told
    assert "return" not in told
    assert "# yield = 3" in told


def test_only_calls_of_the_line_itself_are_its_own() -> None:
    # `blocks` is a Sequential: what it calls stands at the same line of the user's.
    records = [
        make_call(1, "blocks", location=at(15), outputs=[("output", 1)],
                  tensors=[make_tensor(1, 2)], host_ns=5_000),
        make_call(2, "blocks.0", parent=1, location=at(15), outputs=[("output", 2)],
                  tensors=[make_tensor(2, 3)], host_ns=4_000),
    ]  # fmt: skip
    line = function(listing(*records), "train_step").lines[15]
    assert list(line.calls) == ["blocks"]
    assert (line.executions, line.host_ns) == (1, 5_000)


def test_a_replayed_or_recomputed_call_shows_its_shapes_and_is_not_counted() -> None:
    records = [
        make_call(i, "", op="log", location=at(15), outputs=[("output", i)],
                  tensors=[make_tensor(i, 2)], **{how: True})
        for i, how in enumerate(["replay", "recompute"])
    ]  # fmt: skip
    line = function(listing(*records), "train_step").lines[15]
    assert line.executions == 0
    assert flow_text(line.calls["log"]) == "[2] f32"


def test_calls_before_the_first_line_record_are_not_counted_as_executions() -> None:
    records = [make_call(0, "a", location=at(15)), make_line(1, at(16))]
    found = listing(*records)
    assert found.recorded
    assert function(found, "train_step").lines[15].executions == 0


def test_a_bad_gradient_is_told_at_the_line_of_its_forward() -> None:
    back = make_call(3, "fc", phase="backward", location=at(15), inputs=[("output[0]", 1)],
                     tensors=[make_tensor(1, 2, nan=1)])  # fmt: skip
    assert "x nan in a gradient (step 0)" in text(back)


def test_loss_and_gradient_norm_stand_at_their_lines() -> None:
    records = [
        Action(step=i, seq=1, action="loss", location=at(27), detail={"value": value})
        for i, value in enumerate((2.5, "NaN"))
    ]
    assert "loss = 2.5→NaN" in text(*records)


def test_flags_and_exceptions_are_told_below_the_line() -> None:
    records = [
        make_line(0, at(15), flags=["nonfinite", "broadcast"]),
        *(make_line(1 + i, at(16), what="exception",
                    value=Variable("exception", "ValueError: no\nmore")) for i in range(2)),
    ]  # fmt: skip
    told = text(*records)
    assert "x made the first NaN or infinity (step 0)" in told
    assert "! shapes were broadcast (step 0)" in told
    assert "x raised ValueError: no (2 times)" in told


def test_what_came_of_the_first_nan_in_later_steps_is_not_told_as_the_first() -> None:
    records = [make_line(1, at(17 - step), step=step, flags=["nonfinite"]) for step in (1, 2)]
    assert text(*records).count("made the first NaN or infinity (step 1)") == 1
    assert "(step 2)" not in text(*records)


def test_values_stand_in_the_order_in_which_the_lines_began_not_in_which_they_ended() -> None:
    told = text(
        make_line(5, at(15), Variable("x", "2"), nth=1), make_line(3, at(15), Variable("x", "1"))
    )
    assert "# x = 1→2" in told


def test_a_line_that_is_told_twice_in_one_execution_ran_once() -> None:
    records = [make_line(i, at(15), nth=i // 2, host_ns=10) for i in range(6)]
    line = listing(*records).functions[0].lines[15]
    assert (line.executions, line.recorded, line.host_ns) == (3, 3, 60)


def test_calls_that_were_passed_over_are_counted_and_said_to_be() -> None:
    source = make_sources()[0]
    records = [
        source,
        make_line(0, at(14), what="call"), make_line(1, at(15)),
        make_line(2, at(14), what="call", frame=2, passed_over=3), make_line(3, at(15), frame=2),
        make_line(9, at(14), what="call", frame=9, passed_over=4),
    ]  # fmt: skip
    assert "train_step  model.py:14  called 10 times, 2 of them recorded" in text(*records)


def test_what_a_call_made_that_is_not_finite_shows_although_the_line_has_variables() -> None:
    bad, good = make_tensor(1, 4, nan=2), make_tensor(2, 4)
    told = text(
        make_line(0, at(15), held("x", 2), tensors=[good]),
        make_call(1, op="div", location=at(15), outputs=[("output", 1)], tensors=[bad]),
    )
    assert "x [4] f32" in told
    assert "div [4] f32  x nan (step 0)" in told


def test_members_of_a_container_beside_its_tensors_are_told() -> None:
    pair = Variable("pair", "[tensor<...>, 3]", tensors=[("[0]", 1)], others=[("[1]", "3")])
    told = text(make_line(0, at(15), pair, tensors=[make_tensor(1, 4)]))
    assert "pair[0] [4] f32" in told
    assert "pair[1] = 3" in told


def test_the_first_nan_is_that_of_the_run_whatever_part_of_it_is_shown() -> None:
    run = open_run(write_log(Path("log.jsonl"), make_run([
        *make_sources(),
        make_line(0, in_forward(8), step=1, flags=["nonfinite"]),
        make_line(0, at(15), step=2, flags=["nonfinite"]),
        make_line(1, in_forward(6), step=2),
    ])))  # fmt: skip

    def told(**options: Any) -> str:
        return "".join(render_lines(gather_lines(run, **options)))

    elsewhere = "x the first NaN or infinity of the run was made elsewhere: Net.forward, model.py:8"
    assert elsewhere not in told()
    assert "x made the first NaN or infinity (step 1)" in told(function="forward")
    assert elsewhere + " (step 1)" in told(function="train_step").replace("\n", " ")
    assert "made the first" not in told(function="train_step")
    assert elsewhere + " (step 1)" in told(steps=range(2, 3)).replace("\n", " ")
    assert "x made the first NaN or infinity of step 2" in told(steps=range(2, 3))


def test_a_thinned_step_is_said_to_be_one_with_the_nearest_that_have_lines() -> None:
    header = make_header(options={"lines": True})
    full = [make_line(0, at(15), step=step) for step in (0, 10)]
    steps = [Step(step=step, seq=1, full=step in (0, 5, 10)) for step in range(12)]
    records = sorted([*full, *steps], key=lambda record: record.step)
    run = open_run(write_log(Path("log.jsonl"), [header, *records]))
    found = gather_lines(run, steps=range(4, 6))
    assert found.near == (0, 10)
    told = "".join(render_lines(found)).replace("\n", " ")
    assert "Steps 4 to 5: not recorded in full, so without lines." in told
    assert "The nearest steps that have them: 0 and 10." in told
    assert "every=1" in told
    assert "lines=True" not in told


def test_the_worst_finding_comes_first_and_signs_the_line() -> None:
    found = [
        make_found(id=str(i), step=0, code=f"TT{i}", severity=severity, location=at(15))
        for i, severity in enumerate(["note", "error", "warning"])
    ]
    told = text(*make_sources(), make_line(0, at(15)), *found)
    assert told.index("x TT1 error") < told.index("! TT2 warning") < told.index("i TT0 note")
    assert re.search(r"^x +15 ", told, re.M)


def test_a_finding_of_several_steps_is_told_once_with_the_first() -> None:
    found = [make_found(id=str(i), step=i, location=at(15)) for i in range(3)]
    assert "(step 0, and 2 more)" in text(*found)


# -- where text is missing


def test_without_source_the_code_of_the_location_stands_in() -> None:
    place = Location(FILE, 15, "train_step", "    logits = model(ids)")
    told = text(make_line(0, place, Variable("n", "3")))
    assert "15" in told
    assert "logits = model(ids)" in told


def test_without_any_text_the_line_number_stands_alone() -> None:
    assert re.search(r"^ +15 +1 +# n = 3$", text(make_line(0, at(15), Variable("n", "3"))), re.M)


def test_a_line_beyond_the_stored_text_is_listed_after_it() -> None:
    source = Source(step=0, file=FILE, name="train_step", first_line=14, text="def train_step():\n")
    assert re.search(r"^ +99 +1", text(source, make_line(0, at(99))), re.M)


def test_lines_of_a_comprehension_stand_in_the_function_around_it() -> None:
    inner = Location(FILE, 15, "train_step.<locals>.<listcomp>")
    found = listing(*make_sources(), make_line(0, at(15)), make_line(1, inner, Variable("n", "3")))
    assert [f.name for f in found.functions] == ["train_step"]
    line = found.functions[0].lines[15]
    assert line.executions == 1
    assert list(line.variables) == ["n"]


@pytest.mark.parametrize("name", ["<listcomp>", "train_step.<locals>.<lambda>.<locals>.<lambda>"])
def test_a_function_known_only_by_its_comprehension_has_its_text(name: str) -> None:
    whole = make_sources()[0]
    source = Source(step=0, file=FILE, name=name, first_line=whole.first_line, text=whole.text)
    records = [make_line(0, at(15)), make_line(1, Location(FILE, 16, name))]
    (found,) = listing(source, *records).functions
    assert (found.name, found.code(15), sorted(found.lines)) == (
        "train_step", "    logits = model(ids)", [15, 16],
    )  # fmt: skip


def test_a_nested_function_is_a_listing_of_its_own() -> None:
    outer = Source(
        step=0, file=FILE, name="f", first_line=1, text="def f():\n  def g():\n    pass\n"
    )
    inner = Source(
        step=0, file=FILE, name="f.<locals>.g", first_line=2, text="  def g():\n    pass\n"
    )
    records = [
        make_line(0, Location(FILE, 1, "f")),
        make_line(1, Location(FILE, 3, "f.<locals>.g")),
    ]
    found = listing(outer, inner, *records)
    assert [(f.name, list(f.lines)) for f in found.functions] == [("f", [1]), ("f.<locals>.g", [3])]


def test_two_functions_of_one_name_are_kept_apart() -> None:
    sources = [
        Source(step=0, file=FILE, name="f", first_line=n, text="def f():\n    pass\n")
        for n in (1, 9)
    ]
    records = [make_line(i, Location(FILE, n, "f")) for i, n in enumerate((2, 10))]
    found = listing(*sources, *records)
    assert [(f.first_line, list(f.lines)) for f in found.functions] == [(1, [2]), (9, [10])]


def test_an_empty_run_says_so() -> None:
    told = text()
    assert "no steps" in told
    assert "No line of a function of yours" in told


# -- choosing


@pytest.mark.parametrize("name", ["forward", "Net.forward", "*.forw*"])
def test_a_function_is_chosen_by_name_end_or_glob(name: str) -> None:
    assert [f.name for f in listing(*make_listed(), function=name).functions] == ["Net.forward"]


def test_a_wrong_name_is_refused_with_the_closest() -> None:
    with pytest.raises(UsageError, match=r"no function 'foward'.*Closest: Net\.forward"):
        listing(*make_listed(), function="foward")
    with pytest.raises(UsageError, match=r"It has: train_step, Net\.forward"):
        listing(*make_listed(), function="zzzzzz")


def test_a_step_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(UsageError, match=r"no step 7 in log\.jsonl: it has steps 0 to 2"):
        listing(*make_listed(), steps=range(7, 8))
    with pytest.raises(UsageError, match="no step 7 to 9"):
        listing(*make_listed(), steps=range(7, 10))


# -- how it is drawn


@pytest.mark.parametrize("width", [40, 59, 60, 71, 72, 80, 100, 200])
@pytest.mark.parametrize(
    "records", [make_listed(), make_plain(), make_canonical()], ids=["lines", "calls", "canonical"]
)
def test_no_line_is_wider_than_asked_for(width: int, records: list[Record]) -> None:
    assert max(map(len, text(*records, width=width).split("\n"))) <= width


def test_without_colour_there_is_no_escape_byte_and_with_it_the_words_are_the_same() -> None:
    found = listing(*make_listed())
    plain = "".join(render_lines(found))
    coloured = "".join(render_lines(found, colour=True))
    assert not FORBIDDEN.search(plain)
    assert "\x1b[1;31m" in coloured
    assert re.sub(r"\x1b\[[0-9;]*m", "", coloured).split() == plain.split()


def test_ascii_is_ascii() -> None:
    assert "".join(render_lines(listing(*make_listed()), plain=True)).isascii()


def hostile_records(payload: str) -> list[Record]:
    place = Location(f"{payload}.py", 2, payload, payload)
    return [
        make_header(cwd=payload, world_size=2),
        Source(step=0, file=f"{payload}.py", name=payload, first_line=1,
               text=f"def f():\n    {payload}\n    {payload}\n"),
        make_line(0, place, Variable(payload, payload, payload),
                  Variable("t", payload, tensors=[(payload, 1)]),
                  tensors=[make_tensor(1, 2, dtype=payload)]),
        make_line(1, place, value=Variable(payload, payload), what="exception"),
        make_line(2, Location(payload, 7, f"{payload}2", payload)),
        make_call(3, payload, location=Location(payload, 9, payload), outputs=[("output", 1)]),
        make_call(4, payload, op=payload, location=Location(payload, 9, payload)),
        make_found(step=0, code=payload, message=payload, location=place),
        Step(step=0, seq=9),
    ]  # fmt: skip


@pytest.mark.parametrize("payload", PAYLOADS.values(), ids=PAYLOADS)
def test_hostile_text_is_shown_and_never_obeyed(payload: str) -> None:
    found = listing(*hostile_records(payload))
    for width in (40, 4000):
        assert not FORBIDDEN.search("".join(render_lines(found, width=width)))
    coloured = "".join(render_lines(found, width=4000, colour=True))
    assert not FORBIDDEN.search(re.sub(r"\x1b\[[0-9;]*m", "", coloured))
    json.loads(render_lines_json(found))


def test_the_json_document_says_the_same() -> None:
    document = json.loads(render_lines_json(listing(*make_listed())))
    assert (document["recorded"], document["steps"], document["whole"]) == (True, [0, 2], 3)
    step, forward = document["functions"]
    assert (forward["name"], forward["called"]) == ("Net.forward", 3)
    line = next(line for line in step["lines"] if line["line"] == 15)
    assert line["code"] == "    logits = model(ids)"
    assert line["flows"] == [{
        "name": "logits", "first": None, "last": None, "values": [], "values_range": None,
        "tensors": [{"dtype": "float32", "shape": [8, [128, 97], 64],
                     "range": [[8, 8], [97, 128], [64, 64]]}],
        "bad": {"nan": {"step": 1, "count": 64, "numel": 65536}},
    }]  # fmt: skip
    bad = next(line for line in forward["lines"] if line["line"] == 8)
    assert [(f["code"], f["step"], f["count"]) for f in bad["findings"]] == [("TT101", 1, 1)]


# -- bounds


def test_names_beyond_a_bound_are_counted() -> None:
    changed = [Variable(f"v{i}", "1") for i in range(MOST_NAMES + 5)]
    line = function(listing(make_line(0, at(15), *changed)), "train_step").lines[15]
    assert (len(line.variables), line.unnamed) == (MOST_NAMES, 5)


def test_lines_beyond_a_bound_are_left_out() -> None:
    records = [make_line(i, Location(f"{i}.py", i, f"f{i}")) for i in range(MOST_LINES + 10)]
    assert len(listing(*records).functions) == MOST_LINES


def test_a_step_of_many_tensors_is_read_with_bounded_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tensortrace.export import lines_reader

    monkeypatch.setattr(lines_reader, "MOST_TENSORS", 10)
    reader = lines_reader.Reader({})
    for i in range(100):
        reader.feed(make_line(i, at(15), held("x", i), tensors=[make_tensor(i, i + 1)]))
        assert len(reader._tensors) <= 12
    (found,) = reader.finish()
    assert flow_text(found.lines[15].variables["x"]) == "[1..100] f32 = 0"


def test_each_step_that_was_read_is_told_for_progress() -> None:
    ticks: list[int] = []
    listing(*make_listed(), tick=ticks.append)
    assert ticks == [0, 1, 2]


def test_a_damaged_line_of_the_log_costs_that_line_only() -> None:
    log = write_log(Path("log.jsonl"), make_run(make_listed()))
    data = log.read_bytes().split(b"\n")
    data[9] = b'{"kind":"line","step":0,"seq":"what"}'
    log.write_bytes(b"\n".join(data))
    assert "Net.forward" in "".join(render_lines(gather_lines(open_run(log))))


STRANGE = [
    b"null", b"-1", b"0", b"99999999999999999999999", b"1e400", b'""', b'"x"', b"[]", b"{}",
    b"true", b"9007199254740992", b"-9223372036854775808", b'[["",1]]', b"1000000", b"[[1]]",
]  # fmt: skip
A_VALUE = re.compile(rb'"(?!kind")\w+":(-?\d+|"[^"]*"|\[[^\[\]]*\]|null|true|false)')


@pytest.mark.parametrize("seed", range(12))
def test_any_value_of_any_key_can_be_shown(seed: int) -> None:
    chance = random.Random(seed)
    log = write_log(Path("log.jsonl"), make_run(make_listed()))
    first, *lines = log.read_bytes().split(b"\n")
    for i, line in enumerate(lines):
        values = list(A_VALUE.finditer(line))
        if values and chance.random() < 0.5:
            at = chance.choice(values)
            lines[i] = line[: at.start(1)] + chance.choice(STRANGE) + line[at.end(1) :]
    log.write_bytes(b"\n".join([first, *lines]))
    run = open_run(log)
    found = gather_lines(run)
    for width in (40, 100):
        assert not FORBIDDEN.search("".join(render_lines(found, width=width)))
    json.loads(render_lines_json(found))
    for number in {*run.steps[:3], *run.steps[-3:]}:
        executed = read_executed(run.step(number).records, run.modules)
        for at_line in range(len(executed)):
            assert executed.stack(at_line)[-1] == at_line
            executed.into(at_line)
            for row in function_at(executed, at_line, None).rows[:20]:
                told = beside_lines(executed, at_line, run.findings).get(row[0])
                source_line(row, told, executed, 80, current=True, longest=30)
            for item in items_at(executed, at_line, run.findings, 80):
                item_line(item, executed, 9, 80)

from __future__ import annotations

import pytest

from tensortrace.records import Call
from tests.checks import brief, closing, find, loss, nan, ok, op, optimizer


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity"])
def test_a_loss_that_nothing_explains_is_an_error_at_the_gate(value):
    (found,) = find([loss(1, value), optimizer()])
    assert brief([found]) == [("TT103", "error", None)]
    assert (found.value, found.seq) == (value, 1)
    assert value in found.message


@pytest.mark.parametrize("value", [0.0, 3.4e38, -1.0, None])
def test_a_finite_or_absent_loss_is_silent(value):
    assert find([loss(1, value), optimizer(), closing()], "TT103") == []


def test_the_trail_back_from_the_loss_names_where_it_ends():
    records = [op(1, "full", [], [2], [nan(2)]), op(2, "mul", [2], [3], [nan(3)])]
    (found,) = find([*records, loss(3, "NaN", 3), optimizer()])
    assert brief([found]) == [("TT103", "error", "full")]
    assert [link.op for link in found.chain] == ["full", "mul"]


def test_the_trail_is_followed_to_its_end_and_shown_from_there():
    through = [op(n, "mul", [n], [n + 1], [nan(n + 1)]) for n in range(2, 40)]
    records = [op(1, "full", [], [2], [nan(2)]), *through, loss(40, "NaN", 40), optimizer()]
    (found,) = find(records)
    assert brief([found]) == [("TT103", "error", "full")]
    assert [link.op for link in found.chain] == ["full", *["mul"] * 7]


def test_micro_batches_that_spoil_the_loss_alike_are_one_finding_in_a_log_without_their_calls():
    first = [op(1, "sqrt", [1], [2], [ok(1), nan(2)]), loss(3, "NaN", 2), closing()]
    again = [record for step in (1, 2)
             for record in (loss(1, "NaN", step=step), optimizer(step=step, skipped=True),
                            closing(step, full=False, repeats={"TT101-1": 1}))]  # fmt: skip
    assert [(f.code, f.step) for f in find([*first, *again])] == [("TT101", 0)]
    other = [loss(1, "NaN", step=1), optimizer(step=1, skipped=True), closing(1, full=False)]
    found = find([*first, *other])
    assert [(f.code, f.step) for f in found] == [("TT101", 0), ("TT103", 1)]


def test_a_loss_that_is_bad_again_steps_later_follows_from_what_its_step_line_repeats():
    first = [op(1, "log", [1], [2], [ok(1), nan(2)]), loss(3, "NaN", 2), closing()]
    clean = [loss(1, 0.5, step=1), optimizer(step=1), closing(1, full=False)]
    again = [loss(1, "NaN", step=2), optimizer(step=2),
             closing(2, full=False, repeats={"TT101-1": 2})]  # fmt: skip
    assert [(f.code, f.step) for f in find([*first, *clean, *again])] == [("TT101", 0)]
    # Without a gate it was counted after its line, for a next one that never came.
    last = [loss(1, "NaN", step=3), closing(3, full=False)]
    assert [(f.code, f.step) for f in find([*first, *clean, *again, *last])] == [("TT101", 0)]


def test_the_gradients_of_a_bad_loss_follow_from_it():
    weight = Call(step=0, seq=4, phase="backward", module="a", outputs=[("weight", 9)],
                  tensors=[nan(9)])  # fmt: skip
    records = [op(1, "full", [], [2], [nan(2)]), loss(3, "NaN", 2), weight]
    assert [f.code for f in find([*records, optimizer(grad_norm="NaN")])] == ["TT103"]


def test_a_forward_finding_explains_it_also_when_that_is_only_met_again():
    steps = [
        record
        for s in range(3)
        for record in (
            op(1, "log", [1], [2], [ok(1), nan(2)], step=s), loss(2, "NaN", 2, step=s), closing(s)
        )
    ]  # fmt: skip
    assert [f.code for f in find(steps)] == ["TT101"]


def test_it_is_told_once_and_not_again_at_the_end_of_the_step():
    assert len(find([loss(1, "NaN"), optimizer(), closing()], "TT103")) == 1

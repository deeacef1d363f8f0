"""Where a row leads along the data flow, without a screen."""

from __future__ import annotations

from pathlib import Path

import pytest

from tensortrace.records import Action, Call, Param, Record, Step
from tensortrace.run import StepRecords, open_run
from tensortrace.tui.step.flow import Flow, Way, counterparts, sources, uses
from tests.builders import make_call, make_tensor, write_log
from tests.tui.nets import make_op_run


@pytest.fixture
def step(tmp_path: Path) -> StepRecords:
    return make_op_run(tmp_path).step(2)


def at(step: StepRecords, seq: int) -> Record:
    return next(r for r in step.records if getattr(r, "seq", None) == seq)


def told(way: Way) -> list[tuple[int | None, str]]:
    return [(link.seq, link.label) for link in way.links]


def test_the_flow_agrees_with_the_columns_of_the_step(step: StepRecords) -> None:
    # The oracle: the data flow that the reader keeps of small steps.
    for call in step.calls:
        if call.phase == "forward":
            made = {p.seq for _, i in call.inputs if (p := step.producer(i)) and p != call}
            assert {seq for seq, _ in told(sources(call, Flow(step)))} == made
            given = {c.seq for _, i in call.outputs for c in step.consumers(i)} - {call.seq}
            found = {s for s, _ in told(uses(call, Flow(step))) if s != 8}
            assert found <= given
            # What is left out encloses a call that was given the same.
            assert given - found <= {c.parent for c in step.calls if c.seq in found}


def test_an_input_leads_to_the_innermost_call_that_made_it(step: StepRecords) -> None:
    assert told(sources(at(step, 4), Flow(step))) == [(3, "input")]
    assert told(sources(at(step, 5), Flow(step))) == [(3, "input, other")]
    assert told(sources(at(step, 7), Flow(step))) == [(3, "target"), (6, "input")]


def test_an_input_that_nothing_made_says_where_it_is_from(step: StepRecords) -> None:
    way = sources(at(step, 3), Flow(step))
    assert told(way) == []
    assert "nothing in this step made weight: it came from step 1" in way.why
    assert "nothing in this step made input" in way.why
    assert "not recorded" in sources(make_call(50, "b", parent=1, inputs=[("input", 99)]),
                                     Flow(step)).why  # fmt: skip


def test_an_output_leads_to_the_innermost_calls_that_were_given_it(step: StepRecords) -> None:
    assert told(uses(at(step, 2), Flow(step))) == [(5, "output"), (7, "output")]
    assert told(uses(at(step, 6), Flow(step))) == [(7, "output")]
    assert told(uses(at(step, 7), Flow(step))) == [(8, "output")]


def test_gradients_are_followed_through_the_calls_of_the_forward_pass(step: StepRecords) -> None:
    assert told(sources(at(step, 12), Flow(step))) == [(9, "output")]
    assert told(sources(at(step, 13), Flow(step))) == [(12, "output")]
    assert told(uses(at(step, 12), Flow(step))) == [(13, "input")]
    assert told(uses(at(step, 13), Flow(step))) == [(15, "input, other")]


def test_a_call_and_its_gradient_lead_to_each_other(step: StepRecords) -> None:
    assert told(counterparts(at(step, 6), Flow(step))) == [(12, "gradient")]
    assert told(counterparts(at(step, 12), Flow(step))) == [(6, "forward")]
    assert told(counterparts(at(step, 4), Flow(step))) == [(11, "gradient")]
    assert told(counterparts(at(step, 16), Flow(step))) == [(2, "forward")]


def test_a_parameter_leads_to_its_gradient(step: StepRecords) -> None:
    param = at(step, 43)
    assert isinstance(param, Param)
    assert told(counterparts(param, Flow(step))) == [(16, "gradient")]
    assert told(uses(at(step, 16), Flow(step)))[0][0] == 43


def test_no_counterpart_is_said(step: StepRecords) -> None:
    call = make_call(60, "c")
    assert counterparts(call, Flow(step)).why == "no gradient came back to this call in this step"
    lost = make_call(61, "c", phase="backward", forward=59)
    assert "#59 is not in this step" in counterparts(lost, Flow(step)).why
    assert uses(make_call(1, outputs=[("y", 77)]), Flow(step)).why == "nothing in this step used y"
    assert sources(None, Flow(step)).why == "nothing goes into this row"


def test_what_ops_inside_a_module_used_is_said_to_be_unrecorded(tmp_path: Path) -> None:
    from tensortrace.run import open_run

    run = open_run(write_log(tmp_path / "log.jsonl", [
        make_call(1, "", outputs=[("output", 9)]),
        make_call(2, "a", parent=1, outputs=[("output", 2)]),
        make_call(3, "b", parent=1, op="relu", outputs=[("output", 3)], step=1),
        make_call(4, "c", parent=1, outputs=[("output", 4)], step=1),
    ]))  # fmt: skip
    held, kept = run.step(0), run.step(1)
    way = uses(at(held, 2), Flow(held))
    assert "no recorded call used output" in way.why
    assert "ops inside modules are not recorded" in way.why
    assert uses(at(kept, 4), Flow(kept)).why == "nothing in this step used output"


def test_a_view_that_no_call_made_leads_to_the_maker_of_its_base(tmp_path: Path) -> None:
    from tensortrace.run import open_run

    base, view = make_tensor(1, 4), make_tensor(2, 2, view_of=1)
    run = open_run(write_log(tmp_path / "log.jsonl", [
        make_call(1, "a", outputs=[("output", 1)], tensors=[base]),
        make_call(2, "b", inputs=[("input", 2)], tensors=[view]),
    ]))  # fmt: skip
    user = run.step(0).calls[1]
    assert isinstance(user, Call)
    assert told(sources(user, Flow(run.step(0)))) == [(1, "input")]


def test_a_question_that_is_given_up_ends(step: StepRecords) -> None:
    assert Flow(step, lambda: True).about([3]) == []


@pytest.mark.parametrize(
    ("full", "calls", "gap"),
    [
        (True, 2, ""),
        (False, 2, "not all calls of this step were kept: "),
        (False, 0, "the calls of this step were not kept: "),
    ],
)
def test_a_thin_step_does_not_claim_that_no_call_made_or_used_a_tensor(
    tmp_path: Path, full: bool, calls: int, gap: str
) -> None:
    loss = Action(step=0, seq=3, action="loss", tensor=9)
    made = [make_call(1, "a", outputs=[("y", 1)]), make_call(2, "b", inputs=[("x", 2)])][:calls]
    closing = Step(step=0, seq=4, update=1, full=full, dropped=0 if full else 7)
    held = open_run(write_log(tmp_path / "log.jsonl", [*made, loss, closing])).step(0)
    whys = [sources(loss, Flow(held)).why, uses(loss, Flow(held)).why]
    if gap:
        assert whys == [f"{gap}what made loss is not known", f"{gap}what used loss is not known"]
        assert counterparts(make_call(1, "a"), Flow(held)).why == f"{gap}its gradient is not known"
        back = make_call(9, "a", phase="backward", forward=1, inputs=[("y", 5)])
        assert sources(back, Flow(held)).why == f"{gap}what passed on y is not known"
    else:
        assert whys == ["nothing in this step made loss: it came from outside",
                        "nothing in this step used loss"]  # fmt: skip

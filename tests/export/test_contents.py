from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from msgspec import structs

from tensortrace.checks import Check, Draft, StepView, check
from tensortrace.errors import UsageError
from tensortrace.export.contents import (
    found_again,
    gather,
    in_order_of_cause,
    logged,
    matches,
    order_of_cause,
    shown_path,
)
from tensortrace.export.html import render_page
from tensortrace.export.text import render_report
from tensortrace.records import Module, Record, Step
from tensortrace.run import Run, open_run
from tests.builders import make_call, make_run
from tests.export.canonical import (
    make_calls,
    make_canonical,
    make_finding,
    make_param,
    make_step,
    write_log,
)


def make(tmp_path: Path, *records: Record) -> Run:
    return open_run(write_log(tmp_path / "log.jsonl", make_run(records)))


def test_the_order_is_first_nonfinite_then_severity_then_step_and_seq() -> None:
    expected = [
        make_finding(id="first nan", code="TT102", step=3, seq=1),
        make_finding(id="later nan", code="TT101", step=3, seq=2),
        make_finding(id="nan warning", code="TT104", step=4, seq=1, severity="warning"),
        make_finding(id="error", code="TT801", step=1, seq=9),
        make_finding(id="warning", code="TT202", step=0, seq=None, severity="warning"),
        make_finding(id="later warning", code="TT201", step=0, seq=5, severity="warning"),
        make_finding(id="benign nan", code="TT101", step=0, seq=0, severity="note"),
    ]
    shuffled = [expected[i] for i in (3, 6, 0, 5, 2, 4, 1)]
    got = sorted(shuffled, key=order_of_cause)
    assert [finding.id for finding in got] == [finding.id for finding in expected]


def test_what_grew_before_the_first_nan_comes_before_it() -> None:
    expected = [
        make_finding(id="inputs", code="TT601", step=2, seq=1, severity="warning"),
        make_finding(id="not cleared", code="TT206", step=3, seq=1),
        make_finding(id="exploding", code="TT201", step=16, seq=1, severity="warning"),
        make_finding(id="nan", code="TT101", step=17, seq=1),
        make_finding(id="afterwards", code="TT401", step=20, seq=1),
        make_finding(id="note", code="TT305", step=0, seq=1, severity="note"),
    ]
    shuffled = [expected[i] for i in (3, 5, 0, 4, 2, 1)]
    assert [f.id for f in in_order_of_cause(shuffled)] == [f.id for f in expected]


@pytest.mark.parametrize(
    ("code", "step"), [("TT704", 2), ("TT201", 17), ("TT601", 20)], ids=["other", "same", "later"]
)
def test_a_nan_that_nothing_led_up_to_comes_first(code: str, step: int) -> None:
    nan = make_finding(id="nan", code="TT101", step=17, seq=1)
    other = make_finding(id="other", code=code, step=step, seq=9, severity="warning")
    assert in_order_of_cause([other, nan]) == [nan, other]


def test_repeats_are_counted_in_later_steps_once_each(tmp_path: Path) -> None:
    run = make(
        tmp_path, make_finding(step=0), make_step(0, repeats={"TT101-1": 7}),
        make_step(1, repeats={"TT101-1": 3}), make_step(2), make_step(3, repeats={"TT101-1": 1}),
    )  # fmt: skip
    assert logged(run).later == {"TT101-1": 2}


def test_without_a_finding_the_last_whole_step_is_shown(tmp_path: Path) -> None:
    run = make(tmp_path, *make_calls(0), make_step(0), *make_calls(2), make_step(2),
               make_step(3, full=False))  # fmt: skip
    assert gather([run]).step == 2


def validated(step: int, **changes: Any) -> Step:
    """A step line without gradients and updates."""
    whole = make_step(step, **changes)
    nothing: list[float | None] = [None] * len(whole.modules.path)
    columns = structs.replace(whole.modules, param_grad_rms=nothing, update_ratio=nothing)
    return structs.replace(whole, modules=columns)


@pytest.mark.parametrize("after", [1, 250])
def test_without_a_finding_a_step_with_an_update_is_shown_before_validation(
    tmp_path: Path, after: int
) -> None:
    training = [record for n in (0, 1) for record in (*make_calls(n), make_step(n))]
    rest = [record for n in range(2, 2 + after) for record in (*make_calls(n)[:1], validated(n))]
    run = make(tmp_path, *training, *rest)
    assert gather([run]).step == 1


def test_without_any_update_the_last_whole_step_is_shown(tmp_path: Path) -> None:
    steps = [record for n in range(150) for record in (*make_calls(n)[:1], validated(n))]
    assert gather([make(tmp_path, *steps)]).step == 149


def test_a_step_that_updated_what_ran_in_it_is_shown_before_one_that_updated_others(
    tmp_path: Path,
) -> None:
    other = make_step(1)
    columns = structs.replace(other.modules, output_rms=[0.5, None, None, None, None])
    other = structs.replace(other, modules=columns)
    run = make(tmp_path, *make_calls(0), make_step(0), *make_calls(1)[:1], other)
    assert gather([run]).step == 0


def test_a_killed_run_shows_the_step_that_has_no_line_yet(tmp_path: Path) -> None:
    assert gather([make(tmp_path, *make_calls(0))]).step == 0


def test_a_finding_in_a_step_that_was_thinned_does_not_choose_it(tmp_path: Path) -> None:
    run = make(tmp_path, *make_calls(0), make_step(0), make_finding(step=1),
               make_step(1, full=False))  # fmt: skip
    assert gather([run]).step == 0


def test_a_note_does_not_choose_the_step(tmp_path: Path) -> None:
    note = make_finding(step=0, severity="note")
    run = make(tmp_path, *make_calls(0), note, make_step(0), *make_calls(1), make_step(1))
    assert gather([run]).step == 1


def test_a_step_between_two_that_has_no_records_is_shown_empty(tmp_path: Path) -> None:
    run = make(tmp_path, *make_calls(0), make_step(0), *make_calls(2), make_step(2))
    contents = gather([run], step=1)
    assert (contents.rows, contents.whole) == ([], False)


def test_a_run_without_steps_has_no_step_to_ask_for(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no step 0 in .* it has no steps"):
        gather([make(tmp_path)], step=0)


def test_a_finding_on_a_parameter_matches_by_the_name_of_it(tmp_path: Path) -> None:
    run = make(tmp_path, make_finding(module=None, param="encoder.weight", step=0))
    assert [one.finding.param for one in gather([run], modules=["encoder*"]).shown]
    assert not gather([run], modules=["decoder*"]).shown


def test_a_glob_matches_the_path_the_alias_and_the_class_of_the_root(tmp_path: Path) -> None:
    block = Module(step=0, path="Net.Block", cls="Block", alias="blocks.0")
    run = make(tmp_path, Module(step=0, path="", cls="Net"), block, make_step(0))
    assert matches(run.modules, "", ["Net"])
    assert matches(run.modules, "Net.Block", ["blocks.*"])
    assert matches(run.modules, "Net.Block", ["x", "Net.*"])
    assert not matches(run.modules, "Net.Block", ["net.*"])
    assert not matches(run.modules, None, ["*"])
    assert matches(run.modules, None, [])
    assert (shown_path(run.modules, "gone"), shown_path(run.modules, "Net.Block")) == (
        "gone",
        "blocks.0",
    )


def counts_calls() -> Check:
    def rule(step: StepView, memory: dict[str, Any], *, limit: int = 3) -> Iterator[Draft]:
        """Many calls.

        Symptom:    many
        Threshold:  calls > limit
        Source:     this test
        Fix:        fewer
        Misses:     none
        """
        if len(step.calls) > limit:
            yield Draft(message=f"{len(step.calls)} calls", cause="calls")

    return check("TT199", "many-calls", severity="error")(rule)


def test_checks_run_again_find_by_the_saved_log_alone(tmp_path: Path) -> None:
    run = make(
        tmp_path, *(make_call(i, "a") for i in range(2)), make_step(0),
        *(make_call(i, "a", step=1) for i in range(4)), make_finding(step=1), make_step(1),
        *(make_call(i, "a", step=2) for i in range(5)), make_step(2),
    )  # fmt: skip
    seen: list[int] = []
    found = found_again(run, [counts_calls()], {}, seen.append)
    assert [(f.code, f.step, f.message) for f in found.findings] == [("TT199", 1, "4 calls")]
    assert found.later == {found.findings[0].id: 1}
    assert (seen, found.again, found.problems) == ([0, 1, 2], True, [])


def test_a_log_longer_than_its_head_and_tail_is_counted_whole(tmp_path: Path) -> None:
    steps = [make_step(i, repeats={"TT101-1": 1} if i > 1100 else {}) for i in range(1200)]
    records = [make_finding(step=0), *steps, make_finding(step=1199, id="last")]
    run = make(tmp_path, *sorted(records, key=lambda record: record.step))
    found = logged(run)
    assert found.later == {"TT101-1": 99}
    assert [finding.id for finding in found.findings] == ["TT101-1", "last"]


def test_the_canonical_run_has_one_row_for_each_module_in_order_of_call(tmp_path: Path) -> None:
    run = open_run(write_log(tmp_path / "log.jsonl", make_canonical()))
    rows = gather([run]).rows
    assert [row.path for row in rows] == ["", "encoder", "encoder.0", "encoder.1", "head"]
    assert [row.calls for row in rows] == [1, 1, 1, 1, 2]
    assert [row.flag for row in rows] == ["TT101", "", "", "", "NaN"]


def test_a_wrapper_and_what_it_wraps_are_one_call(tmp_path: Path) -> None:
    calls = [
        make_call(1, "", host_ns=9), make_call(2, "", parent=1, host_ns=7),
        make_call(3, "fc", parent=2), make_call(4, "fc", parent=2, nth=1),
    ]  # fmt: skip
    rows = gather([make(tmp_path, *calls)]).rows
    assert [(row.path, row.calls, row.host_ns) for row in rows] == [("", 1, 9), ("fc", 2, 0)]


def test_rms_and_gradient_norm_stand_in_where_the_step_has_no_line_yet(tmp_path: Path) -> None:
    run = make(tmp_path, *make_calls(0))
    rows = {row.path: row for row in gather([run]).rows}
    # norm / sqrt(numel) = 0.5 for every tensor that make_tensor makes.
    assert rows["encoder.0"].output_rms == pytest.approx(0.5)
    assert rows["encoder.0"].grad_norm is None


def test_a_gradient_that_is_not_finite_is_told_from_an_output(tmp_path: Path) -> None:
    flags = {"": "n", "encoder": "i", "encoder.0": "ni", "encoder.1": "f", "head": ""}
    step = make_step(0)
    columns = msgspec.structs.replace(step.modules, flags=[flags[p] for p in step.modules.path])
    line = msgspec.structs.replace(step, modules=columns)
    whole = gather([make(tmp_path, *make_calls(0), line)])
    assert [row.flag for row in whole.rows] == ["NaN grad", "inf grad", "NaN grad", "", ""]
    thinned = gather([make(tmp_path, line)])
    assert [row.flag for row in thinned.rows] == ["NaN", "inf", "NaN", "", ""]


def test_an_update_that_is_no_number_is_taken_from_the_parameter(tmp_path: Path) -> None:
    param = make_param(0, "encoder.1.weight", (8, 4), 1.5)
    broken = msgspec.structs.replace(param, update_ratio="NaN")
    run = make(tmp_path, *make_calls(0), broken, make_step(0))
    rows = {row.path: row for row in gather([run]).rows}
    assert rows["encoder.1"].update_ratio == "NaN"
    assert rows["encoder.0"].update_ratio == 1e-3


def test_the_time_on_a_gpu_is_that_of_all_calls_and_shows_only_where_there_is_one(
    tmp_path: Path,
) -> None:
    times = {"encoder": 2_500_000, "head": 30_000}
    timed = [msgspec.structs.replace(call, device_ns=times.get(call.module or ""))
             for call in make_calls(0)]  # fmt: skip
    (tmp_path / "on").mkdir()
    run = make(tmp_path / "on", *timed)
    told = {row.path: row.device_ns for row in gather([run]).rows}
    assert (told["encoder"], told["head"], told["encoder.0"]) == (2_500_000, 60_000, None)
    for render in (lambda run: render_report(run, width=200), lambda run: render_page([run])):
        text = render(run)
        assert "device ms" in text
        assert "2.50" in text
        assert "device ms" not in render(make(tmp_path, *make_calls(0)))

from __future__ import annotations

import ast
import json
import os
import random
import subprocess
import sys
from typing import get_args

import msgspec
import pytest

from tensortrace.checks import Draft, all_checks, check, select, steadiness
from tensortrace.details import DETAILS
from tensortrace.engine import FINDINGS_PER_CODE as MOST
from tensortrace.engine import HELD, Engine
from tensortrace.errors import UsageError
from tensortrace.export.page import explain
from tensortrace.records import Action, ActionName, Call, ChainLink, Finding, Param
from tensortrace.step_view import StepView
from tests.builders import make_call, make_header, make_run
from tests.checks import call, closing, find, loss, module, nan, ok, op, optimizer, param, row

EVERY = all_checks()


@check("TT990", "always", severity="warning", when="step")
def always(step, memory, *, limit=3, name="x", on=True):
    """Find something in every step.

    Symptom:    it is there
    Threshold:  none, but for `limit`
    Source:     chosen here
    Fix:        do nothing
                at all
    Misses:     nothing
    """
    yield Draft(message=f"{limit} {name} {on}", module="a")


def run(engine, steps):
    return [f for step in steps for f in engine.feed(closing(step))]


def test_one_cause_is_one_finding_and_the_rest_is_counted():
    engine = Engine([always])
    found = run(engine, range(4))
    assert [(f.id, f.step) for f in found] == [("TT990-1", 0)]
    assert engine.take_repeats() == {"TT990-1": 3}
    assert engine.take_repeats() == {}


def test_a_check_is_asked_of_steps_that_have_what_it_is_about():
    asked: dict[str, list[int]] = {}

    def asking(of):
        @check(f"TT99{len(of)}", "-".join(of) or "each", of=of)
        def note(step, memory):
            yield from ()
            asked.setdefault("-".join(of), []).append(step.number)

        return note

    checks = [asking(()), asking(("calls",)), asking(("clip", "scale"))]
    engine = Engine(checks)
    engine.feed(make_header(options={"every": "auto"}))
    for step in range(18, 34):
        if step in (19, 23):
            engine.feed(Action(step=step, seq=1, action="clip"))
        # One that is put aside is looked at after all if something in it is not finite.
        engine.feed(call(2, "a", [1], [2], [ok(1), nan(2) if step == 25 else ok(2)], step=step))
        engine.feed(closing(step, full=False))
    assert asked == {
        "": list(range(18, 34)), "calls": [18, 19, 20, 25, 30], "clip-scale": [19, 23],
    }  # fmt: skip


def test_checks_ask_for_actions_that_there_are():
    asked = {tag for one in EVERY for tag in one.of + one.since + one.until}
    kinds = asked - {"calls", "full", "inner", "holds", "frozen", "repeated"}
    assert kinds
    assert {kind.partition(".")[0] for kind in kinds} <= set(get_args(ActionName))
    keys = [kind.split(".") for kind in kinds if "." in kind]
    assert keys
    assert all(key in DETAILS[action].__annotations__ for action, key in keys)


def test_a_check_is_asked_until_a_step_has_what_ends_it():
    asked: list[int] = []

    @check("TT990", "ends", until=("threads",))
    def note(step, memory):
        yield from ()
        asked.append(step.number)

    engine = Engine([note])
    for step in range(4):
        if step == 2:
            engine.feed(Action(step=step, seq=1, action="threads"))
        engine.feed(closing(step))
    assert asked == [0, 1]


def test_a_check_is_asked_of_steps_by_what_their_actions_optimizers_and_lines_say():
    asked: dict[str, list[int]] = {}

    def asking(number, of, since=()):
        @check(f"TT99{number}", "-".join(of + since), of=of, since=since)
        def note(step, memory):
            yield from ()
            asked.setdefault("-".join(of + since), []).append(step.number)

        return note

    tags = ["loss.graph", "full", "inner", "holds"]
    checks = [asking(i, (tag,)) for i, tag in enumerate(tags)]
    checks += [asking(5, (), ("scale",)), asking(6, ("holds",), ("eval",)), asking(7, ("eval",))]
    engine = Engine(checks)
    for step in range(6):
        if step in (2, 4):
            engine.feed(Action(step=step, seq=1, action="eval"))
        if step == 3:
            engine.feed(Action(step=step, seq=1, action="scale"))
        graph = {"graph": []} if step in (1, 4) else {}
        engine.feed(Action(step=step, seq=2, action="loss", detail={"value": 1.0, **graph}))
        engine.feed(optimizer(step=step, parameters=["a"] if step == 0 else None))
        engine.feed(closing(step, full=step == 2, rested=step in (3, 4)))
    assert asked == {
        "loss.graph": [1, 4], "full": [2], "inner": [0, 1, 2, 5], "holds": [0],
        "scale": [3, 4, 5], "holds-eval": [0, 2, 3, 4, 5], "eval": [2, 4],
    }  # fmt: skip


def test_what_happened_is_listed_anew_when_more_has():
    view = StepView(0)
    view.actions.append(Action(step=0, seq=5, action="loss"))
    assert [r.seq for r in view.happened()] == [5]
    view.optimizers.append(optimizer(seq=3))
    assert [r.seq for r in view.happened()] == [3, 5]
    del view.actions[0]
    view.actions.append(Action(step=0, seq=7, action="loss"))
    assert [r.seq for r in view.happened()] == [3, 7]


def test_calls_are_found_by_seq_when_more_have_come_and_when_they_are_dropped():
    view = StepView(0)
    assert view.by_seq() == {}
    view.calls.append(Call(step=0, seq=5))
    assert list(view.by_seq()) == [5]
    view.calls.append(Call(step=0, seq=3))
    assert list(view.by_seq()) == [5, 3]
    assert view.by_seq() is view.by_seq()
    view.calls.clear()
    view.calls += [Call(step=0, seq=7), Call(step=0, seq=8)]
    assert list(view.by_seq()) == [7, 8]
    view.calls.clear()
    assert view.by_seq() == {}


def test_the_calls_inside_a_call_are_found_by_their_parents():
    draw = random.Random(0)
    view = StepView(0)

    def naive(root):
        seqs, inside = {root.seq}, [root]
        for one in sorted(view.calls, key=lambda c: c.seq):
            if one.phase == "forward" and one.op is None and one.parent in seqs:
                seqs.add(one.seq)
                inside.append(one)
        return inside

    for seq in range(60):
        view.calls.append(
            Call(
                step=0, seq=seq, parent=draw.choice([None, *range(max(0, seq - 9), seq)]),
                op=draw.choice([None, None, None, "add"]),
                phase=draw.choice(["forward", "forward", "forward", "backward"]),
            )
        )  # fmt: skip
        for root in view.calls:
            assert view.inside(root) == naive(root)
    view.calls.append(Call(step=0, seq=60, parent=60))  # a log may say anything
    assert view.inside(view.calls[-1]) == view.calls[-1:]


def test_explanation_and_fix_come_from_the_docstring_unless_the_draft_has_them():
    (found,) = run(Engine([always]), [0])
    assert (found.explanation, found.fix) == ("it is there", "do nothing at all")
    assert (found.severity, found.check, found.code) == ("warning", "always", "TT990")


def test_a_finding_is_what_its_line_in_the_log_gives_back():
    @check("TT991", "tuple")
    def with_tuple(step, memory):
        yield Draft(message="", evidence={"shape": (2, 3)}, chain=(ChainLink(1, 2, "log", None),))

    (found,) = run(Engine([with_tuple]), [0])
    assert msgspec.json.decode(msgspec.json.encode(found), type=Finding) == found


def test_a_cause_that_becomes_more_severe_is_told_again():
    @check("TT991", "worse")
    def worse(step, memory):
        yield Draft(message="", severity=("note", "error", "warning")[step.number])

    found = run(Engine([worse]), range(3))
    assert [(f.id, f.severity) for f in found] == [("TT991-1", "note"), ("TT991-2", "error")]


def test_a_cause_at_another_place_is_told_again():
    @check("TT991", "placed")
    def placed(step, memory):
        yield Draft(message="", cause="a", place=("x:1", "", "y:2", "x:1", "", "y:2")[step.number])

    engine = Engine([placed])
    assert [(f.id, f.step) for f in run(engine, range(6))] == [("TT991-1", 0), ("TT991-2", 2)]
    # What has no place is taken for the last that was told.
    assert engine.take_repeats() == {"TT991-1": 2, "TT991-2": 2}


def test_what_was_told_without_its_place_is_not_told_again_with_it():
    @check("TT991", "later")
    def later(step, memory):
        yield Draft(message="", cause="a", place="x:1" if step.number else "")

    assert [f.step for f in run(Engine([later]), range(3))] == [0]


def test_what_follows_from_a_finding_is_only_counted():
    @check("TT991", "after")
    def after(step, memory):
        yield Draft(message="", follows="TT1-1")

    engine = Engine([after])
    assert run(engine, range(2)) == []
    assert engine.take_repeats() == {"TT1-1": 2}


def test_findings_of_one_code_and_severity_are_bounded_and_counted_after_that():
    @check("TT991", "many")
    def many(step, memory):
        yield Draft(message="", cause=str(step.number))

    engine = Engine([many])
    assert len(run(engine, range(MOST + 7))) == MOST
    assert engine.take_repeats() == {f"TT991-{MOST}": 7}


def test_a_check_that_raises_stops_alone_and_says_so():
    @check("TT000", "broken")
    def broken(step, memory):
        yield Draft(message="first")
        raise ValueError("no such luck")

    engine = Engine([broken, always])
    assert [f.code for f in run(engine, range(3))] == ["TT000", "TT990"]
    assert len(engine.problems) == 1
    assert "TT000 broken stopped at step 0: ValueError: no such luck" in engine.problems[0]


def test_checks_run_after_those_that_they_look_at():
    seen = []

    def make(code, *after):
        @check(code, code.lower(), after=after)
        def one(step, memory):
            seen.append(code)
            yield from ()

        return one

    run(Engine([make("TT1", "TT3"), make("TT2"), make("TT3", "TT9")]), [0])
    assert seen == ["TT3", "TT1", "TT2"]


def test_gate_checks_run_at_each_gate_and_at_the_end_with_the_fresh_calls():
    seen = []

    @check("TT991", "gate", when="gate")
    def gate(step, memory):
        seen.append(([c.seq for c in step.calls[step.fresh :]], step.summary is not None))
        yield from ()

    engine = Engine([gate])
    gated = Action(step=0, seq=3, action="gate")
    for record in [make_call(1), make_call(2), gated, make_call(4), optimizer(5), closing()]:
        engine.feed(record)
    assert seen == [([1, 2], False), ([4], False), ([], True)]


def test_a_step_of_many_records_is_not_held_without_bound():
    longest = []

    @check("TT991", "gate", when="gate")
    def gate(step, memory):
        longest.append((len(step.calls), len(step.tensors)))
        yield from ()

    engine = Engine([gate])
    for i in range(5 * HELD):
        engine.feed(make_call(i, inputs=[("x", i)], tensors=[ok(i)]))
    assert longest == [(2 * HELD, 2 * HELD), (2 * HELD, 4 * HELD)]


def test_settings_are_read_as_the_type_of_the_default():
    settings = {"TT990.limit": "7", "always.name": 5, "TT990.on": "false"}
    (found,) = run(Engine([always], settings), [0])
    assert found.message == "7 5 False"


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("TT202.rato", 1, "Closest: 'TT202.ratio'"),
        ("vanishing-gradient.ratios", 1, "Closest: 'vanishing-gradient.ratio'"),
        ("nothing", 1, "no setting named 'nothing'"),
        ("TT202.ratio", "much", "TT202.ratio is 'much', not a value of type float"),
    ],
)
def test_a_setting_that_makes_no_sense_says_what_to_write(name, value, says):
    with pytest.raises(UsageError, match=says):
        Engine(EVERY, {name: value})


def test_settings_of_a_known_check_that_does_not_run_are_accepted():
    Engine(select(["TT101"]), {"TT202.ratio": 0.1})


def test_select_takes_codes_names_and_prefixes():
    codes = [c.code for c in EVERY]
    assert [c.code for c in select(None)] == codes
    assert [c.code for c in select(["tt1"])] == [c for c in codes if c.startswith("TT1")]
    assert [c.code for c in select(["vanishing-gradient", "TT101"])] == ["TT101", "TT202"]
    assert "TT101" not in [c.code for c in select(None, ignore=["nonfinite-forward"])]
    with pytest.raises(UsageError, match=r"no check named 'vanishing'.*'vanishing-gradient'"):
        select(["vanishing"])
    with pytest.raises(UsageError):
        select([""])


@pytest.mark.parametrize("one", EVERY, ids=lambda c: c.code)
def test_every_check_documents_itself(one):
    page = one.doc
    assert page.summary.endswith(".")
    assert all([page.symptom, page.threshold, page.source, page.fix, page.misses])
    assert all(f"`{name}`" in page.threshold or name in page.threshold for name in one.thresholds)
    assert all(value is not None for value in one.thresholds.values())
    text = explain(one)
    assert one.code in text
    assert all(len(line) <= 100 for line in text.splitlines())
    assert all(f"{one.code}.{name}" in text for name in one.thresholds)


@pytest.mark.parametrize("one", EVERY, ids=lambda c: c.code)
def test_every_check_shows_the_fault_and_its_repair_as_code(one):
    example, fixed = one.doc.example, one.doc.fixed
    assert ast.parse(example).body
    assert ast.parse(fixed).body
    assert ast.dump(ast.parse(example)) != ast.dump(ast.parse(fixed))
    assert all(len(code.splitlines()) <= 10 for code in (example, fixed))
    assert "\n\nFixed\n  " + fixed.splitlines()[0] in explain(one)


def test_code_may_begin_beside_its_title_or_below_it():
    @check("TT991", "beside")
    def beside(step, memory):
        """Say nothing.

        Example:    for x in loader:
                        train(x)
                    validate()
        Fixed:      pass
        """

    @check("TT991", "below")
    def below(step, memory):
        """Say nothing.

        Example:
            for x in loader:
                train(x)
            validate()

        Fixed:
            pass
        """

    code = "for x in loader:\n    train(x)\nvalidate()"
    assert (beside.doc.example, beside.doc.fixed) == (code, "pass")
    assert (below.doc.example, below.doc.fixed) == (code, "pass")


def test_pages_are_whole_where_python_drops_docstrings():
    program = (
        "from tensortrace.checks import all_checks\n"
        "import json\n"
        "pages = [[c.code, repr(c.doc)] for c in all_checks()]\n"
        "print(json.dumps([all_checks.__doc__, pages]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-OO", "-c", program], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )  # fmt: skip
    assert json.loads(done.stdout) == [None, [[one.code, repr(one.doc)] for one in all_checks()]]


def test_codes_and_names_are_unique():
    assert len({c.code for c in EVERY}) == len({c.name for c in EVERY}) == len(EVERY) >= 9


@pytest.mark.parametrize("one", EVERY, ids=lambda c: c.code)
def test_every_check_is_silent_on_an_empty_run(one):
    assert find([], one.code) == []
    assert find([closing()], one.code) == []
    assert find([call(1, "", [], []), optimizer(2), closing()], one.code) == []


def test_checks_need_no_torch():
    code = (
        "import sys; from tensortrace.engine import Engine; Engine(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_steadiness_tells_an_even_rise_from_a_jump():
    assert steadiness([1, 2, 4, 8]) == (1.0, pytest.approx(1 / 3))
    assert steadiness([1, 1, 1, 8]) == (1 / 3, 1.0)
    assert steadiness([8, 4, 2]) == (0.0, 1.0)


def _long_run():
    """Forty steps with a NaN at step 12, spoilt parameters after it and a shrinking gradient."""
    for step in range(40):
        bad = step >= 12
        tensor = nan if bad else ok
        yield module("a", "weight", step=step)
        source = nan(1, from_step=step - 1) if step > 12 else ok(1, min=0.0, zeros=2)
        yield op(1, "log", [1], [2], [source, tensor(2)], step=step)
        yield call(2, "a", [2], [3], [tensor(3)], step=step)
        yield loss(3, "NaN" if bad else 1.0, 3, step=step)
        yield optimizer(
            4, step=step, grad_norm="NaN" if bad else 1.0, parameters=[] if not step else None
        )
        yield param(5, "a.weight", nan(9) if step > 12 else ok(9), step=step,
                    grad=nan(10) if bad else ok(10), update_norm="NaN" if bad else 0.1)  # fmt: skip
        decay = {str(i): 10.0 ** (i if step > 20 else 0) for i in range(6)}
        for path in decay:
            yield module(path, "weight", step=step)
        yield closing(step, grad_norm=1.0, loss=1.0, modules=row(param_grad_rms=decay))


def test_a_thinned_log_gives_the_findings_of_the_live_run():
    everything = make_run(_long_run())
    live = find(everything)
    assert {f.code for f in live} == {"TT101", "TT202"} | {"TT401"}
    full = {0, 39} | {f.step for f in live} | {f.step - 1 for f in live} | set(range(0, 40, 10))
    thinned = [r for r in everything if r.step in full or not isinstance(r, Call | Param)]
    assert len(thinned) < len(everything)
    assert find(thinned) == live


@check("TT9", "sees-calls", when="gate")
def _sees_calls(step, memory):
    if step.calls:
        yield Draft(message=f"{len(step.calls)} calls", cause=f"{step.number}")


def _looked_at(options, *, bad=None, failed=None, first=0):
    """The steps whose calls a check is shown, of forty; one of them may have a NaN or an end."""
    engine = Engine([_sees_calls])
    engine.feed(make_header(options=options))
    found = []
    for step in range(first, first + 40):
        made = nan(2) if step == bad else ok(2)
        records = [
            call(0, "a", [1], [2], [ok(1)], step=step),
            call(1, "b", [2], [2], [made], step=step),
            call(2, "b", [2], [2], [], step=step),
            *([Action(step=step, seq=3, action="exception")] if step == failed else []),
            closing(step),
        ]
        found += [finding for record in records for finding in engine.feed(record)]
    return found


def test_past_the_first_steps_of_a_thinned_run_calls_are_looked_at_one_step_in_ten():
    closely = [*range(20), 20, 30]
    assert [f.step for f in _looked_at({})] == closely
    assert {f.step for f in _looked_at({"every": "auto"})} == {*closely}
    assert {f.step for f in _looked_at({"every": 4})} == {*closely, 24, 28, 32, 36}
    for options in ({"every": 1}, {"steps": "[3]"}):
        assert {f.step for f in _looked_at(options)} == {*range(40)}


def test_past_the_thousandth_step_calls_are_looked_at_one_step_in_fifty():
    assert [f.step for f in _looked_at({}, first=980)] == [980, 990, 1000]
    assert [f.step for f in _looked_at({"every": "auto"}, first=1030)] == [1050]
    assert [f.step for f in _looked_at({"every": 20}, first=1030)] == [1040, 1050, 1060]


def _updated(*rhythms, last=70, skipped=()):
    """The steps past the first that are looked at, where optimizer i steps as rhythms[i] says."""
    engine = Engine([_sees_calls])
    engine.feed(make_header(options={}))
    found = []
    for step in range(last):
        records = [call(0, "a", [1], [2], [ok(1)], step=step)]
        records += [optimizer(step=step, index=i, skipped=step in skipped)
                    for i, steps in enumerate(rhythms) if step in steps]  # fmt: skip
        assert engine.looks_at(step) == (step < 20 or step % 10 == 0 or _brings(engine, step))
        found += [f for record in [*records, closing(step)] for f in engine.feed(record)]
    return [f.step for f in found if f.step >= 20]


def _brings(engine, step):
    return engine.brings_update(step, 10)


def test_where_not_every_step_has_an_update_the_next_that_has_one_is_looked_at_too():
    tens = [20, 30, 40, 50, 60]
    assert _updated(range(70)) == _updated() == tens
    # Gradients that accumulate over four steps, updates at their end.
    assert _updated(range(3, 70, 4)) == [20, 23, 30, 31, 40, 43, 50, 51, 60, 63]
    assert _updated(range(0, 70, 4)) == [20, 30, 32, 40, 50, 52, 60]
    assert _updated(range(15, 70, 16)) == [*tens[:3], 47, 50, 60, 63]
    # One that steps each time beside one that steps every fifth.
    assert _updated(range(70), range(4, 70, 5)) == [20, 24, 30, 34, 40, 44, 50, 54, 60, 64]


def test_an_update_that_a_scaler_skips_is_none():
    assert _updated(range(3, 70, 4), skipped=(27,)) == [20, 23, 30, 31, 40, 43, 50, 51, 60, 63]
    assert _updated(range(3, 28, 4), skipped=range(20)) == [20, 30, 31, 40, 43, 50, 51, 60, 63]


def test_all_calls_of_a_step_are_looked_at_once_something_in_it_is_not_finite():
    assert [f.message for f in _looked_at({}, bad=23) if f.step == 23] == ["3 calls"]
    assert [f.message for f in _looked_at({}, failed=27) if f.step == 27] == ["3 calls"]


def test_calls_that_come_after_the_line_of_their_step_are_looked_at_before_the_next():
    late = [call(0, "a", [1], [2], [ok(1), nan(2)], step=21), call(1, "b", [2], [], [], step=21)]
    engine = Engine([_sees_calls])
    found = [f for r in [make_header(options={}), closing(21), *late] for f in engine.feed(r)]
    assert found == []
    found = [f for r in [call(0, "a", [1], [], [ok(1)], step=22), closing(22)]
             for f in engine.feed(r)]  # fmt: skip
    assert [(f.step, f.message) for f in found] == [(21, "2 calls")]


def test_an_earlier_run_of_the_engine_in_the_log_is_not_looked_at():
    live = find(_long_run())
    assert find([*_long_run(), *live]) == live


def test_header_and_unknown_order_are_no_problem():
    engine = Engine()
    assert engine.feed(make_header()) == []
    assert engine.feed(closing(5)) == []
    assert engine.feed(optimizer(1, step=7)) == []
    assert engine.problems == []

"""No false alarms is a feature: every check runs over every healthy program, at both levels."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import pytest

from tensortrace import trace
from tensortrace.capture import rest
from tensortrace.engine import Engine
from tensortrace.records import Finding, Optimizer, Step
from tests.capture import Recorded
from tests.healthy import load
from tests.neutral import one_thread

PROGRAMS = load()
# They train without an optimizer of torch's, or not at all.
WITHOUT_OPTIMIZER = {"evaluation_only", "gradients_taken_by_autograd_grad"}
# Their loss is made of a gradient: of a pass that spoils it only the modules' own calls tell where.
NEVER_AT_REST = {"wasserstein_gan_with_gradient_penalty", "meta_learning"}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


def check_program(name: str, steps: int, level: str, every: int | Literal["auto"] = 1) -> Recorded:
    records = Recorded()
    with trace(out=records.append, every=every, level=level):
        PROGRAMS[name](steps)
    assert [a.detail["traceback"] for a in records.actions("tracer_error")] == []
    said = [f"{f.code} {f.message}" for f in records.of(Finding) if f.severity != "note"]
    assert said == []
    assert bool(records.of(Optimizer)) == (name not in WITHOUT_OPTIMIZER)
    engine = Engine()
    again = [finding for record in records for finding in engine.feed(record)]
    assert engine.problems == []
    assert again == records.of(Finding), "a saved log must say what the run said"
    return records


@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_check_has_anything_to_say_about_a_healthy_program(name: str, level: str) -> None:
    check_program(name, 30, level)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["module", "op"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_check_has_anything_to_say_when_it_goes_on(name: str, level: str) -> None:
    check_program(name, 200, level)


@pytest.mark.slow
@pytest.mark.parametrize("name", PROGRAMS)
def test_no_check_has_anything_to_say_while_steps_rest(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rest, "RESTS_FROM", 20)
    records = check_program(name, 120, "module", "auto")
    rested = sum(step.rested for step in records.of(Step))
    if name in NEVER_AT_REST:
        assert rested == 0
    else:
        assert rested >= 60 or len(records.of(Step)) < 100

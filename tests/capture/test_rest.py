"""Steps at rest: of a long run most thin steps look at outermost calls only."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tensortrace import Lines, trace
from tensortrace.capture import recorder as recorder_module
from tensortrace.capture import rest, roots
from tensortrace.engine import Engine
from tensortrace.log import decode
from tensortrace.records import Call, Finding, Module, Param, Record, Step

FROM, STEPS = 20, 45
# Full by `every=100` is the first step only; checks look at one in ten.
LOOKED_AT = {*range(FROM), 20, 30, 40}


@pytest.fixture(autouse=True)
def soon() -> Iterator[None]:
    with patch.object(rest, "RESTS_FROM", FROM):
        yield


class Inner(nn.Module):
    """Where the fault is: `spoil` gets what the linear made, in each forward."""

    def __init__(self, spoil: Callable[[Tensor], Tensor] | None = None) -> None:
        super().__init__()
        self.linear, self.spoil = nn.Linear(4, 4), spoil

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return self.spoil(h) if self.spoil is not None else torch.tanh(h)


class Model(nn.Module):
    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.first, self.inner, self.head = nn.Linear(4, 4), inner or Inner(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(torch.relu(self.first(x))))


class Faulty:
    """Healthy until a step; then what it is given."""

    def __init__(self, fault: Callable[[Tensor], Tensor], at: int) -> None:
        self.fault, self.at, self.step = fault, at, 0

    def __call__(self, x: Tensor) -> Tensor:
        return self.fault(x) if self.step >= self.at else torch.tanh(x)


def log_of_negative(x: Tensor) -> Tensor:
    return (x - x.detach().max() - 1).log()


def root_of_zero(x: Tensor) -> Tensor:
    return (x * 0).square().sum().sqrt() + x


def train(
    model: nn.Module,
    steps: int = STEPS,
    before: Callable[[int], None] | None = None,
    **options: Any,
) -> tuple[list[Any], list[Finding]]:
    torch.manual_seed(1)
    records: list[Any] = []
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with trace(out=records.append, **{"every": 100, **options}) as t:
        for step in range(steps):
            if before is not None:
                before(step)
            model(torch.randn(3, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return records, t.findings


def spoilt_at(
    step: int, fault: Callable[[Tensor], Tensor], **options: Any
) -> tuple[list[Any], list[Finding]]:
    torch.manual_seed(0)
    faulty = Faulty(fault, step)

    def count(now: int) -> None:
        faulty.step = now

    return train(Model(Inner(faulty)), before=count, **options)


def rested(records: list[Any]) -> set[int]:
    return {r.step for r in records if isinstance(r, Step) and r.rested}


def key(finding: Finding) -> tuple[Any, ...]:
    location = finding.location
    return (
        finding.step, finding.code, finding.module, finding.op, finding.param,
        location and (location.line, location.function), finding.evidence["placed"],
    )  # fmt: skip


def test_steps_rest_that_neither_checks_nor_full_steps_ask_for() -> None:
    records, findings = train(Model())
    assert not findings
    assert rested(records) == set(range(STEPS)) - LOOKED_AT
    # A full step is told of the one before it what it was given by that.
    records, _ = train(Model(), every=7)
    full = {r.step for r in records if isinstance(r, Step) and r.full}
    assert rested(records) == set(range(STEPS)) - LOOKED_AT - full - {step - 1 for step in full}


def test_a_step_at_rest_knows_outermost_outputs_and_every_parameter_in_order_of_call() -> None:
    records, _ = train(Model())
    columns = {r.step: r.modules for r in records if isinstance(r, Step)}
    seen, at_rest = columns[20], columns[21]
    assert seen.path == ["", "first", "inner", "inner.linear", "head"]
    assert at_rest.path == ["", "first", "inner.linear", "head"]
    assert all(seen.output_rms)
    assert at_rest.output_rms[0] is not None
    assert at_rest.output_rms[1:] == [None, None, None]
    assert all(at_rest.param_grad_rms[1:])
    assert all(at_rest.update_ratio[1:])
    lines = {r.step: r for r in records if isinstance(r, Step)}
    # Of the four calls inside and of their backward nothing was recorded; the calls are counted.
    assert lines[21].records == lines[20].records - 8
    assert lines[21].dropped == lines[20].dropped - 4


def test_training_is_the_same_to_the_bit() -> None:
    def weights(traced: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = Model()
        if traced:
            train(model)
        else:
            optimizer = torch.optim.SGD(model.parameters(), 0.01)
            torch.manual_seed(1)
            for _ in range(STEPS):
                model(torch.randn(3, 4)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        return list(model.parameters())

    assert all(map(torch.equal, weights(traced=True), weights(traced=False)))


@pytest.mark.parametrize("fault", [log_of_negative, root_of_zero])
@pytest.mark.parametrize("kernel", ["compiled", "torch"])
def test_a_nan_in_a_step_at_rest_is_placed_as_in_a_full_one(
    fault: Callable[[Tensor], Tensor], kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "torch":
        monkeypatch.setattr("tensortrace.capture.compiled.kernel", None)
    records, findings = spoilt_at(25, fault)
    assert 24 in rested(records)
    assert 25 in rested(records)
    (found,) = findings
    assert (found.step, found.module, found.evidence["placed"]) == (25, "inner", "exact")
    assert found.location is not None
    assert found.location.function == fault.__name__
    _, full = spoilt_at(25, fault, every=1)
    assert [key(f) for f in findings] == [key(f) for f in full]


def test_the_fault_in_later_steps_is_no_second_finding() -> None:
    def once(x: Tensor) -> Tensor:
        # Its gradient is finite: the weights stay as they are, and it comes again and again.
        return torch.where(x.detach() > -9, torch.tanh(x), x) + log_of_negative(x).detach() * 0

    _, findings = spoilt_at(25, once)
    assert [f.code for f in findings if f.severity == "error"] == ["TT101"]


class OwnLoss(nn.Module):
    """Computes its loss itself, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(x), y, ignore_index=-1)


def test_the_fault_in_the_code_of_a_root_is_no_second_finding_in_a_step_that_is_looked_at() -> None:
    model = OwnLoss()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    records: list[Any] = []
    with trace(out=records.append, every=100) as t:
        for step in range(STEPS):
            y = torch.full((3,), -1 if step >= 25 else 1)
            model(torch.randn(3, 4), y).backward()
            if step < 25:
                optimizer.step()
                optimizer.zero_grad()
    assert 25 in rested(records)
    assert not {26, 27} & rested(records)
    (error,) = [f for f in t.findings if f.code == "TT101"]
    assert (error.step, error.op, error.evidence["placed"]) == (25, "cross_entropy", "exact")


def test_weights_that_were_spoilt_between_steps_are_named() -> None:
    model = Model()

    def spoil(step: int) -> None:
        if step == 25:
            with torch.no_grad():
                model.inner.linear.weight[0, 0] = torch.nan

    records, findings = train(model, before=spoil)
    assert 25 in rested(records)
    (found,) = findings
    assert (found.module, found.param) == ("inner.linear", "inner.linear.weight")
    assert found.location is not None
    assert found.location.function == "Inner.forward"


def test_after_a_replay_no_step_rests_since_there_is_one_for_each_root() -> None:
    records, findings = spoilt_at(25, lambda x: log_of_negative(x).detach() * 0 + x)
    assert findings
    assert max(rested(records)) == 25


def test_what_differs_in_the_replay_is_close_and_not_exact() -> None:
    drifting = itertools.count(1)

    def drift(x: Tensor) -> Tensor:
        # State outside of the modules: the replay finds it elsewhere.
        n = next(drifting)
        return torch.cat([(x[:1] * 0 - 1).log().expand(1, 4), x[1:] * n])

    _, (found, *_) = spoilt_at(25, drift)
    assert found.op == "log"
    assert found.evidence["placed"] == "close"


class Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, deep: int = 2) -> Tensor:
        h: Tensor = self(x, deep - 1) if deep else x
        return self.linear(h)


def test_a_module_that_calls_itself_is_seen_each_time() -> None:
    model = Recursive()
    paths: list[str] = []
    real = recorder_module.Recorder.module_called

    def called(recorder: Any, module: nn.Module, path: str) -> None:
        if recorder.resting:
            paths.append(path)
        real(recorder, module, path)

    with patch.object(recorder_module.Recorder, "module_called", called):
        records, findings = train(model)
    assert not findings
    assert paths == ["", "", ""] * len(rested(records))


class Mutual(nn.Module):
    """Calls `inner`, if it has one, which calls it back."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 4), nn.Linear(4, 4)
        self.inner: list[nn.Module] = []
        self.spoilt = False

    def forward(self, x: Tensor, deep: int = 0) -> Tensor:
        h: Tensor = torch.tanh(self.first(x))
        if not deep:
            for inner in self.inner:
                h = inner(h, self)
        h = self.head(h)
        return log_of_negative(h) if self.spoilt and not deep else h


class Back(nn.Module):
    def forward(self, x: Tensor, top: nn.Module) -> Tensor:
        back: Tensor = top(x, 1)
        return back


def test_a_module_stays_open_while_one_that_nobody_has_met_calls_it_back() -> None:
    model = Mutual()

    def grow(step: int) -> None:
        if step == 25:
            model.inner.append(Back())
            model.spoilt = True

    records, (found, *others) = train(model, before=grow)
    assert 25 in rested(records)
    assert not others
    assert (found.step, found.module, found.op) == (25, "", "log")


def test_a_gradient_that_no_parameter_inside_gets_is_placed_inside() -> None:
    torch.manual_seed(0)
    faulty = Faulty(root_of_zero, 25)
    model = Model(Inner(faulty)).requires_grad_(False)
    prompt = nn.Parameter(torch.zeros(3, 4))
    optimizer = torch.optim.SGD([prompt], 0.01)
    records: list[Any] = []
    with trace(out=records.append, every=100) as t:
        for faulty.step in range(STEPS):
            model(torch.randn(3, 4) + prompt).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert 25 in rested(records)
    (found,) = t.findings
    assert (found.step, found.module, found.op) == (25, "inner", "sqrt")
    assert found.evidence["placed"] == "exact"


@pytest.mark.parametrize("at", [5, 30, 43])
def test_gradient_of_a_leaf_that_goes_straight_into_a_module_is_placed_inside(at: int) -> None:
    # As a picture that is painted or a latent that is fitted: no call returns its gradient.
    torch.manual_seed(0)
    faulty = Faulty(lambda h: torch.tanh(h) + (h - h.detach()).norm(dim=1).sqrt().sum(), at)
    model = Model(Inner(faulty)).requires_grad_(False)
    picture = torch.rand(3, 4, requires_grad=True)
    optimizer = torch.optim.SGD([picture], 0.01)
    records: list[Any] = []
    with trace(out=records.append, every=100) as t:
        for faulty.step in range(STEPS):
            optimizer.zero_grad()
            model(picture).square().mean().backward()
            optimizer.step()
    assert [(f.step, f.code, f.module, f.op) for f in t.findings] == [
        (at, "TT102", "inner", "sqrt")
    ]
    (finding,) = t.findings
    assert finding.evidence["placed"] == "exact"
    assert (at in rested(records)) is (at == 43)
    engine = Engine()
    saved = [found for record in records for found in engine.feed(record)]
    assert [*map(key, saved)] == [key(finding)]


def test_an_exception_inside_is_explained() -> None:
    def wrong(x: Tensor) -> Tensor:
        return x @ torch.ones(5, 5)

    torch.manual_seed(0)
    faulty = Faulty(wrong, 25)
    heard: list[Finding] = []

    def hear(finding: Finding) -> bool:
        heard.append(finding)
        return False

    def count(now: int) -> None:
        faulty.step = now

    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        train(Model(Inner(faulty)), before=count, stop_on=hear)
    (found,) = heard
    assert (found.code, found.step, found.module) == ("TT801", 25, "inner")


class Listed(nn.Module):
    """Runs more of its modules while it trains, or is given more."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.parts, self.used = nn.ModuleList(nn.Linear(4, 4) for _ in range(count)), 1

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts[: self.used]:
            x = part(x)
        return x


@pytest.mark.parametrize("count", [1, 2])
def test_a_module_that_nobody_has_met_is_looked_at_in_a_step_at_rest(count: int) -> None:
    model = Listed(count)

    def grow(step: int) -> None:
        if step == 25:
            model.used = 2
            if count == 1:
                model.parts.append(nn.Linear(4, 4))

    records, _ = train(model, before=grow)
    assert 25 in rested(records)
    (met,) = (r for r in records if isinstance(r, Module) and r.path == "parts.1")
    assert met.step == 25
    (line,) = (r for r in records if isinstance(r, Step) and r.step == 26)
    assert line.modules.path == ["", "parts.0", "parts.1"]
    assert line.modules.output_rms[1:] == [None, None]


class Twice(nn.Module):
    """Calls the last of its parts twice."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.parts[-1](self.parts[-1](self.parts[0](x)))


def test_a_module_that_is_met_in_a_step_at_rest_is_passed_over_when_it_is_called_again() -> None:
    model = Twice()

    def grow(step: int) -> None:
        if step == 25:
            model.parts.append(nn.Tanh())  # with new parameters none would be passed over

    records, _ = train(model, before=grow)
    assert 25 in rested(records)
    met, later = (r.seq for r in records if isinstance(r, Step) and r.step in (25, 26))
    # What it is, its first call and the gradient of what that returned; none of the second.
    assert met == later + 3


@pytest.mark.parametrize(
    "options",
    [{"level": "op"}, {"lines": Lines(output=[].append)}, {"narrow": False}, {"every": 1}],
)
def test_nothing_rests_where_inner_calls_are_asked_for_or_nothing_could_be_replayed(
    options: dict[str, Any],
) -> None:
    records, _ = train(Model(), **options)
    assert not rested(records)


def inner_paths(records: list[Any]) -> set[str]:
    """Which modules have an output in the line of a step at rest."""
    lines = [r.modules for r in records if isinstance(r, Step) and r.rested]
    return {
        path for line in lines for path, rms in zip(line.path, line.output_rms, strict=True)
        if rms is not None
    }  # fmt: skip


def test_inside_a_root_that_cannot_be_run_again_every_call_is_seen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    every = {"", "first", "inner", "inner.linear", "head"}
    records, _ = train(Model())
    assert inner_paths(records) == {""}
    monkeypatch.setattr(roots, "several_ranks", lambda: True)
    records, _ = train(Model())
    assert inner_paths(records) == every
    monkeypatch.setattr(roots, "several_ranks", lambda: False)
    monkeypatch.setattr(roots, "MOST_BYTES", 8)
    records, _ = train(Model())
    assert inner_paths(records) == every


def test_a_full_step_has_every_record_whatever_rested_before_it() -> None:
    records, _ = train(Model(), steps=108)
    calls = [r for r in records if isinstance(r, (Call, Param))]
    assert {r.step for r in calls} == {0, 100}
    paths = {s: [r.module for r in calls if r.step == s and r.module is not None]
             for s in (0, 100)}  # fmt: skip
    assert paths[0] == paths[100]


class Auxiliary(Model):
    """Keeps a part of the loss in an attribute."""

    def forward(self, x: Tensor) -> Tensor:
        self.aux = self.inner(x).square().mean()
        return self.head(torch.relu(self.first(x)))


def test_nothing_rests_once_a_module_hands_out_what_it_does_not_return() -> None:
    torch.manual_seed(0)
    faulty = Faulty(log_of_negative, 25)
    model = Auxiliary(Inner(faulty))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    records: list[Any] = []
    with trace(out=records.append, every=100) as t:
        for step in range(STEPS):
            faulty.step = step
            (model(torch.randn(3, 4)).square().mean() + model.aux).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert not rested(records)
    (found,) = t.findings
    assert (found.step, found.module, found.op) == (25, "inner", "log")
    assert found.evidence["placed"] == "exact"


@pytest.mark.parametrize("how", ["unfrozen", "replaced"])
def test_parameters_that_are_new_in_a_step_at_rest_get_their_hooks(how: str) -> None:
    torch.manual_seed(0)
    faulty = Faulty(root_of_zero, 25)
    model = Model(Inner(faulty))
    linear = model.inner.linear
    if how == "unfrozen":
        model.requires_grad_(False)
        model.head.requires_grad_(True)

    def change(step: int) -> None:
        faulty.step = step
        if step == 23 and how == "unfrozen":
            model.requires_grad_(True)
        elif step == 23:
            linear.weight = nn.Parameter(linear.weight.detach().clone())

    records, findings = train(model, before=change)
    assert {22, 23, 24, 25} <= rested(records)
    (found,) = findings
    assert (found.step, found.code, found.module, found.op) == (25, "TT102", "inner", "sqrt")
    assert found.evidence["placed"] == "exact"


def test_calls_of_which_no_replay_is_possible_are_seen() -> None:
    model = Model()
    records: list[Any] = []
    with trace(out=records.append, every=100) as t:
        for _ in range(STEPS):
            model(torch.randn(3, 4)).square().mean().backward()
            with torch.no_grad():  # an optimizer by hand: at the next gate the weights have moved
                for parameter in model.parameters():
                    assert parameter.grad is not None
                    parameter.sub_(0.01 * parameter.grad)
                    parameter.grad = None
    assert not [f for f in t.findings if f.severity == "error"]
    assert inner_paths(records) == {"", "first", "inner", "inner.linear", "head"}


class Interrupted(Model):
    def forward(self, x: Tensor) -> Tensor:
        self.inner(x)
        raise KeyboardInterrupt


def test_an_interrupt_inside_a_root_hides_no_other_one() -> None:
    torch.manual_seed(0)
    faulty = Faulty(log_of_negative, 27)
    other = Interrupted()

    def interrupt(step: int) -> None:
        faulty.step = step
        if step in (1, 22):
            with contextlib.suppress(KeyboardInterrupt):
                other(torch.randn(3, 4))

    records, findings = train(Model(Inner(faulty)), before=interrupt)
    assert 27 in rested(records)
    (found,) = (f for f in findings if f.severity == "error")
    assert (found.step, found.op, found.evidence["placed"]) == (27, "log", "exact")


def test_what_is_told_when_an_optimizer_has_stepped_is_told_once() -> None:
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with trace(out=[].append, every=1) as t:
        for step in range(6):
            loss = model(torch.randn(3, 4)).square().mean()
            grads = torch.autograd.grad(loss, list(model.parameters()))
            for parameter, grad in zip(model.parameters(), grads, strict=True):
                parameter.grad = grad * torch.nan if step == 3 else grad
            optimizer.step()
            optimizer.zero_grad()
    (found,) = (f for f in t.findings if f.severity == "error")
    assert (found.step, found.code, found.op) == (3, "TT101", "mul")


class Counting(TorchDispatchMode):
    """A mode of the user's that counts the operators that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options", [{}, {"every": 1}, {"level": "op"}, {"every": 1, "level": "op"}]
)
def test_a_dispatch_mode_of_the_users_sees_no_question_of_ours(options: dict[str, Any]) -> None:
    def count(traced: bool) -> int:
        torch.manual_seed(0)
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        tracer = trace(out=[].append, **options) if traced else contextlib.nullcontext()
        with tracer, Counting() as mode:
            for _ in range(24):
                model(torch.ones(3, 4)).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        return mode.count

    assert count(traced=True) == count(traced=False)


@pytest.mark.parametrize("bad_step", [5, 14, 26])
@pytest.mark.parametrize("how", ["written", "taken"])
def test_bad_data_of_a_loop_without_a_loader_is_named_as_data(
    how: str, bad_step: int, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    data = torch.randn(STEPS, 16, 4)
    if how == "taken":
        data[bad_step, 0, 0] = math.nan
    with trace(tmp_path / "log.jsonl") as t:
        for step in range(bad_step + 1):
            x = data[step]
            if how == "written" and step == bad_step:
                x[0, 0] = math.nan
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    errors = [f for f in t.findings if f.severity == "error"]
    assert [(f.code, f.step) for f in errors] == [("TT105", bad_step)]
    engine = Engine()
    lines = (tmp_path / "log.jsonl").read_bytes().splitlines()
    saved = [f for line in lines for f in engine.feed(cast(Record, decode(line)))]
    assert [(f.code, f.step, f.message) for f in saved] == [
        (f.code, f.step, f.message) for f in t.findings
    ]


@pytest.mark.parametrize("at", [5, 28, 43])
def test_gradient_of_such_a_leaf_that_is_clipped_is_placed_inside(at: int) -> None:
    torch.manual_seed(0)
    faulty = Faulty(root_of_zero, at)
    model = Model(Inner(faulty)).requires_grad_(False)
    picture = torch.rand(3, 4, requires_grad=True)
    optimizer = torch.optim.SGD([picture], 0.01)
    with trace(out=lambda record: None, every=100) as t:
        for faulty.step in range(STEPS):
            optimizer.zero_grad()
            model(picture).square().mean().backward()
            nn.utils.clip_grad_norm_([picture], 1.0)
            optimizer.step()
    assert [(f.step, f.code, f.op) for f in t.findings if f.severity == "error"] == [
        (at, "TT102", "sqrt")
    ]


def normalise(p: Tensor) -> None:
    assert p.grad is not None
    p.grad.div_(p.grad.norm())


@pytest.mark.parametrize("clips", [True, False])
@pytest.mark.parametrize("at", [5, 28, 43])
def test_gradient_that_a_hook_spoils_is_not_called_finite(at: int, clips: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(normalise)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    records: list[Any] = []
    with trace(out=records.append, every=100) as t:
        for step in range(STEPS):
            optimizer.zero_grad()
            (model(torch.randn(3, 4)).square() * (step != at)).mean().backward()
            if clips:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    errors = [f for f in t.findings if f.severity == "error"]
    assert [(f.step, f.code, f.param) for f in errors] == [(at, "TT102", "0.weight")]
    assert errors[0].message.startswith("the gradient of 0.weight holds 32 NaN of 32")
    # Nothing more is measured of a thin step in which all is well.
    known = {r.step: r.grad.unmeasured for r in records if isinstance(r, Param) and r.grad}
    assert known[at] is None
    assert known[at - 1] == ("not asked" if clips else None)

"""Thin steps: of a module that is called over and over, some calls are passed over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

from tensortrace import trace
from tensortrace.capture.drafts import CallDraft
from tensortrace.checks import When
from tensortrace.engine import Engine
from tensortrace.records import Call, End, Finding, Step
from tensortrace.step_view import StepView

TIMES = 100
# The first three, then each that makes their number a power of two.
LOOKED_AT = [0, 1, 2, 3, 7, 15, 31, 63]


class Unrolled(nn.Module):
    """A cell that is called `TIMES` times; `spoil` may change its state after a call."""

    def __init__(self, spoil: Callable[[int, torch.Tensor], torch.Tensor] | None = None) -> None:
        super().__init__()
        self.cell, self.head = nn.GRUCell(4, 4), nn.Linear(4, 2)
        self.spoil = spoil

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.zeros(len(x), 4)
        for t in range(TIMES):
            h = self.cell(x, h)
            if self.spoil is not None:
                h = self.spoil(t, h)
        return self.head(h)


def train(
    model: nn.Module, steps: int, before: Callable[[int], None] | None = None, **options: Any
) -> tuple[list[Any], Any]:
    """Trace some steps of which the second and every third after it are thin."""
    records: list[Any] = []
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    torch.manual_seed(1)
    with trace(out=records.append, every=3, **options) as t:
        for step in range(steps):
            if before is not None:
                before(step)
            model(torch.randn(3, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    return records, t


def cell_calls(records: list[Any], step: int, phase: str = "forward") -> list[Call]:
    return [r for r in records if isinstance(r, Call) and r.step == step and r.module == "cell"
            and r.phase == phase]  # fmt: skip


def test_full_steps_have_every_call_and_thin_ones_count_what_they_pass_over() -> None:
    records, _ = train(Unrolled(), 5)
    steps = [r for r in records if isinstance(r, Step)]
    assert [s.full for s in steps] == [True, False, False, True, False]
    assert len(cell_calls(records, 0)) == len(cell_calls(records, 3)) == TIMES
    # Forward and backward of what was looked at, the calls around it, and what was passed over.
    unseen = TIMES - len(LOOKED_AT)
    thin, full = steps[1], steps[3]
    assert thin.records == full.records - 2 * unseen
    assert unseen < thin.dropped < thin.records + unseen
    end = records[-1]
    assert isinstance(end, End)
    assert end.thinned == sum(s.dropped for s in steps)


def test_modules_are_in_the_step_line_whether_full_or_thin() -> None:
    records, _ = train(Unrolled(), 2)
    full, thin = (r for r in records if isinstance(r, Step))
    assert thin.modules.path == full.modules.path
    assert None not in thin.modules.output_rms
    assert [x is None for x in thin.modules.param_grad_rms] == [
        x is None for x in full.modules.param_grad_rms
    ]


def test_results_are_the_same_to_the_bit() -> None:
    def weights(traced: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = Unrolled()
        if traced:
            train(model, 4)
            return list(model.parameters())
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        torch.manual_seed(1)
        for _ in range(4):
            model(torch.randn(3, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        return list(model.parameters())

    assert all(map(torch.equal, weights(True), weights(False)))


def test_a_nan_between_two_looks_is_traced_to_its_op_and_line() -> None:
    on = False

    def spoil(t: int, h: torch.Tensor) -> torch.Tensor:
        return torch.log(h - 5).detach() + h if on and t == 41 else h

    def switch(step: int) -> None:
        nonlocal on
        on = step == 4

    _, t = train(Unrolled(spoil), 6, switch)
    first = t.findings[0]
    assert (first.step, first.code, first.op) == (4, "TT101", "log")
    assert first.location is not None and "torch.log(h - 5)" in (first.location.code or "")


def test_calls_of_a_thin_step_that_has_a_finding_keep_their_number() -> None:
    on = False

    def spoil(t: int, h: torch.Tensor) -> torch.Tensor:
        return h * float("nan") if on and t == 41 else h

    def switch(step: int) -> None:
        nonlocal on
        on = step == 4

    records, _ = train(Unrolled(spoil), 5, switch)
    assert [c.nth for c in cell_calls(records, 4) if not c.replay] == LOOKED_AT


def test_a_call_that_was_passed_over_and_raises_is_recorded() -> None:
    class Failing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.steps = nn.Linear(4, 4), 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.steps += 1
            for t in range(TIMES):
                x = self.inner(x if self.steps < 3 or t < 50 else x[:, :3])
            return x

    records: list[Any] = []
    model = Failing()
    optimizer = torch.optim.SGD(model.parameters(), 1e-4)
    with pytest.raises(RuntimeError), trace(out=records.append, every=5):
        for _ in range(3):
            model(torch.randn(2, 4)).mean().backward()
            optimizer.step()
    failed = [r for r in records if isinstance(r, Call) and r.exception and r.module == "inner"]
    assert [(c.step, c.nth) for c in failed] == [(2, 50)]
    shapes = [t.shape for r in records if isinstance(r, Call) for t in r.tensors]
    assert (2, 3) in shapes


def test_a_module_that_calls_itself_is_seen_at_every_call() -> None:
    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: torch.Tensor, depth: int) -> torch.Tensor:
            return self.layer(x) if depth == 0 else self(x, depth - 1) * 0.5

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Recursive()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x, 12)

    records, _ = train(Holder(), 6)
    full, thin = (next(r for r in records if isinstance(r, Step) and r.step == n) for n in (3, 4))
    assert thin.records == full.records


def test_op_level_passes_nothing_over(tmp_path: Path) -> None:
    records, _ = train(Unrolled(), 5, level="op")
    full, thin = (next(r for r in records if isinstance(r, Step) and r.step == n) for n in (3, 4))
    assert thin.records == pytest.approx(full.records, abs=10)
    assert full.records > 10 * TIMES


def test_records_of_a_thin_step_are_finished_only_if_somebody_looks() -> None:
    finished: list[int] = []
    real = CallDraft.record

    def counting(draft: CallDraft) -> Call:
        finished.append(draft.step)
        return real(draft)

    def spoil(step: int) -> None:
        if step == 34:
            with torch.no_grad():
                model.head.weight[0, 0] = torch.nan

    model = Unrolled()
    with patch.object(CallDraft, "record", counting):
        records, t = train(model, 36, spoil, checks="TT1")
    # Every third is full, one in ten is looked at, and from 34 on there is a NaN.
    assert set(finished) == {*range(20), *range(21, 36, 3), 20, 30, 34, 35}
    assert [f.step for f in t.findings] == [34]
    assert {r.step for r in records if isinstance(r, Call)} >= {33, 34}
    columns = [r.modules for r in records if isinstance(r, Step)]
    assert all(c.path == columns[0].path and all(c.grad_rms) for c in columns[:34])
    assert [c.flags[c.path.index("head")] for c in columns[33:35]] == ["", "nogf"]


def test_checks_are_shown_all_of_a_step_that_begins_with_an_infinity() -> None:
    shown: dict[int, int] = {}
    real = Engine._run

    def watching(engine: Engine, step: StepView, *when: When) -> list[Finding]:
        shown[step.number] = len(step.calls)
        return real(engine, step, *when)

    model, zeros = nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.zeros(3, 4)
    with patch.object(Engine, "_run", watching), trace(out=[].append, every=3) as t:
        for step in range(26):
            t.step()
            if step >= 24:
                zeros.log() if step == 25 else zeros.exp()
            model(zeros)
    assert shown[25] == 0  # quiet
    assert shown[26] == 4  # the log, and the three calls after it


@pytest.mark.parametrize("step_of_fault", [20, 24])
def test_clipping_by_a_norm_that_is_not_finite_explains_the_steps_after_it(
    step_of_fault: int,
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with trace(out=[].append) as t:
        for step in range(step_of_fault + 3):
            y = model(torch.randn(3, 4))
            loss = (y * 0 if step == step_of_fault else y).sum()
            (loss.sqrt() if step == step_of_fault else loss).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    errors = [f for f in t.findings if f.severity == "error"]
    assert [(f.code, f.step) for f in errors] == [("TT102", step_of_fault)]
